"""Inpainting in boxes (GLIGEN, section 4.3): what is outside the boxes stays as in a given image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

from ..images.orientation import upright
from ..layout import Box
from .layouts import ImageLayout
from .schedule import step_of


@dataclass
class KeptImage:
    """An image that is kept outside the boxes.

    Args:
        latents: of the image, (1 or B, 4, h, w), scaled. noise: what the sampling starts from, (B, 4, h, w).
        mask: (B, 1, h, w), 1 where the image is kept, 0 in every cell that a box reaches into.
        model_mask: the same as a nine-channel model reads it, by the rule that it was trained with.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor
    model_mask: Tensor

    def blend(self, sampled: Tensor, scheduler: Any, evaluation: int) -> Tensor:
        """Put the kept part, at its noise level, into the latents after the U-Net's `evaluation`."""
        kept = self.latents
        if evaluation + 1 < len(scheduler.timesteps):
            within_step = step_of(scheduler, evaluation + 1) == step_of(scheduler, evaluation)
            if within_step and hasattr(scheduler, "sigmas_interpol"):
                return sampled  # the two KDPM2 stop within a step at a level that their add_noise does not know
            level = scheduler.timesteps[evaluation + 1 : evaluation + 2]
            kept = scheduler.add_noise(kept.expand_as(self.noise), self.noise, level)
        return torch.where(self.mask.bool(), kept.to(sampled.dtype), sampled)

    def channels(self) -> Tensor:
        """Return what the first convolution of GLIGEN's inpainting models reads besides the noisy latents, (B, 5, h,
        w)."""
        return torch.cat([self.latents * self.model_mask, self.model_mask], dim=1)


# The images of a call -----------------------------------------------------------------------------------------------


def images_to_keep(
    pipeline: Any, call: dict[str, Any], known: Collection[str], layouts: Sequence[ImageLayout], image: Any
) -> list[Image.Image]:
    """Check gligen_inpaint_image before anything runs, and crop it to the size of the result.

    Args:
        known: names of the arguments that diffusers' call takes.

    Raises:
        ValueError: the pipeline starts from an image itself, a layout has no box, or sizes or numbers do not fit.
    """
    if "strength" in known:
        raise ValueError(
            f"gligen_inpaint_image is for text-to-image; {type(pipeline).__name__} starts from its own image"
        )
    if "image" in known and not (call.get("height") and call.get("width")):
        raise ValueError("gligen_inpaint_image with a control image needs height and width")
    if not layouts or not all(len(layout) for layout in layouts):
        raise ValueError("gligen_inpaint_image keeps what is outside the boxes; every image needs one or more")
    generators = call.get("generator")
    if isinstance(generators, list) and len(generators) != len(layouts):
        raise ValueError(f"{len(generators)} generators for {len(layouts)} images; expected one for each")
    cells = pipeline.unet.config.sample_size
    default = [k * pipeline.vae_scale_factor for k in ((cells, cells) if isinstance(cells, int) else cells)]
    height, width = call.get("height") or default[0], call.get("width") or default[1]
    if height % 8 or width % 8:
        raise ValueError(f"height and width are {height} and {width}; expected multiples of 8")
    return fit_images(image, len(layouts), height, width)


def fit_images(image: Any, number: int, height: int, width: int) -> list[Image.Image]:
    """Crop one image for all, or `number` of them, at the centre to a shape, and resize them.

    Raises:
        ValueError: not an image, or another number of them.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if len(images) not in (1, number):
        raise ValueError(f"gligen_inpaint_image holds {len(images)} images; expected one for all, or {number}")
    for image in images:
        if not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise ValueError(f"gligen_inpaint_image is a {kind}; expected a PIL image, or a list of them")
    size, method = (width, height), Image.Resampling.LANCZOS
    return [ImageOps.fit(upright(image).convert("RGB"), size, method) for image in images]


@torch.no_grad()
def kept_image(
    pipeline: Any, call: dict[str, Any], layouts: Sequence[ImageLayout], images: list[Image.Image]
) -> KeptImage:
    """Encode the images of `images_to_keep`, and draw the noise that the sampling starts from."""
    device, dtype = pipeline._execution_device, pipeline.unet.dtype
    latents = encode_images(pipeline, images, device).to(dtype)
    if (noise := call.get("latents")) is None:
        shape = (len(layouts), *latents.shape[1:])
        noise = randn_tensor(shape, generator=call.get("generator"), device=device, dtype=dtype)
    boxes = [layout.boxes for layout in layouts]
    mask, model_mask = (make(boxes, *latents.shape[2:]).to(latents) for make in (mask_outside, mask_as_trained))
    return KeptImage(latents, noise.to(device), mask, model_mask)


@torch.no_grad()
def encode_images(pipeline: Any, images: list[Image.Image], device: torch.device) -> Tensor:
    """Encode images to scaled latents, (B, 4, h, w), the mean of the posterior; in float32 if the VAE overflows in
    float16."""
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
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        mean, deviation = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, deviation))
        return (latents - mean) * vae.config.scaling_factor / deviation
    return latents * vae.config.scaling_factor


# Masks --------------------------------------------------------------------------------------------------------------


def mask_outside(boxes: Sequence[Sequence[Box]], height: int, width: int) -> Tensor:
    """Mark what is outside the boxes of B images: (B, 1, height, width), 0 in every cell that a box reaches into, else
    1."""
    mask = torch.ones(len(boxes), 1, height, width)
    for k, of_image in enumerate(boxes):
        for x0, y0, x1, y1 in of_image:
            rows = slice(_floor(y0 * height), _ceil(y1 * height))
            mask[k, 0, rows, _floor(x0 * width) : _ceil(x1 * width)] = 0
    return mask


def mask_as_trained(boxes: Sequence[Sequence[Box]], height: int, width: int) -> Tensor:
    """Return boxes of B images -> (B, 1, height, width): 0 in the box, elsewhere 1, with both ends of a box rounded
    down, as GLIGEN trained its inpainting models. A box within one cell leaves no 0."""
    mask = torch.ones(len(boxes), 1, height, width)
    for k, of_image in enumerate(boxes):
        for x0, y0, x1, y1 in of_image:
            mask[k, 0, int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 0
    return mask


def _floor(value: float) -> int:
    return int(np.floor(value + 1e-6))


def _ceil(value: float) -> int:
    return int(np.ceil(value - 1e-6))
