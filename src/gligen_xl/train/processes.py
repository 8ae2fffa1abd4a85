"""The processes of a run: they meet, agree, wait for each other, and end when one of them is gone.

Gradients are exchanged by the devices' own links (NCCL on GPUs). All else is exchanged between the CPUs (gloo), which
does not wait for a device, and notices at once that a process has died.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from .config import TrainConfig
from .peers import Peers, ended, meet


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make the Accelerator that `config` asks for.

    Raises:
        ValueError: accelerate is set up for a strategy that training does not support, or a tracker is not installed.
        RuntimeError: another process of the run does not come, or cannot begin.
    """
    trackers = _trackers(config)
    meet(config.process_timeout)
    hook = DDPCommunicationHookType.BF16 if config.gradient_compression == "bf16" else DDPCommunicationHookType.NO
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on a CPU do not hear of each other
        mixed_precision=config.precision,
        log_with=trackers or None,
        project_dir=Path(config.out),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout)),
            # Buffers never change, and gradients are not held a second time to be sent.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook),
        ],
    )
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # for which accelerate does neither
        accelerator.scaler, accelerator.native_amp = GradScaler("cpu"), True
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which training does not know. Launch it "
            "plainly (torchrun, or accelerate launch --multi_gpu); shard_optimizer shares the optimizer's state"
        )
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be shared by {accelerator.num_processes} processes; "
            "set batch_size to a multiple of them"
        )
    return accelerator


class Processes:
    """Communication among all processes of a run; a single process talks to nobody.

    Raises (from every method):
        RuntimeError: another process is gone, or was not heard of for `timeout` seconds.
    """

    def __init__(self, accelerator: Accelerator, timeout: int):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self._group: Any = None
        self._peers: Peers | None = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._peers = Peers(self.rank, self.count, self.from_main)

    def __enter__(self) -> Processes:
        """Begin the run; an error that leaves the block ends the other processes too, with its reason."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._peers is None:
            return
        if isinstance(error, RuntimeError) and _is_of_the_network(error) and (reason := self._peers.reason(2)):
            self._peers.leave()
            raise RuntimeError(ended(reason)) from error
        reason = "" if error is None else " ".join(str(error).split()) or type(error).__name__
        self._peers.leave(reason, 2 if error is not None else 0)

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is true on any process; all have to call it."""
        if self.count == 1:
            return flag
        value = torch.tensor(int(flag))
        with self._named_errors():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)

    def from_main(self, text: str) -> str:
        """Return the text of the main process; all have to call it."""
        if self.count == 1:
            return text
        content = text.encode()
        size = torch.tensor(len(content))
        with self._named_errors():
            dist.broadcast(size, 0, group=self._group)
            letters = torch.zeros(int(size), dtype=torch.uint8)
            if self.is_main and content:
                letters = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(letters, 0, group=self._group)
        return letters.numpy().tobytes().decode()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block before the others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all processes by name, in main memory, on the main one; on the others, their own."""
        with self._named_errors():
            if not self.is_main:
                self._send(tensors)
                return dict(tensors)
            collected = {name: value.cpu() for name, value in tensors.items()}
            for rank in range(1, self.count):
                collected |= self._receive(rank)
            return collected

    def _send(self, tensors: Mapping[str, Tensor]) -> None:
        kinds = [[name, str(value.dtype).removeprefix("torch."), value.shape] for name, value in tensors.items()]
        header = torch.frombuffer(bytearray(json.dumps(kinds).encode()), dtype=torch.uint8)
        dist.send(torch.tensor(header.numel()), 0, group=self._group)
        dist.send(header, 0, group=self._group)
        for value in tensors.values():
            dist.send(value.detach().contiguous().cpu(), 0, group=self._group)

    def _receive(self, rank: int) -> dict[str, Tensor]:
        size = torch.tensor(0)
        dist.recv(size, rank, group=self._group)
        header = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(header, rank, group=self._group)
        tensors = {}
        for name, kind, shape in json.loads(header.numpy().tobytes()):
            tensors[name] = torch.empty(shape, dtype=getattr(torch, kind))
            dist.recv(tensors[name], rank, group=self._group)
        return tensors

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"another process of this run is gone, or was not heard of in time (process_timeout): {error}. "
                "The last checkpoint stands; the same command continues"
            ) from error


def _is_of_the_network(error: RuntimeError) -> bool:
    """Tell whether an error comes from the communication between processes."""
    if isinstance(error, dist.DistError) or isinstance(error.__cause__, RuntimeError):
        return True
    return any(name in str(error) for name in ("gloo", "NCCL", "Connection closed", "Connection reset"))


def _trackers(config: TrainConfig) -> Any:
    if config.track is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    for name in config.track:
        if not find_spec(name):
            raise ValueError(f"the tracker {name} is not installed; pip install {name}, or leave it out of track")
    return list(config.track)
