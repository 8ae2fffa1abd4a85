"""Pipelines with grounding: a mixin over diffusers' own."""

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
