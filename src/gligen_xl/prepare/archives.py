"""Archives as units of a source: SA-1B's, and webdatasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .item import Item, Skipped
from .json_members import members
from .pictures import ENDINGS, PictureError
from .rows import RowError, clean, read_annotation, read_row, stated_size, unique
from .tars import TarSample, read_samples

TARS = (".tar", ".tar.gz", ".tgz")

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
        """Read the first sample's boxes: if they are not understood, those of the others will not be.

        Raises:
            RowError: as `read_annotation`. An archive that cannot be read is another matter.
        """
        try:
            sample = next(self._samples(), None)
        except ValueError:
            return
        if self.kind == "webdataset" and sample is not None and (ending := _picture(sample)) in sample.files:
            try:
                webdataset_item(sample, ending, self.box_format)
            except PictureError:
                return

    def _samples(self) -> Iterator[TarSample]:
        texts = ("json",) if self.kind == "sa1b" else ("json", "txt")
        return read_samples(self.path, (*ENDINGS, *texts))

    def _items(self) -> Iterator[Item | Skipped]:
        for sample in self._samples():
            ending = _picture(sample)
            if ending is None:
                if self.kind == "webdataset":  # SA-1B's JSON, where it stands elsewhere, is no loss
                    yield Skipped(image_id=sample.key, reason=NO_PICTURE_BESIDE, done=sample.done)
            elif ending in sample.refused:
                yield Skipped(image_id=sample.key, reason=sample.refused[ending], done=sample.done)
            elif self.kind == "sa1b":
                yield sa1b_item(sample, ending)
            else:
                try:
                    yield webdataset_item(sample, ending, self.box_format)
                except (RowError, PictureError) as error:
                    yield Skipped(image_id=sample.key, reason=error.reason, done=sample.done)


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
    if refused := sample.refused.get("json"):
        raise RowError(refused, "its .json was not read")
    row = read_row(sample.files["json"]) if "json" in sample.files else {}
    known = read_annotation(row, picture, box_format)
    caption = clean(sample.files["txt"].decode("utf-8-sig", "replace")) if "txt" in sample.files else known.caption
    return Item(
        image_id=sample.key,
        picture=picture,
        caption=caption,
        boxes=known.boxes,
        phrases=known.phrases,
        scores=known.scores,
        size=known.size,
        done=sample.done,
        dropped=known.dropped,
    )


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


def _picture(sample: TarSample) -> str | None:
    """The ending of its first picture."""
    return next((ending for ending in (*sample.files, *sample.refused) if ending in ENDINGS), None)


def _sa1b_size(contents: bytes) -> tuple[int, int] | None:
    """Of `{"image": {"width": ..., "height": ...}, "annotations": [...]}`, without its annotations.

    JSON that is damaged, or lacks the size, says nothing: the picture's own header then does.
    """
    try:
        image = next((value for key, value in members(contents.decode("utf-8", "replace")) if key == "image"), None)
    except ValueError:
        return None
    return stated_size(image) if isinstance(image, dict) else None
