"""From shards to batches: samples by number, their dropouts and noise by position, padded to the adapter's slots.

Whatever is random about a sample follows from (seed, position), position being how many samples the run has seen
before it. So any number of ranks and workers gives the same global batches with the same noise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..device import to_device
from ..limits import MAX_SLOTS
from .chance import noise_of, uniforms
from .mixture import MixtureOrder
from .order import SampleOrder
from .remote import RemoteShard, is_remote, open_remote
from .shards import Row, Shard, shard_stems
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
        data: a folder, or a URL of one (see `gligen_xl.data.remote`); or several, whose samples are counted through.
        cache_bytes: what shards fetched from a URL may take of the disk.

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
    ):
        self.augmentation, self.seed = augmentation, seed
        folders = [data] if isinstance(data, str | Path) else list(data)
        self._sources = [_open(folder, cache_bytes) for folder in folders]
        for folder, shards in zip(folders, self._sources, strict=True):
            if not any(len(shard) for shard in shards):
                raise ValueError(f"{folder} holds no samples")
        self.shards: list[Shard] = [shard for shards in self._sources for shard in shards]
        self._first = [0, *accumulate(len(shard) for shard in self.shards)]
        self.table = Table(self.shards)
        self.cache_bytes = cache_bytes

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def groups(self) -> list[int]:
        """Number of samples by source and latent shape, in the order of their numbers."""
        sizes: dict[tuple, int] = {}
        for k, shards in enumerate(self._sources):
            for shard in shards:
                if len(shard):
                    key = (k, shard.latent_shape)
                    sizes[key] = sizes.get(key, 0) + len(shard)
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
        shapes = sorted({shard.latent_shape for shard in self.shards if len(shard)})
        mixed = len(self._sources) > 1
        orders = []
        for shards, window in zip(self._sources, windows, strict=True):
            parts = [shard for shard in shards if len(shard)]
            sizes, groups = [len(shard) for shard in parts], [shapes.index(shard.latent_shape) for shard in parts]
            at_once = 1 if mixed and len(shapes) == 1 else batch_size
            orders.append(SampleOrder(sizes, at_once, seed, groups=groups, window=window))
        if not mixed:
            return orders[0]
        return MixtureOrder(orders, weights or [order.samples for order in orders], batch_size, seed)

    def find(self, number: int) -> tuple[Shard, int]:
        """The shard of a sample, and its place there."""
        which = bisect_right(self._first, number) - 1
        return self.shards[which], number - self._first[which]

    def shards_of(self, numbers: Sequence[int] | np.ndarray) -> list[Shard]:
        """The shards that hold these samples, each once."""
        return [self.shards[k] for k in np.unique(np.searchsorted(self._first, numbers, side="right") - 1)]

    def row(self, number: int) -> Row:
        """All that is known of a sample, nothing dropped."""
        return self.table.row(number)

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
        shard, index = self.find(number)
        shard.read_latents(index, latents)
        record = self.table.record(number)
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
