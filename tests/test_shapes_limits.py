"""The embedded model says what it does not know and cannot draw; a call in its own words says nothing."""

import warnings

import pytest
import torch
from helpers.tiny import grounded, sdxl_pipeline

from gligen_xl import StableDiffusionXLGLIGENImg2ImgPipeline
from gligen_xl.toyworld.world import HELD_OUT_SEED, sample_scene, scene_layout

PHRASES, BOXES = ["a red circle"], [[0.1, 0.1, 0.5, 0.5]]


def draw(pipeline, prompt="grass with a red circle", **kwargs):
    """Latents, and the warnings on the way, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        settings = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        images = pipeline(prompt, **(settings | kwargs)).images
    return images, [str(one.message) for one in caught if "embedded model" in str(one.message)]


def test_its_own_words_at_its_own_size_say_nothing(shapes_pipeline):
    for places in (False, True):
        for index in range(40):
            layout = scene_layout(sample_scene(HELD_OUT_SEED, index), index=index, places=places)
            given = {"gligen_phrases": list(layout.phrases), "gligen_boxes": list(layout.boxes)}
            if index > 2:  # the words of all, the model for a few
                given["gligen_phrases"] = given["gligen_boxes"] = None
                from gligen_xl.pipelines.layouts import ImageLayout
                from gligen_xl.toyworld.limits import check_limits

                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    check_limits(
                        shapes_pipeline,
                        {"prompt": layout.prompt},
                        [ImageLayout(layout.boxes, tuple(layout.phrases))],
                    )
            else:
                assert draw(shapes_pipeline, layout.prompt, **given)[1] == []
    assert draw(shapes_pipeline, "Grass, with a Red circle.", width=64, height=64)[1] == []


@pytest.mark.parametrize(
    ("given", "unknown"),
    [
        ({"prompt": "a purple elephant"}, "'elephant'"),
        ({"gligen_phrases": ["a dog"], "gligen_boxes": BOXES}, "'dog'"),
        ({"negative_prompt": "blurry circles, red"}, "'blurry', 'circles'"),
        ({"prompt_2": "a photo of grass"}, "'photo'"),
        ({"negative_prompt_2": "ugly"}, "'ugly'"),
        ({"prompt": ["sand", "a cat", "a cat and a dog"]}, "'cat', 'dog'"),
        ({"prompt": "红色的圆"}, "'红色的圆'"),
        ({"prompt": "3 red stars"}, "'3', 'stars'"),
    ],
)
def test_words_that_it_does_not_know(shapes_pipeline, given, unknown):
    _, said = draw(shapes_pipeline, **given)
    (one,) = said
    assert one.startswith(f"the embedded model does not know {unknown}; it knows circle, square, triangle, star")
    assert "\n" not in one
    for known in ("red", "purple", "grass", "snow", "at the top left"):
        assert known in one


def test_the_warning_is_of_the_callers_line(shapes_pipeline):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shapes_pipeline("an elephant", num_inference_steps=1, output_type="latent")
    assert [one.filename for one in caught if "elephant" in str(one.message)] == [__file__]


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (512, None), (None, 104), (96, 128)])
def test_sizes_that_it_cannot_draw_are_refused(shapes_pipeline, monkeypatch, width, height):
    monkeypatch.setattr(shapes_pipeline.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    asked = f"{width or 64} x {height or 64}"
    with pytest.raises(ValueError, match=f"cannot draw {asked}: it was trained at 64 x 64") as error:
        shapes_pipeline("grass", width=width, height=height)
    assert "\n" not in str(error.value)


def test_a_large_image_to_start_from_is_refused_too(shapes_pipeline):
    from PIL import Image

    pipeline = StableDiffusionXLGLIGENImg2ImgPipeline.from_pipe(shapes_pipeline)
    with pytest.raises(ValueError, match="cannot draw 512 x 256"):
        pipeline("grass", image=Image.new("RGB", (512, 256)))


def test_other_sizes_are_drawn_with_a_warning(shapes_pipeline):
    _, said = draw(shapes_pipeline, width=96, height=64)
    assert said == [
        "the embedded model was trained at 64 x 64; at 96 x 64 objects are less true to their shapes and boxes"
    ]


def test_boxes_smaller_than_any_object_that_it_has_seen(shapes_pipeline):
    small = [[0.1, 0.6, 0.3, 0.8]]
    _, said = draw(shapes_pipeline, gligen_phrases=PHRASES, gligen_boxes=small)
    assert said == [
        "the embedded model draws no object smaller than about 0.3 of the image's side; the box "
        "(0.1, 0.6, 0.3, 0.8) is smaller"
    ]
    _, said = draw(shapes_pipeline, gligen_phrases=PHRASES * 2, gligen_boxes=[*small, [0.5, 0.5, 0.9, 0.6]])
    assert said[0].endswith("the box (0.1, 0.6, 0.3, 0.8) and 1 more are smaller")


def test_other_models_know_all_words_and_sizes():
    pipeline = grounded(sdxl_pipeline())
    pipeline.set_progress_bar_config(disable=True)
    small = {"gligen_phrases": ["an elephant"], "gligen_boxes": [[0.1, 0.1, 0.2, 0.2]]}
    assert draw(pipeline, "a purple elephant", width=104, height=16, **small)[1] == []


def test_objects_beyond_the_slots_are_named(shapes_pipeline):
    phrases = [f"a red {shape}" for shape in ("circle", "square", "triangle", "star", "ring", "cross")]
    phrases += ["a blue circle", "a pink ring"]
    with pytest.warns(UserWarning, match=r"8 objects, the adapter 6 slots; the first 6 are kept, without 'a blue circ"):
        draw_all(shapes_pipeline, phrases)
    with pytest.raises(ValueError, match="8 objects, the adapter 6 slots; leave some out"):
        draw_all(shapes_pipeline, phrases, strict=True)


def draw_all(pipeline, phrases, **given):
    boxes = [[0.1, 0.1, 0.5, 0.5]] * len(phrases)
    pipeline("grass", gligen_phrases=phrases, gligen_boxes=boxes, num_inference_steps=1, output_type="latent", **given)


def test_a_phrase_that_the_tokenizer_cuts_is_named(shapes_pipeline):
    long = "a red circle " * 30
    with pytest.warns(UserWarning, match=r"the phrase 'a red circle a red .*is longer than 48 tokens"):
        draw_all(shapes_pipeline, [long])
