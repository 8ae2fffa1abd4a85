"""The batches of one process, read by any number of workers.

Latents come through shared memory that is set aside once: a worker reads them from the disk straight into it. (Torch
itself would make a file of shared memory for every tensor of every batch, which takes longer than reading the batch.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .dataset import Batch, ShardDataset
from .prefetch import Prefetching
from .sampler import MixtureOrder, SampleOrder
from .streaming import RemoteShard
from .workers import Workers

PREFETCH = 2  # batches that each worker reads ahead

Keys = list[tuple[int, int]]  # (number, position) of each sample of a batch


class Batches(Protocol):
    """Batches, to be gone through; the iterator's `close` ends the workers."""

    def __iter__(self) -> Upcoming: ...

    def __len__(self) -> int: ...


class Upcoming(Protocol):
    """Batches that are on their way."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> object: ...


def batches(
    dataset: ShardDataset,
    order: SampleOrder | MixtureOrder,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    timeout: float | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> Batches:
    """The batches of one rank, for positions `start` to `stop` (both multiples of the global batch).

    Args:
        timeout: seconds to wait for a batch of a worker.
        asked: whether one is asked to stop: a worker that gives nothing then is waited for no longer.

    Raises:
        RuntimeError: while they are drawn, if a worker dies, or gives nothing in time (`workers.Stuck`, when asked).
    """
    if order.batch_size % ranks:
        raise ValueError(f"a global batch of {order.batch_size} cannot be shared by {ranks} processes")
    if start % order.batch_size:
        raise ValueError(f"position {start} is not a multiple of the global batch, {order.batch_size}")
    keys = _Keys(order, start, stop, rank, ranks)
    loader = _InProcess(dataset, keys) if workers == 0 else _InWorkers(dataset, keys, workers, timeout, asked)
    if not any(isinstance(shard, RemoteShard) for shard in dataset.shards):
        return loader
    ahead = _Keys(deepcopy(order), start, stop, rank, ranks)  # an order remembers where it is
    needed = (dataset.shards_of([number for number, _ in batch]) for batch in ahead)
    return Prefetching(loader, needed, dataset.cache_bytes)


class _Keys:
    """(number, position) of this rank's share of every global batch from `start` to `stop`, as lists."""

    def __init__(self, order: SampleOrder | MixtureOrder, start: int, stop: int, rank: int, ranks: int):
        self.order, self.start, self.stop = order, start, stop
        self.share = slice(rank * order.batch_size // ranks, (rank + 1) * order.batch_size // ranks)

    def __iter__(self) -> Iterator[Keys]:
        size = self.order.batch_size
        for number in range(self.start // size, self.stop // size):
            samples = self.order.batch(number).tolist()
            keys = [(sample, number * size + k) for k, sample in enumerate(samples)]
            yield keys[self.share]

    def __len__(self) -> int:
        return (self.stop - self.start) // self.order.batch_size


@dataclass
class _InProcess:
    dataset: ShardDataset
    keys: _Keys

    def __iter__(self) -> Generator[Batch]:
        return (self.dataset.batch(keys) for keys in self.keys)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class _InWorkers:
    """Batches without their latents come through a pipe, the latents in one of the places of the shared memory.

    Between one batch and the next that is asked for, the workers have no more than `PREFETCH` batches each in hand. So
    with one place more than that, a batch's place is not written again before its latents are copied from it.
    """

    dataset: ShardDataset
    keys: _Keys
    workers: int
    timeout: float | None
    asked: Callable[[], bool]

    def __iter__(self) -> _Received:
        return _Received(self)

    def __len__(self) -> int:
        return len(self.keys)


class _Received(Iterator[Batch]):
    """Args: loader: whose workers begin now."""

    def __init__(self, loader: _InWorkers):
        dataset, keys = loader.dataset, loader.keys
        self._places, self._number = PREFETCH * loader.workers + 1, 0
        share = keys.share.stop - keys.share.start
        size = share * max(math.prod(shard.latent_shape) for shard in dataset.shards)
        self._room = torch.empty(self._places, size, dtype=torch.float16).share_memory_()
        numbered = ((number % self._places, batch) for number, batch in enumerate(keys))
        work = _Work(dataset, self._room)
        self._workers = Workers(work, numbered, loader.workers, PREFETCH, loader.timeout, loader.asked)
        self.close = self._workers.close

    def __next__(self) -> Batch:
        values = next(self._workers)
        shape = values["latents"]
        latents = self._room[self._number % self._places, : shape.numel()].view(shape).clone()
        self._number += 1
        values |= {name: torch.from_numpy(values[name]) for name in _SMALL}
        values["latents"] = latents
        return Batch(**values)


@dataclass
class _Work:
    """What a worker does."""

    dataset: ShardDataset
    room: Tensor

    def __call__(self, work: tuple[int, Keys]) -> dict[str, Any]:
        """The fields of the batch; of the latents the shape, and the other tensors as arrays."""
        place, keys = work
        batch = self.dataset.batch(keys, self.room[place].numpy())
        arrays = {name: getattr(batch, name).numpy() for name in _SMALL}
        return vars(batch) | arrays | {"latents": batch.latents.shape}


_SMALL = ("time", "boxes", "mask", "size")
