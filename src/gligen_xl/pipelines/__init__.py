"""Pipelines with grounding: a mixin over diffusers' own."""

from .sdxl import StableDiffusionXLGLIGENPipeline

__all__ = ["StableDiffusionXLGLIGENPipeline"]
