"""Checks a folder of shards for training: reads every latent and every row.

One shard is in memory at a time, and eight bytes for each image of the shards before it, to find images that stand in
two places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..layout import TOLERANCE, validate
from .box_statistics import OPTION, BoxStatistics, of_counts
from .shards import Shard, shard_stems
from .table import flatten, list_lengths

CHUNK = 256  # latents that are checked together
SHOWN = 20  # problems of one kind in a shard, and duplicate images, that are named


@dataclass
class CheckReport:
    shards: int = 0
    statistics: BoxStatistics = field(default_factory=BoxStatistics)
    problems: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.statistics.images

    @property
    def boxes(self) -> int:
        return self.statistics.boxes

    def __str__(self) -> str:
        result = f"{len(self.problems)} problems" if self.problems else "no problem"
        total = f"{self.shards} shards, {self.images} images, {self.boxes} boxes: {result}"
        return "\n".join([*self.problems, f"boxes: {self.statistics}", total])


def check_shards(
    folder: str | Path, *, without_boxes: bool = False, progress: Callable[[list[Path]], Iterable[Path]] = list
) -> CheckReport:
    """Check every shard of a folder; report what is wrong, and where.

    Args:
        without_boxes: it is no problem if no image has a box.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
    """
    folder = Path(folder)
    report = CheckReport()
    stems: list[Path] = []
    hashes: list[np.ndarray] = []  # of the image ids of each shard
    scales: dict[tuple[str, ...], str] = {}  # the first shard with each VAE and scaling factor
    for stem in progress(shard_stems(folder)):
        try:
            shard = Shard(stem, with_table=False)
            table = shard.read_table()
        except (ValueError, OSError) as error:
            report.problems.append(str(error))
            continue
        report.shards += 1
        report.statistics += of_counts(list_lengths(table["phrases"]))
        for problems in (_check_shape(shard), _check_latents(shard), _check_rows(shard, table)):
            report.problems += [f"{stem.name}: {problem}" for problem in _some(problems)]
        stems.append(stem)
        hashes.append(np.array([_hash(name) for name in table["image_id"].to_pylist()], np.uint64))
        settings = tuple(shard.metadata.get(name, "unknown") for name in ("vae", "scaling_factor"))
        scales.setdefault(settings, stem.name)
    report.problems += _some(_find_duplicates(stems, hashes))
    if len(scales) > 1:
        kinds = "; ".join(f"{vae}, scaling factor {factor} (as {name})" for (vae, factor), name in scales.items())
        report.problems.append(f"latents of different VAEs: {kinds}")
    if report.shards and report.statistics.unusable and not without_boxes:
        report.problems.append(f"none of the {report.images} images has a box (if this is meant, say {OPTION})")
    partials = sorted(Path(folder).glob(".*.partial"))
    report.problems += [f"{path.name} was left by a write that was cut short; remove it" for path in partials]
    return report


def _some(problems: Iterable[str]) -> list[str]:
    """Return the first problems, and how many more there are."""
    problems = iter(problems)
    shown = list(islice(problems, SHOWN))
    more = sum(1 for _ in problems)
    return shown + ([f"and {more} more of this kind"] if more else [])


def _check_shape(shard: Shard) -> Iterator[str]:
    """Check that a square or a bucket has about as many pixels as the resolution says."""
    resolution = shard.metadata.get("resolution", "")
    _, height, width = (shard.downsampling * side for side in shard.latent_shape)
    if resolution.isdigit() and not 0.7 <= height * width / max(int(resolution), 1) ** 2 <= 1.3:
        yield f"its images have {width} x {height} pixels, its resolution is {resolution}"


def _check_latents(shard: Shard) -> Iterator[str]:
    latents = shard.latents
    for first in range(0, len(shard), CHUNK):
        part = np.asarray(latents[first : first + CHUNK], np.float32).reshape(-1, np.prod(shard.latent_shape))
        finite = np.isfinite(part).all(axis=1)
        for k in np.flatnonzero(~finite):
            yield f"latents of row {first + k} hold NaN or infinity"
        for k in np.flatnonzero(finite & (part.max(axis=1) == part.min(axis=1))):
            yield f"latents of row {first + k} are all the same number"


def _check_rows(shard: Shard, table: pa.Table) -> Iterator[str]:
    """Check whole columns, and then one by one the rows that look wrong there."""
    row_of_box = np.repeat(np.arange(len(table)), list_lengths(table["boxes"]))
    boxes = flatten(flatten(table["boxes"])).to_numpy().reshape(-1, 4)
    scores = flatten(table["scores"]).to_numpy()
    blank = pc.call_function("equal", [pc.call_function("utf8_trim_whitespace", [flatten(table["phrases"])]), ""])
    outside = ~((boxes >= -TOLERANCE) & (boxes <= 1 + TOLERANCE)).all(axis=1)
    thin = ~(boxes.clip(0, 1)[:, 2:] > boxes.clip(0, 1)[:, :2]).all(axis=1)
    bad = ~((scores >= 0) & (scores <= 1))
    height, width, top, left = (
        table[name].to_numpy().astype(np.int64)
        for name in ("original_height", "original_width", "crop_top", "crop_left")
    )
    no_size = (height < 1) | (width < 1) | (top < 0) | (left < 0)
    _, h, w = (shard.downsampling * side for side in shard.latent_shape)
    scale = np.maximum(h / height.clip(1), w / width.clip(1))  # the image fills the frame
    beyond = ~no_size & ((top + h > height * scale + 2) | (left + w > width * scale + 2))
    odd = {*row_of_box[outside | thin | blank.to_numpy(zero_copy_only=False)].tolist()}
    bad_scores = {*row_of_box[bad].tolist()}
    for k in sorted(odd | bad_scores | {*np.flatnonzero(no_size | beyond).tolist()}):
        row = table.slice(k, 1).to_pylist()[0]
        where = f"row {k} ({row['image_id']})"
        if k in odd:
            try:
                validate(row["phrases"], row["boxes"])
            except ValueError as error:
                yield f"{where}: {error}"
        if k in bad_scores:
            yield f"{where}: a score is not within 0-1"
        if no_size[k]:
            yield f"{where}: its original size is {height[k]} x {width[k]}, crop {top[k]}, {left[k]}"
        elif beyond[k]:
            size = f"{height[k]} x {width[k]}, resized to fill {h} x {w}"
            yield f"{where}: its crop begins at {top[k]}, {left[k]}, too far for an image of {size}"


def _find_duplicates(stems: list[Path], hashes: list[np.ndarray]) -> Iterator[str]:
    """Find images that stand in two places.

    Args:
        hashes: of the image ids of each shard.
    """
    if not hashes:
        return
    every = np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    again = np.flatnonzero(every[order][1:] == every[order][:-1]) + 1
    ends = np.cumsum([len(part) for part in hashes])
    opened: dict[int, Any] = {}

    def place(number: int) -> tuple[int, int, str]:
        which = int(np.searchsorted(ends, number, side="right"))
        if which not in opened:
            opened.clear()  # keep one column at a time
            opened[which] = Shard(stems[which], with_table=False).read_column("image_id")
        row = number - int(ends[which]) + len(hashes[which])
        return which, row, opened[which][row].as_py()

    for k in sorted(again, key=lambda k: order[k]):
        (first, _, name), (which, row, other) = place(int(order[k - 1])), place(int(order[k]))
        if name == other:  # otherwise only the hashes are equal
            yield f"{stems[which].name}: row {row} ({other}) stands in {stems[first].name} too"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
