"""What a source hands over: images as they are stored, with what is known of them, in units of work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..layout import Box

# Reasons why an image is left out.
BAD_TEXT = "a text of its holds control characters or halves of surrogate pairs"
TWICE = "image_id stands there twice"

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
        dropped: boxes that the source left out, by reason. dropped_examples: one of each reason, as it is written.
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
        where: the file and row that describe it, as a person would look them up. Empty: the image's own file.
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
        done, where, unread: as those of an `Item`.
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


def skipped(item: Item, reason: str, detail: str = "") -> Skipped:
    """Leave an image out."""
    return Skipped(
        image_id=item.image_id, reason=reason, detail=detail, done=item.done, where=item.place, unread=item.unread
    )


class Unit(Protocol):
    """A part of a source that is done whole or not at all: an archive, or some thousand files. Can be pickled."""

    @property
    def name(self) -> str:
        """What its shards are called; unique within the source."""
        ...

    @property
    def weight(self) -> int:
        """How much work it is, relative to other units of the source: bytes of an archive, or images."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what the unit is made of (JSON), including its files (see `file_stats`): a unit with another identity
        is done again."""
        ...

    def items(self) -> Iterator[Item | Skipped]:
        """Give its images, in an order that is the same every time.

        Raises:
            ValueError, OSError: the unit as a whole cannot be read on, as an archive that is cut short.
        """
        ...


def unique(items: Iterable[Item | Skipped]) -> Iterator[Item | Skipped]:
    """Give the items; of those with the same image_id only the first is used."""
    places: dict[str, str] = {}  # where each is described
    for item in items:
        if isinstance(item, Item):
            if item.image_id in places:
                detail = f"the first is that of {places[item.image_id]}; expected an image_id of its own"
                item = skipped(item, TWICE, detail)
            else:
                places[item.image_id] = item.place
        yield item


def items_of(units: Iterable[Unit]) -> Iterator[Item | Skipped]:
    """Give the images of units one after another, up to one that cannot be read on."""
    try:
        for unit in units:
            yield from unit.items()
    except (ValueError, OSError):
        return


def text_fault(text: str) -> str:
    """Say why a caption or a phrase is not stored; empty for all but control characters and halves of surrogates."""
    if (match := _BAD.search(text)) is None:
        return ""
    return f"{text!r:.80} has U+{ord(match[0]):04X} at character {match.start()}; expected text"
