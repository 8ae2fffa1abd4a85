"""Rows of a YOLO label file: a class's number and where the object is, as shares of the image.

0 0.5 0.5 0.2 0.2              class, centre x, centre y, width, height
0 0.5 0.5 0.2 0.2 0.87         and a confidence, as predictions have
0 0.1 0.1 0.3 0.1 0.3 0.4      class, a polygon of three corners or more (segmentation, oriented boxes)
0 0.5 0.5 0.2 0.2 0.4 0.4 2    class, box, keypoints of two or three numbers each, where `kpt_shape` says so
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...layout import TOLERANCE, Box

BAD_ROW, BAD_CLASS = "its row is none of YOLO's", "its class has no name"
OUTSIDE_SHARES, PIXELS = "it lies outside of the image", "its numbers look like pixels"
UNNAMED = "class left out by the mapping"

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SHAPES = "class, centre x, centre y, width and height as shares of the image (and confidence), or class and polygon"


@dataclass
class YoloRows:
    """Objects of one image: xyxy, 0-1; and rows that are not used, by reason, with one of each."""

    classes: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def read_rows(text: str, names: Mapping[int, str | None], keypoints: int = 0) -> YoloRows:
    """The objects of a label file.

    Args:
        names: phrases of the classes by number; None for those that are left out.
        keypoints: numbers behind the box that are keypoints, where the set is one of poses.
    """
    rows = YoloRows()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            which, box, score = _row(line, keypoints)
            if which not in names:
                known = f"classes 0 to {max(names)}" if names else "no classes"
                raise _Unusable(BAD_CLASS, f"class {which}; expected one of {known}, as the names of the set say")
            if names[which] is None:
                raise _Unusable(UNNAMED, "")
        except _Unusable as fault:
            rows.dropped[fault.reason] += 1
            if fault.detail:
                rows.examples.setdefault(fault.reason, f"line {number}, {line.strip()[:60]!r}: {fault.detail}")
            continue
        rows.classes.append(which)
        rows.boxes.append(box)
        rows.scores.append(score)
    return rows


def looks_like_rows(text: str) -> bool:
    """Whether a text is rows of numbers as a label file of YOLO holds them, and so no caption."""
    if not text.lstrip()[:1].isdigit():
        return False
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return bool(lines) and all(
        len(words) >= 5 and words[0].partition(".")[0].isdigit() and all(map(_NUMBER.fullmatch, words))
        for words in lines
    )


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _row(line: str, keypoints: int) -> tuple[int, Box, float]:
    words = line.split()
    if not all(map(_NUMBER.fullmatch, words)):
        bad = next(word for word in words if not _NUMBER.fullmatch(word))
        raise _Unusable(BAD_ROW, f"{bad[:20]!r} is no number; expected {_SHAPES}")
    values = [float(word) for word in words]
    if not all(map(math.isfinite, values)) or values[0] != int(values[0]) or values[0] < 0:
        raise _Unusable(BAD_ROW, f"its class is {words[0][:20]}; expected the number of a class")
    which, rest, score = int(values[0]), values[1:], 1.0
    posed = bool(keypoints) and len(rest) in (4 + keypoints, 5 + keypoints)
    if len(rest) == 5 or (posed and len(rest) == 5 + keypoints):
        score = rest[-1]
        if not 0 <= score <= 1:
            raise _Unusable(BAD_ROW, f"its last number, {score:g}, is no confidence; expected {_SHAPES}")
    if len(rest) in (4, 5) or posed:
        box = _from_centre(rest[:4])
    elif len(rest) >= 6 and len(rest) % 2 == 0:
        _check(rest)
        x, y = rest[::2], rest[1::2]
        box = min(x), min(y), max(x), max(y)
    else:
        told = "keypoints need kpt_shape in data.yaml" if len(rest) > 6 else f"expected {_SHAPES}"
        raise _Unusable(BAD_ROW, f"it has {len(words)} numbers; {told}")
    return which, box, score


def _from_centre(values: list[float]) -> Box:
    _check(values)
    x, y, width, height = values
    if width < 0 or height < 0:
        raise _Unusable(OUTSIDE_SHARES, f"width {width:g}, height {height:g}; expected 0 to 1")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _check(values: list[float]) -> None:
    """Raises _Unusable where these are no shares of an image, but for what rounding does."""
    low, high = min(values), max(values)
    if high > 2:
        raise _Unusable(PIXELS, f"a number is {high:g}; expected shares of the image, 0 to 1")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        bad = low if low < -TOLERANCE else high
        raise _Unusable(OUTSIDE_SHARES, f"a number is {bad:g}; expected 0 to 1")
