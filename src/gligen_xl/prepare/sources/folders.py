"""Folders of images alone, some thousand at a time."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS
from ...io import decode_text
from ..file_stats import files_identity
from ..item import BAD_TEXT, Item, Skipped, text_fault, unique
from .links import leaves
from .rows import CAPTION_NOT_UTF8, WRONG_CAPTION, RowError, check_caption, clean, item_or_why_not
from .tars import count_unread

MAX_CAPTION = 2**16  # bytes of a .txt beside an image


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """Consecutive images of a folder and of those below it, by path; captions in a .txt of the same name.

    Args:
        first, last: paths of the first and the last, below the folder. count: of images.
        sha256: of their paths, their sizes in bytes, and their captions. images: see `files_identity`.
        unread: files of the whole folder that are neither images nor their captions, by ending; the first unit tells.
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
            item = item_or_why_not(partial(_item, self.folder, path, image_id, done), image_id, done, str(path))
            yield replace(item, unread=self.unread) if done == 1 else item


def image_chunks(folder: Path, name: str, unit_size: int) -> list[ImageChunk]:
    """Units of `unit_size` images each; none where there are none."""
    chunks: list[ImageChunk] = []
    others: Counter[str] = Counter()
    paths = find_images(folder, others=others)
    while part := list(islice(paths, unit_size)):
        inner = [path.relative_to(folder).as_posix() for path in part]
        lines = [json.dumps([where, *_facts(folder, path)]) for where, path in zip(inner, part, strict=True)]
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


def find_images(folder: Path, begin: tuple[str, ...] = (), *, others: Counter[str] | None = None) -> Iterator[Path]:
    """Files with the ending of an image, here and in the folders below, in the order of the parts of their paths.

    Hidden ones are left out. Links to files are followed, links to folders are not: they may lead round in a circle.

    Args:
        begin: parts of a path below the folder; what comes before it is left out, without a look at its folders.
        others: counts files that are neither images nor the `.txt` of one, by ending, as they are met.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    if others is not None:
        _count_others(entries, others)
    for entry in entries:
        if entry.name.startswith(".") or (begin and entry.name < begin[0]):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_images(Path(entry.path), begin[1:] if begin[:1] == (entry.name,) else (), others=others)
        elif entry.name.rpartition(".")[2].lower() in ENDINGS and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def _count_others(entries: list[os.DirEntry[str]], others: Counter[str]) -> None:
    images = {
        stem for stem, _, ending in (entry.name.rpartition(".") for entry in entries) if ending.lower() in ENDINGS
    }
    for entry in entries:
        stem, _, ending = entry.name.rpartition(".")
        caption = ending == "txt" and stem in images
        if (
            stem
            and ending.lower() not in ENDINGS
            and not caption
            and not entry.name.startswith(".")
            and entry.is_file()
        ):
            count_unread(others, {f".{ending}"[:40]: 1})


def _item(folder: Path, image: Path, image_id: str, done: int) -> Item:
    return Item(image_id=image_id, image=image, caption=_caption(folder, image), done=done)


def _facts(folder: Path, image: Path) -> tuple[int | str | None, ...]:
    """Its size in bytes and its caption; of one that cannot be read, why."""
    try:
        contents = _read_caption(folder, image)
        try:
            return image.stat().st_size, clean(decode_text(contents))
        except ValueError:  # not text: then its bytes
            return image.stat().st_size, "bytes", contents.hex()
    except OSError as error:
        return (error.errno,)


def _caption(folder: Path, image: Path) -> str:
    """The text beside an image; empty where there is none.

    Raises:
        RowError: it is not UTF-8, too long, or holds control characters.
    """
    contents, path = _read_caption(folder, image), image.with_suffix(".txt")
    if len(contents) > MAX_CAPTION:
        raise RowError(WRONG_CAPTION, f"{path} has more than {MAX_CAPTION} bytes; expected a caption")
    try:
        caption = decode_text(contents).strip()
    except ValueError as error:
        raise RowError(CAPTION_NOT_UTF8, f"{path}: {error}") from error
    if fault := text_fault(caption):
        raise RowError(BAD_TEXT, f"{path}: {fault}")
    check_caption(caption, str(path))
    return caption


def _read_caption(folder: Path, image: Path) -> bytes:
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
