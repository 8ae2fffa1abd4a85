"""The published sets become shards: pairs of `.npy` files of latents and boxes, archive by archive."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ...data.box_statistics import BoxStatistics, of_shards
from ...data.shard_writer import ShardWriter
from ...data.shards import DOWNSAMPLING, Row, Shard, has_shard, latents_file, read_header, table_files
from ...images.crop import square_frame
from ...io import write_json
from ...limits import MAX_PHRASE
from .published import SCALING_FACTOR, VAE, PublishedRow, read_boxes, read_latents

REPORT_NAME = "import.json"
LOCK_FOLDER = ".imported"  # beside the shards: a lock for each archive
SAMPLE = 1 << 16  # bytes at either end of a file that tell it from another of its size


@dataclass
class ImportReport:
    """What became of every archive and of its images."""

    images: int = 0  # written
    boxes: int = 0
    without_boxes: int = 0  # images
    skipped: Counter[str] = field(default_factory=Counter)  # images, by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    without_size: int = 0  # images whose size is not known, and taken to be that of the latents
    archives: dict[str, str] = field(default_factory=dict)  # written, already there, or why not

    @property
    def statistics(self) -> BoxStatistics:
        """Of the images that were written."""
        return BoxStatistics(images=self.images, boxes=self.boxes, without=self.without_boxes)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped), "dropped_boxes": dict(self.dropped_boxes)}

    def __str__(self) -> str:
        failed = {name: what for name, what in self.archives.items() if what not in ("written", "already there")}
        already = sum(what == "already there" for what in self.archives.values())
        lines = [f"{self.images} images with {self.boxes} boxes from {len(self.archives) - len(failed)} archives"]
        lines[0] += f", {already} of which stood there already" if already else ""
        lines.append(f"boxes: {self.statistics}")
        for title, counts in (("images skipped", self.skipped), ("boxes dropped", self.dropped_boxes)):
            lines += [f"{title}, {reason}: {number}" for reason, number in counts.most_common()]
        if self.without_size:
            lines.append(f"images without their original size, taken to be that of the latents: {self.without_size}")
        return "\n".join(lines + [f"failed: {name}: {what}" for name, what in failed.items()])


def import_published(
    latents: str | Path,
    boxes: str | Path,
    out: str | Path,
    *,
    sizes: str | Path | None = None,
    progress: Callable[[list[str]], Iterable[str]] = list,
) -> ImportReport:
    """Write a shard under `out` for every pair of files of the same name; one that was made of the same files is kept.

    Several may be at one folder at once: each archive is done by one of them.

    Args:
        latents: folder of `jiuntian/sa1b-sdxl-latents-512` or `-1024`. boxes: of `longlian/sa-1b_boxes` or
            `jiuntian/sa-1b_boxes_sdxl`.
        sizes: another folder of tables of six columns, for the original sizes that tables of five lack.
        progress: wraps the names of the archives, as a progress bar does.

    An archive that fails does not stop the others; the report, also written to `import.json`, says why.

    Raises:
        FileNotFoundError: a folder is missing, or holds no `.npy` files.
    """
    latents, boxes, out = Path(latents), Path(boxes), Path(out)
    tables = {path.stem: path for path in _files(boxes)}
    with_sizes = {path.stem: path for path in _files(Path(sizes))} if sizes is not None else {}
    sources = {path.stem: path for path in _files(latents)}
    report = ImportReport()
    waiting: list[str] = []  # for others that are at them
    for names, wait in ((progress(sorted(sources)), False), (waiting, True)):
        for name in names:
            try:
                if name not in tables:
                    raise FileNotFoundError(f"there is no table of boxes {boxes / name}.npy")
                archive = _Archive(sources[name], tables[name], with_sizes.get(name), out / name)
                with _alone(out, name, wait=wait):
                    report.archives[name] = archive.make(report)
            except Timeout:
                waiting.append(name)
            except (ValueError, OSError, MemoryError) as error:
                report.archives[name] = str(error) or type(error).__name__
    for name in sorted(tables.keys() - sources.keys()):
        report.archives[name] = f"there are no latents {latents / name}.npy"
    with _alone(out, Path(REPORT_NAME).stem, wait=True):
        write_json(out / REPORT_NAME, report.to_dict())
    return report


@contextmanager
def _alone(out: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Nobody else makes the files of this name meanwhile. Rests of one that was killed are removed.

    Raises:
        Timeout: somebody is at them.
    """
    folder = out / LOCK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0):
        for path in out.iterdir():
            if re.fullmatch(rf"\.{re.escape(name)}\.(safetensors|arrow|parquet|json)\.\d+\.partial", path.name):
                path.unlink(missing_ok=True)
        yield


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of .npy files")
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .npy files")
    return files


