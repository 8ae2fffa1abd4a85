"""Phrases to embeddings, with the text encoders of the base model.

SDXL: CLIP-L's `pooler_output` (before projection: its projection is untrained in SDXL) joined to OpenCLIP-bigG's
projected `text_embeds`. Stable Diffusion 1.x / 2.x: the one encoder's `pooler_output`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel


def phrase_width(text_encoders: Sequence[PreTrainedModel]) -> int:
    """Numbers in one phrase embedding."""
    return sum(
        encoder.config.projection_dim if hasattr(encoder, "text_projection") else encoder.config.hidden_size
        for encoder in text_encoders
    )


@torch.no_grad()
def embed_phrases(
    phrases: Sequence[str],
    tokenizers: Sequence[CLIPTokenizer],
    text_encoders: Sequence[PreTrainedModel],
    device: torch.device | None = None,
    *,
    expand: Callable[[list[str], CLIPTokenizer], list[str]] | None = None,
) -> Tensor:
    """One embedding a phrase, (len(phrases), width), in the encoders' dtype.

    Args:
        device: to run on, by default that of the encoders; offloaded ones have none of their own.
        expand: writes out what a tokenizer knows under a name of its own (textual inversion).

    Each distinct phrase is encoded once, padded to the longest of them: CLIP's attention is causal, so what follows
    the end-of-text token cannot change the pooled output, and 77 columns of padding would be ten times the work.
    """
    distinct = list(dict.fromkeys(phrases))
    if not distinct:
        raise ValueError("no phrases to embed")
    parts = []
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        limit = tokenizer.model_max_length
        texts = expand(distinct, tokenizer) if expand is not None else distinct
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        for phrase, length in zip(texts, tokens.attention_mask.sum(1).tolist(), strict=True):
            if length == limit and len(tokenizer(phrase).input_ids) > limit:
                warnings.warn(f"the phrase {phrase!r} is longer than {limit} tokens; its end is ignored", stacklevel=2)
        ids = tokens.input_ids.to(device or encoder.device)
        output = encoder(ids)
        if encoder.config.eos_token_id == 2 and bool((ids > tokenizer.eos_token_id).any()):
            parts.append(_pooled_at_end(encoder, output.last_hidden_state, ids, tokenizer.eos_token_id))
        else:
            parts.append(output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
    rows = torch.cat(parts, dim=-1)
    place = {phrase: k for k, phrase in enumerate(distinct)}
    return rows[[place[phrase] for phrase in phrases]]


def _pooled_at_end(encoder: PreTrainedModel, hidden: Tensor, ids: Tensor, end: Any) -> Tensor:
    """The pooled output at the first end-of-text token.

    Encoders with settings as old as SDXL's look for the highest token in its place, which is another one once textual
    inversion has added some.
    """
    pooled = hidden[torch.arange(len(ids), device=hidden.device), (ids == end).int().argmax(dim=-1)]
    projection: Any = getattr(encoder, "text_projection", None)
    if projection is None:
        return pooled
    return torch.nn.functional.linear(pooled, projection.weight.to(pooled.device))  # it may wait in main memory
