"""The training objective: predict the noise, or the velocity, as the base model's scheduler has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from ..data.batch import Batch


def denoising_loss(
    unet: Callable[..., Any], scheduler: DDPMScheduler, batch: Batch, conditioning: dict[str, Any]
) -> Tensor:
    """Mean squared error of each sample, (B,), float32, at its own timestep (DDPM, arXiv 2006.11239, eq. 14).

    The target follows `scheduler.config.prediction_type`: "epsilon", or "v_prediction" (arXiv 2202.00512, app. D).
    """
    device = conditioning["encoder_hidden_states"].device
    latents, noise = batch.latents.to(device).float(), batch.noise_on(device)
    timesteps: Any = timesteps_of(scheduler, batch).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"the base model predicts {kind!r}; training knows 'epsilon' and 'v_prediction'")
    predicted = unet(noisy.to(conditioning["encoder_hidden_states"].dtype), timesteps, **conditioning).sample
    return F.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)


def timesteps_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """Uniform integers 0 .. num_train_timesteps - 1, (B,)."""
    count = scheduler.config["num_train_timesteps"]
    return (batch.time * count).long().clamp(max=count - 1)  # a time just below 1 is 1 in float32
