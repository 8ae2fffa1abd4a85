"""The batches of one process, read by any number of workers.

Latents come through shared memory that is set aside once: a worker reads them from the disk straight into it. (Torch
itself would make a file of shared memory for every tensor of every batch, which takes longer than reading the batch.)
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .ahead import Prefetching
from .batch import Batch, ShardDataset
from .mixture import MixtureOrder
from .order import SampleOrder
from .remote import RemoteShard

PREFETCH = 2  # batches that each worker reads ahead

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
) -> Iterable[Batch]:
    """The batches of one rank, for positions `start` to `stop` (both multiples of the global batch).

    Raises:
        RuntimeError: while they are drawn, if a worker dies.
    """
    if order.batch_size % ranks:
        raise ValueError(f"a global batch of {order.batch_size} cannot be shared by {ranks} processes")
    if start % order.batch_size:
        raise ValueError(f"position {start} is not a multiple of the global batch, {order.batch_size}")
    keys = _Keys(order, start, stop, rank, ranks)
    loader = _InProcess(dataset, keys) if workers == 0 else _InWorkers(dataset, keys, workers)
    if not any(isinstance(shard, RemoteShard) for shard in dataset.shards):
        return loader
    ahead = _Keys(deepcopy(order), start, stop, rank, ranks)  # an order remembers where it is
    needed = (dataset.shards_of([number for number, _ in batch]) for batch in ahead)
    return Prefetching(loader, needed, dataset.cache_bytes)


class _Keys(Sampler):
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

    def __iter__(self) -> Iterator[Batch]:
        return (self.dataset.batch(keys) for keys in self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _InWorkers:
    """Workers hand batches over without their latents, which wait in one of the places of the shared memory.

    Between one batch and the next that is asked for, the workers have no more than `PREFETCH` batches each in hand. So
    with one place more than that, a batch's place is not written again before its latents are copied from it.
    """

    def __init__(self, dataset: ShardDataset, keys: _Keys, workers: int):
        self._keys = keys
        self._places = PREFETCH * workers + 1
        share = keys.share.stop - keys.share.start
        size = share * max(math.prod(shard.latent_shape) for shard in dataset.shards)
        self._room = torch.empty(self._places, size, dtype=torch.float16).share_memory_()
        self._loader = DataLoader(
            _Work(dataset, self._room),
            sampler=_Numbered(keys, self._places),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
        )

    def __iter__(self) -> Iterator[Batch]:
        work = iter(self._loader)  # the workers begin now
        return (self._received(number, values) for number, values in enumerate(work))

    def _received(self, number: int, values: dict[str, Any]) -> Batch:
        shape = values["latents"]
        latents = self._room[number % self._places, : shape.numel()].view(shape).clone()
        values |= {name: torch.from_numpy(values[name]) for name in _SMALL}
        values["latents"] = latents
        return Batch(**values)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass
class _Numbered:
    """The keys of each batch, and the place for its latents."""

    keys: _Keys
    places: int

    def __iter__(self) -> Iterator[tuple[int, Keys]]:
        return ((number % self.places, keys) for number, keys in enumerate(self.keys))

    def __len__(self) -> int:
        return len(self.keys)


class _Work(Dataset):
    """What a worker does."""

    def __init__(self, dataset: ShardDataset, room: Tensor):
        self.dataset, self.room = dataset, room

    def __getitem__(self, work: tuple[int, Keys]) -> dict[str, Any]:
        """The fields of the batch; of the latents the shape, and the other tensors as arrays."""
        place, keys = work
        batch = self.dataset.batch(keys, self.room[place].numpy())
        arrays = {name: getattr(batch, name).numpy() for name in _SMALL}
        return vars(batch) | arrays | {"latents": batch.latents.shape}


_SMALL = ("time", "boxes", "mask", "size")


def _begin_worker(worker: int) -> None:
    """What the worker has from its parent is left alone by the collector of garbage, whose marks would copy it.

    A request to stop often goes to all processes of a job. The run is to end its step and save, for which it needs its
    workers: they pass over the first one, and so end by the second, with which their parent takes them down.
    """
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _as_it_is(value: Any) -> Any:
    return value
