"""Folders of images alone, some thousand at a time."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ...io import decode_text
from ..file_stats import files_identity
from ..item import Item, Skipped, unique
from .paths import find_images, leaves
from .rows import WRONG_CAPTION, RowError, clean, item_or_skipped, read_caption

MAX_CAPTION = 2**16  # bytes of a .txt beside an image


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """Consecutive images of a folder and of those below it, by path; captions in a .txt of the same name.

    Args:
        first, last: paths of the first and the last, below the folder. count: of images.
        sha256: of their paths, their sizes in bytes, and their captions. images: see `files_identity`.
        unread: files of the whole folder that are neither images nor their captions, by ending; the first unit has it.
    """

    name: str
    folder: Path
    first: str
    last: str
    count: int
    sha256: str
    images: str
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        numbers = {"count": self.count, "sha256": self.sha256, "images": self.images}
        return {"kind": "imagefolder", "file": self.folder.name, **numbers}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item | Skipped]:
        end = Path(self.last).parts
        for done, path in enumerate(find_images(self.folder, Path(self.first).parts), start=1):
            inner = path.relative_to(self.folder)
            if inner.parts > end:
                return
            image_id = clean(inner.with_suffix("").as_posix())
            item = item_or_skipped(partial(_item, self.folder, path, image_id, done), image_id, done, str(path))
            yield replace(item, unread=self.unread) if done == 1 else item


def image_chunks(folder: Path, name: str, unit_size: int) -> list[ImageChunk]:
    """Cut the images of a folder into units of `unit_size`; no units if there are no images."""
    chunks: list[ImageChunk] = []
    others: Counter[str] = Counter()
    paths = find_images(folder, others=others)
    while part := list(islice(paths, unit_size)):
        inner = [path.relative_to(folder).as_posix() for path in part]
        lines = [json.dumps([where, *_contents(folder, path)]) for where, path in zip(inner, part, strict=True)]
        chunk = ImageChunk(
            name=f"{name}-{len(chunks):05d}",
            folder=folder,
            first=inner[0],
            last=inner[-1],
            count=len(part),
            sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            images=files_identity(folder, inner),
        )
        chunks.append(chunk)
    return [replace(chunk, unread=dict(others) if chunk is chunks[0] else {}) for chunk in chunks]


def _item(folder: Path, image: Path, image_id: str, done: int) -> Item:
    """Read the caption beside an image; it is empty if there is none.

    Raises:
        RowError: the caption is not UTF-8, too long, or holds control characters.
    """
    contents, path = _read_text(folder, image), image.with_suffix(".txt")
    if len(contents) > MAX_CAPTION:
        raise RowError(WRONG_CAPTION, f"{path} has more than {MAX_CAPTION} bytes; expected a caption")
    return Item(image_id=image_id, image=image, caption=read_caption(contents, str(path)), done=done)


def _contents(folder: Path, image: Path) -> tuple[int | str | None, ...]:
    """Return what the checksum of a unit has of an image: its size and its caption, or why it cannot be read."""
    try:
        text, size = _read_text(folder, image), image.stat().st_size
        try:
            return size, clean(decode_text(text))
        except ValueError:  # not text: then its bytes
            return size, "bytes", text.hex()
    except OSError as error:
        return (error.errno,)


def _read_text(folder: Path, image: Path) -> bytes:
    text = image.with_suffix(".txt")
    if leaves(folder, text):
        what = f"{text} is a link to a file outside of {folder}, and no caption; copy that file there"
        warnings.warn(what, stacklevel=1)
        return b""
    try:
        with text.open("rb") as file:
            return file.read(MAX_CAPTION + 1)
    except (FileNotFoundError, IsADirectoryError):
        return b""
