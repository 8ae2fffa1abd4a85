"""A layout says what to draw where in one image: phrases, their boxes, and the prompt that goes with them.

    layout = Layout(prompt="grass with a red circle", phrases=["a red circle"], boxes=[[0.1, 0.6, 0.3, 0.8]])

Boxes inside the program are xyxy, 0-1, relative to the image that the model sees, (0, 0) at the top left. Other
conventions are converted where they enter, with the functions below.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .io import read_text, whole_file
from .limits import MAX_BOXES, MAX_NAME, MAX_PHRASE, MAX_PROMPT, MAX_SIDE, MAX_UNPACKED

Box = tuple[float, float, float, float]

_SURROGATE = re.compile("[\ud800-\udfff]")
TOLERANCE = 0.005  # a box may exceed the image by this much, from rounding, and is then clipped


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Phrases and boxes of one image; valid by construction.

    Args:
        prompt: describes the whole image.
        phrases: one a box.
        boxes: (x0, y0, x1, y1) each, 0-1.
        negative_prompt, seed, width, height: generation settings of this image, where it has its own. Pixels.
        id: a name for files and reports.

    Raises:
        ValueError: for anything that cannot be drawn; it names the item, what it is, and what it should be.
    """

    prompt: str = ""
    phrases: Sequence[str] = ()
    boxes: Sequence[Sequence[float]] = ()
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt is {_short(self.prompt)}; expected a string")
        for name, kinds in (("negative_prompt", str), ("id", str), ("seed", int), ("width", int), ("height", int)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} is {_short(value)}; expected {kinds.__name__}")
        for name, limit in (("prompt", MAX_PROMPT), ("negative_prompt", MAX_PROMPT), ("id", MAX_NAME)):
            _check_text(name, getattr(self, name) or "", limit)
        for name in ("width", "height"):
            if (pixels := getattr(self, name)) is not None and not 1 <= pixels <= MAX_SIDE:
                raise ValueError(f"{name} is {pixels}; expected 1 to {MAX_SIDE} pixels")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2**63 - 1")
        phrases, boxes = validate(self.phrases, self.boxes)
        object.__setattr__(self, "phrases", phrases)
        object.__setattr__(self, "boxes", boxes)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the settings that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"phrases": list(self.phrases), "boxes": [list(box) for box in self.boxes]}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """Make a layout from its JSON form; unknown keys are refused."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a layout is a JSON object with prompt, phrases and boxes; got {_short(values)}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown keys {unknown} in a layout; it may have {', '.join(known)}")
        return cls(**values)


# Validation ---------------------------------------------------------------------------------------------------------


def validate(phrases: Any, boxes: Any) -> tuple[tuple[str, ...], tuple[Box, ...]]:
    """Check the phrases and boxes of one image, also against each other."""
    checked_phrases, checked_boxes = validate_phrases(phrases), validate_boxes(boxes)
    if len(checked_phrases) != len(checked_boxes):
        raise ValueError(
            f"{len(checked_phrases)} phrases but {len(checked_boxes)} boxes; give one box (x0, y0, x1, y1) per phrase"
        )
    return checked_phrases, checked_boxes


def validate_phrases(phrases: Any) -> tuple[str, ...]:
    if isinstance(phrases, str):
        shown = _short(phrases)
        raise ValueError(f"phrases is the string {shown}; expected a list of strings: [{shown}]")
    phrases = _items("phrases", phrases, "strings")
    for k, phrase in enumerate(phrases):
        if not isinstance(phrase, str):
            raise ValueError(f"phrases[{k}] is {_short(phrase)}; expected a string")
        if not phrase.strip():
            raise ValueError(f"phrases[{k}] is empty; say what to draw in box {k}")
        _check_text(f"phrases[{k}]", phrase, MAX_PHRASE)
    return phrases


def validate_boxes(boxes: Any) -> tuple[Box, ...]:
    """Convert boxes to tuples of four floats within 0-1; a box that exceeds them by rounding is clipped."""
    boxes = _items("boxes", boxes, "[x0, y0, x1, y1]")
    if len(boxes) == 4 and all(_is_number(value) for value in boxes):
        shown = _short(list(boxes))
        raise ValueError(f"boxes is one bare box {shown}; expected a list of boxes: [{shown}]")
    return tuple(_validate_box(k, box) for k, box in enumerate(boxes))


def _validate_box(k: int, box: Any) -> Box:
    if isinstance(box, str) or not isinstance(box, Iterable):
        raise ValueError(f"boxes[{k}] is {_short(box)}; expected [x0, y0, x1, y1]")
    values = list(islice(box, MAX_BOXES))
    what = f"boxes[{k}] is {_short(values)}"
    if len(values) != 4:
        raise ValueError(f"{what}, of {_how_many(box)} items; expected [x0, y0, x1, y1]")
    if not all(_is_number(value) for value in values):
        raise ValueError(f"{what}; expected four numbers")
    corners = [float(value) for value in values]
    if not all(map(math.isfinite, corners)):
        raise ValueError(f"{what}; expected finite numbers")
    if max(corners) > 2:
        if max(corners) <= 100 and min(corners) >= 0:
            advice = "which look like percent; divide by 100 (or, if they are pixels, by the image's width and height)"
        else:
            advice = "which looks like pixels; divide x by the image's width and y by its height"
        raise ValueError(f"{what}, {advice}, so that all are in 0-1")
    if min(corners) < -TOLERANCE or max(corners) > 1 + TOLERANCE:
        raise ValueError(f"{what}, outside the image; expected 0 <= x, y <= 1")
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in corners)
    if x1 <= x0 or y1 <= y0:
        wrong = "reversed" if x1 < x0 or y1 < y0 else "empty"
        raise ValueError(f"{what}, which is {wrong}; expected x0 < x1 and y0 < y1 (corners, not width and height)")
    return x0, y0, x1, y1


def _items(name: str, values: Any, kind: str) -> tuple[Any, ...]:
    """Return at most MAX_BOXES items, also of a generator without end."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {_short(values)}; expected a list of {kind}")
    items = tuple(islice(values, MAX_BOXES + 1))
    if len(items) > MAX_BOXES:
        raise ValueError(f"{name} are {_how_many(values)}; expected at most {MAX_BOXES}")
    return items


