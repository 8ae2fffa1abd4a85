"""The pipelines for Stable Diffusion XL."""

from diffusers import StableDiffusionXLPipeline

from .grounding import GroundingMixin


class StableDiffusionXLGLIGENPipeline(GroundingMixin, StableDiffusionXLPipeline):  # type: ignore[override]
    """Text-to-image with SDXL, each phrase in its box.

    >>> pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    >>> image = pipeline(
    ...     "grass with a red circle", gligen_phrases=["a red circle"], gligen_boxes=[[0.1, 0.6, 0.4, 0.9]]
    ... ).images[0]

    All arguments of `diffusers.StableDiffusionXLPipeline` keep their meaning; `GroundingMixin` says what is added.
    """
