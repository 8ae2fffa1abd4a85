"""Batches of samples from shards, with dropouts and noise, padded to the adapter's slots.

Everything random about a sample follows from (seed, position); position is how many samples the run has seen before it.
So any number of ranks and workers gives the same global batches with the same noise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..device import to_device
from ..limits import MAX_SLOTS
from .held_out import digest, hold_out
from .rng import noise_of, uniforms
from .rows import open_tables
from .sampler import MixtureOrder, SampleOrder
from .shards import Row, Shard, shard_stems
from .streaming import RemoteShard, is_remote, open_remote

MOST_MIXED = 16  # shards of a window that are fetched, however large the cache: training begins when they are there


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is dropped from a sample, and how many boxes it keeps. The defaults are those of GLIGEN-XL's recipe.

    Args:
        drop_grounding: share of samples that lose their boxes, and their caption too: guidance needs samples with
            neither.
        drop_caption: share of the other samples that lose their caption and keep their boxes.
        min_score: boxes of lower confidence are left out.
        slots: largest number of boxes; the most confident are kept.
    """

    drop_grounding: float = 0.1
    drop_caption: float = 0.5
    min_score: float = 0.25
    slots: int = 30

    def __post_init__(self) -> None:
        for name in ("drop_grounding", "drop_caption", "min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots is {self.slots}; expected 1 to {MAX_SLOTS}")

    def choose(self, scores: Sequence[float]) -> list[int]:
        """Return the numbers of the boxes to keep, the most confident first."""
        good = [k for k, score in enumerate(scores) if score > self.min_score]
        return sorted(good, key=lambda k: -scores[k])[: self.slots]


