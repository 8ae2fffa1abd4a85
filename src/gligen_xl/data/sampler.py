"""Which samples make up which batch: a function of (seed, batch number), whatever the ranks and workers.

An epoch is a permutation of each group of like-shaped samples, cut into batches of one group each; the batches of all
groups are then permuted. What is left over at the end of a group sits the epoch out, another remainder each time.

With a window the order is local, for data that is streamed: the parts (shards) are permuted, and samples are mixed
within so many parts at a time. What a window leaves over begins the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SampleOrder:
    """The endless row of global batches.

    Args:
        parts: number of samples in each part; samples are counted through all parts in this order.
        batch_size: samples of a global batch. A smaller group is repeated until it fills one.
        groups: the group of each part; by default every part is a group of its own.
        window: so many parts are mixed at a time; by default all.
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
        """Sample numbers of global batch `number`, (batch_size,)."""
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
        """The parts of each window, and how much of each group is over by the end of each: samples and batches.

        The samples of a group, window after window, are its stream. A batch of it stands in the window of its last
        sample.
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
        """The samples of the batches of a window, by group, and the order of these batches."""
        self._mixed: list[np.ndarray] = []  # those of the former window go before the new ones come
        counts = self._done[window + 1] - self._done[window]
        for group, count in enumerate(counts):
            first, stop = self._done[window : window + 2, group] * self.batch_size
            self._mixed.append(self._stream(group, first, min(stop, self._totals[group])) if count else np.empty(0))
        self._ends = np.cumsum(counts)
        rng = np.random.default_rng([self.seed, self._epoch, window + 1])
        alone = len(counts) == 1  # one group's batches are in random order as they are
        self._turns = None if alone else rng.permutation(self._ends[-1])
        self._window = window

    def _stream(self, group: int, first: int, stop: int) -> np.ndarray:
        """Samples `first` to `stop` of a group's stream."""
        ends = self._streamed[1:, group]
        pieces = []
        for window in range(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, stop)) + 1):
            begin = self._streamed[window, group]
            pieces.append(self._shuffled(window, group)[max(first - begin, 0) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _shuffled(self, window: int, group: int) -> np.ndarray:
        """The samples of a group that a window brings, shuffled. Half the memory: 44 MB for 11 million."""
        parts = self._parts[window * self.window : (window + 1) * self.window]
        parts = parts[self._group[parts] == group]
        kind = np.uint32 if self.samples < 2**32 else np.int64
        spans = [(int(self._first[part]), int(self._sizes[part])) for part in parts]
        ranges = [np.arange(first, first + size, dtype=kind) for first, size in spans]
        samples = np.concatenate([*ranges, np.empty(0, kind)])
        np.random.default_rng([self.seed, self._epoch, window + 1, group + 1]).shuffle(samples)
        return samples
