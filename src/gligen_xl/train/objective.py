"""The training objective: predict the noise, or the velocity, as the base model's scheduler has it.

What may be changed about it (see `Objective`): which timesteps are trained how often, and what counts how much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..data.dataset import Batch
from .attention import box_masks
from .options import Objective


def denoising_loss(
    unet: Callable[..., Any],
    scheduler: DDPMScheduler,
    batch: Batch,
    conditioning: dict[str, Any],
    objective: Objective | None = None,
) -> Tensor:
    """Mean squared error of each sample, (B,), float32, at its own timestep (DDPM, arXiv 2006.11239, eq. 14).

    The target follows `scheduler.config.prediction_type`: "epsilon", or "v_prediction" (arXiv 2202.00512, app. D).

    Args:
        objective: how timesteps are drawn and errors weighted; by default uniformly and alike.
    """
    objective = objective or Objective()
    device = conditioning["encoder_hidden_states"].device
    latents, noise = batch.latents.to(device).float(), batch.noise_on(device)
    timesteps: Any = timesteps_of(scheduler, batch, objective.noisy_bias).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"the base model predicts {kind!r}; training knows 'epsilon' and 'v_prediction'")
    predicted = unet(noisy.to(conditioning["encoder_hidden_states"].dtype), timesteps, **conditioning).sample
    errors = (predicted.float() - target).square()  # (B, C, h, w)
    if objective.box_weight != 1:
        errors = errors * box_weights(batch.boxes, batch.mask, errors.shape[-2:], objective.box_weight).to(device)
    losses = errors.flatten(1).mean(1)
    if objective.snr_gamma is not None:
        losses = losses * min_snr_weights(scheduler, timesteps, objective.snr_gamma)
    return losses


def timesteps_of(scheduler: DDPMScheduler, batch: Batch, noisy_bias: float = 0.0) -> Tensor:
    """Integers 0 .. num_train_timesteps - 1, (B,), that follow from the samples' uniform times.

    Args:
        noisy_bias: b >= 0 of the density (1 + b) t**b of t in 0-1, where 1 is pure noise: t = u**(1 / (1 + b)). Its
            mean is (1 + b) / (2 + b); 0 is uniform.
    """
    count = scheduler.config["num_train_timesteps"]
    time = batch.time ** (1 / (1 + noisy_bias)) if noisy_bias else batch.time
    return (time * count).long().clamp(max=count - 1)  # a time just below 1 is 1 in float32


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights, (B,), of the loss as the scheduler has it (arXiv 2303.09556, section 3.4).

    The paper weighs the error of the clean image by min(SNR, gamma); that of the noise is SNR times as large, that
    of the velocity SNR + 1 times.
    """
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = kept / (1 - kept)
    if scheduler.config["prediction_type"] == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, and 1 where no signal is left


def box_weights(boxes: Tensor, masks: Tensor, latent_size: torch.Size, weight: float) -> Tensor:
    """What each latent pixel counts, (B, 1, h, w): `weight` inside of boxes as much as outside, 1 on average.

    A pixel is inside if its centre is in any box. An image without boxes counts alike everywhere.

    Args:
        boxes: (B, N, 4) xyxy 0-1. masks: (B, N), 1 where a slot is used. latent_size: (h, w).
    """
    inside = (box_masks(boxes, *latent_size) * masks[:, None, None]).amax(-1)  # (B, h, w)
    weights = 1 + (weight - 1) * inside
    return (weights / weights.mean((1, 2), keepdim=True))[:, None]
