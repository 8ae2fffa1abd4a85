"""Embeds phrases with the text encoders of the base model.

SDXL: CLIP-L's `pooler_output` (before projection: its projection is untrained in SDXL) joined to OpenCLIP-bigG's
projected `text_embeds`. Stable Diffusion 1.x / 2.x: the one encoder's `pooler_output`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel

from .device import to_device


def phrase_width(text_encoders: Sequence[PreTrainedModel]) -> int:
    """Return the width of one phrase embedding."""
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
    shapes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Embed phrases, (len(phrases), width), in the encoders' dtype.

    Each distinct phrase is encoded once, padded to the longest of them or of its group: CLIP's attention is causal, so
    what follows the end-of-text token cannot change the pooled output, and 77 columns of padding would be ten times the
    work.

    Args:
        device: to run on, by default that of the encoders; offloaded ones have none of their own.
        expand: replaces the names that textual inversion added to a tokenizer by its tokens.
        shapes: (rows, tokens) of the groups to encode, shortest first; a phrase goes into the first that is long
            enough, and a group is filled up. Then a phrase has the same embedding to the last bit whatever the others
            are: matrix products of another shape round differently.
    """
    distinct = list(dict.fromkeys(phrases))
    if not distinct:
        raise ValueError("no phrases to embed")
    tokens = [_tokens(distinct, tokenizer, expand) for tokenizer in tokenizers]
    lengths = [max(len(ids) for ids in of_phrase) for of_phrase in zip(*tokens, strict=True)]
    limit = max(tokenizer.model_max_length for tokenizer in tokenizers)
    blocks, order = [], []
    for numbers, shape in _groups(lengths, shapes or [(len(distinct), max(lengths))], limit):
        parts = []
        for of_tokenizer, tokenizer, encoder in zip(tokens, tokenizers, text_encoders, strict=True):
            filler: Any = tokenizer.pad_token_id
            ids = torch.full(shape, filler)
            for row, k in zip(ids, numbers, strict=False):
                row[: len(of_tokenizer[k])] = torch.tensor(of_tokenizer[k])
            parts.append(_pooled(encoder, tokenizer, ids, device or encoder.device)[: len(numbers)])
        blocks.append(torch.cat(parts, dim=-1))
        order += numbers
    embeddings = torch.cat(blocks)
    place = {distinct[k]: row for row, k in enumerate(order)}
    return embeddings[to_device(torch.tensor([place[phrase] for phrase in phrases]), embeddings.device)]


def _tokens(
    phrases: list[str], tokenizer: CLIPTokenizer, expand: Callable[[list[str], CLIPTokenizer], list[str]] | None
) -> list[list[int]]:
    """Tokenize each phrase, start and end included; a phrase that is too long is cut with a warning."""
    limit = tokenizer.model_max_length
    texts = expand(phrases, tokenizer) if expand is not None else phrases
    tokens = tokenizer(texts, truncation=True, max_length=limit).input_ids
    for phrase, ids in zip(texts, tokens, strict=True):
        if len(ids) == limit and len(tokenizer(phrase).input_ids) > limit:
            warnings.warn(f"the phrase {phrase!r} is longer than {limit} tokens; its end is ignored", stacklevel=3)
    return tokens


def _groups(
    lengths: list[int], shapes: Sequence[tuple[int, int]], limit: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yield the numbers of the phrases that are encoded together, at most as many as there are rows, and the shape."""
    shorter = 0
    for rows, tokens in shapes:
        group = [k for k, length in enumerate(lengths) if shorter < length <= tokens]
        for first in range(0, len(group), rows):
            yield group[first : first + rows], (rows, min(tokens, limit))
        shorter = tokens


def _pooled(encoder: PreTrainedModel, tokenizer: CLIPTokenizer, ids: Tensor, device: torch.device) -> Tensor:
    """Return the pooled output at the first end-of-text token, (len(ids), width).

    Encoders with settings as old as SDXL's look for the highest token instead, which is another one once textual
    inversion has added some.
    """
    end: Any = tokenizer.eos_token_id
    on_device = to_device(ids, device)
    output = encoder(on_device)
    if encoder.config.eos_token_id != 2 or not (ids > end).any():
        return output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    hidden = output.last_hidden_state
    pooled = hidden[torch.arange(len(ids), device=hidden.device), (on_device == end).int().argmax(dim=-1)]
    projection: Any = getattr(encoder, "text_projection", None)
    if projection is None:
        return pooled
    return torch.nn.functional.linear(pooled, projection.weight.to(pooled.device))  # an offloaded one is in main memory
