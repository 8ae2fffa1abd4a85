"""Where an image goes in the square or the bucket that the model sees, and its boxes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..layout import Box

# SDXL's aspect-ratio buckets (arXiv 2307.01952, appendix I), (height, width) at 1024, tall ones; the wide are mirrored.
_TALL = (
    (2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640), (1536, 640),
    (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832), (1152, 896), (1088, 896),
    (1088, 960), (1024, 960),
)  # fmt: skip
BUCKET_GRID = 16  # sides are multiples of a sixteenth of the resolution
BUCKETS = (*_TALL, (1024, 1024), *((width, height) for height, width in reversed(_TALL)))


@dataclass(frozen=True)
class Frame:
    """An image of `original` size is resized, and of that `size` is cut out at (top, left). All (height, width)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]

    @property
    def region(self) -> Box:
        """The part of the original that is seen, xyxy, 0-1."""
        (height, width), (h, w) = self.resized, self.size
        return self.left / width, self.top / height, (self.left + w) / width, (self.top + h) / height

    def move(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes (n, 4) xyxy 0-1 of the original image to this frame, where 0-1 is inside."""
        x0, y0, x1, y1 = self.region
        low, span = np.array([x0, y0, x0, y0]), np.array([x1 - x0, y1 - y0] * 2)
        return (np.asarray(boxes, np.float64).reshape(-1, 4) - low) / span

    def back(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes of this frame to the original image: the inverse of `move`."""
        x0, y0, x1, y1 = self.region
        low, span = np.array([x0, y0, x0, y0]), np.array([x1 - x0, y1 - y0] * 2)
        return np.asarray(boxes, np.float64).reshape(-1, 4) * span + low


def square_frame(height: int, width: int, resolution: int) -> Frame:
    """Return the frame of the published latents: the short side becomes `resolution`, and the middle is cut out."""
    if height <= width:
        resized = (resolution, int(resolution * width / height))
    else:
        resized = (int(resolution * height / width), resolution)
    return _centred((height, width), resized, (resolution, resolution))


def bucket_frame(height: int, width: int, resolution: int) -> Frame:
    """Return the bucket of the nearest aspect ratio, filled: nothing but what overhangs on one side is lost."""
    aspect = np.log(height / width)
    bucket = min(BUCKETS, key=lambda size: abs(np.log(size[0] / size[1]) - aspect))
    h, w = (side * resolution // 1024 for side in bucket)
    scale = max(h / height, w / width)
    resized = (max(h, round(height * scale)), max(w, round(width * scale)))
    return _centred((height, width), resized, (h, w))


def _centred(original: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]) -> Frame:
    top, left = (round((whole - part) / 2) for whole, part in zip(resized, size, strict=True))
    return Frame(original, resized, top, left, size)


# Why a box is dropped.
REVERSED, EMPTY = "reversed, its second corner comes before its first", "without width or height"
TINY, OUTSIDE, CUT_AWAY = "smaller than a pixel of the frame", "outside the image", "cut away by the crop"


@dataclass(frozen=True)
class MovedBoxes:
    """Boxes that are seen in a frame, clipped to it; which of the given ones they are; why others are not."""

    boxes: list[Box]
    kept: list[int]
    faults: dict[int, str]


def move_boxes(frame: Frame, boxes: Sequence[Sequence[float]], min_share: float) -> MovedBoxes:
    """Move boxes of the original image into the frame, as training wants them.

    Args:
        min_share: a box of which less than this share of its area is seen is dropped: it is OUTSIDE where so much of
            it is not even in the image, else CUT_AWAY.
    """
    given = np.asarray(boxes, np.float64).reshape(-1, 4)
    moved = frame.move(given)
    clipped = np.clip(moved, 0, 1)
    sides = moved[:, 2:] - moved[:, :2]
    area = sides.clip(0).prod(-1)
    seen = (clipped[:, 2:] - clipped[:, :2]).clip(0)
    inside = (np.clip(given, 0, 1)[:, 2:] - np.clip(given, 0, 1)[:, :2]).clip(0)
    pixels = np.array([frame.size[1], frame.size[0]])
    whole = (given[:, 2:] - given[:, :2]).clip(0).prod(-1)
    faults: dict[int, str] = {}
    for reason, which in (  # of those that a box has, the last is told
        (CUT_AWAY, (seen.prod(-1) < min_share * area) | (seen * pixels < 1).any(-1)),
        (OUTSIDE, (inside.prod(-1) < min_share * whole) | (inside <= 0).any(-1)),
        (TINY, (sides * pixels < 1).any(-1)),
        (EMPTY, (sides == 0).any(-1)),
        (REVERSED, (sides < 0).any(-1)),
    ):
        faults |= dict.fromkeys(np.flatnonzero(which).tolist(), reason)
    kept = [k for k in range(len(given)) if k not in faults]
    return MovedBoxes([tuple(map(float, clipped[k])) for k in kept], kept, dict(sorted(faults.items())))  # type: ignore[misc]
