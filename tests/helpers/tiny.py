"""Tiny models of the real architectures, made in a moment with random weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gligen_xl import StableDiffusionGLIGENPipeline, StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import AdapterConfig, adapter_parameters, attach
from gligen_xl.pipelines.encoders import text_parts
from gligen_xl.text_embeddings import phrase_width
from gligen_xl.toyworld.model import new_tokenizer

PHRASE_DIM = 24 + 16


def sdxl_unet(seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """SDXL's form: no attention at the first level, linear projections, size conditioning."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": PHRASE_DIM,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | overrides)).eval()


def sd15_unet(seed: int = 0, **overrides: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1.x's form: attention at the first levels, none at the last, convolution projections."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | overrides)).eval()


@functools.lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return new_tokenizer(Path(folder))


def text_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer().model_max_length,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLGLIGENPipeline:
    unet = sdxl_unet(seed)
    vae = sdxl_vae(seed + 1)
    pipeline = StableDiffusionXLGLIGENPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(24, 24)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, 16)).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=new_scheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def open_gates(unet: UNet2DConditionModel, seed: int = 5) -> None:
    """Random weights everywhere in the adapter, gates wide open: nothing of it can hide behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in adapter_parameters(unet).items():
        scale = 1.0 if ".alpha_" in name else 0.2
        value.copy_(torch.randn(value.shape, generator=generator) * scale)


def sdxl_vae(seed: int = 1) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        force_upcast=False,
    ).eval()


def sd_pipeline(seed: int = 0, **unet: Any) -> StableDiffusionGLIGENPipeline:
    """Stable Diffusion 1.x: one text encoder, its hidden states are the U-Net's text."""
    model = sd15_unet(seed, **unet)
    vae = sdxl_vae(seed + 1)
    pipeline = StableDiffusionGLIGENPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(24, 24)).eval(),
        tokenizer=tokenizer(),
        unet=model,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def grounded(pipeline: Any, slots: int = 4) -> Any:
    """The same pipeline with an adapter of random weights, gates wide open."""
    encoders = text_parts(pipeline)[1]
    width = pipeline.unet.config.cross_attention_dim
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=width, phrase_dim=phrase_width(encoders), slots=slots))
    open_gates(pipeline.unet)
    return pipeline
