"""Initialisation of an adapter other than GLIGEN's own, which has gates at 0 and random weights.

A fresh fuser spreads its attention evenly over thousands of visual tokens and a few grounding tokens, about a hundredth
of it on the latter, behind a gate that is closed. Each option takes one of these hindrances away, and each is in the
weights alone: the adapter has the published form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import fusers
from ..adapter.layers import Fuser, FuserAttention
from ..adapter.unet import transformer_blocks
from .options import AdapterOptions

_QUERIES = 256  # visual tokens, evenly chosen, that a share is measured on


@torch.no_grad()
def init_adapter_weights(unet: nn.Module, options: AdapterOptions, run_unet: Callable[[], object]) -> None:
    """Initialise the weights of the attached, fresh adapter as `options` ask.

    Args:
        run_unet: runs the U-Net once on grounded samples of the training; called for a `grounding_share` only.

    Raises:
        ValueError: a block's self-attention does not fit its fuser.
    """
    if options.fuser_init == "self_attention":
        for name, block in transformer_blocks(unet).items():
            if isinstance(block.fuser, Fuser):
                copy_self_attention(block.fuser, block, name)
    if options.gate_init:
        for fuser in fusers(unet).values():
            fuser.alpha_attn.fill_(math.atanh(options.gate_init))
            fuser.alpha_dense.fill_(math.atanh(options.gate_init))
    if (share := options.grounding_share) is not None:

        def set_share(fuser: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            set_attention_share(fuser, *inputs, share)  # type: ignore[arg-type]

        hooks = [fuser.register_forward_pre_hook(set_share) for fuser in fusers(unet).values()]
        try:
            run_unet()
        finally:
            for hook in hooks:
                hook.remove()


# From the block's own self-attention --------------------------------------------------------------------------------


def copy_self_attention(fuser: Fuser, block: Any, name: str = "the block") -> None:
    """Attention and norms of a fuser from the transformer block it stands on: `norm1` and `attn1`, and `norm3`, which
    the block's own feed-forward reads. `linear`, which brings grounding tokens to the visual width, and the
    feed-forward stay fresh."""
    sources: dict[str, nn.Module] = {
        "attn.to_q": block.attn1.to_q, "attn.to_k": block.attn1.to_k, "attn.to_v": block.attn1.to_v,
        "attn.to_out.0": block.attn1.to_out[0], "norm1": block.norm1, "norm2": block.norm3,
    }  # fmt: skip
    for target, source in sources.items():
        for part, value in fuser.get_submodule(target).named_parameters():
            given = getattr(source, part, None)
            if given is None and part == "bias":
                value.zero_()
            elif given is None or given.shape != value.shape or not given.is_floating_point():
                got = "nothing" if given is None else f"{tuple(given.shape)} of {given.dtype}"
                raise ValueError(
                    f"the fuser of {name} cannot begin from its self-attention: for {target}.{part} there is {got}, "
                    f"expected {tuple(value.shape)}; set adapter.fuser_init to fresh"
                )
            else:
                value.copy_(given)


# A share of the attention -------------------------------------------------------------------------------------------


def set_attention_share(fuser: Fuser, x: Tensor, objs: Tensor, share: float) -> None:
    """Change a fuser so that `share` of its attention goes to the grounding tokens, on average over what is given.

    The published form has no logit bias, but weights can make one. `norm1.bias` gives every query a constant part. The
    keys get what answers it, of rank one per head, for the direction that tells grounding tokens from visual ones: that
    of Fisher's discriminant, along which visual tokens differ least. How much is found by bisection.

    Args:
        x: visual tokens (B, T, dim). objs: grounding tokens (B, N, context_dim).
    """
    attention, count = fuser.attn, x.shape[1]
    constant = torch.randn(x.shape[-1], device=x.device).sign()  # as long as a token after the norm
    fuser.norm1.bias.add_(constant)
    with torch.autocast(x.device.type, enabled=False):
        tokens = fuser.norm1(torch.cat([x.float(), fuser.linear(objs.float())], dim=1))
        direction = discriminant(tokens[:, count:].flatten(0, 1), tokens[:, :count].flatten(0, 1))
        asked = (attention.to_q.weight @ constant).unflatten(0, (attention.heads, -1))  # (heads, width of a head)
        answer = (asked * asked.shape[1] ** 0.5 / asked.square().sum(1, keepdim=True)).flatten()
        update, before = torch.outer(answer, direction), attention.to_k.weight.clone()
        low, high = -20.0, 20.0  # nats that the grounding tokens' logits are raised by
        for _ in range(20):
            middle = (low + high) / 2
            attention.to_k.weight.copy_(before + middle * update)
            low, high = (low, middle) if attention_share(attention, tokens, count) > share else (middle, high)


def discriminant(ones: Tensor, others: Tensor) -> Tensor:
    """Return the direction w, (D,), in which (n, D) `ones` lie 1 above `others` on average with least variance."""
    apart = ones.mean(0) - others.mean(0)
    spread = torch.cov(ones.T) + torch.cov(others.T)
    spread.diagonal().add_(0.01 * spread.diagonal().mean() + 1e-6)  # fewer tokens than dimensions can be given
    direction = torch.linalg.solve(spread, apart)
    return direction / (direction @ apart)


def attention_share(attention: FuserAttention, tokens: Tensor, num_visual: int) -> float:
    """Return the share of a fuser's attention on the grounding tokens, as a mean over samples, heads and queries.

    Args:
        tokens: (B, num_visual + N, D) after the norm, the visual ones first.
    """
    queries = tokens[:, : num_visual : -(-num_visual // _QUERIES)]
    query = attention.to_q(queries).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key = attention.to_k(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, heads, L, num_visual + N)
    logits[..., num_visual:] += attention.grounding_logit_bias
    return logits.softmax(-1)[..., num_visual:].sum(-1).mean().item()
