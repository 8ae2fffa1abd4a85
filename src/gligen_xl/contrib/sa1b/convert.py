"""Convert the published sets to shards: pairs of `.npy` files of latents and boxes, archive by archive."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data.box_statistics import BoxStatistics, of_shards
from ...data.shard_writer import ShardWriter
from ...data.shards import (
    DOWNSAMPLING,
    SDXL_SCALING_FACTOR,
    SDXL_VAE,
    Row,
    Shard,
    has_shard,
    latents_file,
    read_header,
    table_files,
)
from ...images.crop import square_frame
from ...io import write_json
from ...limits import MAX_PHRASE
from ...workdir import FOREVER, Busy, exclusive, remove_partial_files
from .published import PublishedRow, read_boxes, read_latents

REPORT_NAME = "import.json"
LOCK_FOLDER = ".imported"  # beside the shards: a lock for each archive
SAMPLE = 1 << 16  # bytes at either end of a file that tell it from another of its size
WRITTEN, ALREADY = "written", "already there"  # what becomes of an archive that does not fail


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
        return BoxStatistics(images=self.images, boxes=self.boxes, without=self.without_boxes)

    @property
    def failed(self) -> dict[str, str]:
        """Why, of the archives that failed."""
        return {name: what for name, what in self.archives.items() if what not in (WRITTEN, ALREADY)}

    def to_dict(self) -> dict[str, Any]:
        values = {**vars(self), "skipped": dict(self.skipped), "dropped_boxes": dict(self.dropped_boxes)}
        return {"pictures": values.pop("images"), **values}

    def __str__(self) -> str:
        already = sum(what == ALREADY for what in self.archives.values())
        first = f"{self.images} images with {self.boxes} boxes from {len(self.archives) - len(self.failed)} archives"
        lines = [first + (f", {already} of which stood there already" if already else ""), f"boxes: {self.statistics}"]
        for title, counts in (("images skipped", self.skipped), ("boxes dropped", self.dropped_boxes)):
            lines += [f"{title}, {reason}: {number}" for reason, number in counts.most_common()]
        if self.without_size:
            lines.append(f"images without their original size, taken to be that of the latents: {self.without_size}")
        return "\n".join(lines + [f"failed: {name}: {what}" for name, what in self.failed.items()])


def import_published(
    latents: str | Path,
    boxes: str | Path,
    out: str | Path,
    *,
    sizes: str | Path | None = None,
    progress: Callable[[list[str]], Iterable[str]] = list,
) -> ImportReport:
    """Write a shard under `out` for every pair of files of the same name; one that was made of the same files is kept.

    Several processes may fill one folder at once: each archive is done by one of them.

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
    tables = _npy_files(boxes)
    with_sizes = _npy_files(Path(sizes)) if sizes is not None else {}
    sources = _npy_files(latents)
    report = ImportReport()
    waiting: list[str] = []  # archives that other processes work on
    for names, patience in ((progress(sorted(sources)), 0.0), (waiting, FOREVER)):
        for name in names:
            try:
                if name not in tables:
                    raise FileNotFoundError(f"there is no table of boxes {boxes / name}.npy")
                archive = _Archive(sources[name], tables[name], with_sizes.get(name), out / name)
                with exclusive(out / LOCK_FOLDER / f"{name}.lock", f"another process imports {name}", patience):
                    remove_partial_files(out, name)
                    report.archives[name] = archive.convert(report)
            except Busy:
                waiting.append(name)
            except (ValueError, OSError, MemoryError) as error:
                report.archives[name] = str(error) or type(error).__name__
    for name in sorted(tables.keys() - sources.keys()):
        report.archives[name] = f"there are no latents {latents / name}.npy"
    stem = Path(REPORT_NAME).stem
    with exclusive(out / LOCK_FOLDER / f"{stem}.lock", "", FOREVER):
        remove_partial_files(out, stem)
        write_json(out / REPORT_NAME, report.to_dict())
    return report


