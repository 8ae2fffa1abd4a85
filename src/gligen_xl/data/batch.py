"""From shards to batches: samples by number, their dropouts and noise by position, padded to the adapter's slots.

Whatever is random about a sample follows from (seed, position), position being how many samples the run has seen
before it. So any number of ranks and workers gives the same global batches with the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .order import SampleOrder
from .shards import Shard, find_shards


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
        if self.slots < 1:
            raise ValueError(f"slots is {self.slots}; expected at least 1")

    def choose(self, scores: Sequence[float]) -> list[int]:
        """Numbers of the boxes to keep: confident enough, best first, at most `slots`."""
        good = [k for k, score in enumerate(scores) if score > self.min_score]
        return sorted(good, key=lambda k: -scores[k])[: self.slots]


@dataclass(frozen=True, kw_only=True)
class Sample:
    position: int
    latents: np.ndarray  # (C, h, w) float32
    noise: np.ndarray  # (C, h, w) float32
    time: float  # uniform in 0-1
    caption: str | None  # None: dropped
    phrases: list[str]
    boxes: np.ndarray  # (n, 4) float32
    size: tuple[int, int, int, int, int, int]  # original (h, w), crop (top, left), target (h, w): SDXL's conditioning


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of one latent shape; boxes padded to N slots."""

    position: int
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    time: Tensor  # (B,)
    captions: list[str | None]
    phrases: list[list[str]]
    boxes: Tensor  # (B, N, 4)
    mask: Tensor  # (B, N), 1 where there is a box
    size: Tensor  # (B, 6)


class ShardDataset(Dataset):
    """Samples of a folder of shards, asked for as (number, position)."""

    def __init__(self, folder: str | Path, augmentation: Augmentation, seed: int):
        self.augmentation, self.seed = augmentation, seed
        shards = find_shards(folder)
        self.shards: list[Shard] = sorted(shards, key=lambda shard: (shard.latent_shape, shard.stem))
        self._first = np.cumsum([0, *(len(shard) for shard in self.shards)])
        if not len(self):
            raise ValueError(f"{folder} holds no samples")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def groups(self) -> list[int]:
        """Number of samples by latent shape, in the order of their numbers."""
        sizes: dict[tuple[int, int, int], int] = {}
        for shard in self.shards:
            if len(shard):
                sizes[shard.latent_shape] = sizes.get(shard.latent_shape, 0) + len(shard)
        return list(sizes.values())

    def find(self, number: int) -> tuple[Shard, int]:
        """The shard of a sample, and its place there."""
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.shards[which], number - int(self._first[which])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        number, position = key
        shard, index = self.find(number)
        row = shard.row(index)
        rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        keep_grounding = rng.random() >= self.augmentation.drop_grounding
        keep_caption = rng.random() >= self.augmentation.drop_caption and keep_grounding
        chosen = self.augmentation.choose(row.scores) if keep_grounding else []
        latents = np.asarray(shard.latents[index], np.float32)
        return Sample(
            position=position,
            latents=latents,
            time=rng.random(),
            noise=rng.standard_normal(latents.shape, np.float32),
            caption=row.caption if keep_caption else None,
            phrases=[row.phrases[k] for k in chosen],
            boxes=np.array([row.boxes[k] for k in chosen], np.float32).reshape(-1, 4),
            size=(
                row.original_height, row.original_width, row.crop_top, row.crop_left,
                latents.shape[1] * shard.downsampling, latents.shape[2] * shard.downsampling,
            ),
        )  # fmt: skip

    def collate(self, samples: list[Sample]) -> Batch:
        slots = self.augmentation.slots
        boxes = torch.zeros(len(samples), slots, 4)
        mask = torch.zeros(len(samples), slots)
        for k, sample in enumerate(samples):
            boxes[k, : len(sample.boxes)] = torch.from_numpy(sample.boxes)
            mask[k, : len(sample.boxes)] = 1
        return Batch(
            position=samples[0].position,
            latents=torch.from_numpy(np.stack([sample.latents for sample in samples])),
            noise=torch.from_numpy(np.stack([sample.noise for sample in samples])),
            time=torch.tensor([sample.time for sample in samples]),
            captions=[sample.caption for sample in samples],
            phrases=[sample.phrases for sample in samples],
            boxes=boxes,
            mask=mask,
            size=torch.tensor([sample.size for sample in samples], dtype=torch.float32),
        )


class _Keys(Sampler):
    """(number, position) of this rank's share of every global batch from `start` to `stop`, as lists."""

    def __init__(self, order: SampleOrder, start: int, stop: int, rank: int, ranks: int):
        self.order, self.start, self.stop = order, start, stop
        self.share = slice(rank * order.batch_size // ranks, (rank + 1) * order.batch_size // ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.order.batch_size
        for number in range(self.start // size, self.stop // size):
            samples = self.order.batch(number).tolist()
            keys = [(sample, number * size + k) for k, sample in enumerate(samples)]
            yield keys[self.share]

    def __len__(self) -> int:
        return (self.stop - self.start) // self.order.batch_size


def batches(
    dataset: ShardDataset, order: SampleOrder, *, start: int, stop: int, rank: int = 0, ranks: int = 1, workers: int = 0
) -> DataLoader:
    """The batches of one rank, for positions `start` to `stop` (both multiples of the global batch)."""
    if order.batch_size % ranks:
        raise ValueError(f"a global batch of {order.batch_size} cannot be shared by {ranks} processes")
    if start % order.batch_size:
        raise ValueError(f"position {start} is not a multiple of the global batch, {order.batch_size}")
    keys = _Keys(order, start, stop, rank, ranks)
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=dataset.collate)
