"""The published sets become shards: pairs of `.npy` files of latents and boxes, archive by archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.published import SCALING_FACTOR, VAE, PublishedRow, read_boxes, read_latents
from ..data.shards import DOWNSAMPLING, Row, Shard, write_shard
from ..files import write_json
from .frame import square_frame

REPORT_NAME = "import.json"


@dataclass
class ImportReport:
    """What became of every archive and of its pictures."""

    pictures: int = 0  # written
    boxes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # pictures, by reason
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    without_size: int = 0  # pictures whose size is not known, and taken to be that of the latents
    archives: dict[str, str] = field(default_factory=dict)  # written, already there, or why not

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "skipped": dict(self.skipped), "dropped_boxes": dict(self.dropped_boxes)}

    def __str__(self) -> str:
        failed = {name: what for name, what in self.archives.items() if what not in ("written", "already there")}
        already = sum(what == "already there" for what in self.archives.values())
        lines = [f"{self.pictures} pictures with {self.boxes} boxes from {len(self.archives) - len(failed)} archives"]
        lines[0] += f", {already} of which stood there already" if already else ""
        for title, counts in (("pictures skipped", self.skipped), ("boxes dropped", self.dropped_boxes)):
            lines += [f"{title}, {reason}: {number}" for reason, number in counts.most_common()]
        if self.without_size:
            lines.append(f"pictures without their original size, taken to be that of the latents: {self.without_size}")
        return "\n".join(lines + [f"failed: {name}: {what}" for name, what in failed.items()])


def import_published(
    latents: str | Path,
    boxes: str | Path,
    out: str | Path,
    *,
    sizes: str | Path | None = None,
    progress: Callable[[list[str]], Iterable[str]] = list,
) -> ImportReport:
    """Write a shard under `out` for every pair of files of the same name; those that stand there are kept.

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
    for name in progress(sorted(sources)):
        try:
            if out.joinpath(f"{name}.parquet").exists():
                _count(report, Shard(out / name))
                report.archives[name] = "already there"
            elif name not in tables:
                report.archives[name] = f"there is no table of boxes {boxes / name}.npy"
            else:
                _import_one(sources[name], tables[name], with_sizes.get(name), out / name, report)
                report.archives[name] = "written"
        except (ValueError, OSError, MemoryError) as error:
            report.archives[name] = str(error) or type(error).__name__
    for name in sorted(tables.keys() - sources.keys()):
        report.archives[name] = f"there are no latents {latents / name}.npy"
    write_json(out / REPORT_NAME, report.to_dict())
    return report


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of .npy files")
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .npy files")
    return files


def _import_one(latents: Path, boxes: Path, sizes: Path | None, stem: Path, report: ImportReport) -> None:
    content = read_latents(latents)
    rows = {row.index: row for row in read_boxes(boxes)}
    known = {row.index: row.original_size for row in read_boxes(sizes)} if sizes is not None else {}
    order = np.argsort(content.indices)
    height, width = (side * DOWNSAMPLING for side in content.latents.shape[2:])
    if height != width:
        raise ValueError(f"{latents}: latents of {height} x {width} pixels; the published ones are square")
    kept, written = [], []
    skipped: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    without_size = 0
    for place in order:
        index = int(content.indices[place])
        if index not in rows:
            skipped["no row in the table of boxes"] += 1
        elif not np.isfinite(content.latents[place]).all():
            skipped["latents that are not finite"] += 1
        else:
            size = rows[index].original_size or known.get(index)
            without_size += size is None
            written.append(_row(rows[index], size or (height, width), height, dropped))
            kept.append(place)
    skipped["no latents for a row of boxes"] = len(rows.keys() - set(content.indices.tolist()))
    if not written:
        raise ValueError(f"{latents} and {boxes} have no picture in common")
    metadata = {"resolution": str(height), "vae": VAE, "scaling_factor": SCALING_FACTOR}
    write_shard(stem, np.ascontiguousarray(content.latents[kept]), written, metadata)
    report.skipped.update(+skipped)
    report.dropped_boxes.update(dropped)
    report.without_size += without_size
    report.pictures += len(written)
    report.boxes += sum(len(row.boxes) for row in written)


def _row(row: PublishedRow, size: tuple[int, int], resolution: int, dropped: Counter[str]) -> Row:
    """Boxes clipped to the crop; those of which nothing is left, and those without a phrase, are dropped."""
    frame = square_frame(*size, resolution)
    clipped = np.clip(row.boxes, 0, 1)
    finite = np.isfinite(row.boxes).all(axis=-1) & np.isfinite(row.scores)
    solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(axis=-1)
    named = np.array([bool(phrase.strip()) for phrase in row.phrases], bool)
    for reason, bad in (
        ("not finite", ~finite),
        ("nothing within the picture", finite & ~solid),
        ("no phrase", finite & solid & ~named),
    ):
        if count := int(bad.sum()):
            dropped[reason] += count
    chosen = np.flatnonzero(finite & solid & named)
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


def _count(report: ImportReport, shard: Shard) -> None:
    report.pictures += len(shard)
    report.boxes += sum(len(row["phrases"]) for row in shard.rows("phrases"))
