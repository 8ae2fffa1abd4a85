"""Archives as units of a source: SA-1B's, and webdatasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS, MAX_BYTES
from ...io import checksum
from ..item import Item, Skipped, unique
from .json_members import members
from .rows import RowError, check_first, item_or_skipped, read_annotation, read_caption, read_row, stated_size
from .tars import DOTS, Reading, TarSample, count_unread, read_samples, returning_member

TARS = (".tar", ".tar.gz", ".tgz")

# Bytes that are read of a file. JSON, when parsed, can take thirty times its own.
SA1B_LIMITS = dict.fromkeys(ENDINGS, MAX_BYTES) | {"json": 2**24}
CAPTION_ENDINGS = ("txt", "text", "caption.txt", "text.txt", "prompt.txt", "caption")  # the first that is there
LIMITS = SA1B_LIMITS | dict.fromkeys(CAPTION_ENDINGS, 2**20)

NO_IMAGE_BESIDE = "no image beside its text"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One archive.

    Args:
        kind: "sa1b" or "webdataset".
        box_format: of webdatasets, where a sample does not name its own.
        reading: of the last time that all of its items were taken.
    """

    path: Path
    kind: str
    box_format: str | None = None
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    @property
    def name(self) -> str:
        return archive_name(self.path)

    @property
    def weight(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        stat = self.path.stat()
        identity = {"kind": self.kind, "file": self.path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        return identity if self.kind == "sa1b" else identity | {"box_format": self.box_format}

    def sha256(self) -> str:
        """Read the whole file as it is on the disk now, and return its checksum."""
        return checksum(self.path)

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def check(self) -> None:
        """Raise ValueError if its first samples have a fault that all have, see `check_first`, or if one of its samples
        comes back: most likely, those of the other archives do.

        An archive that cannot be read is another matter.
        """
        if self.kind == "webdataset":
            if returning := returning_member(self.path, LIMITS):
                raise self._comes_back(*returning)
            check_first(self._readers())

    def _readers(self) -> Iterator[tuple[str, partial[Item]]]:
        try:
            for sample in self._samples():
                if (ending := sample.image) in sample.files:
                    yield (
                        f"{self.path}, sample {sample.key}",
                        partial(_webdataset_item, sample, ending, self.box_format),
                    )
        except ValueError:
            return

    def _samples(self) -> Iterator[TarSample]:
        samples = read_samples(self.path, LIMITS if self.kind == "webdataset" else SA1B_LIMITS, reading=self.reading)
        return self._adjacent(samples) if self.kind == "webdataset" else samples

    def _adjacent(self, samples: Iterable[TarSample]) -> Iterator[TarSample]:
        """Raise ValueError if a sample comes back: an image would be used without its boxes. (SA-1B's JSON holds a size
        that the image has too.)"""
        seen: set[str] = set()
        for sample in samples:
            if sample.key in seen:
                raise self._comes_back(sample.key, ", .".join([*sample.files, *sample.refused]))
            seen.add(sample.key)
            yield sample

    def _comes_back(self, key: str, endings: str) -> ValueError:
        return ValueError(
            f"{self.path}: sample {key} comes back with .{endings}; expected all files of a sample next to each other, "
            "once: make the archive anew with tar --sort=name (GNU tar)"
        )

    def _items(self) -> Iterator[Item | Skipped]:
        for sample in self._samples():
            where = f"{self.path}, sample {sample.key}"
            if sample.image is not None:  # what else looks like one is a mask, or a map of depths
                count_unread(sample.unread, {f".{ending}": 1 for ending, why in sample.refused.items() if why == DOTS})
            for k, result in enumerate(self._results(sample, where)):
                yield replace(result, done=sample.done, where=where, unread={} if k else dict(sample.unread))

    def _results(self, sample: TarSample, where: str) -> Iterator[Item | Skipped]:
        ending = sample.image
        if ending is None:
            yield from self._without_image(sample)
        elif ending in sample.refused:
            detail = f"{sample.key}.{ending}; expected a file of at most {LIMITS.get(ending, 0)} bytes, below the root"
            yield Skipped(image_id=sample.key, reason=sample.refused[ending], detail=detail)
        elif self.kind == "sa1b":
            yield _sa1b_item(sample, ending)
        else:
            read = partial(_webdataset_item, sample, ending, self.box_format)
            yield item_or_skipped(read, sample.key, sample.done, where)

    def _without_image(self, sample: TarSample) -> Iterator[Skipped]:
        dotted = [ending for ending, why in sample.refused.items() if why == DOTS]
        for ending in dotted:
            yield Skipped(image_id=f"{sample.key}.{ending}", reason=DOTS, detail=f"it is {sample.key}.{ending}")
        if not dotted and self.kind == "webdataset":  # SA-1B's JSON, where it is elsewhere, is no loss
            endings = ", ".join(f".{ending}" for ending in (*sample.files, *sample.refused, *sample.unread))
            detail = f"it has {endings}; expected an image of the same name"
            yield Skipped(image_id=sample.key, reason=NO_IMAGE_BESIDE, detail=detail)


def _sa1b_item(sample: TarSample, ending: str) -> Item:
    """Read the image, and its size if its JSON lies beside it. SA-1B's masks have no phrases, so no boxes."""
    size = _sa1b_size(sample.files["json"]) if "json" in sample.files else None
    image_id = sample.key.rpartition("/")[2]
    return Item(image_id=image_id, image=sample.files[ending], size=size, done=sample.done)


def _sa1b_size(contents: bytes) -> tuple[int, int] | None:
    """Read the size in `{"image": {"width": ..., "height": ...}, "annotations": [...]}`, without its annotations.

    JSON that is damaged, or lacks the size, says nothing: the image's own header then does.
    """
    try:
        image = next((value for key, value in members(contents.decode("utf-8-sig", "replace")) if key == "image"), None)
    except ValueError:
        return None
    return stated_size(image) if isinstance(image, dict) else None


def _webdataset_item(sample: TarSample, ending: str, box_format: str | None) -> Item:
    """Read an image with its `.txt` (or another of `CAPTION_ENDINGS`), or the caption of its `.json`; boxes as in a row
    of metadata.jsonl.

    Raises:
        RowError, ImageError: as `read_annotation`.
    """
    image = sample.files[ending]
    for text in ("json", *CAPTION_ENDINGS):
        if why := sample.refused.get(text):
            raise RowError(f"its .{text}: {why}", f"expected at most {LIMITS[text]} bytes, in a plain file")
    row = read_row(sample.files["json"]) if "json" in sample.files else {}
    annotation = read_annotation(row, image, box_format)
    text = next((ending for ending in CAPTION_ENDINGS if ending in sample.files), None)
    if text is not None:
        annotation = replace(annotation, caption=read_caption(sample.files[text], f"{sample.key}.{text}"))
    return Item(image_id=sample.key, image=image, done=sample.done, **vars(annotation))


def find_archives(path: Path) -> list[Path]:
    """Return the archive itself, or those of a folder by name.

    Raises:
        ValueError: two of them would have the same name.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if is_archive(file))
    by_name: dict[str, Path] = {}
    for file in files:
        name = archive_name(file)
        if name in by_name:
            raise ValueError(f"{by_name[name]} and {file.name} would both be called {name}; leave one of them out")
        by_name[name] = file
    return files


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(TARS) and not path.name.startswith(".") and path.is_file()


def archive_name(path: Path) -> str:
    """Return the name of an archive without its ending."""
    ending = next((ending for ending in TARS if path.name.lower().endswith(ending)), "")
    return path.name[: len(path.name) - len(ending)]
