"""The batches of one process of a run, read by any number of loading workers.

Latents come through shared memory that is set aside once: a worker reads them from the disk straight into it. (Torch
itself would make a file of shared memory for every tensor of every batch, which takes longer than reading the batch.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dataset import Batch, ShardDataset
from .prefetch import Prefetcher
from .sampler import MixtureOrder, SampleOrder
from .shards import Shard
from .streaming import RemoteShard
from .workers import Workers

PREFETCH = 2  # batches that each worker reads before they are needed

Keys = list[tuple[int, int]]  # (number, position) of each sample of a batch


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
    stop_requested: Callable[[], bool] = lambda: False,
) -> Loader:
    """Return the batches of one rank, for positions `start` to `stop` (both multiples of the global batch).

    Args:
        timeout: seconds to wait for a batch of a worker.
        stop_requested: tells whether the run is asked to stop; then it does not wait long for a worker.

    Raises:
        RuntimeError: while batches are drawn, if a worker dies, or gives no batch in time (`workers.Stuck` if the run
            is asked to stop).
    """
    if order.batch_size % ranks:
        raise ValueError(f"a global batch of {order.batch_size} cannot be shared by {ranks} processes")
    if start % order.batch_size:
        raise ValueError(f"position {start} is not a multiple of the global batch, {order.batch_size}")
    return Loader(dataset, _Keys(order, start, stop, rank, ranks), workers, timeout, stop_requested)


class _Keys:
    """The keys of one rank's part of every global batch from `start` to `stop`."""

    def __init__(self, order: SampleOrder | MixtureOrder, start: int, stop: int, rank: int, ranks: int):
        self.order, self.start, self.stop = order, start, stop
        self.part = slice(rank * order.batch_size // ranks, (rank + 1) * order.batch_size // ranks)

    def __iter__(self) -> Iterator[Keys]:
        size = self.order.batch_size
        for number in range(self.start // size, self.stop // size):
            samples = self.order.batch(number).tolist()
            keys = [(sample, number * size + k) for k, sample in enumerate(samples)]
            yield keys[self.part]

    def __len__(self) -> int:
        return (self.stop - self.start) // self.order.batch_size


@dataclass
class Loader:
    """Batches to iterate over. `iter` starts the workers; `close` of the iterator ends them."""

    dataset: ShardDataset
    keys: _Keys
    workers: int
    timeout: float | None
    stop_requested: Callable[[], bool]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Generator[Batch]:
        if self.workers:
            batches = self._received(*self._start_workers())
        else:
            batches = (self.dataset.batch(keys) for keys in self.keys)
        remote = any(isinstance(shard, RemoteShard) for shard in self.dataset.shards)
        return self._prefetched(batches) if remote else batches

    def _start_workers(self) -> tuple[Workers, Tensor]:
        """Start the workers, and set aside the shared memory (places, numbers) for latents.

        Before one batch is drawn and the next one, workers have no more than `PREFETCH` batches each in hand. So with
        one place more than that, a place is not written again before its latents are copied.
        """
        places = PREFETCH * self.workers + 1
        count = self.keys.part.stop - self.keys.part.start
        size = count * max(math.prod(shard.latent_shape) for shard in self.dataset.shards)
        room = torch.empty(places, size, dtype=torch.float16).share_memory_()
        tasks = ((number % places, keys) for number, keys in enumerate(self.keys))
        work = _Work(self.dataset, room)
        return Workers(work, tasks, self.workers, PREFETCH, self.timeout, self.stop_requested), room

    def _received(self, workers: Workers, room: Tensor) -> Generator[Batch]:
        """Make batches of what the workers send, and the latents in the shared memory."""
        with closing(workers):
            for number, values in enumerate(workers):
                shape = values["latents"]
                latents = room[number % len(room), : shape.numel()].view(shape).clone()
                tensors = {name: torch.from_numpy(values[name]) for name in _SMALL}
                yield Batch(**values | tensors | {"latents": latents})

    def _prefetched(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Fetch the shards of the next batches meanwhile. Workers are forked already: better before threads start."""
        with closing(batches), Prefetcher(self._needed_shards(), self.dataset.cache_bytes) as prefetcher:
            for number, batch in enumerate(batches):
                prefetcher.reach(number)
                yield batch

    def _needed_shards(self) -> Iterator[list[Shard]]:
        for keys in deepcopy(self.keys):  # an order remembers its place
            yield self.dataset.shards_of([number for number, _ in keys])


@dataclass
class _Work:
    """The work of a loading worker."""

    dataset: ShardDataset
    room: Tensor

    def __call__(self, task: tuple[int, Keys]) -> dict[str, Any]:
        """Read a batch into a place of the shared memory; return its fields, with the shape for the latents and arrays
        for the other tensors."""
        place, keys = task
        batch = self.dataset.batch(keys, self.room[place].numpy())
        arrays = {name: getattr(batch, name).numpy() for name in _SMALL}
        return vars(batch) | arrays | {"latents": batch.latents.shape}


_SMALL = ("time", "boxes", "mask", "size")