def _npy_files(folder: Path) -> dict[str, Path]:
    """Return the `.npy` files of a folder, by their names without the ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of .npy files")
    files = {path.stem: path for path in sorted(folder.glob("*.npy"))}
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

    def convert(self, report: ImportReport) -> str:
        """Write the shard, unless it was made of the same files before; return "written" or "already there".

        Raises:
            ValueError, OSError: these files make no shard, or there is one that is not of this archive.
        """
        identity = self._identity()
        latents = latents_file(self.stem)
        former = read_header(latents)[0] if latents.is_file() else {}
        if "imported" not in former and any(file.is_file() for file in (latents, *table_files(self.stem))):
            raise ValueError(f"the shard {self.stem} stands there, not imported; remove it, or choose another folder")
        if former.get("imported") == identity and has_shard(self.stem):
            self._count(report)
            return ALREADY
        content = _Content.read(self)
        if former and former.get("resolution") != str(content.resolution):
            raise ValueError(
                f"the shard {self.stem} has latents of {former.get('resolution')} pixels, {self.latents} those of "
                f"{content.resolution}; choose another folder"
            )
        metadata = {"resolution": str(content.resolution), "vae": SDXL_VAE, "scaling_factor": SDXL_SCALING_FACTOR}
        metadata |= {"imported": identity, "without_size": str(content.without_size)}
        with ShardWriter(self.stem, content.latents.shape[1:], metadata) as writer:
            writer.add(content.latents, content.rows)
        report.skipped.update(+content.skipped)
        report.dropped_boxes.update(content.dropped)
        self._count(report)
        return WRITTEN

    def _identity(self) -> str:
        """Return a checksum of the sizes and the ends of the files, 16 hexadecimal digits, without reading all."""
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
        statistics = of_shards([shard])
        report.images += len(shard)
        report.boxes += statistics.boxes
        report.without_boxes += statistics.without
        report.without_size += int(shard.metadata.get("without_size", 0))


@dataclass(frozen=True)
class _Content:
    """What a shard is to hold, and what became of the rest."""

    latents: np.ndarray
    rows: list[Row]
    resolution: int
    skipped: Counter[str]
    dropped: Counter[str]
    without_size: int

    @classmethod
    def read(cls, archive: _Archive) -> _Content:
        """Join the images that have both latents and a row of boxes, by index."""
        content = read_latents(archive.latents)
        rows = {row.index: row for row in read_boxes(archive.boxes)}
        sizes = {row.index: row.original_size for row in read_boxes(archive.sizes)} if archive.sizes else {}
        height, width = (side * DOWNSAMPLING for side in content.latents.shape[2:])
        if height != width:
            raise ValueError(f"{archive.latents}: latents of {width} x {height} pixels; the published ones are square")
        places, written, without_size = [], [], 0
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
                places.append(place)
        skipped["no latents for a row of boxes"] = len(rows.keys() - set(content.indices.tolist()))
        if not written:
            raise ValueError(f"{archive.latents} and {archive.boxes} have no image in common")
        return cls(content.latents[places], written, height, skipped, dropped, without_size)


def _row(row: PublishedRow, size: tuple[int, int], resolution: int, dropped: Counter[str]) -> Row:
    """Clip boxes to the crop; drop those of which nothing is left, and those without a phrase."""
    frame = square_frame(*size, resolution)
    clipped = np.clip(row.boxes, 0, 1)
    faults = {
        "not finite": ~(np.isfinite(row.boxes).all(axis=-1) & np.isfinite(row.scores)),
        "nothing within the image": ~((clipped[:, 2:] - clipped[:, :2]) > 0).all(axis=-1),
        "no phrase": np.array([not phrase.strip() for phrase in row.phrases], bool),
        f"phrase of more than {MAX_PHRASE} characters": np.array([len(p) > MAX_PHRASE for p in row.phrases], bool),
    }
    sound = np.ones(len(row.phrases), bool)
    for reason, bad in faults.items():  # a box counts for its first fault
        if count := int((bad & sound).sum()):
            dropped[reason] += count
        sound &= ~bad
    chosen = np.flatnonzero(sound)
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
