"""AP with its interval: one evaluation whose images are weighed again, against an evaluation a resample.

python benchmarks/evaluate.py
python benchmarks/evaluate.py --pictures 500 --labels 20

The other way is pycocotools' own: each resample is a set of images, some of them repeated, and is evaluated from the
start. A few resamples are timed, and the time of all is that times their number; both ways run in turns on the same
scores of synthetic images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gligen_xl import Layout
from gligen_xl.detect.detection import Detection
from gligen_xl.evaluate import ImageScore, ObjectScore, summarize

RESAMPLES = 1000


def scores_of(images: int, labels: int) -> list[ImageScore]:
    """Two to seven objects an image; of each none to two detections near it, some of another label."""
    random = np.random.default_rng(0)
    every = []
    for key in range(images):
        number = int(random.integers(2, 8))
        names = [f"label {k}" for k in random.integers(0, labels, number)]
        low = random.uniform(0, 0.6, (number, 2))
        boxes = np.hstack([low, low + random.uniform(0.1, 0.4, (number, 2))])
        found = []
        for name, box in zip(names, boxes, strict=True):
            for _ in range(int(random.choice([0, 1, 1, 2]))):
                seen = np.clip(box + random.normal(0, 0.02, 4), 0, 1)
                label = name if random.random() < 0.8 else f"label {random.integers(labels)}"
                found.append(Detection(tuple(seen.tolist()), label, float(random.random())))
        layout = Layout(phrases=names, boxes=boxes.tolist(), id=str(key))
        objects = tuple(ObjectScore(0.0, label=name) for name in names)
        every.append(ImageScore(layout, str(key), objects, tuple(found), 0, 0))
    return every


def pycocotools_ap(images: list[ImageScore]) -> float:
    """AP at IoU 0.5 to 0.95 of these images, evaluated from the start."""
    labels = sorted({score.label for image in images for score in image.objects})
    numbers = {label: number for number, label in enumerate(labels, 1)}

    def about(image_id: int, label: str, box: tuple[float, ...]) -> dict[str, object]:
        x0, y0, x1, y1 = box
        return {"image_id": image_id, "category_id": numbers[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}

    requested, results = [], []
    for image_id, image in enumerate(images):
        for box, score in zip(image.layout.boxes, image.objects, strict=True):
            requested.append(
                {"id": len(requested) + 1, "area": 1, "iscrowd": 0, **about(image_id, score.label, tuple(box))}
            )
        for found in image.detections:
            if found.label in numbers:
                results.append({"score": found.score, **about(image_id, found.label, found.box)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image_id} for image_id in range(len(images))],
            "categories": [{"id": number} for number in numbers.values()],
            "annotations": requested,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoUs, recalls, labels, areas, numbers of detections)
    return float(precision[:, :, :, 0, -1][precision[:, :, :, 0, -1] > -1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    images = scores_of(options.pictures, options.labels)
    random = np.random.default_rng(1)
    ours, theirs = [], []
    ap = summarize(images, resamples=RESAMPLES)["ap"]  # and warm
    for _ in range(options.repeats):
        began = time.perf_counter()
        summarize(images, resamples=RESAMPLES)
        ours.append(time.perf_counter() - began)
        resample = [images[k] for k in random.integers(len(images), size=len(images))]
        began = time.perf_counter()
        pycocotools_ap(resample)
        theirs.append(time.perf_counter() - began)
    one, whole = statistics.median(theirs), statistics.median(ours)
    low, value, high = (100 * number for number in (ap.low, ap.value, ap.high))
    print(f"AP {value:.2f} [{low:.2f}, {high:.2f}]; pycocotools {100 * pycocotools_ap(images):.2f}")
    print(f"all metrics with AP, {RESAMPLES} resamples: {whole:.2f} s")
    every = one * RESAMPLES
    print(f"pycocotools: {one:.2f} s a resample, {every:,.0f} s for all: {every / whole:,.0f} times as long")


if __name__ == "__main__":
    main()
