"""Whether a folder of shards can be trained on: every shard opened, every latent and every row looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..layout import validate
from .shards import Shard, shard_stems

AT_ONCE = 256  # latents


@dataclass
class CheckReport:
    shards: int = 0
    pictures: int = 0
    boxes: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = f"{len(self.problems)} problems" if self.problems else "no problem"
        lines = [f"{self.shards} shards, {self.pictures} pictures, {self.boxes} boxes: {found}"]
        return "\n".join([*self.problems, *lines])


def check_shards(folder: str | Path, *, progress: Callable[[list[Path]], Iterable[Path]] = list) -> CheckReport:
    """Look at every pair of files of a folder, and say what is wrong where.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
    """
    folder = Path(folder)
    report = CheckReport()
    seen: dict[str, str] = {}  # where each picture stands
    scales: dict[tuple[str, ...], str] = {}  # which shard first had these settings
    for stem in progress(shard_stems(folder)):
        try:
            shard = Shard(stem)
        except (ValueError, OSError) as error:
            report.problems.append(str(error))
            continue
        report.shards += 1
        report.pictures += len(shard)
        report.problems += [f"{stem.name}: {problem}" for problem in _latents(shard)]
        report.problems += [f"{stem.name}: {problem}" for problem in _rows(shard, stem.name, seen, report)]
        settings = tuple(shard.metadata.get(name, "unknown") for name in ("vae", "scaling_factor"))
        scales.setdefault(settings, stem.name)
    if len(scales) > 1:
        kinds = "; ".join(f"{vae}, scaling factor {factor} (as {name})" for (vae, factor), name in scales.items())
        report.problems.append(f"latents of different VAEs: {kinds}")
    rests = sorted(Path(folder).glob(".*.partial"))
    report.problems += [f"{path.name} is the rest of a write that was cut short; remove it" for path in rests]
    return report


def _latents(shard: Shard) -> Iterable[str]:
    latents = shard.latents
    for first in range(0, len(shard), AT_ONCE):
        part = np.asarray(latents[first : first + AT_ONCE], np.float32).reshape(-1, np.prod(shard.latent_shape))
        for k in np.flatnonzero(~np.isfinite(part).all(axis=1)):
            yield f"latents of row {first + k} hold NaN or infinity"
        for k in np.flatnonzero(part.std(axis=1) == 0):
            yield f"latents of row {first + k} are all the same number"


def _rows(shard: Shard, name: str, seen: dict[str, str], report: CheckReport) -> Iterable[str]:
    for k in range(len(shard)):
        row = shard.row(k)
        report.boxes += len(row.boxes)
        where = f"row {k} ({row.image_id})"
        try:
            validate(row.phrases, row.boxes)
        except ValueError as error:
            yield f"{where}: {error}"
        if not all(0 <= score <= 1 for score in row.scores):
            yield f"{where}: a score is not within 0-1"
        if row.original_height < 1 or row.original_width < 1 or row.crop_top < 0 or row.crop_left < 0:
            size = f"{row.original_height} x {row.original_width}, crop {row.crop_top}, {row.crop_left}"
            yield f"{where}: its original size is {size}"
        if row.image_id in seen:
            yield f"{where} stands in {seen[row.image_id]} too"
        seen[row.image_id] = name
