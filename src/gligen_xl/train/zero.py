"""ZeRO: moments and average of the adapter, divided among the processes of a run or kept in main memory.

Every process has all weights and all gradients, but keeps moments and average of its own part alone, steps that part
and sends the new weights to the others (ZeRO stage 1, arXiv 1910.02054, section 5.1). AdamW and the average work
element by element, so the weights equal those of an undivided run, bit for bit.

With offloading (ZeRO-Offload, arXiv 2101.06840) the CPU steps a copy of the weights in main memory: gradients are
copied to it, and the new weights back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import Processes


class ZeroPartition:
    """Assigns each parameter to the process that steps and averages it (ZeRO); unless `sharded`, all to every process.

    Args:
        parameters: by name, in the same order on every process.
        sharded: whether the processes divide the parameters among themselves.
        offloaded: whether copies of the present weights, in main memory, are stepped in their place.

    Attributes:
        own: the parameters, or their copies, that this process steps, by name.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], processes: Processes, *, sharded: bool, offloaded: bool = False
    ):
        self._parameters, self._processes, self._offloaded = parameters, processes, offloaded
        self._owners = _owners(parameters, processes.count) if sharded and processes.count > 1 else {}
        self.own: dict[str, nn.Parameter] = {
            name: _offloaded_copy(value) if offloaded else value
            for name, value in parameters.items()
            if self._owners.get(name, processes.rank) == processes.rank
        }

    @torch.no_grad()
    def broadcast(self) -> None:
        """Send the stepped weights of every process to all others; all have to call it."""
        if self._offloaded:
            for name, copy in self.own.items():
                self._parameters[name].copy_(copy)  # and waits: the copy may be changed next
        works = [dist.broadcast(self._parameters[name], owner, async_op=True) for name, owner in self._owners.items()]
        for work in works:
            assert work is not None  # it is None for those that are in no group
            work.wait()

    def gather(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of all processes, by name, on the main one; all have to call it, each with its own."""
        return self._processes.gather(tensors) if self._owners else tensors


def _offloaded_copy(value: Tensor) -> nn.Parameter:
    """Copie a parameter to main memory; to pinned memory, if it is on a GPU."""
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return nn.Parameter(copy.copy_(value.detach()))


def _owners(parameters: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """Assigns a process to every parameter: the largest first, each to the process that has least."""
    loads = [0] * processes
    owners = {}
    for name, value in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += value.numel()
    return owners
