"""Phrases embedded ahead, so that the text encoders are gone before the U-Net is there; and what needs them says so."""

import re

import diffusers
import numpy as np
import pytest
import torch
from helpers.tiny import grounded, sd_pipeline, sdxl_pipeline
from safetensors.torch import load_file, save_file

from gligen_xl import Layout, StableDiffusionGLIGENPipeline, StableDiffusionXLGLIGENPipeline
from gligen_xl.pipelines.export import export_pipeline

PHRASES, BOXES = ["a red circle", "a blue star of the sea"], [[0.1, 0.1, 0.5, 0.5], [0.6, 0.4, 0.9, 0.8]]
LISTS = {"gligen_phrases": [PHRASES, ["a ring"]], "gligen_boxes": [BOXES, [[0.2, 0.2, 0.7, 0.9]]]}
both = pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
CPU = torch.device("cpu")


def draw(pipeline, prompt="an image of grass", **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "width": 16, "height": 16}
    settings |= {"gligen_scheduled_sampling_beta": 1.0, "generator": torch.Generator().manual_seed(3)}
    return pipeline(prompt, **(settings | kwargs)).images


def prompt_embeds(pipeline, prompt="an image of grass"):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return dict(zip(names, pipeline.encode_prompt(prompt, **given), strict=False))


