"""What a layout's phrases ask of a detector, and what a detector is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..layout import Layout
from .detection import Found


@dataclass(frozen=True)
class Wanted:
    """What a phrase asks for, in a detector's words: the label of a detection, and what it is to be judged."""

    label: str
    attributes: Mapping[str, str] = field(default_factory=dict)


class Detector(Protocol):
    """Finds the objects of layouts.

    Attributes:
        name: for file names and reports.
        settings: all that its detections depend on, for reports.
        attributes: what is judged beside the place, as ("colour",).
        labels_decide: only detections of the requested label may be assigned to an object; else any, by IoU alone.
        reads_layouts: what it finds depends on what the layout asks for; else on the image alone.
    """

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def labels_decide(self) -> bool: ...
    @property
    def reads_layouts(self) -> bool: ...

    def wanted(self, phrase: str) -> Wanted:
        """Raises ValueError, if it cannot look for that."""
        ...

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        """What is in each image, best first; the same whatever images are beside it, to rounding.

        Also what scores less than `settings["threshold"]`, down to 0.05: AP is of the less sure as well.
        """
        ...
