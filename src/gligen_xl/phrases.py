"""Phrases to embeddings, with the text encoders of the base model.

SDXL: CLIP-L's `pooler_output` (before projection: its projection is untrained in SDXL) joined to OpenCLIP-bigG's
projected `text_embeds`. Stable Diffusion 1.x / 2.x: the one encoder's `pooler_output`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

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
) -> Tensor:
    """One embedding a phrase, (len(phrases), width), in the encoders' dtype.

    Runs on `device`, by default that of the encoders; offloaded ones have none of their own.

    Each distinct phrase is encoded once, padded to the longest of them: CLIP's attention is causal, so what follows
    the end-of-text token cannot change the pooled output, and 77 columns of padding would be ten times the work.
    """
    distinct = list(dict.fromkeys(phrases))
    if not distinct:
        raise ValueError("no phrases to embed")
    parts = []
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        limit = tokenizer.model_max_length
        tokens = tokenizer(distinct, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        for phrase, length in zip(distinct, tokens.attention_mask.sum(1).tolist(), strict=True):
            if length == limit and len(tokenizer(phrase).input_ids) > limit:
                warnings.warn(f"the phrase {phrase!r} is longer than {limit} tokens; its end is ignored", stacklevel=2)
        output = encoder(tokens.input_ids.to(device or encoder.device))
        parts.append(output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
    rows = torch.cat(parts, dim=-1)
    place = {phrase: k for k, phrase in enumerate(distinct)}
    return rows[[place[phrase] for phrase in phrases]]
