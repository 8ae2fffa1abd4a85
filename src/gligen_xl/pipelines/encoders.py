"""The text encoders of a pipeline: they embed phrases, and a call that needs one which was freed is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ..adapter import AdapterConfig
from ..text_embeddings import embed_phrases, phrase_width

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def encoder_names(pipeline: Any) -> list[str]:
    """Return the names of the text encoders that this kind of pipeline has."""
    return [name for name in ENCODERS if name in pipeline.config]


def text_parts(pipeline: Any) -> tuple[list[Any], list[Any]]:
    """Return the tokenizers and the text encoders of the pairs that are loaded."""
    pairs = [(getattr(pipeline, ENCODERS[name], None), getattr(pipeline, name, None)) for name in ENCODERS]
    loaded = [pair for pair in pairs if None not in pair]
    return [tokenizer for tokenizer, _ in loaded], [encoder for _, encoder in loaded]


def missing_encoders(pipeline: Any, phrase_dim: int | None = None) -> list[str]:
    """Return the names of text encoders that are not loaded, or whose tokenizers are not.

    Args:
        phrase_dim: if the loaded encoders give phrase embeddings of this width, none is missing.
    """
    if phrase_dim is not None and phrase_width(text_parts(pipeline)[1]) == phrase_dim:
        return []
    parts = {name: (getattr(pipeline, name, None), getattr(pipeline, ENCODERS[name], None)) for name in ENCODERS}
    return [name for name in encoder_names(pipeline) if None in parts[name]]


def check_phrase_width(pipeline: Any, config: AdapterConfig, source: object) -> None:
    """Check that the pipeline's text encoders, if all are loaded, give phrase embeddings of the adapter's width."""
    encoders = text_parts(pipeline)[1]
    if len(encoders) == len(encoder_names(pipeline)) and (width := phrase_width(encoders)) != config.phrase_dim:
        raise ValueError(
            f"{source} reads phrase embeddings of width {config.phrase_dim}, these text encoders give {width}: "
            "it was trained on another base model"
        )


def encode_phrases(pipeline: Any, phrases: list[str], lora_scale: float | None = None) -> Tensor:
    """Embed phrases, (len(phrases), width), with the encoders' LoRAs at the scale they have for the prompt."""
    tokenizers, encoders = text_parts(pipeline)
    expand = getattr(pipeline, "maybe_convert_prompt", None)
    with _lora_scaled(encoders, lora_scale):
        return embed_phrases(phrases, tokenizers, encoders, pipeline._execution_device, expand=expand)


def check_prompt_encoders(pipeline: Any, call: dict[str, Any]) -> None:
    """Refuse a prompt that needs a text encoder which is not loaded.

    A pipeline that is made without one of SDXL's two, such as its refiner, is complete as long as the U-Net reads what
    the other one gives.
    """
    if not (missing := missing_encoders(pipeline)):
        return
    width = sum(encoder.config.hidden_size for encoder in text_parts(pipeline)[1])
    if width and width == pipeline.unet.config["cross_attention_dim"]:
        return
    if call.get("prompt_embeds") is None:
        text, argument = "the prompt", "prompt_embeds"
    elif call.get("negative_prompt_embeds") is None and _encodes_negative_prompt(pipeline, call):
        text, argument = "the negative prompt", "negative_prompt_embeds"
    else:
        return
    raise ValueError(
        f"{text} needs {' and '.join(missing)}, which this pipeline is without; give {argument}, made with "
        "encode_prompt before the encoders were freed"
    )


def _encodes_negative_prompt(pipeline: Any, call: dict[str, Any]) -> bool:
    if call.get("guidance_scale") is not None and call["guidance_scale"] <= 1:
        return False
    takes_zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    return call.get("negative_prompt") is not None or not takes_zeros


@contextmanager
def _lora_scaled(encoders: list[Any], scale: float | None) -> Iterator[None]:
    """Scale the text encoders' LoRAs as diffusers does while it encodes the prompt."""
    scaled = [encoder for encoder in encoders if scale is not None and hasattr(encoder, "peft_config")]
    for encoder in scaled:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in scaled:
            unscale_lora_layers(encoder, scale)
