"""A cache of phrase embeddings across batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from ..device import to_device


class PhraseCache:
    """Keeps the embeddings used last on the device that uses them, in memory allocated once.

    Args:
        size: number of phrases to keep; 0 keeps none.
        width: numbers in one embedding.
    """

    def __init__(self, size: int, width: int, device: torch.device, dtype: torch.dtype):
        self._size = size
        self._rows: OrderedDict[str, int] = OrderedDict()  # by phrase, the one used longest ago first
        self._table = torch.zeros(size + 1, width, device=device, dtype=dtype)

    def table(self, phrases: list[str], encode: Callable[[list[str]], Tensor]) -> tuple[Tensor, dict[str, int]]:
        """Return a table (R, width) with these distinct phrases, and the row of each; row 0 is zeros.

        Args:
            encode: returns the embeddings, (n, width), of phrases that are not in the cache.
        """
        if len(phrases) > self._size:
            return torch.cat([self._table[:1], encode(phrases)]), {phrase: k for k, phrase in enumerate(phrases, 1)}
        new = []
        for phrase in phrases:
            if phrase in self._rows:
                self._rows.move_to_end(phrase)
            else:
                new.append(phrase)
        if new:
            embeddings = encode(new)
            for phrase, row in zip(new, self._free_rows(len(new)), strict=True):
                self._rows[phrase] = row
            rows = to_device(torch.tensor([self._rows[phrase] for phrase in new]), self._table.device)
            self._table.index_copy_(0, rows, embeddings)
        return self._table, self._rows

    def _free_rows(self, count: int) -> list[int]:
        """Return unused rows first, then those of the phrases used longest ago."""
        first = len(self._rows) + 1
        unused = list(range(first, min(first + count, self._size + 1)))
        return unused + [self._rows.popitem(last=False)[1] for _ in range(count - len(unused))]
