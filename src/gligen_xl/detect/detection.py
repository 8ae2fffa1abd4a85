"""What a detector found in an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layout import Box

THRESHOLD = 0.2  # of boxes and of words, where free phrases are looked for; IGLIGEN's


@dataclass(frozen=True)
class Found:
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
        """Whether `value` is what, or among what, was seen of `attribute`."""
        seen = self.attributes.get(attribute, ())
        return value == seen if isinstance(seen, str) else value in seen

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"box": self.box, "label": self.label, "score": self.score, "attributes": dict(self.attributes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Found:
        """The inverse of `to_dict`, after JSON made lists of its tuples."""
        seen = {name: v if isinstance(v, str) else tuple(v) for name, v in values["attributes"].items()}
        x0, y0, x1, y1 = values["box"]
        return cls((x0, y0, x1, y1), values["label"], values["score"], seen)