@pytest.fixture(scope="module", params=[sdxl_pipeline, sd_pipeline], ids=["xl", "sd"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    grounded(request.param()).save_pretrained(folder)
    kind = StableDiffusionXLGLIGENPipeline if request.param is sdxl_pipeline else StableDiffusionGLIGENPipeline
    return folder, kind


def test_in_two_stages_encoders_alone_and_then_without_them(folder, tmp_path):
    """The recipe of docs/generate.md, with embeddings that were on the disk between."""
    path, kind = folder
    xl = kind is StableDiffusionXLGLIGENPipeline
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    expected = draw(kind.from_pretrained(path), **layout)

    first = kind.from_pretrained(path, unet=None, vae=None)
    assert first.unet is None
    embeds = prompt_embeds(first) | {"gligen_phrase_embeds": first.encode_gligen_phrases(PHRASES)}
    save_file({name: value.contiguous() for name, value in embeds.items()}, tmp_path / "embeds.safetensors")
    del first

    encoders = {"text_encoder": None, "tokenizer": None}
    encoders |= {"text_encoder_2": None, "tokenizer_2": None} if xl else {}
    second = kind.from_pretrained(path, **encoders)
    loaded = load_file(tmp_path / "embeds.safetensors")
    assert torch.equal(draw(second, None, gligen_boxes=BOXES, **loaded), expected)


@both
def test_what_is_returned_has_the_nesting_of_what_was_given(make):
    pipeline = grounded(make())
    width = pipeline.unet.position_net.null_positive_feature.shape[0]
    flat = pipeline.encode_gligen_phrases(PHRASES)
    assert flat.shape == (2, width)
    assert not flat.requires_grad
    nested = pipeline.encode_gligen_phrases(LISTS["gligen_phrases"])
    assert [tuple(rows.shape) for rows in nested] == [(2, width), (1, width)]
    torch.testing.assert_close(nested[0], flat)
    layouts = [Layout(prompt="a", phrases=PHRASES, boxes=BOXES), Layout(prompt="b")]
    assert [tuple(rows.shape) for rows in pipeline.encode_gligen_phrases(layouts)] == [(2, width), (0, width)]
    assert torch.equal(pipeline.encode_gligen_phrases(layouts[0]), flat)


@both
def test_embeddings_give_the_latents_of_their_phrases(make):
    pipeline = grounded(make())
    two = ["grass", "sand"]
    expected = draw(pipeline, two, **LISTS)
    embeds = pipeline.encode_gligen_phrases(LISTS["gligen_phrases"])
    boxes = LISTS["gligen_boxes"]
    assert torch.equal(draw(pipeline, two, gligen_phrase_embeds=embeds, gligen_boxes=boxes), expected)
    assert torch.equal(draw(pipeline, two, gligen_phrase_embeds=tuple(embeds), gligen_boxes=boxes), expected)
    arrays = [rows.numpy() for rows in embeds]
    assert torch.equal(draw(pipeline, two, gligen_phrase_embeds=arrays, gligen_boxes=boxes), expected)
    for repeated in (1, 2):
        given = {"num_images_per_prompt": repeated, "gligen_boxes": BOXES}
        flat = draw(pipeline, two, gligen_phrases=PHRASES, **given)
        rows = pipeline.encode_gligen_phrases(PHRASES)
        assert torch.equal(draw(pipeline, two, gligen_phrase_embeds=rows, **given), flat)
    stacked = torch.stack([pipeline.encode_gligen_phrases(PHRASES)] * 2)
    got = draw(pipeline, two, gligen_phrase_embeds=stacked, gligen_boxes=[BOXES] * 2)
    assert torch.equal(got, draw(pipeline, two, gligen_phrases=[PHRASES] * 2, gligen_boxes=[BOXES] * 2))


@both
def test_layouts_with_embeddings_ask_no_encoder(make, monkeypatch):
    pipeline = grounded(make())
    layouts = [Layout(prompt="grass", phrases=PHRASES, boxes=BOXES), Layout(prompt="sand", phrases=[], boxes=[])]
    expected = draw(pipeline, None, gligen_layouts=layouts)
    embeds = pipeline.encode_gligen_phrases(layouts)
    monkeypatch.setattr("gligen_xl.pipelines.encoders.embed_phrases", lambda *_, **__: pytest.fail("encoded"))
    assert torch.equal(draw(pipeline, None, gligen_layouts=layouts, gligen_phrase_embeds=embeds), expected)


@both
def test_embeddings_of_another_type_are_moved(make):
    pipeline = grounded(make())
    embeds = pipeline.encode_gligen_phrases(PHRASES)
    expected = draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES)
    assert torch.equal(draw(pipeline, gligen_phrase_embeds=embeds.double(), gligen_boxes=BOXES), expected)
    half = draw(pipeline, gligen_phrase_embeds=embeds.half(), gligen_boxes=BOXES)
    assert half.dtype == expected.dtype
    torch.testing.assert_close(half, expected, atol=0.1, rtol=0.1)


def test_a_lora_of_the_text_encoders_is_at_the_scale_asked_for():
    from peft import LoraConfig

    pipeline = grounded(sdxl_pipeline())
    torch.manual_seed(1)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    call = {"gligen_boxes": BOXES, "cross_attention_kwargs": {"scale": 0.5}}
    expected = draw(pipeline, gligen_phrases=PHRASES, **call)
    embeds = pipeline.encode_gligen_phrases(PHRASES, lora_scale=0.5)
    assert torch.equal(draw(pipeline, gligen_phrase_embeds=embeds, **call), expected)
    assert not torch.equal(embeds, pipeline.encode_gligen_phrases(PHRASES))


@both
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda rows: {"gligen_phrase_embeds": rows, "gligen_phrases": PHRASES}, "replace gligen_phrases"),
        (
            lambda rows: {"gligen_phrase_embeds": rows, "gligen_boxes": None},
            "gligen_phrase_embeds without gligen_boxes",
        ),
        (
            lambda rows: {"gligen_phrase_embeds": rows[:1]},
            r"of shape \(1, \d+\) for 2 boxes; expected \(2, phrase_dim\)",
        ),
        (lambda rows: {"gligen_phrase_embeds": rows[:, :-1]}, r"of width \d+, the adapter reads \d+"),
        (lambda rows: {"gligen_phrase_embeds": rows / 0}, "not finite"),
        (lambda rows: {"gligen_phrase_embeds": rows.long()}, "of torch.int64; expected a tensor"),
        (lambda rows: {"gligen_phrase_embeds": "a ring"}, "is a str; expected a tensor"),
        (lambda rows: {"gligen_phrase_embeds": [rows, rows]}, "gligen_boxes must nest alike"),
        (lambda rows: {"gligen_phrase_embeds": [rows], "gligen_boxes": [BOXES, BOXES]}, "for 1 images"),
        (lambda rows: {"gligen_phrase_embeds": [rows] * 3, "gligen_boxes": [BOXES] * 3}, "3 layouts for 1 prompts"),
        (lambda rows: {"gligen_phrase_embeds": [rows[0]], "gligen_boxes": [BOXES]}, r"layout 0: .*of shape \(\d+,\)"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_before_anything_runs(make, given, says, monkeypatch):
    pipeline = grounded(make())
    rows = pipeline.encode_gligen_phrases(PHRASES)
    monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("the U-Net ran"))
    with pytest.raises(ValueError, match=says):
        draw(pipeline, **({"gligen_boxes": BOXES} | given(rows)))


