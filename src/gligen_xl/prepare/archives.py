"""Archives as units of a source: SA-1B's, and webdatasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .item import Item, Skipped
from .json_members import members
from .pictures import ENDINGS, MAX_BYTES
from .rows import RowError, check_first, clean, item_or_why_not, read_annotation, read_row, stated_size, unique
from .tars import DOTS, TarSample, read_samples

TARS = (".tar", ".tar.gz", ".tgz")

# Bytes that are read of a file. JSON, when parsed, can take thirty times its own.
SA1B_LIMITS = dict.fromkeys(ENDINGS, MAX_BYTES) | {"json": 2**24}
LIMITS = SA1B_LIMITS | {"txt": 2**20}

NO_PICTURE_BESIDE = "no picture beside its text"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One archive.

    Args:
        kind: "sa1b" or "webdataset".
        box_format: of webdatasets, where a sample does not name its own.
    """

    path: Path
    kind: str
    box_format: str | None = None

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return archive_name(self.path)

    @property
    def weight(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        identity = {"kind": self.kind, "file": self.path.name, "bytes": self.weight}
        return identity if self.kind == "sa1b" else identity | {"box_format": self.box_format}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def check(self) -> None:
        """Raises ValueError where its first samples have a fault that all have, see `check_first`.

        An archive that cannot be read is another matter.
        """
        if self.kind == "webdataset":
            check_first(self._readers())

    def _readers(self) -> Iterator[tuple[str, Callable[[], Item]]]:
        try:
            for sample in self._samples():
                if (ending := sample.picture) in sample.files:
                    yield f"{self.path}, sample {sample.key}", partial(webdataset_item, sample, ending, self.box_format)
        except ValueError:
            return

    def _samples(self) -> Iterator[TarSample]:
        return read_samples(self.path, LIMITS if self.kind == "webdataset" else SA1B_LIMITS)

    def _items(self) -> Iterator[Item | Skipped]:
        for sample in self._samples():
            ending = sample.picture
            if ending is None:
                yield from self._without_picture(sample)
            elif ending in sample.refused:
                yield Skipped(image_id=sample.key, reason=sample.refused[ending], done=sample.done)
            elif self.kind == "sa1b":
                yield sa1b_item(sample, ending)
            else:
                yield item_or_why_not(
                    partial(webdataset_item, sample, ending, self.box_format), sample.key, done=sample.done
                )

    def _without_picture(self, sample: TarSample) -> Iterator[Skipped]:
        dotted = [ending for ending, why in sample.refused.items() if why == DOTS]
        for ending in dotted:
            yield Skipped(image_id=f"{sample.key}.{ending}", reason=DOTS, done=sample.done)
        if not dotted and self.kind == "webdataset":  # SA-1B's JSON, where it stands elsewhere, is no loss
            yield Skipped(image_id=sample.key, reason=NO_PICTURE_BESIDE, done=sample.done)


def sa1b_item(sample: TarSample, ending: str) -> Item:
    """The picture, and its size where its JSON stands beside it. SA-1B's masks have no phrases, so no boxes."""
    size = _sa1b_size(sample.files["json"]) if "json" in sample.files else None
    image_id = sample.key.rpartition("/")[2]
    return Item(image_id=image_id, picture=sample.files[ending], size=size, done=sample.done)


def webdataset_item(sample: TarSample, ending: str, box_format: str | None) -> Item:
    """A picture with its `.txt`, or the caption of its `.json`; boxes as in a row of metadata.jsonl.

    Raises:
        RowError, PictureError: as `read_annotation`.
    """
    picture = sample.files[ending]
    for text in ("json", "txt"):
        if why := sample.refused.get(text):
            raise RowError(f"its .{text}: {why}", f"{sample.key} is left out with it")
    row = read_row(sample.files["json"]) if "json" in sample.files else {}
    known = read_annotation(row, picture, box_format)
    if "txt" in sample.files:
        known = replace(known, caption=clean(sample.files["txt"].decode("utf-8-sig", "replace")))
    return Item(image_id=sample.key, picture=picture, done=sample.done, **vars(known))


def find_archives(path: Path) -> list[Path]:
    """The archive itself, or those of a folder by name.

    Raises:
        ValueError: two of them would have the same name.
    """
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if is_archive(file))
    by_name: dict[str, Path] = {}
    for file in found:
        name = archive_name(file)
        if name in by_name:
            raise ValueError(f"{by_name[name]} and {file.name} would both be called {name}; leave one of them out")
        by_name[name] = file
    return found


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(TARS) and not path.name.startswith(".") and path.is_file()


def archive_name(path: Path) -> str:
    ending = next((ending for ending in TARS if path.name.lower().endswith(ending)), "")
    return path.name[: len(path.name) - len(ending)]


def _sa1b_size(contents: bytes) -> tuple[int, int] | None:
    """Of `{"image": {"width": ..., "height": ...}, "annotations": [...]}`, without its annotations.

    JSON that is damaged, or lacks the size, says nothing: the picture's own header then does.
    """
    try:
        image = next((value for key, value in members(contents.decode("utf-8", "replace")) if key == "image"), None)
    except ValueError:
        return None
    return stated_size(image) if isinstance(image, dict) else None
