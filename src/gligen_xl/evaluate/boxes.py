"""Box metrics: requested boxes against detected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..layout import box_iou

FOUND = 0.5  # IoU from which on an object counts as found


@dataclass(frozen=True)
class ObjectScore:
    """One requested object against the detection that was assigned to it.

    Args:
        iou: 0 if nothing was assigned.
        attributes: whether the assigned detection is what the phrase says, by attribute ("colour", "shape"; "label").
            All are False if nothing was assigned.
    """

    iou: float
    attributes: Mapping[str, bool] = field(default_factory=dict)


def match(requested: np.ndarray, detected: np.ndarray) -> list[tuple[int | None, float]]:
    """Assign each requested box (n, 4) at most one detected box (m, 4), and no detection twice.

    Pairs are taken by falling IoU, whatever the detections are labelled. Returns for each requested box the number of
    its detection and their IoU, or (None, 0.0).
    """
    overlap = box_iou(requested, detected)
    assigned: list[tuple[int | None, float]] = [(None, 0.0)] * len(overlap)
    while overlap.size and overlap.max() > 0:
        row, column = (int(k) for k in np.unravel_index(overlap.argmax(), overlap.shape))
        assigned[row] = (column, float(overlap[row, column]))
        overlap[row, :] = 0
        overlap[:, column] = 0
    return assigned


def summarize(scores: Sequence[ObjectScore]) -> dict[str, float]:
    """Metrics over all requested objects; shares are 0-1.

    Returns:
        objects: how many were requested.
        mean_iou: an object to which nothing was assigned counts 0.
        recall_50, recall_75: share of IoU at least 0.5, 0.75.
        ATTRIBUTE: share of all objects whose assigned detection has the right one.
        ATTRIBUTE_of_found: the same share among the found (IoU at least 0.5).
        success: share that is found and right in every attribute.
    """
    if not scores:
        raise ValueError("no objects to summarize")
    iou = np.array([score.iou for score in scores])
    found = iou >= FOUND
    metrics = {
        "objects": len(scores),
        "mean_iou": float(iou.mean()),
        "recall_50": float(found.mean()),
        "recall_75": float((iou >= 0.75).mean()),
    }
    right = found.copy()
    for name in scores[0].attributes:
        values = np.array([score.attributes[name] for score in scores])
        metrics[name] = float(values.mean())
        metrics[f"{name}_of_found"] = float(values[found].mean()) if found.any() else 0.0
        right &= values
    metrics["success"] = float(right.mean())
    return metrics
