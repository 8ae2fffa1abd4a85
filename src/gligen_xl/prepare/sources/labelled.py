"""Images that have a file of annotations each, as in YOLO and Pascal VOC, some thousand at a time."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..file_stats import files_identity
from ..item import TWICE, Annotation, Item, Skipped
from .paths import folder_name, leaves, without_ending
from .rows import MISSING, RowError, clean, item_or_skipped

# Reasons why an image is left out.
WITHOUT_IMAGE, NO_FILE = "annotations without their image", "its annotations are no file"
LABEL_IS_LINK, LABEL_TOO_LARGE = "its annotations are a link that leaves the folder", "its annotations are too large"
MAX_LABEL = 2**22  # bytes of a file of annotations: some ten thousand objects
FIRST_IMAGES = 1000  # in which a box that can be used is looked for before anything is begun

_LOGGER = logging.getLogger(__name__)


class LabelReader(Protocol):
    """Reads annotations of one image. Can be pickled."""

    def read(self, label: bytes, image: Path) -> Annotation:
        """Read the annotations of an image.

        Raises:
            RowError: they cannot be read.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return what annotations depend on beside their file (JSON)."""
        ...


@dataclass(frozen=True)
class LabelledImage:
    """An image and the file of its annotations, as paths from the root; "" for what is missing."""

    image: str
    label: str

    @property
    def path(self) -> str:
        return self.image or self.label

    @property
    def image_id(self) -> str:
        return clean("/".join(part for part in without_ending(self.path).split("/") if part != ".."))


@dataclass(frozen=True, kw_only=True)
class LabelledChunk:
    """Consecutive images of a source.

    Args:
        root: that the paths of images and of their annotations begin at.
        first: number of its first image, from 0. repeated: places in it of ids that an earlier image of the source has.
    """

    name: str
    kind: str
    root: Path
    reader: LabelReader
    first: int
    images: tuple[LabelledImage, ...]
    repeated: frozenset[int] = frozenset()

    @property
    def weight(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        values = {"kind": self.kind, "file": folder_name(self.root), "first": self.first, "count": self.weight}
        images = files_identity(self.root, (entry.image for entry in self.images))
        labels = files_identity(self.root, (entry.label for entry in self.images))
        return values | {"images": images, "labels": labels, **self.reader.identity()}

    def items(self) -> Iterator[Item | Skipped]:
        for k, entry in enumerate(self.images):
            yield item_or_skipped(partial(self._item, k), entry.image_id, k + 1, self._where(entry))

    def _where(self, entry: LabelledImage) -> str:
        return str(self.root / (entry.label or entry.image))

    def _item(self, k: int) -> Item:
        entry = self.images[k]
        image, label = self.root / entry.image, self.root / entry.label
        if not entry.image:
            raise RowError(WITHOUT_IMAGE, f"there is no image {label.stem} for {label}")
        if k in self.repeated:
            raise RowError(TWICE, f"{image}; expected images whose names differ by more than .jpg")
        if not image.is_file():
            raise RowError(MISSING, f"{image}: there is no such file; expected the image that a list names")
        annotation = self.reader.read(self._contents(label), image) if entry.label else Annotation()
        return Item(image_id=entry.image_id, image=image, done=k + 1, where=self._where(entry), **vars(annotation))

    def _contents(self, label: Path) -> bytes:
        if leaves(self.root, label) and leaves(label.parent, label):
            raise RowError(LABEL_IS_LINK, f"{label}; put a copy of the file there")
        if not stat.S_ISREG(label.stat().st_mode):  # a pipe would be waited for
            raise RowError(NO_FILE, f"{label}; expected a file")
        with label.open("rb") as file:
            contents = file.read(MAX_LABEL + 1)
        if len(contents) > MAX_LABEL:
            raise RowError(LABEL_TOO_LARGE, f"{label}; expected at most {MAX_LABEL} bytes")
        return contents


def labelled_chunks(
    kind: str,
    root: Path,
    images: Sequence[LabelledImage],
    reader: LabelReader,
    unit_size: int,
    split: str | None = None,
) -> list[LabelledChunk]:
    """Cut images into units of `unit_size`, and warn of those without annotations.

    Raises:
        ValueError: there are no images, no annotations of any, or all of the first boxes have a fault.
    """
    if not any(entry.image for entry in images):
        raise ValueError(f"{root}: none of {len(images)} files of annotations has its image; name its folder: --images")
    if not any(entry.label for entry in images if entry.image):
        raise ValueError(f"{root}: none of {len(images)} images has a file of annotations ({kind})")
    if without := [entry.image for entry in images if not entry.label]:
        _LOGGER.warning(
            "%s: %d of %d images have no file of annotations, as %s; they are taken as images without objects",
            root, len(without), sum(bool(entry.image) for entry in images), clean(without[0]),
        )  # fmt: skip
    chunks: list[LabelledChunk] = []
    ids: set[str] = set()
    for first in range(0, len(images), unit_size):
        part = tuple(images[first : first + unit_size])
        repeated = set()
        for k, entry in enumerate(part):
            if entry.image and entry.image_id in ids:
                repeated.add(k)
            elif entry.image:
                ids.add(entry.image_id)
        chunk = LabelledChunk(
            name=f"{folder_name(root)}-{f'{split}-' if split else ''}{len(chunks):05d}",
            kind=kind,
            root=root,
            reader=reader,
            first=first,
            images=part,
            repeated=frozenset(repeated),
        )
        chunks.append(chunk)
    _check_boxes(chunks)
    return chunks


def _check_boxes(chunks: Sequence[LabelledChunk]) -> None:
    """Look for a box that can be used, in the first thousand images.

    Raises:
        ValueError: there are boxes, and all of them have a fault; the error shows the first.
    """
    first, number = "", 0
    for item in islice((item for chunk in chunks for item in chunk.items()), FIRST_IMAGES):
        if isinstance(item, Item) and item.boxes:
            return
        if isinstance(item, Skipped) and item.reason not in (WITHOUT_IMAGE, TWICE):
            number += 1
            first = first or f"{item.place}: {item.reason}: {item.detail}"
        elif isinstance(item, Item) and item.dropped_examples:
            number += sum(item.dropped.values())
            reason, example = next(iter(item.dropped_examples.items()))
            first = first or f"{item.place}: {reason}: {example}"
    if first:
        raise ValueError(f"{first}. None of the {number} annotations that were looked at can be used")
