"""Turns a framed image into the rows that training reads: boxes moved into the frame, and the mirror image."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from ..data.shards import MIRRORED, Row
from ..images.crop import Frame, move_boxes
from .item import Item
from .report import UnitReport
from .settings import Settings

NO_PHRASE = "without a phrase"  # why a box is dropped
_SIDES = re.compile(r"\b(left|right)(most|hand|ward|wards|side)?\b", re.IGNORECASE)


def views(
    item: Item, frame: Frame, pixels: np.ndarray, settings: Settings, report: UnitReport
) -> Iterator[tuple[np.ndarray, Row]]:
    """Give what of an image goes into one resolution: it, or its mirror image, or both; nothing with too few boxes.

    Args:
        pixels: the image in the frame, (h, w, 3) uint8.
    """
    moved = move_boxes(frame, item.boxes, settings.min_share)
    named = [k for k, which in enumerate(moved.kept) if item.phrases[which].strip()]
    faults = moved.faults | {which: NO_PHRASE for which in moved.kept if not item.phrases[which].strip()}
    for which, reason in faults.items():
        report.drop(reason, 1, partial(_described, item, which, frame))
    if len(named) < settings.min_boxes:
        return
    row = Row(
        image_id=item.image_id,
        caption=item.caption,
        boxes=[moved.boxes[k] for k in named],
        scores=[float(item.scores[moved.kept[k]]) for k in named],
        phrases=[item.phrases[moved.kept[k]] for k in named],
        original_height=frame.original[0],
        original_width=frame.original[1],
        crop_top=frame.top,
        crop_left=frame.left,
    )
    for mirrored in _sides(item, settings):
        yield (np.ascontiguousarray(pixels[:, ::-1]), mirror(row, frame)) if mirrored else (pixels, row)


def _described(item: Item, which: int, frame: Frame) -> str:
    """Describe a box as it is in its source, as far as that is known, for the one who has to mend it."""
    box, (height, width) = item.boxes[which], frame.original
    shares, pixels = ([round(float(v * s), 3) for v, s in zip(box, scale, strict=True)] for scale in (
        (1, 1, 1, 1), (width, height, width, height))
    )  # fmt: skip
    return (
        f"{item.place}: {item.phrases[which]!r:.40} at {shares} (xyxy; in pixels {pixels} of {width} x {height}); "
        f"expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, and {frame.size[1]} x {frame.size[0]} pixels show "
        f"{[round(v, 3) for v in frame.region]} of it"
    )


def mirror(row: Row, frame: Frame) -> Row:
    """Return the row of the mirrored image."""
    return replace(
        row,
        image_id=row.image_id + MIRRORED,
        boxes=[(1 - x1, y0, 1 - x0, y1) for x0, y0, x1, y1 in row.boxes],
        crop_left=frame.resized[1] - frame.size[1] - frame.left,
    )


def _sides(item: Item, settings: Settings) -> tuple[bool, ...]:
    """Say for each row of an image whether it is mirrored."""
    if settings.flip == "no" or any(_SIDES.search(text) for text in (item.caption, *item.phrases)):
        return (False,)
    if settings.flip == "both":
        return False, True
    return (hashlib.sha256(f"flip {settings.seed} {item.image_id}".encode()).digest()[0] % 2 == 1,)
