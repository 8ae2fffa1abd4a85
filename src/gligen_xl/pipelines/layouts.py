"""The layouts of one call: given for all images, for each prompt or for each image; one for each image after."""

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
    """Of one image: boxes, and for each its phrase, or the phrase's embedding (n, phrase_dim)."""

    boxes: tuple[Box, ...]
    phrases: tuple[str, ...] = ()
    embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def first(self, number: int) -> ImageLayout:
        embeds = None if self.embeds is None else self.embeds[:number]
        return ImageLayout(self.boxes[:number], self.phrases[:number], embeds)


def taken_apart(layouts: Layout | Sequence[Layout]) -> tuple[Any, Any, Any]:
    """Prompts, phrases and boxes of one layout or of a list."""
    if isinstance(layouts, Layout):
        return layouts.prompt, list(layouts.phrases), [list(box) for box in layouts.boxes]
    if not isinstance(layouts, list | tuple) or not layouts or not all(isinstance(one, Layout) for one in layouts):
        raise ValueError(f"gligen_layouts is {layouts!r:.80}; expected a Layout or a list of them")
    return (
        [layout.prompt for layout in layouts],
        [list(layout.phrases) for layout in layouts],
        [[list(box) for box in layout.boxes] for layout in layouts],
    )


def warn_of_unused_settings(layouts: Layout | Sequence[Layout], call: dict[str, Any]) -> None:
    """Settings of layouts are not those of a call: one call has one size, and generators of its own."""
    each = [layouts] if isinstance(layouts, Layout) else layouts
    unused = [
        f"{setting} (give {argument})"
        for setting, argument in SETTINGS.items()
        if call.get(argument) is None and any(getattr(layout, setting) is not None for layout in each)
    ]
    if unused:
        warnings.warn(f"gligen_layouts hold settings that a call does not read: {', '.join(unused)}", stacklevel=4)


def numbers_of_images(call: dict[str, Any]) -> tuple[int, int]:
    """Prompts of the call, and images for each."""
    prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
    number = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list | tuple) else 1
    return number, call.get("num_images_per_prompt") or 1


def one_a_image(phrases: Any, boxes: Any, num_prompts: int, per_prompt: int) -> list[ImageLayout]:
    """Checked layouts for every image, of one for all, one a prompt, or one an image.

    Raises:
        ValueError: a layout that cannot be drawn, another number of them, or other nesting.
    """

    def checked(of_image: Any, its_boxes: Any) -> ImageLayout:
        valid_phrases, valid_boxes = validate(of_image, its_boxes)
        return ImageLayout(valid_boxes, valid_phrases)

    phrases = _plain(phrases)
    return _for_each(phrases, _is_nested(phrases), boxes, num_prompts, per_prompt, checked, "gligen_phrases")


def embeds_a_image(embeds: Any, boxes: Any, num_prompts: int, per_prompt: int, phrase_dim: int) -> list[ImageLayout]:
    """As `one_a_image`, for embeddings of phrases: (n, phrase_dim) for all images, or a list of such.

    Raises:
        ValueError: as there; or embeddings that are no finite numbers, or of another width.
    """

    def checked(of_image: Any, its_boxes: Any) -> ImageLayout:
        valid_boxes = validate_boxes(its_boxes)
        rows = _tensor(of_image)
        if not valid_boxes and not rows.numel():
            return ImageLayout(())
        if rows.ndim != 2 or len(rows) != len(valid_boxes):
            raise ValueError(
                f"gligen_phrase_embeds of shape {tuple(rows.shape)} for {len(valid_boxes)} boxes; expected "
                f"({len(valid_boxes)}, {phrase_dim}), one row a box"
            )
        if rows.shape[1] != phrase_dim:
            raise ValueError(
                f"gligen_phrase_embeds are of width {rows.shape[1]}, the adapter reads {phrase_dim}; they come from "
                "other text encoders"
            )
        if not rows.isfinite().all():
            raise ValueError("gligen_phrase_embeds hold values that are no finite numbers")
        return ImageLayout(valid_boxes, embeds=rows)

    nested = len(embeds) > 0 if isinstance(embeds, list | tuple) else _tensor(embeds).ndim == 3
    return _for_each(embeds, nested, boxes, num_prompts, per_prompt, checked, "gligen_phrase_embeds")


def _for_each(
    objects: Any,
    nested: bool,
    boxes: Any,
    num_prompts: int,
    per_prompt: int,
    checked: Callable[[Any, Any], ImageLayout],
    name: str,
) -> list[ImageLayout]:
    boxes = _plain(boxes)
    num_images = num_prompts * per_prompt
    if not nested:
        return [_named(checked, objects, boxes, "")] * num_images
    if not _is_nested(boxes, depth=3):
        raise ValueError(f"{name} is a list of lists; gligen_boxes must nest alike, a list of boxes each")
    if len(objects) != len(boxes):
        raise ValueError(f"{name} are for {len(objects)} images, gligen_boxes for {len(boxes)}")
    if len(objects) not in (num_prompts, num_images):
        raise ValueError(
            f"{len(objects)} layouts for {num_prompts} prompts x {per_prompt} images; expected one layout "
            f"for all, {num_prompts} (one a prompt) or {num_images} (one an image)"
        )
    pairs = zip(objects, boxes, strict=True)
    layouts = [_named(checked, of_image, its, f"layout {k}: ") for k, (of_image, its) in enumerate(pairs)]
    repeats = num_images // len(layouts)
    return [layout for layout in layouts for _ in range(repeats)]


def _named(checked: Callable[[Any, Any], ImageLayout], objects: Any, boxes: Any, where: str) -> ImageLayout:
    try:
        return checked(objects, boxes)
    except ValueError as error:
        prefix = where if str(error).startswith("gligen") else f"gligen {where}"
        raise ValueError(f"{prefix}{error}") from error


def _tensor(value: Any) -> Tensor:
    """Embeddings as a tensor of floating-point numbers, where they are."""
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
    """Arrays and tensors, also in lists, as lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_nested(value: Any, depth: int = 2) -> bool:
    """Whether a list holds lists, `depth` deep, as far as its first non-empty items tell."""
    if depth == 1:
        return isinstance(value, Sequence) and not isinstance(value, str)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    inner = [item for item in value if isinstance(item, str) or not isinstance(item, Sequence) or len(item)]
    if not inner:
        return len(value) > 0
    return all(_is_nested(item, depth - 1) for item in inner)


def nested_phrases(phrases: Any) -> bool:
    """Whether phrases are given for each prompt or image, and not once for all."""
    return _is_nested(_plain(phrases))
