"""Layouts: what is refused and how, files, geometry."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gligen_xl import Layout
from gligen_xl.layout import box_iou, read_layouts, validate, write_layouts, xyxy_from_cxcywh, xyxy_from_xywh

BOX = [0.1, 0.2, 0.5, 0.6]
shares = st.floats(0, 1)
boxes = st.tuples(shares, shares, shares, shares).filter(lambda b: b[0] < b[2] and b[1] < b[3])


@pytest.mark.parametrize(
    ("phrases", "given_boxes", "says"),
    [
        (["a", "b"], [BOX], "2 phrases but 1 boxes"),
        ("a dog", [BOX], r"expected a list of strings: \['a dog'\]"),
        (["a"], BOX, "one bare box"),
        (["a"], [[10, 20, 300, 400]], "looks like pixels"),
        (["a"], [[0.1, 0.2, 0.5]], "of 3 items"),
        (["a"], [[0.5, 0.2, 0.1, 0.6]], "reversed"),
        (["a"], [[0.1, 0.2, 0.1, 0.6]], "empty"),
        (["a"], [[float("nan"), 0, 1, 1]], "finite"),
        (["a"], [[-0.2, 0, 1, 1]], "outside the image"),
        (["a"], [[0, 0, 1, 1.2]], "outside the image"),
        (["a"], [["0", 0, 1, 1]], "four numbers"),
        (["a"], [[True, 0, 1, 1]], "four numbers"),
        (["  "], [BOX], r"phrases\[0\] is empty"),
        ([3], [BOX], r"phrases\[0\] is 3"),
        (["a"], "box", "expected a list of"),
        (["a"], [None], r"boxes\[0\] is None"),
    ],
)
def test_wrong_layouts_are_refused_with_what_was_got(phrases, given_boxes, says):
    with pytest.raises(ValueError, match=says):
        Layout(phrases=phrases, boxes=given_boxes)


def test_a_box_beyond_the_edge_by_rounding_is_clipped():
    assert Layout(phrases=["a"], boxes=[[-0.001, 0, 1.001, 1]]).boxes == ((0.0, 0.0, 1.0, 1.0),)


def test_arrays_are_boxes_too():
    assert validate(["a"], np.array([BOX], np.float64))[1] == (tuple(BOX),)


@pytest.mark.parametrize("name", ["width", "height", "seed"])
def test_settings_of_the_wrong_kind_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Layout(**{name: "12"})
    with pytest.raises(ValueError, match=name):
        Layout(**{name: -1})


@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), boxes), max_size=5), st.text())
def test_a_layout_survives_its_json(pairs, prompt):
    layout = Layout(prompt=prompt, phrases=[p for p, _ in pairs], boxes=[b for _, b in pairs], seed=3)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_files_of_layouts(tmp_path):
    layouts = [Layout(prompt="a", id="x"), Layout(prompt="ü b", phrases=["c"], boxes=[BOX], width=512)]
    write_layouts(tmp_path / "many.jsonl", layouts)
    assert read_layouts(tmp_path / "many.jsonl") == layouts
    (tmp_path / "one.json").write_text(json.dumps(layouts[1].to_dict(), indent=2))
    assert read_layouts(tmp_path / "one.json") == layouts[1:]
    (tmp_path / "list.json").write_text(json.dumps([layout.to_dict() for layout in layouts]))
    assert read_layouts(tmp_path / "list.json") == layouts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2"),
        ('{"prompt": "a"}\n{"promt": "b"}', r"line 2: unknown keys \['promt'\]"),
        ('{"prompt": "a", ', "neither JSON nor JSONL"),
        ("[1]", "item 0"),
        ("", "holds no layouts"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, text, says):
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_layouts(tmp_path / "broken.jsonl")
    assert "broken.jsonl" in str(error.value)


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no layout file"):
        read_layouts(tmp_path / "none.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not a text file"):
        read_layouts(tmp_path / "picture.json")


@given(boxes)
def test_conventions_convert_to_corners(box):
    x0, y0, x1, y1 = box
    corners = np.array(box)
    np.testing.assert_allclose(xyxy_from_xywh(np.array([x0, y0, x1 - x0, y1 - y0])), corners, atol=1e-12)
    centred = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    np.testing.assert_allclose(xyxy_from_cxcywh(centred), corners, atol=1e-12)


def test_box_iou_on_counted_pixels():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 20, (30, 4))
    made = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    made[:, 2:] += 1
    canvas = np.zeros((len(made), 22, 22), bool)
    for k, (x0, y0, x1, y1) in enumerate(made):
        canvas[k, y0:y1, x0:x1] = True
    flat = canvas.reshape(len(made), -1)
    expected = (flat[:, None] & flat).sum(-1) / (flat[:, None] | flat).sum(-1)
    np.testing.assert_allclose(box_iou(made, made), expected)
    assert box_iou(made, np.empty((0, 4))).shape == (30, 0)


def test_prompts_may_hold_any_line_end_but_the_newline(tmp_path):
    layouts = [Layout(prompt=f"grass{end}sand") for end in ("\u2028", "\u2029", "\x85", "\r", "\x0b", "\n")]
    write_layouts(tmp_path / "layouts.jsonl", layouts)
    assert read_layouts(tmp_path / "layouts.jsonl") == layouts


def test_a_number_beyond_floats_is_refused():
    with pytest.raises(ValueError, match="expected four numbers"):
        Layout(phrases=["a dog"], boxes=[[0, 0, 1, 10**400]])
