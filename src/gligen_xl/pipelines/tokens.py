"""Boxes become tokens here: the layouts of a call become the inputs of the position net, which the U-Net runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import AdapterConfig
from .encoders import encode_phrases
from .layouts import ImageLayout


@torch.no_grad()
def grounding_tokens(
    pipeline: Any, layouts: Sequence[ImageLayout], config: AdapterConfig, lora_scale: float | None = None
) -> dict[str, Tensor]:
    """Make the position net's inputs for the B images of a call, with the adapter's N slots each.

    Phrases are embedded, unless the layouts hold embeddings; unused slots are zeros.

    Args:
        lora_scale: of LoRAs on the text encoders.

    Returns:
        boxes (B, N, 4) float32, masks (B, N) with 1 for a used slot, positive_embeddings (B, N, phrase_dim).
    """
    device = pipeline._execution_device
    given = [layout.embeds for layout in layouts if layout.embeds is not None]
    if given:
        embeddings = torch.cat([rows.to(device) for rows in given])
    else:
        phrases = [phrase for layout in layouts for phrase in layout.phrases]
        embeddings = encode_phrases(pipeline, phrases, lora_scale).to(device)
    shape = (len(layouts), config.slots)
    boxes = torch.zeros(*shape, 4, device=device)
    masks = torch.zeros(shape, device=device)
    positive = torch.zeros(*shape, config.phrase_dim, device=device, dtype=embeddings.dtype)
    first = 0
    for k, layout in enumerate(layouts):
        if n := len(layout):
            boxes[k, :n] = torch.tensor(layout.boxes, device=device)
            masks[k, :n] = 1
            positive[k, :n] = embeddings[first : first + n]
            first += n
    return {"boxes": boxes, "masks": masks, "positive_embeddings": positive}


def with_negative_half(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the unconditional half of classifier-free guidance first, with every slot empty: (B, ...) -> (2B, ...)."""
    return {name: torch.cat([torch.zeros_like(value), value]) for name, value in tokens.items()}
