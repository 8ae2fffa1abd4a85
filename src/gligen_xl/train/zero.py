"""The moments and the average of the adapter, shared among the processes of a run, or held in main memory.

Every process has all weights and all gradients. Of what the optimizer and the average keep beside them, each holds its
share alone, steps it, and hands the new weights to the others (ZeRO's first stage, arXiv 1910.02054, section 5.1).
AdamW and the average go number by number, so the weights are those of a run that shares nothing, to the bit.

In main memory (ZeRO-Offload, arXiv 2101.06840) it is a copy of the weights that is stepped, by the CPU: gradients come
down to it, and the new weights go up again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .processes import Processes


class Shares:
    """Which process keeps what of some parameters; every process keeps all of them where `sharded` is false.

    Args:
        parameters: by name, in the same order on every process.
        sharded: whether they are shared out.
        offloaded: whether what is stepped are copies in main memory, of the weights as they are now.

    Attributes:
        own: what this process steps, by name: parameters, or their copies.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], processes: Processes, *, sharded: bool, offloaded: bool = False
    ):
        self._parameters, self._processes, self._offloaded = parameters, processes, offloaded
        self._owners = _owners(parameters, processes.count) if sharded and processes.count > 1 else {}
        self.own: dict[str, nn.Parameter] = {
            name: _in_main_memory(value) if offloaded else value
            for name, value in parameters.items()
            if self._owners.get(name, processes.rank) == processes.rank
        }

    @torch.no_grad()
    def spread(self) -> None:
        """Every process gets the weights of all shares, as they have been stepped; all have to call it."""
        if self._offloaded:
            for name, copy in self.own.items():
                self._parameters[name].copy_(copy)  # and waits: the copy may be changed next
        works = [dist.broadcast(self._parameters[name], owner, async_op=True) for name, owner in self._owners.items()]
        for work in works:
            assert work is not None  # it is None for those that are in no group
            work.wait()

    def collect(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What all processes hold, by name, on the main process; all have to call it, each with what is its own."""
        return self._processes.collect(tensors) if self._owners else tensors


def _in_main_memory(value: Tensor) -> nn.Parameter:
    """A copy there; pinned, where a GPU has to reach it."""
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return nn.Parameter(copy.copy_(value.detach()))


def _owners(parameters: Mapping[str, Tensor], processes: int) -> dict[str, int]:
    """A process for every parameter: the largest first, each to the one that has least."""
    loads = [0] * processes
    owners = {}
    for name, value in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += value.numel()
    return owners
