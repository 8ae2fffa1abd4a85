"""Images for people: boxes lie where they should, small images are enlarged, nothing is drawn into the original."""

import json

import numpy as np
import pytest
from PIL import Image

from gligen_xl import Layout
from gligen_xl.images.draw import METADATA_KEY, draw_boxes, enlarged, grid, png_metadata


def test_boxes_are_drawn_where_they_are_on_a_copy():
    image = Image.new("RGB", (640, 320), "gray")
    layout = Layout(phrases=["a dog"], boxes=[[0.25, 0.5, 0.75, 0.9]])
    drawn = np.asarray(draw_boxes(image, layout)) != 128
    assert not (np.asarray(image) != 128).any()
    changed = drawn.any(-1)
    assert changed.shape == (320, 640)
    columns = np.flatnonzero(changed.any(0))
    assert abs(columns[0] - 160) <= 2
    assert abs(columns[-1] - 479) <= 2
    assert np.flatnonzero(changed.any(1))[-1] in range(285, 290)
    assert not changed[180:280, 180:460].any()  # the inside stays free


def test_small_images_are_enlarged_by_whole_numbers():
    assert enlarged(Image.new("RGB", (64, 64))).size == (256, 256)
    assert enlarged(Image.new("RGB", (100, 300))).size == (300, 900)
    assert enlarged(Image.new("RGB", (512, 300))).size == (512, 300)


def test_labels_stay_inside():
    image = Image.new("RGB", (256, 256), "gray")
    layout = Layout(phrases=["a phrase of some length", "b"], boxes=[[0.9, 0, 1, 0.1], [0, 0.9, 0.1, 1]])
    assert draw_boxes(image, layout).size == (256, 256)


def test_grids():
    small, large = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 40), "blue")
    made = np.asarray(grid([[small, large], [large]], gap=4))
    assert made.shape[:2] == (4 + 2 * 44, 4 + 2 * 34)
    assert (made[4:24, 4:14] == (255, 0, 0)).all()
    titled = grid([[large], [small]], columns=["one"], captions=["a caption that is far too long for it", "b"])
    assert titled.height > 2 * 40 + 3 * 8
    with pytest.raises(ValueError, match="at least one image"):
        grid([])


def test_an_image_says_how_it_was_made(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=png_metadata({"seed": 3, "prompt": "Grün"}))
    with Image.open(tmp_path / "a.png") as image:
        about = json.loads(image.text[METADATA_KEY])
    assert about["seed"] == 3
    assert about["prompt"] == "Grün"
    assert {"gligen-xl", "torch", "python"} <= about["versions"].keys()


def test_the_thinnest_boxes_can_be_drawn():
    for side in (64, 512, 1024):
        image = Image.new("RGB", (side, side), "gray")
        draw_boxes(image, Layout(phrases=["a", "b"], boxes=[[0.5, 0, 0.5001, 1], [0, 0.3, 1, 0.3001]]))
