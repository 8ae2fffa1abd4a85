"""Embedded worlds: what a name such as "shapes" stands for, wherever a model, a detector, data or layouts are named.

    find_world("shapes").model_folder()    # None for every other name

A world draws images of its own, finds their objects again, and has a small model of them. Its package stands above all
that trains and evaluates; it is looked up here by name, so nothing below imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from .detect.detection import CaptionGrounder, Detector
    from .evaluate.protocol import Protocol as EvaluationProtocol
    from .pipelines.layouts import ImageLayout

_PACKAGES = {"shapes": "gligen_xl.toyworld"}
NAMES = tuple(_PACKAGES)
DATA_FORM = "shapes:COUNT"  # how its images are named as training data


class World(Protocol):
    """The interface of a world's package.

    Attributes:
        NAME: the name by which users call it.
        GUIDANCE_SCALE: what its model is best at.
        EXAMPLE: a prompt, and a phrase of it.
        DRAWN_FOR_VALIDATION: how many images are drawn to validate on, where nothing else is said.
    """

    NAME: str
    GUIDANCE_SCALE: float
    EXAMPLE: tuple[str, str]
    DRAWN_FOR_VALIDATION: int

    def model_folder(self) -> Path:
        """Return the pipeline folder of its model."""
        ...

    def new_detector(self) -> Detector:
        """Return its exact detector, for the evaluation."""
        ...

    def new_grounder(self) -> CaptionGrounder:
        """Return its exact detector, for the preparation of data."""
        ...

    def write_shards(self, vae: Any, out: Path, count: int, *, held_out: bool) -> None:
        """Draw `count` images, encode them with `vae` and write them as shards under `out`.

        Args:
            held_out: images to validate on, which no training sees.
        """
        ...

    def new_protocol(self, count: int | None) -> EvaluationProtocol:
        """Return `count` of its own layouts to evaluate on, or the usual number of them."""
        ...

    def check_call(self, pipeline: Any, call: dict[str, Any], layouts: Sequence[ImageLayout]) -> None:
        """Refuses, or warns of, what its model cannot draw; ignores any other model."""
        ...


def find_world(name: object) -> World | None:
    """Return the embedded world of that name; None for any other name, such as a folder or a repository."""
    package = _PACKAGES.get(str(name))
    return None if package is None else cast(World, import_module(package))


def all_worlds() -> list[World]:
    return [cast(World, import_module(package)) for package in _PACKAGES.values()]


def drawn_count(source: str) -> str | None:
    """Return the COUNT of "shapes:COUNT", data that a world draws; None for any other source."""
    name, _, count = source.partition(":")
    return count if name in _PACKAGES else None
