"""Attention supervision: tell the fusers from the start which grounding token a visual token should look at.

Boxes are learned suddenly and late because two things have to be found at once: where a token belongs, and what it
should do there; each is useless without the other. Here the first is given. A visual token inside a box is pulled
towards that box's grounding token, one outside all boxes towards the empty slots, by a cross entropy on the grounding
part of each fuser's attention. Its weight fades to 0 over the first part of a run, so that the finished adapter has
been trained on the diffusion loss alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapter import fusers


@dataclass
class AttentionLosses:
    """Collects the attention losses of the fusers in one forward pass."""

    terms: list[Tensor] = field(default_factory=list)

    def mean(self) -> Tensor:
        """Return the mean over all fusers for each sample, (B,)."""
        return torch.stack(self.terms).mean(0)


@contextmanager
def watch_attention(unet: nn.Module, boxes: Tensor, masks: Tensor, latent_size: Sequence[int]) -> Iterator:
    """Let every fuser add its `attention_loss` to the `AttentionLosses` that the block gets, while the block runs.

    Args:
        boxes: (B, N, 4) xyxy 0-1. masks: (B, N), 1 where a slot is used. latent_size: (h, w) of the U-Net's input.
    """
    losses = AttentionLosses()

    def observe(logits: Tensor) -> None:
        losses.terms.append(attention_loss(logits, boxes, masks, latent_size))

    watched = list(fusers(unet).values())
    for fuser in watched:
        fuser.attn.observer = observe
    try:
        yield losses
    finally:
        for fuser in watched:
            fuser.attn.observer = None


def attention_loss(logits: Tensor, boxes: Tensor, masks: Tensor, latent_size: Sequence[int]) -> Tensor:
    """Cross entropy of the heads' mean attention over the grounding tokens, from its targets, for each sample, (B,).

    Args:
        logits: (B, heads, L, N) of L visual tokens, in rows, over the grounding tokens.
    """
    attention = logits.float().softmax(-1).mean(1)  # (B, L, N)
    targets = attention_targets(boxes.to(logits.device), masks.to(logits.device), latent_size, logits.shape[2])
    rows = targets.sum(-1) > 0  # an image that fills every slot has no target outside its boxes
    cross_entropy = -(targets * attention.clamp_min(1e-6).log()).sum(-1)  # 0 where there is no target
    return cross_entropy.sum(1) / rows.sum(1).clamp_min(1)


def attention_targets(boxes: Tensor, masks: Tensor, latent_size: Sequence[int], num_visual: int) -> Tensor:
    """Return the target attention of each visual token, (B, L, N), summing to 1: equal parts to the boxes that hold its
    centre or, if none does, to the empty slots."""
    height, width = latent_size
    rows = round((num_visual * height / width) ** 0.5)
    columns = num_visual // rows
    inside = box_masks(boxes, rows, columns).flatten(1, 2) * masks[:, None]
    outside = (inside.sum(-1, keepdim=True) == 0).float() * (1 - masks[:, None])
    targets = inside + outside
    return targets / targets.sum(-1, keepdim=True).clamp_min(1)


def box_masks(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Mark the cells of a grid whose centre is in a box: (B, N, 4) xyxy 0-1 -> (B, rows, columns, N), 1 or 0."""
    y = (torch.arange(rows, device=boxes.device) + 0.5) / rows
    x = (torch.arange(columns, device=boxes.device) + 0.5) / columns
    y, x = y[:, None, None], x[None, :, None]
    x0, y0, x1, y1 = boxes[:, None, None].unbind(-1)  # (B, 1, 1, N)
    return ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).float()
