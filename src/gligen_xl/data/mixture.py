"""Several datasets mixed by weight: which of them a sample, or a batch, is taken from.

Draws come in blocks. In each block every dataset has its exact share, and their turns are shuffled; so how often a
dataset was drawn before any point is known at once, without going through the draws before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .sampler import SampleOrder

BLOCK = 2**20  # draws


class MixtureOrder:
    """The endless row of global batches of several datasets.

    Args:
        orders: of each dataset. Where they give single samples (batch_size 1), samples of all mix within a batch; else
            each batch is of one dataset. Samples are counted through all datasets.
        weights: shares of samples, of any sum.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], batch_size: int, seed: int):
        if len(weights) != len(orders):
            raise ValueError(f"{len(weights)} weights for {len(orders)} datasets; each needs one")
        if {order.batch_size for order in orders} not in ({1}, {batch_size}):
            raise ValueError(f"datasets are to give samples one by one, or in batches of {batch_size}")
        self.batch_size, self.seed, self._orders = batch_size, seed, list(orders)
        self.samples = sum(order.samples for order in orders)
        self._first = np.cumsum([0, *(order.samples for order in orders)])[:-1]
        self._shares = turns_of(weights)
        self._at_once = batch_size // orders[0].batch_size
        self._block = -1

    def batch(self, number: int) -> np.ndarray:
        """Sample numbers of global batch `number`, (batch_size,)."""
        draws = (self._draw(k) for k in range(number * self._at_once, (number + 1) * self._at_once))
        return np.concatenate([self._first[which] + self._orders[which].batch(turn) for which, turn in draws])

    def _draw(self, number: int) -> tuple[int, int]:
        """Which dataset, and how often it was drawn before."""
        block, place = divmod(number, BLOCK)
        if block != self._block:
            self._turns = np.repeat(np.arange(len(self._shares), dtype=np.uint16), self._shares)
            np.random.default_rng([self.seed, block, 0, 0, 1]).shuffle(self._turns)
            self._before = np.empty(BLOCK, np.int32)
            for which, share in enumerate(self._shares):
                self._before[self._turns == which] = np.arange(share)
            self._block = block
        which = int(self._turns[place])
        return which, block * int(self._shares[which]) + int(self._before[place])


def turns_of(weights: Sequence[float]) -> np.ndarray:
    """How many draws of a block each dataset has: its share to a millionth, and at least one.

    Raises:
        ValueError: a weight that is not a positive number.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weights of the data are {list(weights)}; expected positive numbers")
    exact = np.array(weights) / sum(weights) * BLOCK
    turns = np.maximum(np.floor(exact), 1).astype(np.int64)
    while missing := BLOCK - int(turns.sum()):  # to those that lost most by rounding; or from those that have most
        if missing > 0:
            turns[np.argsort(turns - exact, kind="stable")[:missing]] += 1
        else:
            turns[np.argmax(turns)] -= 1
    return turns
