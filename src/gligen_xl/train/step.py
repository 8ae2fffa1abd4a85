"""One training step: gradients of a batch in micro-batches, then the optimizer and the average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor

from ..data.dataset import Batch
from .attention import watch_attention
from .checkpoint import TrainState
from .conditioning import Conditioner
from .objective import denoising_loss
from .options import Objective


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The frozen base with its adapter, and what computes a loss with it.

    Attributes:
        unet: the U-Net itself.
        model: the U-Net as accelerate wraps it, which exchanges the gradients of several processes.
    """

    unet: Any
    model: Any
    scheduler: DDPMScheduler
    conditioner: Conditioner
    accelerator: Accelerator


def train_step(
    denoiser: Denoiser,
    batch: Batch,
    state: TrainState,
    *,
    objective: Objective,
    attention_weight: float,
    rate: float,
    micro_batch: int | None,
) -> tuple[Tensor, Tensor]:
    """Update weights and average with this process's share of a batch; a step that is not finite changes neither.

    Args:
        rate: factor on the learning rates.
        micro_batch: samples of one forward pass; None takes the whole share.

    Returns:
        The losses, (b,), and the norm of the gradients of all processes before clipping, a scalar.
    """
    losses = accumulate_gradients(denoiser, batch, objective, attention_weight, micro_batch)
    state.optimizer.set_rate(rate)
    norm = state.optimizer.step()
    state.partition.broadcast()
    state.ema.update(norm.isfinite())
    return losses, norm


def accumulate_gradients(
    denoiser: Denoiser, batch: Batch, objective: Objective, attention_weight: float, micro_batch: int | None
) -> Tensor:
    """Add up the gradients of the mean loss of a batch, micro-batch by micro-batch; return the losses, (b,)."""
    losses, accelerator = [], denoiser.accelerator
    for part, conditioning, is_last in micro_batches(batch, denoiser.conditioner(batch), micro_batch):
        watched = watch_attention(denoiser.unet, part.boxes, part.mask, part.latents.shape[-2:])
        exchange = nullcontext() if is_last else accelerator.no_sync(denoiser.model)  # once a step
        with exchange, watched if attention_weight else nullcontext() as attention:
            with accelerator.autocast():
                loss = denoising_loss(denoiser.model, denoiser.scheduler, part, conditioning, objective)  # (b,)
                guided = loss + attention_weight * attention.mean() if attention else loss
            # Attention is still watched here, as gradient checkpointing runs the fusers again.
            accelerator.backward(poison_unless_finite(guided.sum() / len(batch.positions)))
        losses.append(loss.detach())
    return torch.cat(losses)


def micro_batches(
    batch: Batch, conditioning: dict[str, Any], size: int | None
) -> Iterator[tuple[Batch, dict[str, Any], bool]]:
    """Yield parts of at most `size` samples, each with its part of the conditioning, and whether it is the last."""
    count = len(batch.positions)
    size = min(size or count, count)
    for first in range(0, count, size):
        part = slice(first, first + size)
        yield batch.part(part), _rows(conditioning, part), first + size >= count


def poison_unless_finite(loss: Tensor) -> Tensor:
    """Return the same scalar, bit for bit, but make all gradients NaN where it is NaN or infinite.

    All processes have the same gradient norm, so it tells each of them of a loss that is not finite in any.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def _rows(values: Any, part: slice) -> Any:
    """Take the same rows of every tensor in nested dictionaries."""
    if isinstance(values, Tensor):
        return values[part]
    if isinstance(values, dict):
        return {name: _rows(value, part) for name, value in values.items()}
    return values