# Encoders that are gone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freed", [["text_encoder"], ["text_encoder_2"], ["tokenizer"], ["text_encoder", "tokenizer"]])
def test_half_of_the_encoders_freed_is_said_by_name(freed):
    pipeline = grounded(sdxl_pipeline())
    embeds, rows = prompt_embeds(pipeline), pipeline.encode_gligen_phrases(PHRASES)
    expected = draw(pipeline, None, **embeds, gligen_phrase_embeds=rows, gligen_boxes=BOXES)
    for name in freed:
        setattr(pipeline, name, None)
    encoder = freed[0].replace("tokenizer", "text_encoder")
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    with pytest.raises(ValueError, match=f"the prompt needs {encoder}, which .*without; give prompt_embeds"):
        draw(pipeline)
    with pytest.raises(ValueError, match=f"phrases need {encoder}, which .* gligen_phrase_embeds"):
        draw(pipeline, None, **embeds, **layout)
    with pytest.raises(ValueError, match=f"phrases need {encoder}, which"):
        pipeline.encode_gligen_phrases(PHRASES)
    negative = embeds.pop("negative_prompt_embeds"), embeds.pop("negative_pooled_prompt_embeds")
    with pytest.raises(ValueError, match=f"the negative prompt needs {encoder}"):
        draw(pipeline, None, negative_prompt="a ring", **embeds)
    embeds |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), negative, strict=True))
    got = draw(pipeline, None, **embeds, gligen_phrase_embeds=rows, gligen_boxes=BOXES)
    assert torch.equal(got, expected)


def test_all_of_them_freed_in_either_family(folder):
    path, kind = folder
    names = ["text_encoder", "tokenizer"]
    names += ["text_encoder_2", "tokenizer_2"] if kind is StableDiffusionXLGLIGENPipeline else []
    pipeline = kind.from_pretrained(path, **dict.fromkeys(names))
    with pytest.raises(ValueError, match=r"the prompt needs text_encoder.* which this pipeline is without"):
        draw(pipeline)
    with pytest.raises(ValueError, match="phrases need text_encoder"):
        pipeline.encode_gligen_phrases(PHRASES)


def test_an_encoder_that_alone_gives_the_whole_width_is_enough():
    """As SDXL's refiner, which is made without the first."""
    from helpers.tiny import CLIPTextModelWithProjection, sdxl_unet, text_config

    pipeline = sdxl_pipeline()
    unet = sdxl_unet(cross_attention_dim=16)
    encoder = CLIPTextModelWithProjection(text_config(16, 16)).eval()
    parts = pipeline.components | {"unet": unet, "text_encoder": None, "tokenizer": None, "text_encoder_2": encoder}
    refiner = grounded(StableDiffusionXLGLIGENPipeline(**parts, add_watermarker=False))
    assert draw(refiner, gligen_phrases=PHRASES, gligen_boxes=BOXES).isfinite().all()


@both
def test_other_parts_that_are_gone(make):
    pipeline = grounded(make())
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    vae, pipeline.vae = pipeline.vae, None
    with pytest.raises(ValueError, match="without its vae; load it, or ask for output_type='latent'"):
        draw(pipeline, output_type="pil", **layout)
    pipeline.vae = vae
    pipeline.unet = None
    with pytest.raises(ValueError, match="without its unet"):
        draw(pipeline, **layout)


@pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
def test_an_exported_folder_takes_them_too(make, tmp_path):
    pipeline = grounded(make())
    export_pipeline(pipeline, tmp_path / "exported")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    expected = draw(loaded, **layout)
    rows, words = loaded.encode_gligen_phrases(PHRASES), prompt_embeds(loaded)
    torch.testing.assert_close(rows, pipeline.encode_gligen_phrases(PHRASES), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="replace gligen_phrases"):
        draw(loaded, gligen_phrase_embeds=rows, **layout)
    with pytest.raises(ValueError, match=re.escape(f"expected (n, {rows.shape[1]})")):
        draw(loaded, gligen_phrase_embeds=rows[:, 1:], gligen_boxes=BOXES)
    with pytest.raises(ValueError, match="one box per phrase"):
        draw(loaded, gligen_phrase_embeds=rows[:1], gligen_boxes=BOXES)
    loaded.text_encoder = None
    with pytest.raises(ValueError, match="phrases need text_encoder and its tokenizer"):
        draw(loaded, None, **words, **layout)
    assert torch.equal(draw(loaded, None, **words, gligen_phrase_embeds=rows, gligen_boxes=BOXES), expected)
    assert np.isfinite(expected.numpy()).all()