class Sample(NamedTuple):
    position: int
    latents: np.ndarray  # (C, h, w) float16
    time: float  # uniform in 0-1
    caption: str | None  # None: dropped
    phrases: list[str]
    boxes: np.ndarray  # (n, 4) float32
    size: tuple[int, int, int, int, int, int]  # original (h, w), crop (top, left), target (h, w): SDXL's conditioning


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of one latent shape, with boxes padded to N slots. Their noise is drawn where it is needed."""

    seed: int
    positions: list[int]
    latents: Tensor  # (B, C, h, w) float16
    time: Tensor  # (B,)
    captions: list[str | None]
    phrases: list[list[str]]
    boxes: Tensor  # (B, N, 4)
    mask: Tensor  # (B, N), 1 where there is a box
    size: Tensor  # (B, 6)

    @property
    def position(self) -> int:
        return self.positions[0]

    @property
    def noise(self) -> Tensor:
        """(B, C, h, w) float32, drawn on the CPU."""
        return self.noise_on("cpu")

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`; see `to_device`."""
        names = ("latents", "time", "boxes", "mask", "size")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})

    def part(self, rows: slice) -> Batch:
        """Return the batch of some of its samples."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if name != "seed"})

    def noise_on(self, device: torch.device | str) -> Tensor:
        """Return the noise of its samples, (B, C, h, w) float32, drawn on `device`; another device draws others."""
        return noise_of(self.seed, self.positions, self.latents.shape[1:], device)


class ShardDataset:
    """The samples of one or several sources of shards, by (number, position).

    Args:
        data: a folder, or the URL of one (see `gligen_xl.data.streaming`); or several, whose samples are counted
            through.
        cache_bytes: disk space for shards that are fetched from a URL.
        held_out: the share of each source's images that are left out (see `gligen_xl.data.held_out`);
            `held_out_samples` has them.

    Raises:
        ValueError: a source has no samples, or a shard is damaged.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        augmentation: Augmentation,
        seed: int,
        *,
        cache_bytes: int = 20_000_000_000,
        held_out: Sequence[float] | None = None,
    ):
        self.augmentation, self.seed, self.cache_bytes = augmentation, seed, cache_bytes
        folders = [data] if isinstance(data, str | Path) else list(data)
        self.sources = [_open(folder, cache_bytes) for folder in folders]
        for folder, shards in zip(folders, self.sources, strict=True):
            if not any(len(shard) for shard in shards):
                raise ValueError(f"{folder} holds no samples")
        self.shards: list[Shard] = [shard for shards in self.sources for shard in shards]
        self._tables = open_tables(self.shards)
        self._held_out_shares = [0.0] * len(folders) if held_out is None else list(held_out)
        pairs = zip(self.sources, self._held_out_shares, strict=True)
        self.held_out = [hold_out(shards, share) for shards, share in pairs]
        self._select({k: np.delete(np.arange(len(self.shards[k])), rows) for k, rows in self._held_out_rows().items()})

    def _held_out_rows(self) -> dict[int, np.ndarray]:
        """Return the rows that are held out, by the number of the shard among all."""
        starts = accumulate((len(shards) for shards in self.sources), initial=0)
        return {
            start + k: rows for start, held in zip(starts, self.held_out, strict=False) for k, rows in held.rows.items()
        }

    def _select(self, rows: Mapping[int, np.ndarray]) -> None:
        """Make samples of these rows of these shards, and of all rows of the others."""
        self._selected = dict(rows)
        self._sizes = [len(rows[k]) if k in rows else len(shard) for k, shard in enumerate(self.shards)]
        self._first = [0, *accumulate(self._sizes)]

    def held_out_samples(self, augmentation: Augmentation) -> ShardDataset:
        """Return the samples that are held out here; or, if all sources have too few images for that, the samples of
        those sources that were to hold some out."""
        other = copy(self)
        other.augmentation = augmentation
        rows, none = self._held_out_rows(), np.zeros(0, np.int64)
        shares = [share for share, shards in zip(self._held_out_shares, self.sources, strict=True) for _ in shards]
        if rows:
            other._select({k: rows.get(k, none) for k in range(len(self.shards))})
        else:
            other._select({k: none for k, share in enumerate(shares) if not share})
        return other

    def __len__(self) -> int:
        return self._first[-1]

    def held_out_digest(self) -> str:
        """Return a checksum of what is held out."""
        return digest(self.held_out, self.sources)

    def _sized_sources(self) -> list[list[tuple[Shard, int]]]:
        """Return the shards of each source that have samples, and how many."""
        pairs = iter(zip(self.shards, self._sizes, strict=True))
        return [[(shard, size) for shard, size in islice(pairs, len(shards)) if size] for shards in self.sources]

    @property
    def groups(self) -> list[int]:
        """Number of samples by source and latent shape, in the order of their numbers."""
        sizes = Counter()
        for k, shards in enumerate(self._sized_sources()):
            for shard, size in shards:
                sizes[k, shard.latent_shape] += size
        return list(sizes.values())

    def windows(self, window: int | None = None) -> list[int | None]:
        """Return how many shards of each source are mixed at a time: `window`; or by default all, but of a remote
        source as many as half of the cache holds."""
        if window:
            return [window] * len(self.sources)
        largest = [
            max((shard.bytes for shard in shards if isinstance(shard, RemoteShard)), default=0)
            for shards in self.sources
        ]
        room = self.cache_bytes // 2 // max(sum(size > 0 for size in largest), 1)
        return [min(max(room // size, 1), MOST_MIXED) if size else None for size in largest]

    def order(
        self,
        batch_size: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        windows: Sequence[int | None] | None = None,
    ) -> SampleOrder | MixtureOrder:
        """Return the order of training.

        Args:
            weights: of each source; samples come from it in this proportion. By default its number of samples.
            windows: of each source; by default `windows()`.
        """
        windows = self.windows() if windows is None else windows
        if len(windows) != len(self.sources):
            raise ValueError(f"{len(windows)} windows for {len(self.sources)} sources of data")
        sources = self._sized_sources()
        shapes = sorted({shard.latent_shape for shards in sources for shard, _ in shards})
        mixed = len(sources) > 1
        at_once = 1 if mixed and len(shapes) == 1 else batch_size
        orders = [
            SampleOrder(
                [size for _, size in shards],
                at_once,
                seed,
                groups=[shapes.index(shard.latent_shape) for shard, _ in shards],
                window=window,
            )
            for shards, window in zip(sources, windows, strict=True)
        ]
        if not mixed:
            return orders[0]
        return MixtureOrder(orders, weights or [order.samples for order in orders], batch_size, seed)

    def find(self, number: int) -> tuple[Shard, int]:
        """Return the shard of a sample, and its row there."""
        which, row = self._find(number)
        return self.shards[which], row

    def _find(self, number: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row there."""
        which = bisect_right(self._first, number) - 1
        place = number - self._first[which]
        return which, int(self._selected[which][place]) if which in self._selected else place

    def shards_of(self, numbers: Sequence[int] | np.ndarray) -> list[Shard]:
        """Return the shards that hold these samples, each once."""
        return [self.shards[k] for k in np.unique(np.searchsorted(self._first, numbers, side="right") - 1)]

    def row(self, number: int) -> Row:
        """Return the whole description of a sample, without dropouts."""
        which, row = self._find(number)
        return self._tables[which].row(row)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self._sample(*key, np.empty(self.find(key[0])[0].latent_shape, np.float16))

    def batch(self, keys: Sequence[tuple[int, int]], room: np.ndarray | None = None) -> Batch:
        """Return samples of one latent shape, by (number, position).

        Args:
            room: memory for their latents, float16, flat.
        """
        shape = (len(keys), *self.find(keys[0][0])[0].latent_shape)
        latents = np.empty(shape, np.float16) if room is None else room[: np.prod(shape)].reshape(shape)
        samples = [self._sample(*key, latents[k]) for k, key in enumerate(keys)]
        slots = self.augmentation.slots
        boxes = np.zeros((len(samples), slots, 4), np.float32)
        mask = np.zeros((len(samples), slots), np.float32)
        for k, sample in enumerate(samples):
            boxes[k, : len(sample.boxes)] = sample.boxes
            mask[k, : len(sample.boxes)] = 1
        return Batch(
            seed=self.seed,
            positions=[sample.position for sample in samples],
            latents=torch.from_numpy(latents),
            time=torch.tensor([sample.time for sample in samples]),
            captions=[sample.caption for sample in samples],
            phrases=[sample.phrases for sample in samples],
            boxes=torch.from_numpy(boxes),
            mask=torch.from_numpy(mask),
            size=torch.tensor([sample.size for sample in samples], dtype=torch.float32),
        )

    def _sample(self, number: int, position: int, latents: np.ndarray) -> Sample:
        """Read a sample; its latents go to `latents`, (C, h, w) float16."""
        which, index = self._find(number)
        shard, row = self.shards[which], self._tables[which].row(index)
        shard.read_latents(index, latents)
        grounding, caption, time = uniforms(self.seed, position, 3)
        keep_grounding = grounding >= self.augmentation.drop_grounding
        keep_caption = caption >= self.augmentation.drop_caption and keep_grounding
        chosen = self.augmentation.choose(row.scores) if keep_grounding else []
        _, height, width = shard.latent_shape
        return Sample(
            position=position,
            latents=latents,
            time=time,
            caption=row.caption if keep_caption else None,
            phrases=[row.phrases[k] for k in chosen],
            boxes=np.array([row.boxes[k] for k in chosen], np.float32).reshape(-1, 4),
            size=(
                row.original_height, row.original_width, row.crop_top, row.crop_left,
                height * shard.downsampling, width * shard.downsampling,
            ),
        )  # fmt: skip


def _open(folder: str | Path, cache_bytes: int) -> list[Shard]:
    """Open the shards of a source, in the order of their latent shapes and names."""
    shards: list[Shard]
    if is_remote(folder):
        shards = [*open_remote(str(folder), cache_bytes)]
    else:
        shards = [Shard(stem, with_table=False) for stem in shard_stems(folder)]
    return sorted(shards, key=lambda shard: (shard.latent_shape, shard.stem))
