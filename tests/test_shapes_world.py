"""The shapes world: scenes follow from seeds, boxes enclose what is drawn, captions say what is there."""

import numpy as np
import pytest
from PIL import Image

from gligen_xl.layout import box_iou
from gligen_xl.toyworld.layouts import held_out_layouts
from gligen_xl.toyworld.model import MAX_TOKENS, new_tokenizer
from gligen_xl.toyworld.text import attributes
from gligen_xl.toyworld.world import (
    COLOURS,
    HELD_OUT_SEED,
    PLACES,
    SHAPES,
    Object,
    Scene,
    draw,
    sample_scene,
    scene_layout,
    vocabulary,
)


def test_a_scene_is_a_function_of_seed_and_index():
    assert sample_scene(3, 7) == sample_scene(3, 7)
    assert len({sample_scene(3, k) for k in range(50)} | {sample_scene(4, k) for k in range(50)}) == 100
    assert np.array_equal(np.asarray(draw(sample_scene(3, 7))), np.asarray(draw(sample_scene(3, 7))))


def test_scenes_are_what_they_promise():
    scenes = [sample_scene(0, k) for k in range(500)]
    counts = np.bincount([len(scene.objects) for scene in scenes])
    assert counts[0] == 0
    assert (counts[1:] > 40).all()
    for scene in scenes:
        boxes = np.array([item.box for item in scene.objects])
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        overlap = box_iou(boxes, boxes) - np.eye(len(boxes))
        assert overlap.max() < 0.1
        colours = [item.colour for item in scene.objects]
        assert len(set(colours)) == len(colours)
    assert 0.4 < np.mean([scene.horizon is not None for scene in scenes]) < 0.6
    with pytest.raises(ValueError, match="num_objects is 5"):
        sample_scene(0, 0, num_objects=5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_encloses_its_shape_exactly(shape):
    box = (0.25, 0.125, 0.75, 0.625)
    empty = Scene(background="grass", horizon=None, objects=(), texture_seed=1)
    drawn = Scene(background="grass", horizon=None, objects=(Object("red", shape, box),), texture_seed=1)
    changed = (np.asarray(draw(empty)) != np.asarray(draw(drawn))).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (16, 8, 48, 40)


def test_captions_say_everything_once_and_places_only_when_asked():
    for index in range(200):
        scene = sample_scene(1, index)
        for places in (False, True):
            layout = scene_layout(scene, seed=1, index=index, places=places)
            background, shapes, said = attributes(layout.prompt)
            assert background >= 0
            wanted = {item.colour: item.shape for item in scene.objects}
            for k, colour in enumerate(COLOURS):
                assert shapes[k] == (1 + SHAPES.index(wanted[colour]) if colour in wanted else 0)
                assert bool(said[k]) == (places and colour in wanted)
            assert list(layout.phrases) == [item.phrase for item in scene.objects]


def test_evaluation_captions_never_say_where_things_are():
    layouts = held_out_layouts(256)
    assert len({layout.id for layout in layouts}) == 256
    assert all(str(HELD_OUT_SEED) in str(layout.id) for layout in layouts)
    for layout in layouts:
        assert not any(words in layout.prompt for words in PLACES.values())
        assert not {"left", "right", "top", "bottom", "middle", "small", "large"} & set(layout.prompt.split())
    assert {len(layout.boxes) for layout in layouts} == {1, 2, 3, 4}


def test_words_come_back_from_their_tokens_and_evaluation_captions_fit(tmp_path):
    tokenizer = new_tokenizer(tmp_path)
    for word in vocabulary():
        assert tokenizer.decode(tokenizer(word).input_ids, skip_special_tokens=True).strip() == word
    lengths = [len(tokenizer(layout.prompt).input_ids) for layout in held_out_layouts(256)]
    assert max(lengths) <= MAX_TOKENS
    unknown = tokenizer("a dachshund, 3 of them!").input_ids
    assert tokenizer.unk_token_id not in unknown[1:-1]


def test_images_are_pil():
    image = draw(sample_scene(0, 0), size=128)
    assert isinstance(image, Image.Image)
    assert image.size == (128, 128)
