"""The small SDXL-form model of the shapes world: its configuration, and where its shipped weights are.

The folder is an ordinary `StableDiffusionXLPipeline` folder with the adapter in the subfolder `gligen_adapter`:

    StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .world import IMAGE_SIZE, vocabulary

LATENT_SIZE = IMAGE_SIZE // 4
TEXT_WIDTH = 64
MAX_TOKENS = 48  # of the captions with size and place of four objects, one in 250 is cut


def new_vae() -> AutoencoderKL:
    """Make a VAE: images (3, 64, 64) in -1..1 to latents (4, 16, 16). It has no attention, as every cell is decided
    locally."""
    channels = (16, 32, 64)
    settings: dict[str, Any] = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
        "sample_size": IMAGE_SIZE,
        "force_upcast": False,
    }
    return AutoencoderKL(**settings)


def new_unet() -> UNet2DConditionModel:
    """Make a small U-Net of SDXL's form: size conditioning, linear projections, deeper transformers in deeper levels.

    Unlike SDXL's, its last level has attention, and so fusers: a latent pixel is a sixteenth of this image, and a
    box that only half of them resolve has no corners.
    """
    settings: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 3),  # as in SDXL's configuration, this is the number of heads
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 16,
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**settings)


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Make two text encoders of three layers each; SDXL reads the output of the last but one."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(**settings)
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def new_scheduler() -> EulerDiscreteScheduler:
    """Make SDXL's schedule, ended nearer to pure noise: small flat images survive a signal of 7 %."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """Make a CLIP tokenizer that holds most words of the world as one token and can spell any other.

    Its files are written to `folder`.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.!?'-")
    vocabulary_: dict[str, int] = {}
    merges: list[str] = []
    for token in [*letters, *(f"{letter}</w>" for letter in letters)]:
        vocabulary_[token] = len(vocabulary_)
    for word in vocabulary():
        left = word[0]
        for k, letter in enumerate(word[1:], start=2):
            right = letter if k < len(word) else f"{letter}</w>"
            if left + right not in vocabulary_:
                vocabulary_[left + right] = len(vocabulary_)
                merges.append(f"{left} {right}")
            left += right
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary_[token] = len(vocabulary_)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary_))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS).save_pretrained(
        folder
    )
    return CLIPTokenizer.from_pretrained(folder)
