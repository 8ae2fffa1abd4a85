"""From shards to batches: samples by number, their dropouts and noise by position, padded to the adapter's slots.

Whatever is random about a sample follows from (seed, position), position being how many samples the run has seen
before it. So any number of ranks and workers gives the same global batches with the same noise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..device import to_device
from ..limits import MAX_SLOTS
from .held_out import digest, hold_out
from .mixture import MixtureOrder
from .rng import noise_of, uniforms
from .sampler import SampleOrder
from .shards import Row, Shard, shard_stems
from .streaming import RemoteShard, is_remote, open_remote
from .table import Table


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is dropped from a sample, and how many boxes it keeps (the values of GLIGEN-XL's recipe).

    Args:
        drop_grounding: share of samples without boxes; their caption goes too, as guidance needs a fully empty half.
        drop_caption: share of the other samples that keep their boxes but lose their caption.
        min_score: boxes of lower confidence are left out.
        slots: at most this many boxes, best first.
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
        """Numbers of the boxes to keep: confident enough, best first, at most `slots`."""
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
    """B samples of one latent shape; boxes padded to N slots. Their noise is drawn where it is needed."""

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
        """(B, C, h, w) float32, of this machine's CPU."""
        return self.noise_on("cpu")

    def to(self, device: torch.device | str) -> Batch:
        """The same with its tensors on `device`; see `to_device`."""
        names = ("latents", "time", "boxes", "mask", "size")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})

    def part(self, rows: slice) -> Batch:
        """Some of its samples."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if name != "seed"})

    def noise_on(self, device: torch.device | str) -> Tensor:
        """(B, C, h, w) float32, drawn on `device`, where training runs."""
        return noise_of(self.seed, self.positions, self.latents.shape[1:], device)


class ShardDataset:
    """Samples of folders of shards, asked for as (number, position).

    Args:
        data: a folder, or a URL of one (see `gligen_xl.data.streaming`); or several, whose samples are counted through.
        cache_bytes: what shards fetched from a URL may take of the disk.
        held_out: of each source, the share of its images that are left out (see `gligen_xl.data.held_out`);
            `held_out_samples` has them.

    Raises:
        ValueError: a folder without samples, or a shard that is damaged.
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
        self.augmentation, self.seed = augmentation, seed
        folders = [data] if isinstance(data, str | Path) else list(data)
        self._sources = [_open(folder, cache_bytes) for folder in folders]
        for folder, shards in zip(folders, self._sources, strict=True):
            if not any(len(shard) for shard in shards):
                raise ValueError(f"{folder} holds no samples")
        self.shards: list[Shard] = [shard for shards in self._sources for shard in shards]
        self._first_row = [0, *accumulate(len(shard) for shard in self.shards)]
        self.table = Table(self.shards)
        self.cache_bytes = cache_bytes
        shares = [0.0] * len(folders) if held_out is None else held_out
        self.held_out = [hold_out(shards, share) for shards, share in zip(self._sources, shares, strict=True)]
        self._asked = [share > 0 for share in shares]
        self._select({k: np.delete(np.arange(len(self.shards[k])), rows) for k, rows in self._held_rows().items()})

    def _held_rows(self) -> dict[int, np.ndarray]:
        """What is held out, by number of the shard among all."""
        starts = accumulate((len(shards) for shards in self._sources), initial=0)
        return {
            start + k: rows for start, held in zip(starts, self.held_out, strict=False) for k, rows in held.rows.items()
        }

    def _select(self, rows: Mapping[int, np.ndarray]) -> None:
        """Of these shards only such rows are samples, of the others all."""
        self._rows = dict(rows)
        sizes = [len(self._rows[k]) if k in self._rows else len(shard) for k, shard in enumerate(self.shards)]
        self._first = [0, *accumulate(sizes)]
        ends = list(accumulate(len(shards) for shards in self._sources))
        self._sizes = [sizes[end - len(shards) : end] for end, shards in zip(ends, self._sources, strict=True)]

    def held_out_samples(self, augmentation: Augmentation) -> ShardDataset:
        """The samples that are left out here; where all sources have too few images for that, those of the training."""
        other = copy(self)
        other.augmentation = augmentation
        rows, none = self._held_rows(), np.zeros(0, np.int64)
        asked = [asked for asked, shards in zip(self._asked, self._sources, strict=True) for _ in shards]
        if rows:
            other._select({k: rows.get(k, none) for k in range(len(self.shards))})
        else:
            other._select({k: none for k in range(len(self.shards)) if not asked[k]})
        return other

    def __len__(self) -> int:
        return self._first[-1]

    def held_out_digest(self) -> str:
        """What is left out, to know it again."""
        return digest(self.held_out, self._sources)

    @property
    def sources(self) -> list[list[Shard]]:
        """The shards of each source."""
        return self._sources

    @property
    def groups(self) -> list[int]:
        """Number of samples by source and latent shape, in the order of their numbers."""
        sizes: dict[tuple, int] = {}
        for k, shards in enumerate(self._sources):
            for shard, size in zip(shards, self._sizes[k], strict=True):
                if size:
                    key = (k, shard.latent_shape)
                    sizes[key] = sizes.get(key, 0) + size
        return list(sizes.values())

    def windows(self, window: int | None = None) -> list[int | None]:
        """Of each source, how many shards are mixed at a time: `window`; or all, but of fetched ones what half of the
        cache holds."""
        if window:
            return [window] * len(self._sources)
        largest = [
            max((shard.bytes for shard in shards if isinstance(shard, RemoteShard)), default=0)
            for shards in self._sources
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
        """The order of training.

        Args:
            weights: of each source; a source's samples come in proportion to it. By default in proportion to its size.
            windows: of each source, as `windows()` has them.
        """
        windows = self.windows() if windows is None else windows
        if len(windows) != len(self._sources):
            raise ValueError(f"{len(windows)} windows for {len(self._sources)} sources of data")
        counted = [list(zip(*pair, strict=True)) for pair in zip(self._sources, self._sizes, strict=True)]
        shapes = sorted({shard.latent_shape for shards in counted for shard, size in shards if size})
        mixed = len(self._sources) > 1
        orders = []
        for shards, window in zip(counted, windows, strict=True):
            sizes = [size for _, size in shards if size]
            groups = [shapes.index(shard.latent_shape) for shard, size in shards if size]
            at_once = 1 if mixed and len(shapes) == 1 else batch_size
            orders.append(SampleOrder(sizes, at_once, seed, groups=groups, window=window))
        if not mixed:
            return orders[0]
        return MixtureOrder(orders, weights or [order.samples for order in orders], batch_size, seed)

    def find(self, number: int) -> tuple[Shard, int]:
        """The shard of a sample, and its place there."""
        which, index = self._find(number)
        return self.shards[which], index

    def _find(self, number: int) -> tuple[int, int]:
        """The number of the shard, and the row there."""
        which = bisect_right(self._first, number) - 1
        place = number - self._first[which]
        return which, int(self._rows[which][place]) if which in self._rows else place

    def shards_of(self, numbers: Sequence[int] | np.ndarray) -> list[Shard]:
        """The shards that hold these samples, each once."""
        return [self.shards[k] for k in np.unique(np.searchsorted(self._first, numbers, side="right") - 1)]

    def row(self, number: int) -> Row:
        """All that is known of a sample, nothing dropped."""
        which, index = self._find(number)
        return self.table.row(self._first_row[which] + index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self._sample(*key, np.empty(self.find(key[0])[0].latent_shape, np.float16))

    def batch(self, keys: Sequence[tuple[int, int]], room: np.ndarray | None = None) -> Batch:
        """Samples of one latent shape, by (number, position).

        Args:
            room: memory for their latents, float16, flat.
        """
        shape = (len(keys), *self.find(keys[0][0])[0].latent_shape)
        latents = np.empty(shape, np.float16) if room is None else room[: np.prod(shape)].reshape(shape)
        return self._joined([self._sample(*key, latents[k]) for k, key in enumerate(keys)], latents)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return self._joined(samples, np.stack([sample.latents for sample in samples]))

    def _sample(self, number: int, position: int, latents: np.ndarray) -> Sample:
        """A sample, its latents in `latents`, (C, h, w) float16."""
        which, index = self._find(number)
        shard = self.shards[which]
        shard.read_latents(index, latents)
        record = self.table.record(self._first_row[which] + index)
        of_grounding, of_caption, time = uniforms(self.seed, position, 3)
        keep_grounding = of_grounding >= self.augmentation.drop_grounding
        keep_caption = of_caption >= self.augmentation.drop_caption and keep_grounding
        boxes = record.boxes
        chosen = self.augmentation.choose(boxes[:, 4].tolist()) if keep_grounding else []
        texts = record.texts if keep_grounding else []
        _, height, width = shard.latent_shape
        return Sample(
            position=position,
            latents=latents,
            time=time,
            caption=texts[1].decode() if keep_caption else None,
            phrases=[texts[2 + k].decode() for k in chosen],
            boxes=boxes[chosen, :4],
            size=(
                record.original_height, record.original_width, record.crop_top, record.crop_left,
                height * shard.downsampling, width * shard.downsampling,
            ),
        )  # fmt: skip

    def _joined(self, samples: Sequence[Sample], latents: np.ndarray) -> Batch:
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


MOST_MIXED = 16  # shards in a window, where the cache would hold more: training begins when they are there


def _open(folder: str | Path, cache_bytes: int) -> list[Shard]:
    """Shards by latent shape and name, without their tables."""
    shards: list[Shard]
    if is_remote(folder):
        shards = [*open_remote(str(folder), cache_bytes)]
    else:
        shards = [Shard(stem, with_table=False) for stem in shard_stems(folder)]
    return sorted(shards, key=lambda shard: (shard.latent_shape, shard.stem))
