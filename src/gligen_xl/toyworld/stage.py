"""One stage of building the embedded model: a plain training loop that resumes from its last checkpoint.

Several processes (torchrun) share each batch and average their gradients. On a CPU one process per core is faster than
one process on all of them (`benchmarks/processes.py`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor, nn

from ..train.checkpoint import last_whole, save_checkpoint
from ..train.ema import EMA
from ..train.optimizer import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a stage: cosine decay over `samples`, after a short warm-up."""

    samples: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.998
    warmup_steps: int = 100
    checkpoint_every: int = 200  # steps
    log_every: int = 50  # steps

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


@dataclass(kw_only=True)
class StageState:
    """What changes in a stage, and what a checkpoint of it holds."""

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    seed: int
    samples_seen: int = 0

    def load_last(self, folder: Path) -> None:
        """Restore the last undamaged checkpoint in `folder`, if there is one."""
        if newest := last_whole(folder, _check):
            _, tensors, state = newest
            self.modules.load_state_dict(tensors["model"])
            self.ema.load(tensors["ema"], state["ema_steps"])
            load_optimizer_tensors(self.optimizer, tensors["optimizer"])
            self.samples_seen = state["position"]

    def save(self, folder: Path) -> None:
        tensors = {
            "model": self.modules.state_dict(),
            "ema": self.ema.average,
            "optimizer": optimizer_tensors(self.optimizer),
        }
        save_checkpoint(folder, self.samples_seen, tensors, {"ema_steps": self.ema.steps, "seed": self.seed}, keep=2)


def run_stage(
    folder: Path, modules: nn.Module, config: StageConfig, loss: Callable[[int, int], dict[str, Tensor]], seed: int
) -> None:
    """Train `modules` and leave them holding their averages. It resumes from `folder`; a finished stage only loads.

    Args:
        loss: (first, count) -> named losses of the samples first .. first + count; "loss" is minimised.
    """
    process = PartialState(cpu=True)
    share = config.batch_size // process.num_processes
    if share * process.num_processes != config.batch_size:
        raise ValueError(f"a batch of {config.batch_size} cannot be shared by {process.num_processes} processes")
    trained = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    state = StageState(modules=modules, optimizer=optimizer, ema=EMA(trained, config.ema_decay), seed=seed)
    with process.main_process_first():  # the first renames damaged checkpoints
        state.load_last(folder)
    log = _StageLog(folder, config)
    for step in range(state.samples_seen // config.batch_size, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        first = state.samples_seen + process.process_index * share
        torch.manual_seed((seed << 32) + first)
        losses = loss(first, share)
        optimizer.zero_grad()
        losses["loss"].backward()
        if process.num_processes > 1:
            _average_gradients(trained.values())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        state.ema.update()
        state.samples_seen += config.batch_size
        log.add(losses)
        if (step + 1) % config.log_every == 0 and process.is_main_process:
            log.write(state.samples_seen)
        if ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps) and process.is_main_process:
            state.save(folder)
    process.wait_for_everyone()
    state.ema.copy_to_parameters()


class _StageLog:
    """Writes mean losses and speed to `log.jsonl` and the terminal."""

    def __init__(self, folder: Path, config: StageConfig):
        self._folder, self._config = folder, config
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._began = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item()

    def write(self, samples_seen: int) -> None:
        seconds, steps = time.perf_counter() - self._began, self._config.log_every
        row = {name: round(value / steps, 5) for name, value in self._sums.items()}
        row |= {"samples": samples_seen, "samples_per_s": round(steps * self._config.batch_size / seconds, 1)}
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(self._folder.name, row, flush=True)
        self._begin()


def _check(path: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Check that a checkpoint has all that a stage resumes from."""
    if missing := sorted({"model", "ema", "optimizer"} - tensors.keys()):
        raise ValueError(f"{path} is damaged: it has no {missing[0]}.safetensors")
    if type(state.get("ema_steps")) is not int:
        raise ValueError(f"{path / 'state.json'} is damaged: it has no ema_steps")


def _average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients over all processes, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