def _check_text(name: str, text: str, limit: int) -> None:
    """Refuse a text that is too long, or that no tokenizer and no file can hold: half of a pair of UTF-16."""
    if half := _SURROGATE.search(text):
        raise ValueError(
            f"{name} is {_short(text)}; its letter {half.start()}, {half[0]!a}, is half of one; write it as UTF-8"
        )
    if len(text) > limit:
        raise ValueError(f"{name} has {len(text)} characters, {_short(text)}; expected at most {limit}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | np.bool_ | str | bytes):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def _how_many(values: Any) -> str:
    return str(len(values)) if hasattr(values, "__len__") else f"more than {MAX_BOXES}"


def _short(value: Any) -> str:
    text = repr(value[:80] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


# Files --------------------------------------------------------------------------------------------------------------


def read_layouts(path: str | Path) -> list[Layout]:
    """Read the layouts of a file: a JSON object, a JSON list, or one JSON object a line (JSONL).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the file and the line or item that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no layout file {path}")
    if (size := path.stat().st_size) > MAX_UNPACKED:
        raise ValueError(f"{path} has {size} bytes; expected layouts of at most {MAX_UNPACKED}")
    text = read_text(path)
    try:
        whole = json.loads(text)
        entries = [(f", item {k}", item) for k, item in enumerate(whole)] if isinstance(whole, list) else [("", whole)]
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a layout") from error
    except ValueError as error:  # of the syntax, or a number of too many digits
        entries = _parse_lines(path, text, error)
    if not entries:
        raise ValueError(f"{path} holds no layouts")
    layouts = []
    for where, item in entries:
        try:
            layouts.append(Layout.from_dict(item))
        except ValueError as error:
            raise ValueError(f"{path}{where}: {error}") from error
    return layouts


def _parse_lines(path: Path, text: str, whole_error: ValueError) -> list[tuple[str, Any]]:
    """Parse JSONL: each value with the place where it is."""
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):  # prompts may hold other line ends
        line = line.removeprefix("\ufeff")  # of a file that was appended to another
        if not line.strip():
            continue
        try:
            entries.append((f", line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            # A broken file of one object is not JSONL: then the error of the whole file says more.
            reason = f"line {number}: {error}" if entries else str(whole_error)
            raise ValueError(f"{path} is neither JSON nor JSONL: {reason}") from error
    return entries


def write_layouts(path: str | Path, layouts: Iterable[Layout]) -> None:
    """Write layouts as JSONL, one object a line."""
    with whole_file(path) as partial:
        lines = [json.dumps(layout.to_dict(), ensure_ascii=False) for layout in layouts]
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# Geometry -----------------------------------------------------------------------------------------------------------


def xyxy_from_cxcywh(boxes: np.ndarray) -> np.ndarray:
    """Convert centre and size to corners, (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def xyxy_from_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert corner and size to corners, (..., 4)."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the intersection over union of every pair: (n, 4) and (m, 4), xyxy -> (n, m)."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(-1) for box in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
