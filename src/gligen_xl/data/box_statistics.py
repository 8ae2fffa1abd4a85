"""How many boxes images have. `prepare`, `import`, `check` and `train` say it, and stop where there are none.

An adapter learns nothing from images without boxes, and the usual cause is annotations that were not understood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .shards import Shard
from .table import read_column

OPTION = "--without-boxes"


@dataclass(frozen=True, kw_only=True)
class BoxStatistics:
    """Numbers of images, of boxes that count, and of images without one."""

    images: int = 0
    boxes: int = 0
    without: int = 0

    def __add__(self, other: BoxStatistics) -> BoxStatistics:
        return BoxStatistics(
            images=self.images + other.images, boxes=self.boxes + other.boxes, without=self.without + other.without
        )

    def __str__(self) -> str:
        mean = self.boxes / max(self.images, 1)
        none = f"{self.without:,} of {self.images:,} images have none" if self.without else "every image has some"
        return f"{mean:.1f} boxes an image on average, {none if self.images else 'there is no image'}"

    @property
    def unusable(self) -> bool:
        """True if there is not a single box."""
        return not self.boxes

    def check(self, where: str, advice: str) -> None:
        """Refuse images none of which has a box.

        Args:
            where: where the images are, for the error.
            advice: what to do about it, for the error.

        Raises:
            ValueError: none of the images has a box.
        """
        if self.unusable:
            raise ValueError(
                f"none of the {self.images:,} images of {where} has a usable box, so nothing can be learned from them: "
                f"{advice}. If this is meant, say {OPTION}"
            )


def of_counts(counts: np.ndarray) -> BoxStatistics:
    """Return the statistics of images that have so many boxes each."""
    return BoxStatistics(images=len(counts), boxes=int(counts.sum()), without=int((counts == 0).sum()))


def of_shards(shards: Iterable[Shard], min_score: float = -np.inf) -> BoxStatistics:
    """Return the statistics of shards, from one column of their tables.

    Args:
        min_score: only boxes of a higher score count, as in training.

    Raises:
        ValueError: a table cannot be read.
    """
    total = BoxStatistics()
    for file in (shard.table_file for shard in shards):
        stat = file.stat()
        total += _of_table(file, min_score, stat.st_size, stat.st_mtime_ns)
    return total


@lru_cache(maxsize=4096)
def _of_table(file: Path, min_score: float, size: int, mtime: int) -> BoxStatistics:
    """Args: size, mtime: of the file, so that a changed file is read again."""
    lists = read_column(file, "scores").combine_chunks()
    ends = np.asarray(lists.offsets)  # nulls are refused where the whole table is read
    good = np.concatenate([[0], np.cumsum(np.asarray(lists.values.fill_null(-np.inf)) > min_score)])
    return of_counts(good[ends[1:]] - good[ends[:-1]])
