"""The text encoders of a pipeline: phrases embedded with them, also ahead of a call, and what needs them said early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ..text_embeddings import embed_phrases

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def absent_encoders(pipeline: Any) -> list[str]:
    """Names of the text encoders that this kind of pipeline has, and that are not there with their tokenizers."""
    return [
        name
        for name in pipeline._expected_encoders()
        if getattr(pipeline, name, None) is None or getattr(pipeline, ENCODERS[name], None) is None
    ]


def encode_phrases(pipeline: Any, phrases: list[str], lora_scale: float | None = None) -> Tensor:
    """(len(phrases), width) by the encoders that are there, their LoRAs at the scale that the prompt's have."""
    tokenizers, text_encoders = pipeline._text_parts()
    with _lora_scaled(text_encoders, lora_scale):
        return embed_phrases(
            phrases,
            tokenizers,
            text_encoders,
            pipeline._execution_device,
            expand=getattr(pipeline, "maybe_convert_prompt", None),
        )


def check_prompt_encoders(pipeline: Any, call: dict[str, Any]) -> None:
    """Refuse words that must be encoded where an encoder for them is not there.

    A pipeline that is made without one of SDXL's two, as its refiner, is whole as long as the U-Net reads what the
    other gives.
    """
    if not (absent := absent_encoders(pipeline)):
        return
    width = sum(encoder.config.hidden_size for encoder in pipeline._text_parts()[1])
    if width and width == pipeline.unet.config["cross_attention_dim"]:
        return
    if call.get("prompt_embeds") is None:
        words, lacking = "the prompt", "prompt_embeds"
    elif call.get("negative_prompt_embeds") is None and _encodes_negative_prompt(pipeline, call):
        words, lacking = "the negative prompt", "negative_prompt_embeds"
    else:
        return
    raise ValueError(
        f"{words} needs {' and '.join(absent)}, which this pipeline is without; give {lacking}, made with "
        "encode_prompt before the encoders were freed"
    )


def _encodes_negative_prompt(pipeline: Any, call: dict[str, Any]) -> bool:
    if call.get("guidance_scale") is not None and call["guidance_scale"] <= 1:
        return False
    takes_zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    return call.get("negative_prompt") is not None or not takes_zeros


@contextmanager
def _lora_scaled(text_encoders: list[Any], scale: float | None) -> Iterator[None]:
    """The text encoders' LoRAs at the scale that diffusers gives them while it encodes the prompt."""
    scaled = [encoder for encoder in text_encoders if scale is not None and hasattr(encoder, "peft_config")]
    for encoder in scaled:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in scaled:
            unscale_lora_layers(encoder, scale)
