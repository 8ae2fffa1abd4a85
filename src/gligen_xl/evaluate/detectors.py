"""Detectors: what is where in a picture, and is it what the layout asked for."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
from PIL import Image

from ..layout import Layout
from ..shapes.detect import detect
from ..shapes.world import COLOURS, SHAPES
from .boxes import ObjectScore, match


class Detector(Protocol):
    """Scores one picture against a layout: one score an object, in the layout's order."""

    def score(self, picture: Image.Image, layout: Layout) -> list[ObjectScore]: ...


class ShapesDetector:
    """The exact detector of the shapes world; attributes are colour and shape."""

    def score(self, picture: Image.Image, layout: Layout) -> list[ObjectScore]:
        wanted = [self.parse(phrase) for phrase in layout.phrases]
        found = detect(picture)
        assigned = match(np.array(layout.boxes), np.array([item.box for item in found]))
        return [
            ObjectScore(
                iou,
                {
                    "colour": number is not None and found[number].colour == colour,
                    "shape": number is not None and found[number].shape == shape,
                },
            )
            for (number, iou), (colour, shape) in zip(assigned, wanted, strict=True)
        ]

    @staticmethod
    def parse(phrase: str) -> tuple[str, str]:
        """Colour and shape that a phrase names."""
        words = re.findall(r"[a-z]+", phrase.lower())
        colours, shapes = [w for w in words if w in COLOURS], [w for w in words if w in SHAPES]
        if len(colours) != 1 or len(shapes) != 1:
            raise ValueError(
                f"the shapes detector cannot look for {phrase!r}; a phrase has to name one colour "
                f"({', '.join(COLOURS)}) and one shape ({', '.join(SHAPES)})"
            )
        return colours[0], shapes[0]


def find_detector(name: str) -> Detector:
    """The detector of that name."""
    if name != "shapes":
        raise ValueError(f"no detector {name!r}; there is 'shapes'")
    return ShapesDetector()
