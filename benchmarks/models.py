"""Models with random weights for the benchmarks: time and memory do not depend on what the weights are."""

import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gligen_xl.toyworld.model import new_tokenizer
from gligen_xl.train.known_bases import CLIP_BIG_G, CLIP_L, SDXL_UNET, VAE

SDXL_VAE = VAE | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": False}
SDXL_TEXT = (CLIP_L, CLIP_BIG_G)
# The same forms at about a third of the width: proportions of SDXL that a laptop runs.
SMALL_UNET = SDXL_UNET | {
    "sample_size": 32,
    "block_out_channels": (96, 192, 384),
    "transformer_layers_per_block": (1, 2, 6),
    "attention_head_dim": (3, 6, 12),
    "cross_attention_dim": 640,
    "projection_class_embeddings_input_dim": 384 + 6 * 256,
}
SMALL_VAE = SDXL_VAE | {"block_out_channels": (32, 32, 64, 64), "sample_size": 256}
SMALL_TEXT = tuple(
    CLIP_L
    | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 6,
        "num_attention_heads": width // 64,
        "projection_dim": width,
    }
    for width in (256, 384)
)


def random_weights(make, dtype: torch.dtype) -> nn.Module:
    """A module of `make()`, its weights small and random, made in the type itself: no second copy in float32."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            value.data.normal_(0, 0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value.data.fill_(1)
        elif "position_ids" in name:
            value.data.copy_(torch.arange(value.shape[-1])[None])
    return module.eval()


def parts(
    unet: dict,
    vae: dict,
    text: tuple[dict, ...],
    dtype: torch.dtype,
    *,
    unet_dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    **unet_options,
) -> dict:
    """Components of an SDXL pipeline.

    Args:
        max_tokens: of a caption; by default those of the shapes model. SDXL's are 77.
    """
    with TemporaryDirectory() as folder:
        tokenizer = new_tokenizer(Path(folder))
    tokenizer.model_max_length = max_tokens or tokenizer.model_max_length
    common = {
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    first, second = (CLIPTextConfig(**(one | common)) for one in text)
    return {
        "vae": random_weights(lambda: AutoencoderKL(**vae), dtype),
        "text_encoder": random_weights(lambda: CLIPTextModel(first), dtype),
        "text_encoder_2": random_weights(lambda: CLIPTextModelWithProjection(second), dtype),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": random_weights(lambda: UNet2DConditionModel(**unet, **unet_options), unet_dtype or dtype),
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    }


def peak_memory() -> float:
    """GiB that this process has held at most."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
