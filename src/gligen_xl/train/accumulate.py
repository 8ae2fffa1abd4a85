"""A batch in parts, whose gradients add up to those of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Batch


def micro_batches(
    batch: Batch, conditioning: dict[str, Any], size: int | None
) -> Iterator[tuple[Batch, dict[str, Any], bool]]:
    """Parts of at most `size` samples, each with its part of the conditioning, and whether it is the last."""
    count = len(batch.positions)
    size = min(size or count, count)
    for first in range(0, count, size):
        part = slice(first, first + size)
        yield batch.part(part), _part(conditioning, part), first + size >= count


def spoiled_unless_finite(loss: Tensor) -> Tensor:
    """The same scalar, to the bit; but where it is no number, or infinite, so are all of its gradients.

    So the norm of the gradients, of which all processes have the same, tells of a loss that is not finite in any.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def _part(values: Any, part: slice) -> Any:
    """The same rows of every tensor of nested dictionaries."""
    if isinstance(values, Tensor):
        return values[part]
    if isinstance(values, dict):
        return {name: _part(value, part) for name, value in values.items()}
    return values
