"""The layouts of one call: given for all images, for each prompt or for each image; afterwards one for each image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import Box, Layout, validate, validate_boxes

SETTINGS = {"width": "width", "height": "height", "negative_prompt": "negative_prompt", "seed": "generator"}


@dataclass(frozen=True)
class ImageLayout:
    """The boxes of one image, with a phrase for each or the phrases' embeddings, (n, phrase_dim)."""

    boxes: tuple[Box, ...]
    phrases: tuple[str, ...] = ()
    embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def first(self, number: int) -> ImageLayout:
        embeds = None if self.embeds is None else self.embeds[:number]
        return ImageLayout(self.boxes[:number], self.phrases[:number], embeds)


# The argument gligen_layouts ----------------------------------------------------------------------------------------


def split_layouts(layouts: Layout | Sequence[Layout]) -> tuple[Any, Any, Any]:
    """Split one layout, or a list of them, into prompts, phrases and boxes."""
    if isinstance(layouts, Layout):
        return layouts.prompt, list(layouts.phrases), [list(box) for box in layouts.boxes]
    if not isinstance(layouts, list | tuple) or not layouts or not all(isinstance(one, Layout) for one in layouts):
        raise ValueError(f"gligen_layouts is {layouts!r:.80}; expected a Layout or a list of them")
    prompts, phrases, boxes = zip(*(split_layouts(layout) for layout in layouts), strict=True)
    return list(prompts), list(phrases), list(boxes)


def warn_of_unused_settings(layouts: Layout | Sequence[Layout], call: dict[str, Any]) -> None:
    """Warn of settings of layouts that a call does not read: it has one size, and its own generators."""
    each = [layouts] if isinstance(layouts, Layout) else layouts
    unused = [
        f"{setting} (give {argument})"
        for setting, argument in SETTINGS.items()
        if call.get(argument) is None and any(getattr(layout, setting) is not None for layout in each)
    ]
    if unused:
        warnings.warn(f"gligen_layouts hold settings that a call does not read: {', '.join(unused)}", stacklevel=4)


# Phrases, embeddings and boxes --------------------------------------------------------------------------------------


def image_layouts(call: dict[str, Any], phrases: Any, embeds: Any, boxes: Any) -> list[ImageLayout]:
    """Check the phrases (or their embeddings) and boxes of a call, and give every image its layout.

    Args:
        call: arguments of the call by name; they say how many images there are.
        phrases, embeds, boxes: the arguments gligen_phrases, gligen_phrase_embeds and gligen_boxes, or None.

    Returns:
        One layout for each image, in diffusers' order; nothing if there are no boxes at all.

    Raises:
        ValueError: a layout that cannot be drawn, another number of them, or different nesting.
    """
    if phrases is not None and embeds is not None:
        raise ValueError("gligen_phrase_embeds replace gligen_phrases; give one of the two")
    objects, name = (phrases, "gligen_phrases") if embeds is None else (embeds, "gligen_phrase_embeds")
    if (objects is None) != (boxes is None):
        present, absent = ("gligen_boxes", "gligen_phrases") if objects is None else (name, "gligen_boxes")
        raise ValueError(f"{present} without {absent}; give both, one box per phrase")
    if boxes is None:
        return []
    if embeds is None:
        objects = _plain(phrases)
        nested, check = _is_nested(objects), _check_phrases
    else:
        nested = len(embeds) > 0 if isinstance(embeds, list | tuple) else _tensor(embeds).ndim == 3
        check = _check_embeds
    return _per_image(objects, nested, _plain(boxes), call, check, name)


def _check_phrases(phrases: Any, boxes: Any) -> ImageLayout:
    valid_phrases, valid_boxes = validate(phrases, boxes)
    return ImageLayout(valid_boxes, valid_phrases)


def _check_embeds(embeds: Any, boxes: Any) -> ImageLayout:
    valid_boxes, rows = validate_boxes(boxes), _tensor(embeds)
    number = len(valid_boxes)
    if not number and not rows.numel():
        return ImageLayout(())
    if rows.ndim != 2 or len(rows) != number:
        raise ValueError(
            f"gligen_phrase_embeds of shape {tuple(rows.shape)} for {number} boxes; expected ({number}, phrase_dim), "
            "one row per box"
        )
    if not rows.isfinite().all():
        raise ValueError("gligen_phrase_embeds hold values that are not finite numbers")
    return ImageLayout(valid_boxes, embeds=rows)


def _per_image(
    objects: Any, nested: bool, boxes: Any, call: dict[str, Any], check: Callable[[Any, Any], ImageLayout], name: str
) -> list[ImageLayout]:
    prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
    num_prompts = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list | tuple) else 1
    per_prompt = call.get("num_images_per_prompt") or 1
    num_images = num_prompts * per_prompt
    if not nested:
        return [_named(check, objects, boxes, "")] * num_images
    if not _is_nested(boxes, depth=3):
        raise ValueError(f"{name} is a list of lists; gligen_boxes must nest alike, a list of boxes each")
    if len(objects) != len(boxes):
        raise ValueError(f"{name} are for {len(objects)} images, gligen_boxes for {len(boxes)}")
    if len(objects) not in (num_prompts, num_images):
        raise ValueError(
            f"{len(objects)} layouts for {num_prompts} prompts x {per_prompt} images; expected one layout "
            f"for all, {num_prompts} (one per prompt) or {num_images} (one per image)"
        )
    pairs = zip(objects, boxes, strict=True)
    layouts = [_named(check, of_image, its_boxes, f"layout {k}: ") for k, (of_image, its_boxes) in enumerate(pairs)]
    return [layout for layout in layouts for _ in range(num_images // len(layouts))]


def _named(check: Callable[[Any, Any], ImageLayout], objects: Any, boxes: Any, where: str) -> ImageLayout:
    """Run a check whose errors say which layout is wrong."""
    try:
        return check(objects, boxes)
    except ValueError as error:
        prefix = where if str(error).startswith("gligen") else f"gligen {where}"
        raise ValueError(f"{prefix}{error}") from error


def _tensor(value: Any) -> Tensor:
    """Convert embeddings to a tensor of floating-point numbers."""
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or not (tensor.is_floating_point() or not tensor.numel()):
        kind = f"a {type(value).__name__}" if tensor is None else f"of {tensor.dtype}"
        raise ValueError(
            f"gligen_phrase_embeds is {kind}; expected a tensor (n, phrase_dim) of floating-point numbers, or a list "
            "of them, as encode_gligen_phrases returns"
        )
    return tensor


def _plain(value: Any) -> Any:
    """Convert arrays and tensors, also within lists, to lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_nested(value: Any, depth: int = 2) -> bool:
    """Tell whether a list holds lists, `depth` deep, as far as its first non-empty items tell."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    if depth == 1:
        return True
    inner = [item for item in value if isinstance(item, str) or not isinstance(item, Sequence) or len(item)]
    return all(_is_nested(item, depth - 1) for item in inner) if inner else len(value) > 0


def nested_phrases(phrases: Any) -> bool:
    """Tell whether phrases are given for each prompt or image, and not once for all."""
    return _is_nested(_plain(phrases))
