"""Parts of the objects: each object is in one part of a grouping, where its box, phrase and image say."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gligen_xl import Layout
from gligen_xl.detect.detection import Detection, Query
from gligen_xl.detect.matching import ObjectScore, score_image
from gligen_xl.evaluate.metrics import summarize
from gligen_xl.evaluate.slices import (
    METRICS,
    POSITIONS,
    SIZE_EDGES,
    frequency_name,
    objects_name,
    plain_phrase,
    position_name,
    size_name,
    slices,
)
from gligen_xl.toyworld.detectors import ShapesDetector

MISSED = ObjectScore(0.0, {"colour": False, "shape": False})
SMALL, LARGE = (0.0, 0.0, 0.1, 0.1), (0.4, 0.4, 1.0, 1.0)
LAYOUTS = [
    Layout(phrases=["a red circle", "a blue square"], boxes=[SMALL, LARGE], id="a"),
    Layout(phrases=["A  red circle"], boxes=[SMALL], id="b"),
    Layout(phrases=["a red star"], boxes=[LARGE], id="c"),
]


def scored(layouts=LAYOUTS):
    """Red circles are found, nothing else is."""
    detector = ShapesDetector()
    found = [
        [
            Detection(box, "red circle", 1.0, {"colour": "red", "shape": "circle"})
            for phrase, box in zip(layout.phrases, layout.boxes, strict=True)
            if plain_phrase(phrase) == "a red circle"
        ]
        for layout in layouts
    ]
    return [score_image(layout, layout.id, here, detector) for layout, here in zip(layouts, found, strict=True)]


def told(parts):
    return {part.name: (part.objects, part.images, part.metrics["success"].value) for part in parts}


def test_parts_by_hand():
    parts = slices(scored(), LAYOUTS, ShapesDetector().query)
    assert list(parts) == ["size", "position", "objects", "frequency", "colour", "shape"]
    assert told(parts["size"]) == {"under 2 %": (2, 2, 1), "from 25 %": (2, 2, 0)}
    assert told(parts["position"]) == {"top left": (2, 2, 1), "bottom right": (2, 2, 0)}
    assert told(parts["objects"]) == {"1": (2, 2, 0.5), "2": (2, 1, 0.5)}
    assert told(parts["frequency"]) == {"once": (2, 2, 0), "2 to 9 times": (2, 2, 1)}
    assert told(parts["colour"]) == {"red": (3, 3, pytest.approx(2 / 3)), "blue": (1, 1, 0)}
    assert list(told(parts["shape"])) == ["circle", "square", "star"]  # most objects first, then by name
    for part in parts["size"]:
        assert set(part.metrics) == set(METRICS)
        assert part.metrics["success"].low <= part.metrics["success"].value <= part.metrics["success"].high


def test_a_part_that_is_the_whole_has_its_interval():
    layouts = [Layout(phrases=["a red circle"], boxes=[LARGE], id=f"{k}") for k in range(30)]
    images = [*scored(layouts[:20]), *(replace(image, objects=(MISSED,)) for image in scored(layouts[20:]))]
    (whole,) = slices(images, layouts, ShapesDetector().query)["size"]
    metrics = summarize(images, ap=False)
    assert whole.metrics == {name: metrics[name] for name in METRICS}
    assert metrics["success"].low < metrics["success"].value == 2 / 3 < metrics["success"].high


def test_phrases_are_counted_in_all_layouts():
    """Also in those whose images could not be read."""
    parts = slices(scored()[1:2], LAYOUTS, ShapesDetector().query)
    assert told(parts["frequency"]) == {"2 to 9 times": (1, 1, 1)}


def test_phrases_without_attributes_and_no_images():
    parts = slices(scored(), LAYOUTS, Query)
    assert list(parts) == ["size", "position", "objects", "frequency"]
    assert slices([], LAYOUTS, Query) == {}

    def some(phrase):
        return Query(phrase, {"colour": "red"} if "red" in phrase else {})

    assert told(slices(scored(), LAYOUTS, some)["colour"]) == {"red": (3, 3, pytest.approx(2 / 3))}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 0.99)] * 2, *[st.floats(0.01, 1)] * 2), min_size=1, max_size=12))
def test_every_object_is_in_one_part_of_each_grouping(corners):
    boxes = [(x, y, min(x + w, 1.0), min(y + h, 1.0)) for x, y, w, h in corners]
    layout = Layout(phrases=["a red circle"] * len(boxes), boxes=boxes, id="x")
    images = scored([layout])
    whole = summarize(images, ap=False, resamples=1)["success"].value
    for name, parts in slices(images, [layout], ShapesDetector().query).items():
        assert sum(part.objects for part in parts) == len(boxes), name
        right = sum(part.objects * part.metrics["success"].value for part in parts)
        assert right / len(boxes) == pytest.approx(whole)


def test_edges_belong_to_the_larger_part():
    sides = [edge**0.5 for edge in SIZE_EDGES]
    names = [size_name((0, 0, 1, edge)) for edge in SIZE_EDGES]
    assert names == ["2 to 5 %", "5 to 10 %", "10 to 25 %", "from 25 %"]
    assert [size_name((0, 0, 1, edge - 1e-9)) for edge in SIZE_EDGES] == ["under 2 %", *names[:3]]
    assert [round(100 * side) for side in sides] == [14, 22, 32, 50]
    assert [frequency_name(number) for number in (1, 2, 9, 10, 99, 100, 5000)] == [
        "once", "2 to 9 times", "2 to 9 times", "10 to 99 times", "10 to 99 times", "100 times or more",
        "100 times or more",
    ]  # fmt: skip
    assert [objects_name(number) for number in (1, 6, 7, 10, 11, 30)] == [
        "1", "6", "7 to 10", "7 to 10", "more than 10", "more than 10",
    ]  # fmt: skip


def test_positions_are_ninths_by_the_centre():
    third = 1 / 3
    centres = [((k + 0.5) * third, (j + 0.5) * third) for j in range(3) for k in range(3)]
    assert tuple(position_name((x - 0.1, y - 0.1, x + 0.1, y + 0.1)) for x, y in centres) == POSITIONS
    assert POSITIONS[4] == "middle"
    assert position_name((0, 0, 1, 1)) == "middle"
    assert position_name((0.9999, 0.0, 1.0, 1.0)) == "right"
    assert position_name((0.0, 0.999, 0.001, 1.0)) == "bottom left"
