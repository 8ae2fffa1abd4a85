"""The box around a segmentation of COCO: polygons, or run lengths as numbers or as COCO's compressed text.

Run lengths count pixels column by column, background first. The text holds them in groups of five bits, the lowest
first, from the third on as differences to the last but one; see `maskApi.c` of the COCO API.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...images.decode import MAX_PIXELS
from .rows import is_number

MAX_RUNS = 2**22  # of one mask; an image of noise at the limit of pixels has more, a mask of an object some thousand


def segment_box(segmentation: Any) -> list[float] | None:
    """The box (x, y, width, height) in pixels around a segmentation; None where there is none that can be read."""
    if isinstance(segmentation, dict):
        return _box_of_runs(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if not all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in polygons):
        return None
    numbers = [value for polygon in polygons for value in polygon]
    if len(numbers) < 4 or not all(map(is_number, numbers)):
        return None
    x, y = numbers[::2], numbers[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _box_of_runs(mask: dict[str, Any]) -> list[float] | None:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    height, width = size
    if height * width > MAX_PIXELS or not isinstance(counts, str | list) or len(counts) > MAX_RUNS:
        return None
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and 0 <= run <= height * width for run in runs) or sum(runs) != height * width:
        return None
    ends = np.cumsum(np.asarray(runs, np.int64))
    begin, end = ends[:-1][::2], ends[1::2]  # of each run of the object, the second, the fourth, ...
    seen = end > begin
    begin, last = begin[: len(end)][seen], end[seen] - 1
    if not len(begin):
        return None
    columns = begin // height, last // height
    whole = columns[0] < columns[1]  # a run that goes on in the next column touches the top and the bottom
    top = int(np.where(whole, 0, begin % height).min())
    bottom = int(np.where(whole, height - 1, last % height).max())
    left, right = int(columns[0].min()), int(columns[1].max())
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _runs_of_text(text: str) -> list[int]:
    """Run lengths; [-1], which no mask has, where the text is none of COCO's."""
    runs: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64 or shift > 60:
            return [-1]
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if shift == 0 else [-1]
