"""The device that computes: tensors to it without waiting, and the same bits from it each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on `device`; itself, if it is there.

    A GPU works through a queue. An ordinary copy to it returns when all of the queue before it is done; one from pinned
    memory joins the queue.
    """
    if value.device.type == "cpu" and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """Let torch use only kernels that give the same bits each time within the block, if asked to; they are slower.

    On a GPU it has to begin before the first product of matrices (cuBLAS reads its setting once).

    Raises:
        RuntimeError: (inside) an operation has no such kernel.
    """
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
