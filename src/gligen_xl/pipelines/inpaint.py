"""Inpainting in boxes (GLIGEN, section 4.3): what lies outside of them stays that of a given image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..images.orientation import upright
from ..layout import Box
from .schedule import step_of


@dataclass
class KeptImage:
    """An image of which the outside of the boxes is kept.

    Args:
        latents: of the image, (1 or B, 4, h, w), scaled. noise: what the sampling starts from, (B, 4, h, w).
        mask: (B, 1, h, w), 1 where the image is kept, 0 in the boxes and in cells that they reach into.
        model_mask: the same for the eyes of a nine-channel model, by the rule that it was trained with.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor
    model_mask: Tensor

    def blend(self, sampled: Tensor, scheduler: Any, evaluation: int) -> Tensor:
        """The latents after the U-Net's `evaluation`, with the kept part put in at their noise level."""
        kept = self.latents
        if evaluation + 1 < len(scheduler.timesteps):
            within_step = step_of(scheduler, evaluation + 1) == step_of(scheduler, evaluation)
            if within_step and hasattr(scheduler, "sigmas_interpol"):
                return sampled  # the two KDPM2 stop within a step at a level that their add_noise does not know
            level = scheduler.timesteps[evaluation + 1 : evaluation + 2]
            kept = scheduler.add_noise(kept.expand_as(self.noise), self.noise, level)
        return torch.where(self.mask.bool(), kept.to(sampled.dtype), sampled)

    def channels(self) -> Tensor:
        """(B, 5, h, w): what the first convolution of GLIGEN's inpainting models reads beside the noisy latents."""
        return torch.cat([self.latents * self.model_mask, self.model_mask], dim=1)


def mask_outside(boxes: Sequence[Sequence[Box]], height: int, width: int) -> Tensor:
    """Boxes of B images -> (B, 1, height, width): 0 wherever a box reaches into a cell of the grid, elsewhere 1."""
    mask = torch.ones(len(boxes), 1, height, width)
    for k, of_image in enumerate(boxes):
        for x0, y0, x1, y1 in of_image:
            rows = slice(_floor(y0 * height), _ceil(y1 * height))
            mask[k, 0, rows, _floor(x0 * width) : _ceil(x1 * width)] = 0
    return mask


def mask_as_trained(boxes: Sequence[Sequence[Box]], height: int, width: int) -> Tensor:
    """Boxes of B images -> (B, 1, height, width), with both ends of a box rounded down, as GLIGEN trained its
    inpainting models: 0 in the box, elsewhere 1. A box within one cell leaves no 0."""
    mask = torch.ones(len(boxes), 1, height, width)
    for k, of_image in enumerate(boxes):
        for x0, y0, x1, y1 in of_image:
            mask[k, 0, int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 0
    return mask


def _floor(value: float) -> int:
    return int(np.floor(value + 1e-6))


def _ceil(value: float) -> int:
    return int(np.ceil(value - 1e-6))


def fit_images(image: Any, number: int, height: int, width: int) -> list[Image.Image]:
    """One image for all, or `number` of them, cropped at the centre to the wanted shape and resized.

    Raises:
        ValueError: not an image, or another number of them.
    """
    given = list(image) if isinstance(image, list | tuple) else [image]
    if len(given) not in (1, number):
        raise ValueError(f"gligen_inpaint_image holds {len(given)} images; expected one for all, or {number}")
    fitted = []
    for image in given:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"gligen_inpaint_image is a {type(image).__name__}; expected a PIL image, or a list of them"
            )
        fitted.append(ImageOps.fit(upright(image).convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    return fitted


@torch.no_grad()
def encode_images(pipeline: Any, images: list[Image.Image], device: torch.device) -> Tensor:
    """Scaled latents, (B, 4, h, w), the mean of the posterior; in float32 where the VAE overflows in float16."""
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(images)
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
    finally:
        if upcast:
            vae.to(dtype)
    mean, spread = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and spread is not None:
        mean, spread = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, spread))
        return (latents - mean) * vae.config.scaling_factor / spread
    return latents * vae.config.scaling_factor
