"""Tensors to the device that computes, without waiting for it."""

from __future__ import annotations

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
