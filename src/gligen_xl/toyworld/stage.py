"""One stage of building the embedded model: a plain training loop that resumes from its last checkpoint.

Several processes (torchrun) share each batch and average their gradients. On a CPU one process a core is faster than
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
    """How one part of the model is trained: cosine decay over `samples`, after a short warm-up."""

    samples: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.998
    warmup_steps: int = 100
    checkpoint_every: int = 200  # steps
    log_every: int = 50  # steps


def run_stage(
    folder: Path, modules: nn.Module, config: StageConfig, loss: Callable[[int, int], dict[str, Tensor]], seed: int
) -> None:
    """Train `modules` and leave them holding their averages. Resumes from `folder`; done stages load and return.

    Args:
        loss: (first, count) -> named losses of the samples first .. first + count; "loss" is what falls.
    """
    process = PartialState(cpu=True)
    share = config.batch_size // process.num_processes
    if share * process.num_processes != config.batch_size:
        raise ValueError(f"a batch of {config.batch_size} cannot be shared by {process.num_processes} processes")
    trained = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMA(trained, config.ema_decay)
    position = 0
    with process.main_process_first():  # the first puts damaged ones aside
        whole = last_whole(folder, _check)
    if whole:
        _, tensors, state = whole
        modules.load_state_dict(tensors["model"])
        ema.load(tensors["ema"], state["ema_steps"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        position = state["position"]
    total_steps = config.samples // config.batch_size
    sums: dict[str, float] = {}
    clock = time.perf_counter()
    while (step := position // config.batch_size) < total_steps:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        rate = config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = position + process.process_index * share
        torch.manual_seed((seed << 32) + first)
        losses = loss(first, share)
        optimizer.zero_grad()
        losses["loss"].backward()
        if process.num_processes > 1:
            _average_gradients(trained.values())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ema.update()
        position += config.batch_size
        step += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % config.log_every == 0 and process.is_main_process:
            seconds = time.perf_counter() - clock
            row = {name: round(value / config.log_every, 5) for name, value in sums.items()}
            row |= {"samples": position, "samples_per_s": round(config.log_every * config.batch_size / seconds, 1)}
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(folder.name, row, flush=True)
            sums, clock = {}, time.perf_counter()
        if step % config.checkpoint_every == 0 or step == total_steps:
            tensors = {"model": modules.state_dict(), "ema": ema.average, "optimizer": optimizer_tensors(optimizer)}
            if process.is_main_process:
                save_checkpoint(folder, position, tensors, {"ema_steps": ema.steps, "seed": seed}, keep=2)
    process.wait_for_everyone()
    ema.copy_to_parameters()


def _check(path: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Whether a checkpoint has all that a stage goes on from."""
    if missing := sorted({"model", "ema", "optimizer"} - tensors.keys()):
        raise ValueError(f"{path} is damaged: it has no {missing[0]}.safetensors")
    if type(state.get("ema_steps")) is not int:
        raise ValueError(f"{path / 'state.json'} is damaged: it has no ema_steps")


def _average_gradients(parameters: Iterable[Tensor]) -> None:
    """Over all processes, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
