"""What a source hands over: pictures as they stand there, with what is known of them, in units of work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..layout import Box


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a source says of a picture.

    Args:
        caption: empty where there is none.
        boxes: xyxy, 0-1, of the whole picture as it is seen (upright, after EXIF orientation). They may overstep it.
        phrases, scores: one a box.
        size: (height, width) in pixels that the source states, upright; None where it states none.
        dropped: boxes that the source left out, by reason.
    """

    caption: str = ""
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Item(Annotation):
    """One picture, not decoded yet, and what its source says of it.

    Args:
        image_id: unique within the source.
        picture: its encoded bytes, or the file that holds them.
        done: how much of the unit's `weight` is behind once this picture is.
    """

    image_id: str
    picture: bytes | Path
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A picture that cannot be used, and why, in words that are the same for all of its kind."""

    image_id: str
    reason: str
    done: int = 0


class Unit(Protocol):
    """A part of a source that is done whole or not at all: an archive, or some thousand files. Can be pickled."""

    @property
    def name(self) -> str:
        """What its shards are called; unique within the source."""
        ...

    @property
    def weight(self) -> int:
        """How much work it is, beside other units of the source: bytes of an archive, or pictures."""
        ...

    def identity(self) -> dict[str, Any]:
        """What it is made of (JSON): a unit with another identity has to be done again."""
        ...

    def items(self) -> Iterator[Item | Skipped]:
        """Its pictures, in an order that is the same every time.

        Raises:
            ValueError, OSError: the unit as a whole cannot be read on, as an archive that is cut short.
        """
        ...
