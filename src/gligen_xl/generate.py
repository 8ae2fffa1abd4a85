"""Layouts to images: what the command line, the evaluation and the trainer's validation all call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from .layout import Layout
from .pipelines.grounding import GroundingMixin


def generate(
    pipeline: GroundingMixin,
    layouts: Sequence[Layout],
    *,
    beta: float | Sequence[float] = 0.3,
    seed: int = 0,
    grounded: bool = True,
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[Image.Image]:
    """Generate one image for each layout, in order.

    Each image has its own noise, from the layout's seed where it has one and else from `seed` plus its number; so
    it is the same image, to rounding, in whatever batch it is made.

    Args:
        beta: the call argument `gligen_scheduled_sampling_beta`.
        grounded: without, phrases and boxes are left out and only the prompt remains.
        settings: further arguments of the pipeline's call, as num_inference_steps, guidance_scale, image. An image
            is one for all the layouts; one to start from is resized to a layout's width and height, where it has them.
    """
    batches = generate_batches(
        pipeline, layouts, beta=beta, seed=seed, grounded=grounded, batch_size=batch_size, **settings
    )
    for batch in batches:
        yield from batch


def generate_batches(
    pipeline: GroundingMixin,
    layouts: Sequence[Layout],
    *,
    beta: float | Sequence[float] = 0.3,
    seed: int = 0,
    grounded: bool = True,
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[list[Image.Image]]:
    """Generate as `generate` does, and yield the images of each call of the pipeline together."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")

    def alike(item: tuple[int, Layout]) -> tuple[Any, ...]:
        layout = item[1]  # a missing negative prompt is no empty one: diffusers embeds it as zeros. Without boxes
        # an image is the plain pipeline's; beside grounded ones it would be given null tokens.
        return layout.width, layout.height, layout.negative_prompt is None, bool(layout.phrases)

    for (width, height, plain, _), group in groupby(enumerate(layouts), key=alike):
        members = list(group)
        sized = _sized(settings, width, height)
        for first in range(0, len(members), batch_size):
            part = members[first : first + batch_size]
            grounding: dict[str, Any] = {}
            if grounded:
                grounding["gligen_phrases"] = [list(layout.phrases) for _, layout in part]
                grounding["gligen_boxes"] = [list(layout.boxes) for _, layout in part]
            yield pipeline(
                [layout.prompt for _, layout in part],
                negative_prompt=None if plain else [layout.negative_prompt for _, layout in part],
                gligen_scheduled_sampling_beta=beta,
                generator=[torch.Generator().manual_seed(image_seed(layout, seed, k)) for k, layout in part],
                **grounding,
                **sized,
            ).images


def image_seed(layout: Layout, seed: int, number: int) -> int:
    """Return the seed of image `number` of a row that starts at `seed`; a layout's own goes before."""
    return seed + number if layout.seed is None else layout.seed


def _sized(settings: dict[str, Any], width: int | None, height: int | None) -> dict[str, Any]:
    """Return the call's settings at a layout's size. A call that starts from an image has the image's size, resized if
    asked."""
    size = {name: value for name, value in (("width", width), ("height", height)) if value is not None}
    if "strength" not in settings:
        return settings | size
    images = {name: settings[name] for name in ("image", "mask_image", "control_image") if name in settings}
    sized = settings | {name: _resized(image, width, height) for name, image in images.items()}
    if "mask_image" in settings:  # only inpainting does not look at its image
        sized |= {name: getattr(sized["image"], name) // 8 * 8 for name in ("width", "height")}
    return sized


def _resized(image: Any, width: int | None, height: int | None) -> Any:
    if isinstance(image, list):
        return [_resized(one, width, height) for one in image]
    return image.resize((width or image.width, height or image.height))
