"""The order of samples: a function of (seed, number of the batch), for any number of ranks and workers.

`SampleOrder`: an epoch permutes each group of samples that have one latent shape, cuts it into batches, and permutes
the batches of all groups. The remainder of a group is left out of the epoch; each epoch has another one. With a window,
for data that is streamed, the order is local: parts (shards) are permuted, and samples are mixed within that many parts
at a time. The remainder of a window begins the next one.

`MixtureOrder`: several datasets by weight. Draws come in blocks. In each block every dataset has its exact number of
draws, and their turns are shuffled; so how often a dataset was drawn before any point is known without going through
the draws before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BLOCK = 2**20  # draws of a mixture


class SampleOrder:
    """The endless sequence of global batches of one dataset.

    Args:
        parts: number of samples in each part; samples are counted through all parts in this order.
        batch_size: samples of a global batch. A smaller group is repeated until it fills one.
        groups: the group of each part; by default every part is a group of its own.
        window: how many parts are mixed at a time; by default all.
    """

    def __init__(
        self,
        parts: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        groups: Sequence[int] | None = None,
        window: int | None = None,
    ):
        if not parts or min(parts) < 1:
            raise ValueError(f"groups of {list(parts)} samples; each needs at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; expected at least 1 shard")
        self.batch_size, self.seed = batch_size, seed
        self.window = min(window or len(parts), len(parts))
        self.samples = int(sum(parts))
        self._sizes = np.array(parts, np.int64)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._group = np.unique(np.arange(len(parts)) if groups is None else groups, return_inverse=True)[1]
        self._totals = np.zeros(self._group.max() + 1, np.int64)
        np.add.at(self._totals, self._group, self._sizes)
        self.batches_per_epoch = int(np.maximum(self._totals // batch_size, 1).sum())
        self._epoch, self._window = -1, -1

    def batch(self, number: int) -> np.ndarray:
        """Return the sample numbers of global batch `number`, (batch_size,)."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._plan(epoch)
        window = int(np.searchsorted(self._done.sum(1), place, side="right")) - 1
        if window != self._window:
            self._mix(window)
        turn = place - int(self._done[window].sum())
        turn = turn if self._turns is None else int(self._turns[turn])
        group = int(np.searchsorted(self._ends, turn, side="right"))
        first = turn - (int(self._ends[group - 1]) if group else 0)
        part = self._mixed[group][first * self.batch_size : (first + 1) * self.batch_size]
        return np.resize(part, self.batch_size).astype(np.int64)

    def _plan(self, epoch: int) -> None:
        """Plan an epoch: the parts of each window, and how many samples and batches of each group end with each.

        The samples of a group, window after window, are its stream. A batch belongs to the window of its last sample.
        """
        rng = np.random.default_rng([self.seed, epoch])
        self._parts = rng.permutation(len(self._sizes)) if self.window < len(self._sizes) else np.arange(self.window)
        windows = -(-len(self._sizes) // self.window)
        samples = np.zeros((windows + 1, len(self._totals)), np.int64)
        which = 1 + np.arange(len(self._parts)) // self.window
        np.add.at(samples, (which, self._group[self._parts]), self._sizes[self._parts])
        self._streamed = samples.cumsum(0)
        small = self._totals < self.batch_size
        self._done = np.where(small, self._streamed >= self._totals, self._streamed // self.batch_size)
        self._epoch, self._window = epoch, -1

    def _mix(self, window: int) -> None:
        """Draw the samples of a window's batches, by group, and the order of these batches."""
        self._mixed: list[np.ndarray] = []  # frees those of the former window first
        counts = self._done[window + 1] - self._done[window]
        for group, count in enumerate(counts):
            first, stop = self._done[window : window + 2, group] * self.batch_size
            self._mixed.append(self._stream(group, first, min(stop, self._totals[group])) if count else np.empty(0))
        self._ends = np.cumsum(counts)
        rng = np.random.default_rng([self.seed, self._epoch, window + 1])
        alone = len(counts) == 1  # the batches of a single group are in random order already
        self._turns = None if alone else rng.permutation(self._ends[-1])
        self._window = window

    def _stream(self, group: int, first: int, stop: int) -> np.ndarray:
        """Return samples `first` to `stop` of a group's stream."""
        ends = self._streamed[1:, group]
        pieces = []
        for window in range(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, stop)) + 1):
            begin = self._streamed[window, group]
            pieces.append(self._shuffled(window, group)[max(first - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _shuffled(self, window: int, group: int) -> np.ndarray:
        """Return the samples of a group in a window, shuffled; as uint32 where that suffices: 44 MB for 11 million."""
        parts = self._parts[window * self.window : (window + 1) * self.window]
        parts = parts[self._group[parts] == group]
        kind = np.uint32 if self.samples < 2**32 else np.int64
        spans = [(int(self._first[part]), int(self._sizes[part])) for part in parts]
        ranges = [np.arange(first, first + size, dtype=kind) for first, size in spans]
        samples = np.concatenate([*ranges, np.empty(0, kind)])
        np.random.default_rng([self.seed, self._epoch, window + 1, group + 1]).shuffle(samples)
        return samples


class MixtureOrder:
    """The endless sequence of global batches of several datasets.

    Args:
        orders: one for each dataset. If they give single samples (batch_size 1), a batch mixes samples of all datasets;
            otherwise each batch comes from one. Samples are counted through all datasets.
        weights: of each dataset; a sample comes from it in this proportion.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], batch_size: int, seed: int):
        if len(weights) != len(orders):
            raise ValueError(f"{len(weights)} weights for {len(orders)} datasets; each needs one")
        if {order.batch_size for order in orders} not in ({1}, {batch_size}):
            raise ValueError(f"datasets must give samples one by one, or in batches of {batch_size}")
        self.batch_size, self.seed, self._orders = batch_size, seed, list(orders)
        self.samples = sum(order.samples for order in orders)
        self._first = np.cumsum([0, *(order.samples for order in orders)])[:-1]
        self._counts = draws_per_block(weights)
        self._draws = batch_size // orders[0].batch_size  # of a batch
        self._block = -1

    def batch(self, number: int) -> np.ndarray:
        """Return the sample numbers of global batch `number`, (batch_size,)."""
        draws = (self._draw(k) for k in range(number * self._draws, (number + 1) * self._draws))
        return np.concatenate([self._first[which] + self._orders[which].batch(turn) for which, turn in draws])

    def _draw(self, number: int) -> tuple[int, int]:
        """Return the dataset of a draw, and how often that dataset was drawn before."""
        block, place = divmod(number, BLOCK)
        if block != self._block:
            self._turns = np.repeat(np.arange(len(self._counts), dtype=np.uint16), self._counts)
            np.random.default_rng([self.seed, block, 0, 0, 1]).shuffle(self._turns)
            self._before = np.empty(BLOCK, np.int32)
            for which, count in enumerate(self._counts):
                self._before[self._turns == which] = np.arange(count)
            self._block = block
        which = int(self._turns[place])
        return which, block * int(self._counts[which]) + int(self._before[place])


def draws_per_block(weights: Sequence[float]) -> np.ndarray:
    """Return how many draws of a block each dataset has: in proportion to its weight, and at least one.

    Raises:
        ValueError: a weight is not a positive number.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weights of the data are {list(weights)}; expected positive numbers")
    exact = np.array(weights) / sum(weights) * BLOCK
    draws = np.maximum(np.floor(exact), 1).astype(np.int64)
    while missing := BLOCK - int(draws.sum()):  # give to those that lost most by rounding, or take from the largest
        if missing > 0:
            draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
        else:
            draws[np.argmax(draws)] -= 1
    return draws
