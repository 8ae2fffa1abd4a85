"""The frozen base of a run, and the adapter put on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import AdapterConfig, attach, detach, is_attached, load_adapter_state_dict
from ..adapter.convert import read_published
from ..data.dataset import ShardDataset
from ..hub import INDEX_NAME, check_variant
from ..io import read_json
from ..pipelines import GroundingMixin
from ..pipelines.auto import load_pipeline
from ..pipelines.encoders import encoder_names, text_parts
from ..text_embeddings import phrase_width
from ..worlds import drawn_count, find_world
from .config import TrainConfig


def load_base(config: TrainConfig, device: torch.device, *, draws: bool = True) -> GroundingMixin:
    """Load the frozen base, SDXL or Stable Diffusion 1.x / 2.x, and removes an adapter it came with.

    Args:
        draws: whether this process makes images; only then is the VAE put on the device.

    Raises:
        ValueError: a part that training needs is missing.
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    check_base_files(config)
    loading = {"variant": config.variant} if config.variant else {}
    pipeline: Any = load_pipeline(config.model, dtype=dtype, **loading)
    for name in (*encoder_names(pipeline), "unet", "vae"):
        if getattr(pipeline, name) is None:
            raise ValueError(f"{config.model} has no {name}, which training needs; expected a whole pipeline")
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # of SD 1.x: it would black out images of the validation
    if is_attached(pipeline.unet):
        detach(pipeline.unet)
    uses_vae = draws and needs_vae(config)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(device if name != "vae" or uses_vae else "cpu")
    if dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # SDXL's overflows in half precision
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_base_files(config: TrainConfig) -> None:
    """Check that the base, if it is a folder, has the files of `config.variant`.

    Raises:
        ValueError: it has not; or it is no folder of files.
    """
    path = Path(config.model).expanduser()
    if config.variant and (path.is_file() or (find_world(config.model) and not path.is_dir())):
        raise ValueError(f"variant is {config.variant}, but {config.model} has no variants; leave it out")
    if path.is_dir() and (path / INDEX_NAME).is_file():
        index = read_json(path / INDEX_NAME)
        parts = {*index} if isinstance(index, dict) else set()
        files = [file.relative_to(path).as_posix() for file in path.glob("*/*") if file.parent.name in parts]
        check_variant(files, config.variant, config.model)


def needs_vae(config: TrainConfig) -> bool:
    """Tell whether the run uses the VAE: to generate images, or to encode those of an embedded world."""
    images = config.validation.enabled and config.validation.pictures > 0
    return images or any(drawn_count(source) is not None for source in [*config.sources, config.validation.data or ""])


def fresh_adapter(pipeline: GroundingMixin, config: TrainConfig, form: AdapterConfig | None = None) -> None:
    """Attach an adapter in float32: one of `form`, for the weights of a checkpoint; the one to start from; or a new
    one, initialised from the seed."""
    torch.manual_seed(config.seed)
    weights = None
    phrase_dim = phrase_width(text_parts(pipeline)[1])
    if form is not None:
        pass
    elif config.init_adapter:
        form, weights, _ = read_published(config.init_adapter)
        check_adapter_form(form, config, phrase_dim)
        form = replace(form, slots=config.augmentation.slots)
    else:
        form = AdapterConfig(
            cross_attention_dim=pipeline.unet.config["cross_attention_dim"],
            phrase_dim=phrase_dim,
            slots=config.augmentation.slots,
            blocks=config.adapter.blocks,
            every=config.adapter.every,
            grounding_logit_bias=config.adapter.grounding_logit_bias,
        )
    attach(pipeline.unet, form, dtype=torch.float32)
    if weights is not None:
        load_adapter_state_dict(pipeline.unet, weights, source=str(config.init_adapter))
    pipeline.unet.train()


def check_adapter_form(form: AdapterConfig, config: TrainConfig, phrase_dim: int | None = None) -> None:
    """Check that `config.init_adapter` has the form that the run asks for.

    Args:
        form: the configuration of that adapter.
        phrase_dim: width of the base's phrase embeddings; None does not compare it.
    """
    if form.inpaint:
        raise ValueError(
            f"{config.init_adapter} is an inpainting adapter, whose first convolution cannot be trained here; "
            "begin from one for text and boxes"
        )
    if phrase_dim not in (None, form.phrase_dim):
        raise ValueError(
            f"{config.init_adapter} reads phrase embeddings of width {form.phrase_dim}, the base's text encoders "
            f"give {phrase_dim}: it is for another base model"
        )
    for name in ("blocks", "every", "grounding_logit_bias"):
        if (its := getattr(form, name)) != (ours := getattr(config.adapter, name)):
            raise ValueError(f"{config.init_adapter} has {name} {its}, the run adapter.{name} {ours}; set them alike")


def check_fit(dataset: ShardDataset, pipeline: GroundingMixin, resolution: int | None = None) -> None:
    """Check shape and scale of the latents against the base's VAE, and their resolution against the settings."""
    channels, scale = pipeline.unet.config["in_channels"], pipeline.vae.config["scaling_factor"]
    for shard in dataset.shards:
        if shard.latent_shape[0] != channels:
            raise ValueError(f"{shard.stem} holds latents of {shard.latent_shape[0]} channels, the base has {channels}")
        pixels = int(shard.metadata.get("resolution") or min(shard.latent_shape[1:]) * shard.downsampling)
        if resolution not in (None, pixels):
            raise ValueError(
                f"{shard.stem} was prepared for a resolution of {pixels}, the run is for {resolution}; "
                "give it data of that size, or set resolution"
            )
        if abs(float(shard.metadata.get("scaling_factor") or scale) / scale - 1) > 1e-3:
            raise ValueError(
                f"{shard.stem} holds latents scaled by {shard.metadata['scaling_factor']}, the base's VAE by {scale}: "
                "they come from another VAE; prepare the images again with that of the base"
            )
