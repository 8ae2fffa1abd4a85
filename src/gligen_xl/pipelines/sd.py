"""The pipelines for Stable Diffusion 1.x and 2.x, for which GLIGEN and IGLIGEN published weights. All arguments of
diffusers' own keep their meaning; `GroundingMixin.__call__` documents the others."""

from typing import TYPE_CHECKING

from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

from .grounding import GroundingMixin
from .signature import grounded_call


class StableDiffusionGLIGENPipeline(GroundingMixin, StableDiffusionPipeline):  # type: ignore[override]
    """Text-to-image with Stable Diffusion 1.x or 2.x, each phrase in its box."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]


class StableDiffusionGLIGENInpaintPipeline(GroundingMixin, StableDiffusionInpaintPipeline):  # type: ignore[override]
    """Inpainting under a mask with Stable Diffusion 1.x or 2.x, each phrase in its box."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionInpaintPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]
