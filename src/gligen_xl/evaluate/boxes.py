"""Names that moved to `scores` and `metrics`."""

from __future__ import annotations

import numpy as np

from ..layout import box_iou
from .metrics import point_metrics as summarize
from .scores import FOUND, ObjectScore

__all__ = ["FOUND", "ObjectScore", "match", "summarize"]


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
