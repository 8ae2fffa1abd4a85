"""The layouts of one call: given for all pictures, for each prompt or for each picture; one for each picture after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..layout import Layout, validate

PictureLayout = tuple[tuple[str, ...], tuple]  # phrases and boxes of one picture


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


def numbers_of_pictures(call: dict[str, Any]) -> tuple[int, int]:
    """Prompts of the call, and pictures for each."""
    prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
    number = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list | tuple) else 1
    return number, call.get("num_images_per_prompt") or 1


def one_a_picture(phrases: Any, boxes: Any, num_prompts: int, per_prompt: int) -> list[PictureLayout]:
    """Checked layouts for every picture, of one for all, one a prompt, or one a picture.

    Raises:
        ValueError: a layout that cannot be drawn, another number of them, or other nesting.
    """
    phrases, boxes = _plain(phrases), _plain(boxes)
    num_pictures = num_prompts * per_prompt
    if not _is_nested(phrases):
        return [_validated(phrases, boxes, "")] * num_pictures
    if not _is_nested(boxes, depth=3):
        raise ValueError("gligen_phrases is a list of lists; gligen_boxes must nest alike, a list of boxes each")
    if len(phrases) != len(boxes):
        raise ValueError(f"gligen_phrases are for {len(phrases)} pictures, gligen_boxes for {len(boxes)}")
    if len(phrases) not in (num_prompts, num_pictures):
        raise ValueError(
            f"{len(phrases)} layouts for {num_prompts} prompts x {per_prompt} pictures; expected one layout "
            f"for all, {num_prompts} (one a prompt) or {num_pictures} (one a picture)"
        )
    layouts = [_validated(p, b, f"layout {k}: ") for k, (p, b) in enumerate(zip(phrases, boxes, strict=True))]
    repeats = num_pictures // len(layouts)
    return [layout for layout in layouts for _ in range(repeats)]


def _validated(phrases: Any, boxes: Any, where: str) -> PictureLayout:
    try:
        return validate(phrases, boxes)
    except ValueError as error:
        raise ValueError(f"gligen {where}{error}") from error


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
