"""Metrics of objects: how well the detections that were assigned to them fit, as ratios of two sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .matching import FOUND, ObjectScore

Ratio = tuple[np.ndarray, np.ndarray]  # what is summed, and what its sum is divided by


def point_metrics(scores: Sequence[ObjectScore]) -> dict[str, float]:
    """Return those metrics of `summarize` that objects alone tell, without intervals.

    objects, mean_iou, recall_50, recall_75, ATTRIBUTE, ATTRIBUTE_of_found, mean_iou_right and success.
    """
    if not scores:
        raise ValueError("no objects to summarize")
    ratios = of_objects(scores).items()
    return {"objects": len(scores)} | {
        name: float(values.sum() / counted.sum()) for name, (values, counted) in ratios if counted.any()
    }


def of_objects(scores: Sequence[ObjectScore]) -> dict[str, Ratio]:
    """Return each metric as a ratio of two sums over objects: (objects,) each."""
    iou = np.array([score.iou for score in scores])
    found = (iou >= FOUND).astype(float)
    success = np.array([score.success for score in scores], float)
    each = np.ones_like(iou)
    ratios = {"mean_iou": (iou, each), "recall_50": (found, each), "recall_75": ((iou >= 0.75).astype(float), each)}
    for name in scores[0].attributes:
        right = np.array([score.attributes[name] for score in scores], float)
        ratios |= {name: (right, each), f"{name}_of_found": (right * found, found)}
    if scores[0].attributes:
        ratios["mean_iou_right"] = np.where(found > success, 0, iou), each
    return ratios | {"success": (success, each)}


def quotients(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NaN is undefined."""
    with np.errstate(invalid="ignore"):
        return totals / counts
