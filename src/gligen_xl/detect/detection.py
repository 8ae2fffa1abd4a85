"""Detections, what a detector is asked for, and what a detector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..layout import Box, Layout

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

THRESHOLD = 0.2  # of boxes and of words, where free phrases are looked for; IGLIGEN's


@dataclass(frozen=True)
class Detection:
    """One detection.

    Args:
        box: xyxy, 0-1 of the image.
        label: what the detector calls it; of a detector of free phrases, the phrase.
        score: how sure the detector is, 0-1.
        attributes: what else was seen of it, as {"colour": "red"}; several values where several hold.
    """

    box: Box
    label: str
    score: float = 1.0
    attributes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)

    def has(self, attribute: str, value: str) -> bool:
        """Tell whether `value` is what, or among what, was seen of `attribute`."""
        seen = self.attributes.get(attribute, ())
        return value == seen if isinstance(seen, str) else value in seen

    def to_dict(self) -> dict[str, Any]:
        """Return the detection as JSON values."""
        return {"box": self.box, "label": self.label, "score": self.score, "attributes": dict(self.attributes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Detection:
        """Restore a detection from `to_dict`, after JSON made lists of its tuples."""
        seen = {name: v if isinstance(v, str) else tuple(v) for name, v in values["attributes"].items()}
        x0, y0, x1, y1 = values["box"]
        return cls((x0, y0, x1, y1), values["label"], values["score"], seen)


@dataclass(frozen=True)
class Query:
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

    def query(self, phrase: str) -> Query:
        """Raise ValueError, if it cannot look for that."""
        ...

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """Return what is in each image, best first; it does not depend on the other images, except for rounding.

        Also what scores less than `settings["threshold"]`, down to 0.05: AP is of the less sure as well.
        """
        ...


class CaptionGrounder(ABC):
    """Finds the boxes of what a caption names, for the preparation of data.

    Attributes:
        cut_texts: number of the texts that were too long for it, and were cut.
        reads_captions: whether an image without one has nothing to look for.
    """

    cut_texts: int = 0
    reads_captions: bool = False

    @abstractmethod
    def ground(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[Detection]]:
        """Return what is found in each image, (h, w, 3) uint8 of any size; it does not depend on the other images.

        Raises:
            ValueError: images of another kind, or not one caption an image.
        """
