"""Folders of pictures alone, some thousand at a time."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from .item import Item, Skipped
from .links import leaves
from .pictures import ENDINGS
from .rows import clean, item_or_why_not, unique

MAX_CAPTION = 2**16  # bytes of a .txt beside a picture


@dataclass(frozen=True, kw_only=True)
class PictureChunk:
    """Consecutive pictures of a folder and of those below it, by path; captions in a .txt of the same name.

    Args:
        first, last: paths of the first and the last, below the folder. count: of pictures.
        sha256: of their paths, their sizes in bytes, and their captions.
    """

    name: str
    folder: Path
    first: str
    last: str
    count: int
    sha256: str

    @property
    def weight(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        return {"kind": "imagefolder", "file": self.folder.name, "count": self.count, "sha256": self.sha256}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item | Skipped]:
        end = Path(self.last).parts
        for done, path in enumerate(find_pictures(self.folder, Path(self.first).parts), start=1):
            inner = path.relative_to(self.folder)
            if inner.parts > end:
                return
            image_id = clean(inner.with_suffix("").as_posix())
            yield item_or_why_not(partial(_item, self.folder, path, image_id, done), image_id, done)


def picture_chunks(folder: Path, name: str, unit_size: int) -> list[PictureChunk]:
    """Units of `unit_size` pictures each; none where there are none."""
    chunks: list[PictureChunk] = []
    paths = find_pictures(folder)
    while part := list(islice(paths, unit_size)):
        inner = [path.relative_to(folder).as_posix() for path in part]
        lines = [json.dumps([where, *_facts(folder, path)]) for where, path in zip(inner, part, strict=True)]
        chunk = PictureChunk(
            name=f"{name}-{len(chunks):05d}",
            folder=folder,
            first=inner[0],
            last=inner[-1],
            count=len(part),
            sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        )
        chunks.append(chunk)
    return chunks


def find_pictures(folder: Path, begin: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files with the ending of a picture, here and in the folders below, in the order of the parts of their paths.

    Hidden ones are left out. Links to files are followed, links to folders are not: they may lead round in a circle.

    Args:
        begin: parts of a path below the folder; what comes before it is left out, without a look at its folders.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or (begin and entry.name < begin[0]):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_pictures(Path(entry.path), begin[1:] if begin[:1] == (entry.name,) else ())
        elif entry.name.rpartition(".")[2].lower() in ENDINGS and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def _item(folder: Path, picture: Path, image_id: str, done: int) -> Item:
    return Item(image_id=image_id, picture=picture, caption=_caption(folder, picture), done=done)


def _facts(folder: Path, picture: Path) -> tuple[int | str | None, ...]:
    """Its size in bytes and its caption; of one that cannot be read, why."""
    try:
        return picture.stat().st_size, _caption(folder, picture)
    except OSError as error:
        return (error.errno,)


def _caption(folder: Path, picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if leaves(folder, text):
        what = f"{text} is a link to a file outside of {folder}, and no caption; copy that file there"
        warnings.warn(what, stacklevel=2)
        return ""
    try:
        with text.open("rb") as file:
            return clean(file.read(MAX_CAPTION).decode("utf-8-sig", "replace"))
    except (FileNotFoundError, IsADirectoryError):
        return ""
