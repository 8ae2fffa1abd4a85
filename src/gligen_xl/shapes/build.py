"""Make the embedded model from nothing: VAE, then shards of latents, then text encoders and U-Net.

    gligen-xl shapes build --out runs/shapes

Each stage resumes from its last checkpoint; every picture, caption and noise follows from the seed and the number of
samples seen. The adapter comes afterwards, from the ordinary trainer (`gligen-xl train shapes`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from ..train.ema import EMA
from .model import new_vae
from .world import draw, sample_scene


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
    trained = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMA(trained, config.ema_decay)
    position = 0
    if checkpoints := list_checkpoints(folder):
        tensors, state = load_checkpoint(checkpoints[-1])
        modules.load_state_dict(tensors["model"])
        ema.load(tensors["ema"], state["ema_steps"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        position = state["position"]
    total_steps = config.samples // config.batch_size
    sums: dict[str, float] = {}
    seconds, clock = 0.0, time.perf_counter()
    while (step := position // config.batch_size) < total_steps:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        rate = config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((seed << 32) + position)
        losses = loss(position, config.batch_size)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ema.update()
        position += config.batch_size
        step += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % config.log_every == 0:
            seconds = time.perf_counter() - clock
            row = {name: round(value / config.log_every, 5) for name, value in sums.items()}
            row |= {"samples": position, "samples_per_s": round(config.log_every * config.batch_size / seconds, 1)}
            with (folder / "log.jsonl").open("a") if folder.exists() else _created(folder / "log.jsonl") as log:
                log.write(json.dumps(row) + "\n")
            print(folder.name, row, flush=True)
            sums, clock = {}, time.perf_counter()
        if step % config.checkpoint_every == 0 or step == total_steps:
            tensors = {"model": modules.state_dict(), "ema": ema.average, "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(folder, position, tensors, {"ema_steps": ema.steps, "seed": seed}, keep=1)
    ema.copy_to_parameters()


def _created(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def pictures(seed: int, first: int, count: int) -> Tensor:
    """Drawn scenes (count, 3, 64, 64), -1..1."""
    drawn = np.stack([np.asarray(draw(sample_scene(seed, index))) for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


VAE = StageConfig(samples=36_000, batch_size=8, learning_rate=1.5e-3)


def train_vae(out: Path, seed: int = 1, config: StageConfig = VAE):
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        x = pictures(seed, first, count).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = F.l1_loss(decoded, x)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + 1e-3 * divergence, "l1": error, "kl": divergence}

    run_stage(out / "vae", vae, config, loss, seed)
    return vae
