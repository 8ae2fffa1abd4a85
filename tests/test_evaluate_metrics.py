"""Which detection stands for which object, the metrics over them, and their intervals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.scores import Words, found, image, perfect
from hypothesis import given, settings
from hypothesis import strategies as st

from gligen_xl.detect.detection import Detection
from gligen_xl.detect.matching import ImageScore, ObjectScore
from gligen_xl.detect.metrics import point_metrics
from gligen_xl.evaluate.metrics import paired_difference, summarize
from gligen_xl.layout import Layout

COLOURS, NAMES = ("red", "blue"), ("cat", "dog")


def layout_of(**objects):
    """layout_of(red_cat=[0, 0, 1, 1])"""
    phrases = [name.replace("_", " ").rstrip("2") for name in objects]
    return Layout(phrases=phrases, boxes=list(objects.values()))


LEFT, RIGHT, BOTH = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1]


# Assignment ---------------------------------------------------------------------------------------------------------


def test_found_goes_through_json():
    item = Detection((0, 0.25, 0.5, 1), "car", 0.75, {"colour": ("red", "brown"), "shape": "box"})
    assert Detection.from_dict(json.loads(json.dumps(item.to_dict()))) == item
    assert [item.has("colour", c) for c in ("red", "brown", "blue")] == [True, True, False]
    assert item.has("shape", "box")
    assert not item.has("shape", "b")
    assert not item.has("size", "large")


def test_only_detections_of_the_label_are_assigned_and_of_another_colour_are_wrong():
    layout = layout_of(red_cat=LEFT, blue_dog=RIGHT)
    scored = image(layout, [found("red dog", LEFT), found("blue cat", BOTH), found("red dog", RIGHT)])
    assert scored.objects == (
        ObjectScore(0.5, {"colour": False}, 1, "cat"),
        ObjectScore(1.0, {"colour": False}, 2, "dog"),
    )
    assert (scored.extra, scored.missing) == (1, 0)
    free = image(layout, scored.detections, detector=Words(labels_decide=False))
    assert [score.assigned for score in free.objects] == [0, 2]


def test_two_of_a_kind_take_turns():
    """One cat over both boxes stands for one of them only; the published COCO-MIG would count it for both."""
    layout = layout_of(blue_cat=[0, 0, 0.625, 1], red_cat=[0.375, 0, 1, 1])
    one = image(layout, [found("red cat", [0, 0, 1, 1])])
    assert sorted(score.iou for score in one.objects) == [0, 0.625]
    assert (one.extra, one.missing) == (0, 1)
    assert one.objects[1].success  # of equal overlaps, the right colour goes first
    swapped = image(layout, [found("red cat", layout.boxes[0]), found("blue cat", layout.boxes[1])])
    assert [score.iou for score in swapped.objects] == [1, 1]
    assert not any(score.attributes["colour"] for score in swapped.objects)


def test_the_best_pairs_go_first():
    layout = layout_of(red_cat=[0, 0, 0.4, 1], red_cat2=[0.1, 0, 0.5, 1])
    scored = image(layout, [found("red cat", [0.08, 0, 0.48, 1]), found("red cat", [0.12, 0, 0.42, 1])])
    assert [score.assigned for score in scored.objects] == [1, 0]


def test_unsure_detections_are_kept_and_not_counted():
    layout = layout_of(red_cat=LEFT)
    seen = [found("red cat", LEFT, 0.2), found("red cat", RIGHT, 0.3)]
    scored = image(layout, seen, detector=Words(settings={"threshold": 0.3}))
    assert scored.objects[0].assigned is None
    assert scored.detections == tuple(seen)
    assert (scored.extra, scored.missing) == (0, 0)


def test_counts_are_of_requested_labels_wherever_they_stand():
    layout = layout_of(red_cat=LEFT, blue_cat=RIGHT, red_dog=BOTH)
    seen = [found("red cat", [0, 0, 0.01, 0.01])] * 4 + [found("red bird", LEFT)] * 3
    scored = image(layout, seen)
    assert (scored.extra, scored.missing) == (2, 1)
    free = image(layout, seen, detector=Words(labels_decide=False))
    assert (free.extra, free.missing) == (4, 0)
    nothing = image(layout, [])
    assert (nothing.extra, nothing.missing) == (0, 3)
    assert all(score == ObjectScore(0, {"colour": False}, None, score.label) for score in nothing.objects)


# Metrics by hand ----------------------------------------------------------------------------------------------------


def scored(*objects, key="0", extra=0, missing=0, **values):
    """From (iou, colour is right) each."""
    scores = tuple(ObjectScore(iou, {"colour": right}, None, "cat") for iou, right in objects)
    layout = Layout(phrases=["red cat"] * len(scores), boxes=[LEFT] * len(scores))
    return ImageScore(layout, key, scores, (), extra, missing, **values)


def values(images, **options):
    return {name: estimate.value for name, estimate in summarize(images, ap=False, **options).items()}


BY_HAND = (
    scored((0.9, True), (0.6, False), key="a", extra=2, clip=0.3, clip_objects=(0.1, 0.3)),
    scored((0.3, True), (0.0, False), key="b", missing=1, clip=0.5, clip_objects=(0.2, 0.2)),
    scored((0.75, True), key="c"),
)


def test_metrics_by_hand():
    of_objects = {
        "objects": 5, "mean_iou": 0.51, "recall_50": 0.6, "recall_75": 0.4, "colour": 0.6, "colour_of_found": 2 / 3,
        "mean_iou_right": 0.39, "success": 0.4,
    }  # fmt: skip
    assert values(BY_HAND) == pytest.approx(
        of_objects
        | {
            "pictures": 3, "mean_iou_right": 0.39, "picture_success": 1 / 3, "wrong_count": 2 / 3,
            "extra_objects": 2 / 3, "clip": 0.4, "clip_objects": 0.2,
        }
    )  # fmt: skip
    assert point_metrics([score for item in BY_HAND for score in item.objects]) == pytest.approx(of_objects)
    assert list(point_metrics(BY_HAND[0].objects)) == list(of_objects)


def test_metrics_of_nothing():
    assert "colour_of_found" not in values([scored((0.4, True))])  # none is found
    plain = ImageScore(Layout(phrases=["cat"], boxes=[LEFT]), "0", (ObjectScore(0.7),), (), 0, 0)
    assert set(values([plain])) == {
        "objects", "pictures", "mean_iou", "recall_50", "recall_75", "success", "picture_success", "wrong_count",
        "extra_objects",
    }  # fmt: skip
    for empty in ([], [scored()]):
        with pytest.raises(ValueError, match="no objects"):
            summarize(empty, ap=False)
    with pytest.raises(ValueError, match="no objects"):
        point_metrics([])
    with pytest.raises(ValueError, match="0 resamples"):
        summarize(BY_HAND, ap=False, resamples=0)


# Properties ---------------------------------------------------------------------------------------------------------

sides = st.tuples(st.integers(0, 12), st.integers(1, 4))  # start and length, in sixteenths
boxes = st.tuples(sides, sides).map(lambda s: (s[0][0] / 16, s[1][0] / 16, sum(s[0]) / 16, sum(s[1]) / 16))
phrases = st.tuples(st.sampled_from(COLOURS), st.sampled_from(NAMES)).map(" ".join)
objects = st.tuples(phrases, boxes)
layouts = st.lists(objects, min_size=1, max_size=3).map(
    lambda items: Layout(phrases=[phrase for phrase, _ in items], boxes=[box for _, box in items])
)
detections = st.lists(st.builds(found, phrases, boxes, st.sampled_from([0.5, 0.9])), max_size=5)
detectors = st.booleans().map(lambda decide: Words(labels_decide=decide))
whole_images = st.lists(st.tuples(layouts, detections), min_size=1, max_size=3).map(
    lambda items: [image(layout, seen, str(key)) for key, (layout, seen) in enumerate(items)]
)


@settings(max_examples=30, deadline=None)
@given(layout=layouts, detector=detectors)
def test_perfect_images_score_one(layout, detector):
    got = values([image(layout, perfect(layout), detector=detector)], resamples=5)
    wrong = {"wrong_count": 0, "extra_objects": 0, "pictures": 1, "objects": len(layout.boxes)}
    assert got == {name: wrong.get(name, 1) for name in got}


@settings(max_examples=30, deadline=None)
@given(box=boxes, shift=st.floats(0, 1))
def test_a_shifted_box_falls_as_iou_says(box, shift):
    width = box[2] - box[0]
    moved = found("red cat", (box[0] + shift * width, box[1], box[2] + shift * width, box[3]))
    got = values([image(Layout(phrases=["red cat"], boxes=[box]), [moved])], resamples=5)
    iou = (1 - shift) / (1 + shift)
    assert got["mean_iou"] == pytest.approx(iou)
    if abs(iou - 0.5) > 1e-9:
        assert got["recall_50"] == got["success"] == got.get("colour_of_found", 0) == (iou > 0.5)
    assert got["wrong_count"] == 0


@settings(max_examples=50, deadline=None)
@given(layout=layouts, seen=detections, detector=detectors, data=st.data())
def test_the_order_of_objects_and_detections_does_not_matter(layout, seen, detector, data):
    order = data.draw(st.permutations(range(len(layout.boxes))))
    other = Layout(phrases=[layout.phrases[k] for k in order], boxes=[layout.boxes[k] for k in order])
    here = image(layout, seen, detector=detector)
    there = image(other, data.draw(st.permutations(seen)), detector=detector)
    assert (here.extra, here.missing) == (there.extra, there.missing)

    def told(scored):
        """Each object and what stands for it; equal objects may swap."""
        each = zip(scored.layout.phrases, scored.layout.boxes, scored.objects, strict=True)
        return sorted((p, b, s.iou, s.attributes["colour"], s.assigned is None) for p, b, s in each)

    assert told(here) == told(there)


@settings(max_examples=30, deadline=None)
@given(images=whole_images, data=st.data())
def test_the_order_of_images_does_not_matter(images, data):
    assert values(data.draw(st.permutations(images)), resamples=5) == pytest.approx(values(images, resamples=5))


@settings(max_examples=30, deadline=None)
@given(layout=layouts, seen=detections, more=detections)
def test_detections_that_stand_for_nothing_count_as_extra_only(layout, seen, more):
    few, many = image(layout, seen), image(layout, [*seen, *(replace(item, label="bird") for item in more)])
    assert replace(many, detections=few.detections) == few  # nobody asked for birds
    elsewhere = [replace(item, box=(2, 2, 2 + item.box[2], 2 + item.box[3])) for item in more]
    many = image(layout, [*seen, *elsewhere])
    assert many.objects == few.objects
    assert many.extra >= few.extra
    full = image(layout, [*perfect(layout), *perfect(layout)])
    assert values([full], resamples=5)["recall_50"] == 1
    assert full.extra == len(layout.boxes)


# Intervals ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(images=whole_images, seed=st.integers(0, 9))
def test_intervals_hold_the_value_and_shares_are_shares(images, seed):
    for name, estimate in summarize(images, ap=False, seed=seed, resamples=20).items():
        assert estimate.low <= estimate.value <= estimate.high
        if name not in ("objects", "pictures", "extra_objects"):
            assert estimate.low >= 0
            assert estimate.high <= 1


def simulated(count, objects=1, share=0.3, seed=0):
    """Images whose objects are all found, or none, at random."""
    hits = np.random.default_rng(seed).random(count) < share
    return [scored(*[(float(hit), True)] * objects, key=str(k)) for k, hit in enumerate(hits)]


def test_the_interval_follows_from_the_seed():
    images = [scored((iou, True), key=str(k)) for k, iou in enumerate(np.linspace(0.1, 0.9, 40).tolist())]
    assert summarize(images, ap=False, seed=3) == summarize(images, ap=False, seed=3)
    assert summarize(images, ap=False, seed=3) != summarize(images, ap=False, seed=4)
    one = summarize(images[:1], ap=False)["mean_iou"]
    assert one.low == one.value == one.high


@pytest.mark.parametrize("objects", [1, 4])
def test_intervals_hold_the_truth_in_about_95_of_100_cases(objects):
    """Also where the objects of an image are all alike: images are resampled, not objects."""
    held = 0
    for seed in range(300):
        recall = summarize(simulated(80, objects, 0.3, seed), ap=False, seed=seed, resamples=300)["recall_50"]
        held += recall.low <= 0.3 <= recall.high
    assert 0.91 <= held / 300 <= 0.98


@settings(max_examples=30, deadline=None)
@given(images=whole_images, seed=st.integers(0, 9))
def test_nothing_differs_from_itself(images, seed):
    difference = paired_difference(images, images, ap=False, seed=seed, resamples=20)
    for name in ("objects", "pictures"):
        assert difference.pop(name) == summarize(images, ap=False)[name]
    assert all((e.value, e.low, e.high) == (0, 0, 0) for e in difference.values())


def test_the_paired_difference_is_surer_than_either_side():
    a = simulated(60)
    b = [*a[:55], *(replace(scored((0.0, False)), key=item.key, layout=item.layout) for item in a[55:])]
    assert sum(item.objects[0].iou for item in a[55:]) > 0
    of_a, of_b = (summarize(side, ap=False)["recall_50"] for side in (a, b))
    difference = paired_difference(a, b, ap=False)["recall_50"]
    assert difference.value == pytest.approx(of_a.value - of_b.value)
    assert difference.value > 0
    assert difference.high - difference.low < (of_a.high - of_a.low) / 2


def test_pairs_are_of_the_same_layouts():
    a, b = simulated(5), simulated(7, seed=1)
    both = paired_difference(a[1:], list(reversed(b)), ap=False)
    assert both["pictures"].value == both["objects"].value == 4
    assert both["mean_iou"].value == pytest.approx(values(a[1:])["mean_iou"] - values(b[1:5])["mean_iou"])
    with pytest.raises(ValueError, match="no image of one side"):
        paired_difference(a[:2], b[2:], ap=False)
    with pytest.raises(ValueError, match="1 is another layout"):
        paired_difference(a, [scored((1.0, True), (1.0, True), key="1")], ap=False)
    with pytest.raises(ValueError, match="6 images have only 5 different keys"):
        paired_difference([*a, a[0]], b, ap=False)
