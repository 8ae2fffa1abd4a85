"""AP is what pycocotools says, and its resamples are what faster-coco-eval says of repeated images."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.scores import found, image, perfect

from gligen_xl import Layout
from gligen_xl.evaluate.ap import AveragePrecision
from gligen_xl.evaluate.metrics import _estimates, paired_difference, summarize

NAMES = ("cat", "dog", "bird", "car")
AP = ("ap", "ap_50", "ap_75", "ar")


def random_images(count=30, seed=0, scores=8):
    """Some labels twice, boxes moved a little, detections missing, twice, or of other labels; many scores are equal."""
    random = np.random.default_rng(seed)

    def box(centre=None, size=None):
        centre = random.uniform(0.3, 0.7, 2) if centre is None else centre
        size = random.uniform(0.2, 0.6, 2) if size is None else size
        low, high = np.clip(centre - size / 2, 0, 1), np.clip(centre + size / 2, 0, 1)
        return (*low.tolist(), *high.tolist())

    images = []
    for number in range(count):
        names = random.choice(NAMES[:3], random.integers(1, 6)).tolist()
        boxes = [box() for _ in names]
        seen = []
        for name, (x0, y0, x1, y1) in zip(names, boxes, strict=True):
            for _ in range(random.choice([0, 1, 1, 2])):
                centre = np.array([x0 + x1, y0 + y1]) / 2 + random.normal(0, 0.03, 2)
                label = name if random.random() < 0.8 else str(random.choice(NAMES))
                place = box(centre, np.array([x1 - x0, y1 - y0]) * random.uniform(0.8, 1.2, 2))
                seen.append(found(f"red {label}", place, float(random.integers(1, scores + 1) / scores)))
        layout = Layout(phrases=[f"red {name}" for name in names], boxes=boxes)
        images.append(image(layout, seen, f"{number:03}"))
    return images


def by_pycocotools(images):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    categories = {name: k for k, name in enumerate(NAMES, start=1)}
    requested, results = [], []
    for number, item in enumerate(sorted(images, key=lambda item: item.key)):
        for box, score in sorted(zip(item.layout.boxes, item.objects, strict=True), key=lambda pair: pair[0]):
            about = {"image_id": number, "category_id": categories[score.label], "bbox": xywh(box)}
            requested.append({"id": len(requested) + 1, "area": 1, "iscrowd": 0, **about})
        for one in sorted(item.detections, key=lambda one: (-one.score, one.box)):
            about = {"image_id": number, "category_id": categories[one.label], "bbox": xywh(one.box)}
            results.append({"score": one.score, **about})
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": k, "name": name} for name, k in categories.items()],
        "annotations": requested,
        "info": {},
    }
    truth.createIndex()
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(AP, evaluation.stats[[0, 1, 2, 8]].tolist(), strict=True))


def values(images, **options):
    got = summarize(images, resamples=options.pop("resamples", 3), **options)
    return {name: got[name].value for name in AP}


@pytest.fixture
def library():
    return pytest.importorskip("faster_coco_eval")


@pytest.mark.parametrize("seed", range(6))
def test_ap_is_what_pycocotools_says(library, seed, capsys):
    images = random_images(seed=seed)
    got = values(images)
    assert 0.05 < got["ap"] < 0.95
    assert got == pytest.approx(by_pycocotools(images), abs=1e-12)


def test_the_best_hundred_count(library):
    layout = Layout(phrases=["red cat"], boxes=[[0.5, 0.5, 1, 1]])
    wrong = [found("red cat", (0, 0, 0.4, 0.4), 1 - k / 1000) for k in range(300)]
    seen = {
        rank: image(layout, [*wrong, found("red cat", (0.5, 0.5, 1, 1), 1.0005 - rank / 1000)]) for rank in (99, 100)
    }
    assert {rank: values([one])["ar"] for rank, one in seen.items()} == {99: 1, 100: 0}
    for one in seen.values():
        assert values([one]) == pytest.approx(by_pycocotools([one]), abs=1e-12)


def test_a_resample_is_the_image_repeated(library):
    images = random_images(20, scores=10**9)  # where two scores of an image are equal, repeating mixes them
    random = np.random.default_rng(1)
    weights = random.multinomial(20, np.full(20, 1 / 20), 12).astype(float)
    weights[0] = 1
    few = next(k for k, item in enumerate(images) if len(set(item.layout.phrases)) == 1)
    weights[1] = 20.0 * (np.arange(20) == few)  # other labels are not in it
    got = AveragePrecision(images).resampled(weights)
    for row, of_row in zip(weights, got, strict=True):
        repeated = [
            replace(item, key=f"{item.key}-{copy}")
            for item, count in zip(images, row, strict=True)
            for copy in range(int(count))
        ]
        assert of_row == pytest.approx(AveragePrecision(repeated).point, abs=1e-12)


def test_order_does_not_matter(library):
    random = np.random.default_rng(2)
    images = random_images(scores=2)

    def shuffled(item):
        seen = [item.detections[k] for k in random.permutation(len(item.detections))]
        order = random.permutation(len(item.objects)).tolist()
        layout = item.layout
        layout = Layout(phrases=[layout.phrases[k] for k in order], boxes=[layout.boxes[k] for k in order])
        return image(layout, seen, item.key)

    other = [shuffled(images[k]) for k in random.permutation(len(images))]
    assert values(other) == pytest.approx(values(images), abs=1e-12)


def test_perfect_nothing_and_what_nobody_asked_for(library):
    layouts = [item.layout for item in random_images(10)]
    right = [image(layout, perfect(layout), str(k)) for k, layout in enumerate(layouts)]
    got = summarize(right, resamples=20)
    assert all((got[name].low, got[name].value, got[name].high) == (1, 1, 1) for name in AP)
    birds = [replace(item, detections=(*item.detections, found("red car", (0, 0, 1, 1)))) for item in right]
    assert values(birds) == values(right)
    nothing = [image(layout, [], str(k)) for k, layout in enumerate(layouts)]
    got = summarize(nothing, resamples=20)
    assert all((got[name].low, got[name].value, got[name].high) == (0, 0, 0) for name in AP)


def test_intervals(library):
    images = random_images(40)
    got, again, other = (summarize(images, seed=seed, resamples=200) for seed in (0, 0, 1))
    assert got == again
    assert got["ap"] != other["ap"]
    for name in AP:
        fifth = (got[name].high - got[name].low) / 5
        assert 0 <= got[name].low < got[name].value - fifth < got[name].value + fifth < got[name].high <= 1
    without = [item if k % 4 else replace(item, detections=()) for k, item in enumerate(images)]
    difference = paired_difference(images, without, resamples=200)["ap"]
    assert difference.value == pytest.approx(got["ap"].value - values(without)["ap"])
    assert 0 < difference.low < difference.high < got["ap"].high - got["ap"].low + difference.value
    same = paired_difference(images, images, resamples=20)
    assert all((same[name].low, same[name].value, same[name].high) == (0, 0, 0) for name in AP)


def test_samples_of_ap_are_moved_to_its_value():
    samples = np.linspace(0.6, 0.8, 101)[:, None]
    got = _estimates({"ap": 0.5}, samples)["ap"]
    assert (got.low, got.value, got.high) == pytest.approx((0.405, 0.5, 0.595))
    assert _estimates({"ap": 0.98}, samples)["ap"].high == 1
    assert _estimates({"ap": 0.0}, samples)["ap"].low == 0
    assert _estimates({"ap": 0.0}, samples, lowest=-1)["ap"].low == pytest.approx(-0.095)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    images = random_images(3)
    with pytest.raises(ValueError, match=r"pip install 'gligen-xl\[evaluation\]'"):
        summarize(images)
    assert "ap" not in summarize(images, ap=False)


def test_objects_without_labels_are_refused(library):
    item = random_images(1)[0]
    unlabelled = replace(item, objects=tuple(replace(score, label="") for score in item.objects))
    with pytest.raises(ValueError, match="AP needs the label"):
        summarize([unlabelled])
