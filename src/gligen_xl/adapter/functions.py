"""The methods of `GligenAdapter` as functions of the U-Net that carries it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .attach import GligenAdapter
from .config import AdapterConfig
from .layers import Fuser

attach = GligenAdapter.attach


def is_attached(unet: nn.Module | None) -> bool:
    return GligenAdapter.find(unet) is not None


def detach(unet: UNet2DConditionModel) -> GligenAdapter:
    """Take the adapter off; what is returned can be put back with `reattach`."""
    adapter = GligenAdapter.of(unet)
    adapter.detach()
    return adapter


def reattach(unet: UNet2DConditionModel, adapter: GligenAdapter) -> None:
    """Put back what `detach` took off."""
    adapter.reattach()


def adapter_config(unet: nn.Module) -> AdapterConfig:
    return GligenAdapter.of(unet).config


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    return GligenAdapter.of(unet).parameters()


def adapter_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    return GligenAdapter.of(unet).state_dict()


def load_adapter_state_dict(unet: nn.Module, state: Mapping[str, Tensor], *, source: str = "the adapter") -> None:
    GligenAdapter.of(unet).load_state_dict(state, source=source)


def load_adapter(unet: UNet2DConditionModel, source: str | Path, **settings: Any) -> AdapterConfig:
    return GligenAdapter.load(unet, source, **settings).config


def save_adapter(unet: nn.Module, folder: str | Path, **settings: Any) -> None:
    GligenAdapter.of(unet).save(folder, **settings)


def set_adapter_scale(unet: nn.Module, scale: float) -> None:
    GligenAdapter.of(unet).set_scale(scale)


def set_grounding_logit_bias(unet: nn.Module, bias: float) -> None:
    GligenAdapter.of(unet).set_logit_bias(bias)


def gate_values(unet: nn.Module) -> dict[str, float]:
    return GligenAdapter.of(unet).gate_values()


def fusers(unet: nn.Module) -> dict[str, Fuser]:
    return GligenAdapter.of(unet).fusers
