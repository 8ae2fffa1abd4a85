"""Images that have a file of annotations each, as in YOLO and Pascal VOC, some thousand at a time."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..file_stats import files_identity
from ..item import TWICE, Annotation, Item, Skipped
from .links import leaves
from .rows import MISSING, RowError, clean, item_or_why_not

WITHOUT_IMAGE = "annotations without their image"  # why an image is left out
NO_FILE = "its annotations are no file"
LABEL_IS_LINK, LABEL_TOO_LARGE = "its annotations are a link that leaves the folder", "its annotations are too large"
MAX_LABEL = 2**22  # bytes of a file of annotations: some ten thousand objects
LOOKED_AT = 1000  # images in which a box that can be used is looked for before anything is begun

_LOGGER = logging.getLogger(__name__)


class LabelReader(Protocol):
    """Reads annotations of one image. Can be pickled."""

    def read(self, label: bytes, image: Path) -> Annotation:
        """Annotations of an image.

        Raises:
            RowError: they cannot be read.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What annotations depend on beside their file (JSON)."""
        ...


@dataclass(frozen=True)
class LabelledImage:
    """An image and the file of its annotations, as paths from the root; "" for what is not there."""

    image: str
    label: str

    @property
    def image_id(self) -> str:
        name = self.image or self.label
        return clean("/".join(part for part in os.path.splitext(name)[0].split("/") if part != ".."))  # noqa: PTH122


@dataclass(frozen=True, kw_only=True)
class LabelledChunk:
    """Consecutive images of a source.

    Args:
        root: that the paths of images and of their annotations begin at.
        first: number of its first image, from 0. repeated: ids in it that an earlier image of the source has.
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
        said = {"kind": self.kind, "file": _name(self.root), "first": self.first, "count": self.weight}
        images = files_identity(self.root, (entry.image for entry in self.images))
        labels = files_identity(self.root, (entry.label for entry in self.images))
        return said | {"images": images, "labels": labels, **self.reader.identity()}

    def items(self) -> Iterator[Item | Skipped]:
        for k, entry in enumerate(self.images):
            yield item_or_why_not(partial(self._item, k), entry.image_id, k + 1, str(self._path(entry)))

    def _path(self, entry: LabelledImage) -> Path:
        return self.root / (entry.label or entry.image)

    def _item(self, k: int) -> Item:
        entry = self.images[k]
        if not entry.image:
            raise RowError(WITHOUT_IMAGE, f"there is no image {Path(entry.label).stem} for {self.root / entry.label}")
        if k in self.repeated:
            raise RowError(TWICE, f"{self.root / entry.image}; expected images whose names differ by more than .jpg")
        image = self.root / entry.image
        if not image.is_file():
            raise RowError(MISSING, f"{image}: there is no such file; expected the image that a list names")
        known = self.reader.read(self._contents(self.root / entry.label), image) if entry.label else Annotation()
        return Item(image_id=entry.image_id, image=image, done=k + 1, where=str(self._path(entry)), **vars(known))

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
    """Units of `unit_size` images each; how many images have no annotations is told.

    Raises:
        ValueError: there are no images, or no annotations of any.
    """
    if not any(entry.image for entry in images):
        raise ValueError(f"{root}: none of {len(images)} files of annotations has its image; name its folder: --images")
    if not any(entry.label for entry in images if entry.image):
        raise ValueError(f"{root}: none of {len(images)} images has a file of annotations ({kind})")
    without = [entry.image for entry in images if not entry.label]
    if without:
        _LOGGER.warning(
            "%s: %d of %d images have no file of annotations, as %s; they are taken as images without objects",
            root, len(without), sum(bool(entry.image) for entry in images), clean(without[0]),
        )  # fmt: skip
    chunks, seen = [], set()
    for first in range(0, len(images), unit_size):
        part = tuple(images[first : first + unit_size])
        repeated = set()
        for k, entry in enumerate(part):
            if entry.image and entry.image_id in seen:
                repeated.add(k)
            elif entry.image:
                seen.add(entry.image_id)
        chunk = LabelledChunk(
            name=f"{_name(root)}-{f'{split}-' if split else ''}{len(chunks):05d}",
            kind=kind,
            root=root,
            reader=reader,
            first=first,
            images=part,
            repeated=frozenset(repeated),
        )
        chunks.append(chunk)
    return chunks


def check_boxes(chunks: Sequence[LabelledChunk]) -> None:
    """Look for a box that can be used, in the first thousand images.

    Raises:
        ValueError: there are boxes, and all of them have a fault; it shows the first.
    """
    first, number = "", 0
    for item in islice((item for chunk in chunks for item in chunk.items()), LOOKED_AT):
        if isinstance(item, Item) and item.boxes:
            return
        if isinstance(item, Skipped) and item.reason not in (WITHOUT_IMAGE, TWICE):
            number += 1
            first = first or f"{item.place}: {item.reason}: {item.detail}"
        elif isinstance(item, Item) and item.dropped_examples:
            number += sum(item.dropped.values())
            reason, told = next(iter(item.dropped_examples.items()))
            first = first or f"{item.place}: {reason}: {told}"
    if first:
        raise ValueError(f"{first}. None of the {number} annotations that were looked at can be used")


def _name(root: Path) -> str:
    return os.path.basename(os.path.abspath(root))  # noqa: PTH100, PTH119, links stay as they are called


def relative(path: Path, root: Path) -> str:
    """A path as it is reached from the root, with slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def splits_in(paths: Sequence[str]) -> dict[str, str]:
    """The split that each path belongs to by one of its folders, where it does: path -> "train", "val" or "test"."""
    found = {}
    for path in paths:
        for part in path.lower().split("/")[:-1]:
            if part in SPLITS:
                found[path] = SPLITS[part]
    return found


SPLITS = {
    "train": "train", "training": "train", "train2017": "train", "train2014": "train", "obj_train_data": "train",
    "val": "val", "valid": "val", "validation": "val", "val2017": "val", "val2014": "val", "obj_valid_data": "val",
    "obj_validation_data": "val",
    "test": "test", "testing": "test", "test2017": "test", "obj_test_data": "test",
}  # fmt: skip


def split_name(said: str) -> str:
    """ "valid" -> "val"; what is none of the usual names stays as it is."""
    return SPLITS.get(said.lower(), said)


def tell_splits(source: Path, counts: dict[str, int]) -> None:
    """Say which splits are taken together, where there are several and none was chosen."""
    if len(counts) > 1:
        told = ", ".join(f"{name} ({number})" for name, number in counts.items())
        _LOGGER.warning("%s: all splits are taken: %s; --split takes one of them", source, told)


def find_files(folder: Path, ending: str) -> Iterator[Path]:
    """Files with this ending, in small or large letters, here and in the folders below, by name; no hidden ones.

    Links to files are among them, wherever they lead; pipes and the like are not.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_files(Path(entry.path), ending)
        elif entry.name.lower().endswith(ending) and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def head_of(file: Path, size: int) -> bytes:
    """The first bytes of a file; nothing of what is none or cannot be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return b""
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError:
        return b""
