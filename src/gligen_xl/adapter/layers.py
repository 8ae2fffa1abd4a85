"""The layers of GLIGEN: the fuser (gated self-attention), the position net (grounding tokens), and the first
convolution of its inpainting models.

Weight names are those of diffusers' gated U-Net, so files pass both ways. The fuser's attention is a class of its own:
code that walks a U-Net for diffusers' attention (IP-Adapter, LoRA, attention processors) does not meet it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

FREQUENCIES = 8
POSITION_WIDTH = FREQUENCIES * 2 * 4  # sine and cosine of four coordinates
HIDDEN_WIDTH = 512


class FuserAttention(nn.Module):
    """Attention of visual tokens over visual and grounding tokens."""

    def __init__(self, dim: int, heads: int, grounding_logit_bias: float):
        super().__init__()
        self.heads = heads
        self.grounding_logit_bias = grounding_logit_bias
        self.observer: Callable[[Tensor], None] | None = None  # called with the grounding logits, (B, heads, L, N)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, tokens: Tensor, num_visual: int) -> Tensor:
        """tokens (B, num_visual + N, D), the visual ones first -> (B, num_visual, D)."""
        query, key, value = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in (
                (self.to_q, tokens[:, :num_visual]),  # the outputs of grounding tokens are never used
                (self.to_k, tokens),
                (self.to_v, tokens),
            )
        )
        if self.observer is not None:
            self.observer(query @ key[:, :, num_visual:].transpose(-1, -2) * query.shape[-1] ** -0.5)
        bias = None
        if self.grounding_logit_bias:
            bias = query.new_zeros(tokens.shape[1])
            bias[num_visual:] = self.grounding_logit_bias
            bias = bias.expand(num_visual, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class Fuser(nn.Module):
    """Gated self-attention (GLIGEN, section 3, eq. 4): lets visual tokens read the grounding tokens.

    Both gates start at 0, so a fresh fuser is the identity, bit for bit. `scale` multiplies the gates at run time and
    is not saved with the weights.

    Args:
        dim: width of the visual tokens. heads: attention heads. context_dim: width of the grounding tokens.
    """

    scale: Tensor

    def __init__(self, dim: int, heads: int, context_dim: int, grounding_logit_bias: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(context_dim, dim)
        self.attn = FuserAttention(dim, heads, grounding_logit_bias)
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor, objs: Tensor) -> Tensor:
        """Visual tokens x (B, T, dim), grounding tokens objs (B, N, context_dim) -> (B, T, dim)."""
        tokens = torch.cat([x, self.linear(objs)], dim=1)
        x = x + self.scale * self.alpha_attn.tanh() * self.attn(self.norm1(tokens), x.shape[1])
        return x + self.scale * self.alpha_dense.tanh() * self.ff(self.norm2(x))


class PassThrough(nn.Module):
    """Takes the place of a fuser on a block without one, because diffusers calls one on every block."""

    def forward(self, x: Tensor, objs: Tensor) -> Tensor:
        return x


class PositionNet(nn.Module):
    """Grounding tokens from boxes and phrase embeddings (GLIGEN, section 3, eq. 5).

    Args:
        phrase_dim: width of a phrase embedding. out_dim: width of a grounding token.
    """

    def __init__(self, phrase_dim: int, out_dim: int):
        super().__init__()
        self.linears = nn.Sequential(
            nn.Linear(phrase_dim + POSITION_WIDTH, HIDDEN_WIDTH),
            nn.SiLU(),
            nn.Linear(HIDDEN_WIDTH, HIDDEN_WIDTH),
            nn.SiLU(),
            nn.Linear(HIDDEN_WIDTH, out_dim),
        )
        self.null_positive_feature = nn.Parameter(torch.zeros(phrase_dim))
        self.null_position_feature = nn.Parameter(torch.zeros(POSITION_WIDTH))

    def forward(self, boxes: Tensor, masks: Tensor, positive_embeddings: Tensor) -> Tensor:
        """Boxes (B, N, 4) xyxy 0-1, masks (B, N) 1 where a slot is used, phrase embeddings (B, N, phrase_dim)
        -> grounding tokens (B, N, out_dim). An unused slot gives the learned null token, whatever its values."""
        dtype = self.null_positive_feature.dtype
        used = masks[..., None] > 0.5
        phrase = torch.where(used, positive_embeddings.to(dtype), self.null_positive_feature)
        position = torch.where(used, fourier_features(boxes).to(dtype), self.null_position_feature)
        return self.linears(torch.cat([phrase, position], dim=-1))


class InpaintConv(nn.Conv2d):
    """The first convolution of GLIGEN's inpainting models (section 4.3): it also reads the kept image.

    Its input channels are the noisy latents (4), the latents of the kept part of the image (4), and a mask (1): 1 where
    the image is kept, 0 in the boxes. The U-Net still takes 4: the others are set as `kept` before it runs; None means
    zeros, so that nothing is kept.

    Args:
        former: the convolution that it replaces. One of 4 channels is used while `active` is False: then the U-Net
            is that of the base. A base of 9 channels has no other convolution than this.
    """

    CHANNELS = 9

    def __init__(self, former: nn.Conv2d):
        super().__init__(self.CHANNELS, former.out_channels, former.kernel_size, padding=former.padding)  # type: ignore[arg-type]
        self.plain = former if former.in_channels != self.CHANNELS else None
        self.active = False  # in a call with boxes, also on the steps without grounding
        self.kept: Tensor | None = None  # (B, 5, h, w); repeated for the halves of classifier-free guidance
        with torch.no_grad():  # as GLIGEN begins: the new channels have no effect yet
            self.weight.zero_()[:, : former.in_channels].copy_(former.weight)
            if self.bias is not None and former.bias is not None:
                self.bias.copy_(former.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(B or 2B, 4, h, w) -> (B or 2B, out_channels, h, w)."""
        if self.plain is not None and not self.active:
            return self.plain(input)
        if self.kept is None:
            return self._conv_forward(input, self.weight[:, : input.shape[1]], self.bias)
        kept = self.kept.to(input).repeat(len(input) // len(self.kept), 1, 1, 1)
        return super().forward(torch.cat([input, kept], dim=1))


def fourier_features(boxes: Tensor) -> Tensor:
    """Sines and cosines of box coordinates, (..., 4) -> (..., 64), ordered frequency, sine / cosine, coordinate.

    Always float32: at the highest frequency, about 56, half precision loses a hundredth of the image.
    """
    frequencies = 100.0 ** (torch.arange(FREQUENCIES, device=boxes.device, dtype=torch.float32) / FREQUENCIES)
    angles = boxes.float()[..., None, :] * frequencies[:, None]  # (..., frequency, coordinate)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)
