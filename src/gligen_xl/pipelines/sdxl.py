"""The pipelines for Stable Diffusion XL. All arguments of diffusers' own keep their meaning; `GroundingMixin.__call__`
documents the others."""

from typing import TYPE_CHECKING

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from .grounding import GroundingMixin
from .signature import grounded_call


class StableDiffusionXLGLIGENPipeline(GroundingMixin, StableDiffusionXLPipeline):  # type: ignore[override]
    """Text-to-image with SDXL, each phrase in its box.

    >>> pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    >>> image = pipeline(
    ...     "grass with a red circle", gligen_phrases=["a red circle"], gligen_boxes=[[0.1, 0.6, 0.4, 0.9]]
    ... ).images[0]
    """

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionXLPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]


class StableDiffusionXLGLIGENImg2ImgPipeline(GroundingMixin, StableDiffusionXLImg2ImgPipeline):  # type: ignore[override]
    """Image-to-image with SDXL, each phrase in its box; also the second half of a split run (`denoising_start`)."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionXLImg2ImgPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]


class StableDiffusionXLGLIGENInpaintPipeline(GroundingMixin, StableDiffusionXLInpaintPipeline):  # type: ignore[override]
    """Inpainting under a mask with SDXL or an SDXL inpainting model, each phrase in its box."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionXLInpaintPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]


class StableDiffusionXLGLIGENControlNetPipeline(GroundingMixin, StableDiffusionXLControlNetPipeline):  # type: ignore[override]
    """Text-to-image with SDXL and ControlNets, each phrase in its box."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionXLControlNetPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]


class StableDiffusionXLGLIGENControlNetImg2ImgPipeline(  # type: ignore[override]
    GroundingMixin, StableDiffusionXLControlNetImg2ImgPipeline
):
    """Image-to-image with SDXL and ControlNets, each phrase in its box."""

    if TYPE_CHECKING:

        @grounded_call(StableDiffusionXLControlNetImg2ImgPipeline.__call__)
        def __call__(self): ...  # type: ignore[override]
