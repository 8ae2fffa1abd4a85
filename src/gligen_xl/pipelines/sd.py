"""The pipelines for Stable Diffusion 1.x and 2.x: the weights of GLIGEN and IGLIGEN. All arguments of diffusers' own
keep their meaning; `GroundingMixin.__call__` says what is added."""

from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

from .grounding import GroundingMixin


class StableDiffusionGLIGENPipeline(GroundingMixin, StableDiffusionPipeline):  # type: ignore[override]
    """Text-to-image with Stable Diffusion 1.x or 2.x, each phrase in its box."""


class StableDiffusionGLIGENInpaintPipeline(GroundingMixin, StableDiffusionInpaintPipeline):  # type: ignore[override]
    """Inpainting under a mask with Stable Diffusion 1.x or 2.x, each phrase in its box."""