@dataclass(frozen=True)
class _Archive:
    """The files of one archive, and the shard they become."""

    latents: Path
    boxes: Path
    sizes: Path | None
    stem: Path

    def make(self, report: ImportReport) -> str:
        """Write the shard, unless it stands there, made of the same files: "written" or "already there".

        Raises:
            ValueError, OSError: these files make no shard, or one stands there that is not of this archive.
        """
        identity = self._identity()
        latents = latents_file(self.stem)
        former = read_header(latents)[0] if latents.is_file() else {}
        if "imported" not in former and any(file.is_file() for file in (latents, *table_files(self.stem))):
            raise ValueError(f"the shard {self.stem} stands there, not imported; remove it, or choose another folder")
        if former.get("imported") == identity and has_shard(self.stem):
            self._count(report)
            return "already there"
        made = _Made.of(self)
        if former and former.get("resolution") != str(made.resolution):
            raise ValueError(
                f"the shard {self.stem} has latents of {former.get('resolution')} pixels, {self.latents} those of "
                f"{made.resolution}; choose another folder"
            )
        metadata = {"resolution": str(made.resolution), "vae": VAE, "scaling_factor": SCALING_FACTOR}
        metadata |= {"imported": identity, "without_size": str(made.without_size)}
        with ShardWriter(self.stem, made.latents.shape[1:], metadata) as writer:
            writer.add(made.latents, made.rows)
        report.skipped.update(+made.skipped)
        report.dropped_boxes.update(made.dropped)
        self._count(report)
        return "written"

    def _identity(self) -> str:
        """Of what the shard is made of, without reading all of it: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for path in (self.latents, self.boxes, self.sizes):
            if path is not None:
                size = path.stat().st_size
                with path.open("rb") as file:
                    digest.update(size.to_bytes(8, "little") + file.read(SAMPLE))
                    file.seek(max(0, size - SAMPLE), os.SEEK_SET)
                    digest.update(file.read(SAMPLE))
        return digest.hexdigest()[:16]

    def _count(self, report: ImportReport) -> None:
        shard = Shard(self.stem, with_table=False)
        report.images += len(shard)
        statistics = of_shards([shard])
        report.boxes += statistics.boxes
        report.without_boxes += statistics.without
        report.without_size += int(shard.metadata.get("without_size", 0))


@dataclass(frozen=True)
class _Made:
    """What a shard is to hold, and what became of the rest."""

    latents: np.ndarray
    rows: list[Row]
    resolution: int
    skipped: Counter[str]
    dropped: Counter[str]
    without_size: int

    @classmethod
    def of(cls, archive: _Archive) -> _Made:
        """Images that have both latents and a row of boxes, by index."""
        content = read_latents(archive.latents)
        rows = {row.index: row for row in read_boxes(archive.boxes)}
        sizes = {row.index: row.original_size for row in read_boxes(archive.sizes)} if archive.sizes else {}
        height, width = (side * DOWNSAMPLING for side in content.latents.shape[2:])
        if height != width:
            raise ValueError(f"{archive.latents}: latents of {width} x {height} pixels; the published ones are square")
        kept, written, without_size = [], [], 0
        skipped: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for place in np.argsort(content.indices):
            index = int(content.indices[place])
            if index not in rows:
                skipped["no row in the table of boxes"] += 1
            elif not np.isfinite(content.latents[place]).all():
                skipped["latents that are not finite"] += 1
            else:
                size = rows[index].original_size or sizes.get(index)
                without_size += size is None
                written.append(_row(rows[index], size or (height, width), height, dropped))
                kept.append(place)
        skipped["no latents for a row of boxes"] = len(rows.keys() - set(content.indices.tolist()))
        if not written:
            raise ValueError(f"{archive.latents} and {archive.boxes} have no image in common")
        return cls(content.latents[kept], written, height, skipped, dropped, without_size)


def _row(row: PublishedRow, size: tuple[int, int], resolution: int, dropped: Counter[str]) -> Row:
    """Boxes clipped to the crop; those of which nothing is left, and those without a phrase, are dropped."""
    frame = square_frame(*size, resolution)
    clipped = np.clip(row.boxes, 0, 1)
    finite = np.isfinite(row.boxes).all(axis=-1) & np.isfinite(row.scores)
    solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(axis=-1)
    named = np.array([bool(phrase.strip()) for phrase in row.phrases], bool)
    short = np.array([len(phrase) <= MAX_PHRASE for phrase in row.phrases], bool)
    for reason, bad in (
        ("not finite", ~finite),
        ("nothing within the image", finite & ~solid),
        ("no phrase", finite & solid & ~named),
        (f"phrase of more than {MAX_PHRASE} characters", finite & solid & named & ~short),
    ):
        if count := int(bad.sum()):
            dropped[reason] += count
    chosen = np.flatnonzero(finite & solid & named & short)
    return Row(
        image_id=f"sa_{row.index}",
        caption=row.caption,
        boxes=[tuple(map(float, clipped[k])) for k in chosen],  # type: ignore[misc]
        scores=[float(row.scores[k]) for k in chosen],
        phrases=[row.phrases[k] for k in chosen],
        original_height=size[0],
        original_width=size[1],
        crop_top=frame.top,
        crop_left=frame.left,
    )
