"""What is said of a source beside its kind, and what a kind of source is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..item import Unit


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """A source and how it is to be read.

    Args:
        box_format: one of `BOX_FORMATS`, of rows that do not name their own.
        instances: COCO's annotations of the images in `path`.
        classes: category name to phrase.
        images: folder of the images, where they do not stand with their annotations.
        split: the part of a source that is taken, as "train"; all of it where none is named.
        unit_size: images in a unit; an archive is always one.
    """

    path: Path
    box_format: str | None = None
    instances: Path | None = None
    classes: Path | None = None
    images: Path | None = None
    split: str | None = None
    unit_size: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of source.

    Args:
        description: what a path of it looks like, in words.
        recognises: whether a path is of this kind.
        open: gives its units.
        takes: the names of the options that it heeds, beside `unit_size`.
    """

    description: str
    recognises: Callable[[Path], bool]
    open: Callable[[SourceOptions], Sequence[Unit]]
    takes: tuple[str, ...] = ()
