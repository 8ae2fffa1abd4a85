"""Find the objects of a shapes image: nearest colour, connected component, best-fitting shape.

No network is involved. Its own error on drawn images is measured in tests/test_shapes_detect.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from ..detect.detection import Detection
from .world import COLOURS, SHAPES, shape_mask

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)
_FAR = 62.0  # RGB distance beyond which a pixel belongs to no object colour
_SMALLEST = 0.01  # share of the image; smaller components are specks
_GRID = 24  # shapes are compared on a grid of this many cells a side


def detect(image: Image.Image | np.ndarray) -> list[Detection]:
    """Return all objects of an image (PIL, or (H, W, 3) uint8), largest first.

    Their attributes are colour and shape; the score is the overlap with the ideal shape, 0-1.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an image of shape (H, W, 3), got {pixels.shape}")
    height, width = pixels.shape[:2]
    distance = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1)  # (H, W, colours)
    colour = np.where(distance.min(-1) < _FAR, distance.argmin(-1), -1)
    components = _components(colour)
    detections = []
    for label in np.unique(components[components >= 0]):
        mask = components == label
        area = mask.mean()
        if area < _SMALLEST:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        shape, score = _classify(mask[y0:y1, x0:x1])
        box = (float(x0 / width), float(y0 / height), float(x1 / width), float(y1 / height))
        name = _NAMES[colour.ravel()[label]]
        detections.append((area, Detection(box, f"{name} {shape}", score, {"colour": name, "shape": shape})))
    return [detection for _, detection in sorted(detections, key=lambda item: -item[0])]


def _components(colour: np.ndarray) -> np.ndarray:
    """Labels of the 4-connected areas of equal value >= 0; -1 elsewhere.

    Every pixel takes the largest index among its like neighbours until nothing changes; pointer jumping makes that
    a few rounds whatever the shape. A label is the index of one pixel of its component.
    """
    height, width = colour.shape
    flat = colour.ravel()
    index = np.arange(height * width).reshape(height, width)
    right, down = colour[:, :-1] == colour[:, 1:], colour[:-1] == colour[1:]
    a = np.concatenate([index[:, :-1][right], index[:-1][down]])
    b = np.concatenate([index[:, 1:][right], index[1:][down]])
    label = index.ravel().copy()
    while True:
        before = label.copy()
        highest = np.maximum(label[a], label[b])
        np.maximum.at(label, a, highest)
        np.maximum.at(label, b, highest)
        label = label[label]
        if np.array_equal(before, label):
            return np.where(flat >= 0, label, -1).reshape(height, width)


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """(shapes, grid, grid) bool: each ideal shape in its own box."""
    fine = [np.asarray(shape_mask(shape, (_GRID * 4, _GRID * 4)).reduce(4), np.float32) / 255 for shape in SHAPES]
    return np.stack(fine) > 0.5


def _classify(mask: np.ndarray) -> tuple[str, float]:
    """Return the shape that overlaps best with a (h, w) bool mask stretched to a square, and that overlap (IoU)."""
    stretched = Image.fromarray(mask.astype(np.uint8) * 255).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    seen = np.asarray(stretched) > 127
    templates = _templates()
    overlap = (templates & seen).sum((1, 2)) / (templates | seen).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[best], float(overlap[best])
