"""Folders of pictures alone, some thousand at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .item import Item, Skipped
from .pictures import ENDINGS
from .rows import clean, unique

MAX_CAPTION = 2**16  # bytes of a .txt beside a picture


@dataclass(frozen=True, kw_only=True)
class PictureChunk:
    """Consecutive pictures of a folder and of those below it, by path; captions in a .txt of the same name.

    Args:
        first: number of its first picture, from 0. count: of pictures.
        sha256: of their paths and sizes in bytes.
    """

    name: str
    folder: Path
    first: int
    count: int
    sha256: str

    @property
    def weight(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        numbers = {"first": self.first, "count": self.count, "sha256": self.sha256}
        return {"kind": "imagefolder", "file": self.folder.name, **numbers}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item]:
        paths = islice(find_pictures(self.folder), self.first, self.first + self.count)
        for done, path in enumerate(paths, start=1):
            image_id = path.relative_to(self.folder).with_suffix("").as_posix()
            yield Item(image_id=clean(image_id), picture=path, caption=_caption(path.with_suffix(".txt")), done=done)


def picture_chunks(folder: Path, name: str, unit_size: int) -> list[PictureChunk]:
    """Units of `unit_size` pictures each; none where there are none."""
    chunks, first = [], 0
    paths = find_pictures(folder)
    while part := list(islice(paths, unit_size)):
        lines = [json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]) for path in part]
        sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        chunk = PictureChunk(
            name=f"{name}-{len(chunks):05d}", folder=folder, first=first, count=len(part), sha256=sha256
        )
        chunks.append(chunk)
        first += len(part)
    return chunks


def find_pictures(folder: Path) -> Iterator[Path]:
    """Files with the ending of a picture, here and in the folders below, in an order that is the same every time.

    Hidden ones are left out. Links to files are followed, links to folders are not: they may lead round in a circle.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_pictures(Path(entry.path))
        elif entry.name.rpartition(".")[2].lower() in ENDINGS and entry.is_file():
            yield Path(entry.path)


def _caption(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return clean(file.read(MAX_CAPTION).decode("utf-8-sig", "replace"))
    except (FileNotFoundError, IsADirectoryError):
        return ""
