"""Pipelines with grounding: a mixin over diffusers' own. They are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grounding import GroundingMixin
    from .sd import StableDiffusionGLIGENInpaintPipeline, StableDiffusionGLIGENPipeline
    from .sdxl import (
        StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
        StableDiffusionXLGLIGENControlNetPipeline,
        StableDiffusionXLGLIGENImg2ImgPipeline,
        StableDiffusionXLGLIGENInpaintPipeline,
        StableDiffusionXLGLIGENPipeline,
    )

__all__ = [
    "GroundingMixin",
    "StableDiffusionGLIGENInpaintPipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionXLGLIGENControlNetImg2ImgPipeline",
    "StableDiffusionXLGLIGENControlNetPipeline",
    "StableDiffusionXLGLIGENImg2ImgPipeline",
    "StableDiffusionXLGLIGENInpaintPipeline",
    "StableDiffusionXLGLIGENPipeline",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".grounding" if name == "GroundingMixin" else ".sdxl" if "XL" in name else ".sd"
    return getattr(import_module(home, __name__), name)
