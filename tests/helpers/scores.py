"""Scored images, made up."""

from dataclasses import dataclass
from types import SimpleNamespace

from gligen_xl.detect.detection import Detection
from gligen_xl.detect.matching import score_image


@dataclass(frozen=True)
class Words:
    """Looks for "red cat" as a cat that is red."""

    attributes: tuple = ("colour",)
    labels_decide: bool = True
    settings: dict = None  # type: ignore[assignment]

    def __post_init__(self):
        object.__setattr__(self, "settings", self.settings or {})

    def query(self, phrase):
        colour, label = phrase.split()
        return SimpleNamespace(label=label, attributes={"colour": colour})


def found(phrase, box, score=1.0):
    colour, label = phrase.split()
    return Detection(tuple(box), label, score, {"colour": colour})


def perfect(layout):
    return [found(phrase, box) for phrase, box in zip(layout.phrases, layout.boxes, strict=True)]


def image(layout, seen, key="0", detector=Words()):
    return score_image(layout, key, seen, detector)
