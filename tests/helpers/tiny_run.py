"""What tests of training share: a tiny run's data, its first batch, a stop in its midst, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from gligen_xl.data.dataset import Batch, ShardDataset
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train import loop, step
from gligen_xl.train.base import fresh_adapter, load_base
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.log import CLOCKED
from helpers.rows import METADATA, latents, row


def write_data(folder: Path) -> Path:
    """A shard of 40 images of one to three boxes."""
    write_shard(folder / "a", latents(40, side=8), [row(1 + k % 3) for k in range(40)], METADATA)
    return folder


def loaded(config: TrainConfig) -> Any:
    """The pipeline that is trained, with its fresh adapter."""
    pipeline = load_base(config, torch.device("cpu"))
    fresh_adapter(pipeline, config)
    return pipeline


def first_batch(config: TrainConfig, **augmentation: Any) -> Batch:
    """The first four samples."""
    dataset = ShardDataset(config.data, replace(config.augmentation, **augmentation), seed=0)
    return dataset.batch([(k, k) for k in range(4)])


def noised(scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and what is to be predicted of them, by the formulas of the papers (DDPM; v: progressive
    distillation, appendix D)."""
    kept = scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    target = {"epsilon": noise, "v_prediction": velocity}[scheduler.config["prediction_type"]]
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise, target


class Stop(Exception):
    """The machine goes down."""


def train_until(position: int, config: TrainConfig) -> None:
    """Trains, and fails in the step at `position`."""
    real = step.denoising_loss

    def fail(unet, scheduler, batch, *rest):
        if batch.position == position:
            raise Stop
        return real(unet, scheduler, batch, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(step, "denoising_loss", fail)
        loop.train(config)


def final(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last checkpoint's tensors and state."""
    tensors, state = load_checkpoint(list_checkpoints(folder)[-1])
    return {f"{group}.{name}": value for group, of_group in tensors.items() for name, value in of_group.items()}, state


def lines(folder: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    """Those of metrics.jsonl, without what differs from one time to the next."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in CLOCKED} for entry in rows if entry["kind"] == kind]
