"""The exact detector of the shapes world, as the evaluation and as the preparation of data ask for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..detect.detection import CaptionGrounder, Detection, Query
from ..detect.grounder import check_inputs
from ..detect.matching import ObjectScore, score_image
from ..layout import Layout
from .detector import detect
from .world import COLOURS, SHAPES


class ShapesDetector:
    """The exact detector of the shapes world; attributes are colour and shape, and labels do not decide."""

    name = "shapes"
    settings: Mapping[str, Any] = {"detector": "shapes"}
    attributes = ("colour", "shape")
    labels_decide = False
    reads_layouts = False

    def query(self, phrase: str) -> Query:
        colour, shape = self.parse(phrase)
        return Query(f"{colour} {shape}", {"colour": colour, "shape": shape})

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        return [detect(image) for image, _ in zip(images, layouts, strict=True)]

    def score(self, image: Image.Image, layout: Layout) -> list[ObjectScore]:
        """Return one score for each object, in the layout's order."""
        (found,) = self.detect([image], [layout])
        return list(score_image(layout, "", found, self).objects)

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


class ShapesGrounder(CaptionGrounder):
    """Of images of the shapes world; what the caption says does not matter."""

    def ground(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[Detection]]:
        check_inputs(images, captions)
        return [[Detection(item.box, f"a {item.label}") for item in detect(image)] for image in images]
