"""What a source hands over: images as they stand there, with what is known of them, in units of work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..layout import Box

BAD_TEXT = "a text of its holds control characters or halves of surrogate pairs"  # why an image is left out

# All of C0 and C1 but tab, line feed, vertical tab, form feed and carriage return; and what UTF-8 cannot hold.
_BAD = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a source says of an image.

    Args:
        caption: empty where there is none.
        boxes: xyxy, 0-1, of the whole image as it is seen (upright, after EXIF orientation). They may overstep it.
        phrases, scores: one a box.
        size: (height, width) in pixels that the source states, upright; None where it states none.
        dropped: boxes that the source left out, by reason. dropped_examples: one of each reason, as it stands there.
    """

    caption: str = ""
    boxes: tuple[Box, ...] = ()
    phrases: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_examples: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Item(Annotation):
    """One image, not decoded yet, and what its source says of it.

    Args:
        image_id: unique within the source.
        image: its encoded bytes, or the file that holds them.
        done: how much of the unit's `weight` is behind once this image is.
        where: it is described: a file and its row, as a person would look it up. Empty: the image's own file.
        unread: files beside it, in an archive, that are of no use here: by ending.
    """

    image_id: str
    image: bytes | Path
    done: int = 0
    where: str = ""
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """What a person looks up."""
        return self.where or (str(self.image) if isinstance(self.image, Path) else self.image_id)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An image that cannot be used, and why.

    Args:
        reason: in words that are the same for all of its kind.
        detail: what was got of this one, and what was expected.
        where, unread: as those of an `Item`.
    """

    image_id: str
    reason: str
    detail: str = ""
    done: int = 0
    where: str = ""
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return self.where or self.image_id


class Unit(Protocol):
    """A part of a source that is done whole or not at all: an archive, or some thousand files. Can be pickled."""

    @property
    def name(self) -> str:
        """What its shards are called; unique within the source."""
        ...

    @property
    def weight(self) -> int:
        """How much work it is, beside other units of the source: bytes of an archive, or images."""
        ...

    def identity(self) -> dict[str, Any]:
        """What it is made of (JSON), its files too, see `file_facts`: a unit with another identity is done again."""
        ...

    def items(self) -> Iterator[Item | Skipped]:
        """Its images, in an order that is the same every time.

        Raises:
            ValueError, OSError: the unit as a whole cannot be read on, as an archive that is cut short.
        """
        ...


def text_fault(text: str) -> str:
    """Why a caption or a phrase is not stored; empty for all but control characters and halves of surrogate pairs."""
    if (found := _BAD.search(text)) is None:
        return ""
    return f"{text!r:.80} has U+{ord(found[0]):04X} at character {found.start()}; expected text"
