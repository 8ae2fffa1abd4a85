"""Average precision of detections against the requested boxes, as COCO counts it (arXiv 1405.0312).

The requested boxes are the ground truth, and what a detector found in the generated image are the results. A label is
a category: of open-vocabulary phrases, each phrase that a detector was to look for.

The figures are faster-coco-eval's. Their resamples repeat images some hundred times, for which no library is made:
here an image counts with a weight, its detections stay matched as they are, and precision and recall are summed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np

from ..detect.matching import ImageScore
from ..layout import Box

AP_NAMES = ("ap", "ap_50", "ap_75", "ar")

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100  # detections of a category in an image, best first
_BLOCK = 1_000_000  # numbers at once


@dataclass(frozen=True)
class _Category:
    """One label in n images: G requested boxes, D detections.

    Args:
        requested: (G,) number of the image of each requested box.
        detected: (D,) number of the image of each detection, highest score first.
        right: (10, D) whether a detection is matched to a requested box, at each IoU.
        precision: (10,) average precision at each IoU.
        recall: (10,) the highest recall.
    """

    requested: np.ndarray
    detected: np.ndarray
    right: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


class AveragePrecision:
    """AP of n images, and of resamples of them.

    `point` holds them in the order of AP_NAMES: AP (mean over IoU 0.5 to 0.95), AP at 0.5, AP at 0.75 and AR (highest
    recall with at most 100 detections of a label in an image, mean over IoU), each the mean over labels.

    Raises:
        ValueError: faster-coco-eval is not installed, or objects have no label.
    """

    def __init__(self, images: Sequence[ImageScore]):
        if any(not score.label for image in images for score in image.objects):
            raise ValueError("AP needs the label that each object was looked for by; score_image gives it")
        self._categories = _categories(images)
        figures = np.mean([(category.precision, category.recall) for category in self._categories], axis=0)
        self.point = _figures(*figures)  # (4,)

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """AP where image k counts `weights[:, k]` times: (r, n) whole numbers -> (r, 4).

        A label that a resample does not hold is not in its mean.
        """
        sums = np.zeros((2, len(weights), len(_IOUS)))  # of precision and recall
        labels = np.zeros((len(weights), 1))
        for category in self._categories:
            rows = max(_BLOCK // max(len(category.detected), 1), 1)
            for start in range(0, len(weights), rows):
                part = slice(start, start + rows)
                sums[:, part] += _accumulate(category, weights[part])
            labels[weights[:, category.requested].any(-1)] += 1
        return _figures(*(sums / labels))


def _figures(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """(..., 10) at each IoU -> (..., 4) in the order of AP_NAMES."""
    return np.stack([precision.mean(-1), precision[..., 0], precision[..., 5], recall.mean(-1)], axis=-1)


def _accumulate(category: _Category, weights: np.ndarray) -> np.ndarray:
    """Precision and recall (2, r, 10) of one label in resamples; 0 where a resample does not hold it.

    Recall grows only at detections that are right. So the interpolated precision at a recall is the best precision from
    the detection on that reaches it, and each counts as often as it passes one of the 101 recalls.
    """
    requested = weights[:, category.requested].sum(-1, keepdims=True)  # (r, 1)
    of_each = weights[:, category.detected]  # (r, D)
    seen = of_each.cumsum(-1)
    figures = np.zeros((2, len(weights), len(_IOUS)))
    for k, right in enumerate(category.right):
        if not right.any():
            break  # none is right at a higher IoU either
        hits = of_each[:, right].cumsum(-1)  # (r, those that are right)
        precision = hits / np.maximum(seen[:, right], 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=-1)[:, ::-1]
        recall = hits / np.maximum(requested, 1)
        passed = np.diff(np.searchsorted(_RECALLS, recall, side="right"), prepend=0, axis=-1)
        figures[:, :, k] = (best * passed).sum(-1) / len(_RECALLS), recall[:, -1]
    return figures


# Matching -----------------------------------------------------------------------------------------------------------


def _categories(images: Sequence[ImageScore]) -> list[_Category]:
    """Return a category for each label that was requested.

    Where COCO's rules leave it to the order which of two comes first, content decides.
    """
    order = sorted(range(len(images)), key=lambda number: images[number].key)
    requested, detected = defaultdict(list), defaultdict(list)
    for place, number in enumerate(order):
        image = images[number]
        for score, box in zip(image.objects, image.layout.boxes, strict=True):
            requested[score.label].append((place, box))
        for item in image.detections:
            detected[item.label].append((place, -item.score, item.box))
    return [
        _category(sorted(boxes), _best(sorted(detected[label])), np.array(order))
        for label, boxes in sorted(requested.items())
    ]


_Requested = list[tuple[int, Box]]  # image, box
_Detected = list[tuple[int, float, Box]]  # image, -score, box


def _best(detected: _Detected) -> _Detected:
    return [item for _, of_image in groupby(detected, key=itemgetter(0)) for item in islice(of_image, _MOST)]


def _category(requested: _Requested, detected: _Detected, order: np.ndarray) -> _Category:
    """Both are sorted; `order` says which image each is of."""
    requested_in = order[[place for place, _ in requested]]
    if not detected:
        nothing = np.zeros(len(_IOUS))
        return _Category(requested_in, np.empty(0, int), np.empty((len(_IOUS), 0), bool), nothing, nothing)
    evaluator = _coco_eval(requested, detected)
    evaluator.evaluate()
    evaluator.accumulate()
    right = np.hstack(
        [
            _match(np.array(evaluator.ious[place, 1]), len(list(of_image)))
            for place, of_image in groupby(detected, key=itemgetter(0))
        ]
    )
    by_score = np.argsort([negative for _, negative, _ in detected], kind="stable")
    return _Category(
        requested=requested_in,
        detected=order[[place for place, _, _ in detected]][by_score],
        right=right[:, by_score],
        precision=evaluator.eval["precision"][:, :, 0, 0, 0].mean(-1),
        recall=evaluator.eval["recall"][:, 0, 0, 0],
    )


def _coco_eval(requested: _Requested, detected: _Detected) -> Any:
    """faster-coco-eval's evaluator of one category, by the interface that it shares with pycocotools."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("AP needs faster-coco-eval; pip install 'gligen-xl[evaluation]', or leave AP out") from error
    places = sorted({place for place, *_ in (*requested, *detected)})
    truth = COCO(
        {
            "images": [{"id": place} for place in places],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": k, "image_id": place, "category_id": 1, "bbox": _xywh(box), "area": 1, "iscrowd": 0}
                for k, (place, box) in enumerate(requested, start=1)
            ],
        }
    )
    results = truth.loadRes(
        [
            {"image_id": place, "category_id": 1, "bbox": _xywh(box), "score": -negative}
            for place, negative, box in detected
        ]
    )
    evaluator = COCOeval_faster(truth, results, "bbox")
    evaluator.params.maxDets = [_MOST]
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    return evaluator


def _xywh(box: Box) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _match(overlap: np.ndarray, detections: int) -> np.ndarray:
    """Return which detections of an image, best first, are right at each IoU: (D, G) -> (10, D).

    Each takes the requested box of best IoU that is left; of equal ones the last, as COCO's code does.
    """
    right = np.zeros((len(_IOUS), detections), bool)
    if not overlap.size:
        return right
    left = np.repeat(overlap[:, None, ::-1], len(_IOUS), axis=1)  # (D, 10, G), last box first
    each = np.arange(len(_IOUS))
    for k, here in enumerate(left):
        box = here.argmax(-1)  # (10,)
        right[:, k] = here[each, box] >= _IOUS
        left[k + 1 :, right[:, k], box[right[:, k]]] = -1
    return right
