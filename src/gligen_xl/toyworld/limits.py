"""The limits of the embedded model: calls that exceed them are refused or warned of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .model import LATENT_SIZE, MAX_TOKENS, TEXT_WIDTH
from .world import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, SHAPES, vocabulary

if TYPE_CHECKING:
    from ..pipelines.layouts import ImageLayout

LARGEST_SIDE = 96  # pixels; at 96 x 96 one object in thirty still stands in its box (LOG.md)
SMALLEST_BOX = 0.26  # of the image's side: 0.30 in training, times the strongest stretch
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def is_shapes_model(pipeline: Any) -> bool:
    """Tell whether a pipeline is the embedded model, or has its form and words."""
    unet, tokenizer = getattr(pipeline, "unet", None), getattr(pipeline, "tokenizer", None)
    settings = getattr(unet, "config", {})
    form = (settings.get("sample_size"), settings.get("cross_attention_dim"), settings.get("addition_time_embed_dim"))
    return form == (LATENT_SIZE, 2 * TEXT_WIDTH, 16) and getattr(tokenizer, "model_max_length", 0) == MAX_TOKENS


def check_limits(pipeline: Any, call: dict[str, Any], layouts: Sequence[ImageLayout]) -> None:
    """Refuse sizes that the embedded model cannot draw; warn of words that it does not know, and of boxes that are
    smaller than any object that it has seen. Of other models nothing is said.

    Raises:
        ValueError: a side is longer than `LARGEST_SIDE`.
    """
    if not is_shapes_model(pipeline):
        return
    _check_size(call)
    texts = [text for name in PROMPTS for text in _texts(call.get(name))]
    texts += [phrase for layout in layouts for phrase in layout.phrases]
    known = set(vocabulary())
    words = [word for text in texts for word in re.findall(r"[^\W_]+", text.lower())]
    if unknown := [word for word in dict.fromkeys(words) if word not in known]:
        shown = ", ".join(map(repr, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        _warn(
            f"the embedded model does not know {shown}; it knows {', '.join(SHAPES)} in {', '.join(COLOURS)}, on "
            f"{', '.join(BACKGROUNDS)}, small, medium or large, {', '.join(PLACES.values())}"
        )
    small = {box for layout in layouts for box in layout.boxes if min(box[2] - box[0], box[3] - box[1]) < SMALLEST_BOX}
    if small:
        box = ", ".join(f"{value:g}" for value in min(small))
        _warn(
            f"the embedded model draws no object smaller than about 0.3 of the image's side; the box ({box})"
            f"{f' and {len(small) - 1} more are' if len(small) > 1 else ' is'} smaller"
        )


def _check_size(call: dict[str, Any]) -> None:
    image = next((call[name] for name in ("image", "control_image") if hasattr(call.get(name), "width")), None)
    width, height = (call.get(name) or getattr(image, name, None) or IMAGE_SIZE for name in ("width", "height"))
    own, asked = f"{IMAGE_SIZE} x {IMAGE_SIZE}", f"{width} x {height}"
    if max(width, height) > LARGEST_SIDE:
        raise ValueError(
            f"the embedded model cannot draw {asked}: it was trained at {own}, and beyond {LARGEST_SIDE} pixels "
            "nothing has its shape; leave width and height out, or load another model"
        )
    if asked != own:
        _warn(f"the embedded model was trained at {own}; at {asked} objects are less true to their shapes and boxes")


def _texts(value: Any) -> list[str]:
    each = value if isinstance(value, list | tuple) else [value]
    return [text for text in each if isinstance(text, str)]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # the line of the pipeline's caller
