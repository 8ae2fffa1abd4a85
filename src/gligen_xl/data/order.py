"""Which samples make up which batch: a function of (seed, batch number), whatever the ranks and workers.

An epoch is a permutation of each group of like-shaped samples, cut into batches of one group each; the batches of all
groups are then permuted. What is left over at the end of a group sits the epoch out, another remainder each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SampleOrder:
    """The endless row of global batches.

    Args:
        groups: number of samples in each group; samples are counted through all groups in this order.
        batch_size: samples of a global batch. A smaller group is repeated until it fills one.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int):
        if not groups or min(groups) < 1:
            raise ValueError(f"groups of {list(groups)} samples; each needs at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.groups, self.batch_size, self.seed = tuple(groups), batch_size, seed
        self.batches_per_epoch = sum(max(size // batch_size, 1) for size in groups)
        self._epoch = -1
        self._batches = np.empty((0, batch_size), np.int64)

    def batch(self, number: int) -> np.ndarray:
        """Sample numbers of global batch `number`, (batch_size,)."""
        epoch, k = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._arrange(epoch)
        return self._batches[k]

    def _arrange(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        batches, first = [], 0
        for size in self.groups:
            whole = max(size // self.batch_size, 1) * self.batch_size
            batches.append(first + np.resize(rng.permutation(size), whole).reshape(-1, self.batch_size))
            first += size
        return rng.permutation(np.concatenate(batches))
