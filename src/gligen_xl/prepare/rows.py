"""What one row of an annotation file says of a picture: its caption, and boxes in one of six conventions."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..layout import Box, xyxy_from_cxcywh, xyxy_from_xywh
from .item import Annotation, Item, Skipped
from .pictures import PictureError, picture_size

BOX_FORMATS = ("xyxy", "xywh", "cxcywh", "xyxy_pixels", "xywh_pixels", "cxcywh_pixels")
CAPTION_KEYS = ("text", "caption", "prompt")

# Reasons why a row, and its picture with it, is left out.
NOT_JSON, NO_PATH, OUTSIDE = "its row is not JSON", "its row names no file", "its path leaves the folder"
WRONG, NUMBERS, NO_FORMAT = "its boxes or phrases are wrong", "phrases are numbers", "its box_format is not known"
PIXELS, SHARES = "boxes look like pixels", "boxes look like shares of the picture"
MISSING, UNREADABLE, TWICE = "file is missing", "file cannot be read", "image_id stands there twice"

OF_ALL = (NUMBERS, NO_FORMAT, PIXELS, SHARES)  # what is so in one row is so in all
FIRST_ROWS = 100  # in which these are looked for

NO_PHRASE = "no phrase"  # why a box is dropped

_EXAMPLE = '{"file_name": "a.jpg", "boxes": [[0.1, 0.2, 0.5, 0.9]], "phrases": ["a cat"], "box_format": "xyxy"}'


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        reason: the same words for all of its kind.
        detail: what is the matter with this one, and what it should be.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def read_row(line: bytes | str) -> dict[str, Any]:
    """A row of JSON.

    Raises:
        RowError: it is no JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(NOT_JSON, str(error)) from error
    if not isinstance(row, dict):
        raise RowError(NOT_JSON, f"{line[:80]!r}; expected an object {_EXAMPLE}")
    return row


def read_annotation(
    row: Mapping[str, Any], picture: bytes | Path, box_format: str | None, *, with_size: bool = True
) -> Annotation:
    """Caption and boxes of a row. A box whose phrase is blank is dropped.

    Args:
        picture: to ask for its size, where boxes are in pixels and the row does not say it.
        box_format: of rows that do not name their own. `objects`, as Hugging Face writes them, are COCO's xywh_pixels
            where neither does.
        with_size: `width` and `height` of the row are the picture's, in pixels.

    Raises:
        RowError: boxes, phrases or scores that do not fit, or boxes of an unknown convention.
        PictureError, OSError: the picture was asked for its size.
    """
    size = _size(row) if with_size else None
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), "")
    if not isinstance(caption, str):
        raise RowError(WRONG, f"the caption is {caption!r:.80}; expected a string")
    if row.get("objects") is not None:
        values, phrases, scores = _objects(row["objects"])
        box_format = box_format or "xywh_pixels"
    else:
        values, phrases, scores = (row.get(key) for key in ("boxes", "phrases", "scores"))
    values, phrases = ([] if value is None else value for value in (values, phrases))
    _check(values, phrases, scores)
    boxes: list[Box] = []
    if values:
        convention = _convention(row.get("box_format") or box_format)
        if convention.endswith("_pixels"):
            size = size or picture_size(picture)
        boxes = convert_boxes(values, convention, size)
    kept = [k for k, phrase in enumerate(phrases) if phrase.strip()]
    return Annotation(
        caption=clean(caption),
        boxes=tuple(boxes[k] for k in kept),
        phrases=tuple(clean(phrases[k]) for k in kept),
        scores=tuple(1.0 if scores is None else float(scores[k]) for k in kept),
        size=size,
        dropped={NO_PHRASE: len(phrases) - len(kept)} if len(kept) < len(phrases) else {},
    )


def convert_boxes(values: Any, convention: str, size: tuple[int, int] | None) -> list[Box]:
    """(n, 4) numbers of one of `BOX_FORMATS` as xyxy, 0-1; reversed or empty ones stay so.

    Args:
        size: (height, width), for boxes in pixels.

    Raises:
        RowError: by their numbers they are in pixels, but `convention` says 0-1, or the other way round.
    """
    boxes = np.asarray(values, np.float64).reshape(-1, 4)
    corners, _, unit = convention.partition("_")
    if unit:
        assert size is not None
        if boxes.size and 0 < boxes.max() <= 1:
            raise RowError(SHARES, f"no number is above {boxes.max():g} but box_format is {convention}; say {corners}")
        boxes = boxes / (size[1], size[0], size[1], size[0])
    elif boxes.size and boxes.max() > 2:
        raise RowError(PIXELS, f"a number is {boxes.max():g} but box_format is {convention}; say {convention}_pixels")
    if corners != "xyxy":
        boxes = (xyxy_from_xywh if corners == "xywh" else xyxy_from_cxcywh)(boxes)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number, as JSON has them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def stated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width), where both are whole numbers that a picture can have."""
    sides = [int(side) for side in (entry.get("height"), entry.get("width")) if is_number(side) and side == int(side)]
    return (sides[0], sides[1]) if len(sides) == 2 and all(0 < side < 2**31 for side in sides) else None


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and UTF-8, and so the table of a shard, cannot."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def file_within(folder: Path, path: Any) -> Path:
    """The file that a row names, below `folder` as its text goes (links are the owner's own affair).

    Raises:
        RowError: it names none, one elsewhere, or one that is not there.
        OSError: that cannot be told, as of a name that is too long.
    """
    if not isinstance(path, str) or not path.strip() or not _can_be_a_name(path):
        raise RowError(NO_PATH, f"it is {path!r:.80}; expected a path relative to {folder}")
    parts = Path(path).parts
    if Path(path).is_absolute() or ".." in parts:
        raise RowError(OUTSIDE, f"{path!r:.80}; expected a path relative to {folder}, below it")
    file = folder.joinpath(*parts)
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        regular = False
    if not regular:
        raise RowError(MISSING, f"there is no file {file}")
    return file


def item_or_why_not(read: Callable[[], Item], image_id: str, done: int) -> Item | Skipped:
    """What `read` gives, or why this one picture is left out."""
    try:
        return read()
    except (RowError, PictureError) as error:
        reason = error.reason
    except OSError as error:
        reason = f"{UNREADABLE} ({error.strerror or type(error).__name__})"
    return Skipped(image_id=image_id, reason=reason, done=done)


def check_first(rows: Iterable[tuple[str, Callable[[], Item]]]) -> None:
    """Look for a fault that all rows have, up to the first row whose boxes are understood, in a hundred at most.

    Args:
        rows: where each stands, and what reads it.

    Raises:
        ValueError: names the row and its fault. What is wrong with one row alone is left for the report.
    """
    for where, read in islice(rows, FIRST_ROWS):
        try:
            if read().boxes:
                return
        except RowError as error:
            if error.reason in OF_ALL:
                raise ValueError(f"{where}: {error}") from error
        except (PictureError, OSError):
            pass


def unique(items: Iterable[Item | Skipped]) -> Iterator[Item | Skipped]:
    """The items; of those with the same image_id the first."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Item) and item.image_id in seen:
            yield Skipped(image_id=item.image_id, reason=TWICE, done=item.done)
            continue
        if isinstance(item, Item):
            seen.add(item.image_id)
        yield item


def _can_be_a_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    size = stated_size(row)
    if size is None and height is not None and width is not None:
        raise RowError(WRONG, f"height is {height!r:.40}, width {width!r:.40}; expected pixels")
    return size


def _objects(objects: Any) -> tuple[Any, Any, Any]:
    if not isinstance(objects, Mapping) or "bbox" not in objects:
        raise RowError(WRONG, f'objects is {objects!r:.80}; expected {{"bbox": [...], "categories": [...]}}')
    names = objects.get("categories", objects.get("category"))
    return objects["bbox"], names, objects.get("scores")


def _convention(given: Any) -> str:
    if given is None:
        raise RowError(NO_FORMAT, f"name one of {', '.join(BOX_FORMATS)} by --box_format, or in the rows: {_EXAMPLE}")
    if given not in BOX_FORMATS:
        raise RowError(NO_FORMAT, f"it is {given!r:.40}; expected one of {', '.join(BOX_FORMATS)}")
    return given


def _check(boxes: Any, phrases: Any, scores: Any) -> None:
    if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        raise RowError(WRONG, f"boxes is {boxes!r:.80}; expected a list of lists of four numbers")
    for box in boxes:
        if not all(map(is_number, box)):
            raise RowError(WRONG, f"a box is {box!r:.80}; expected four finite numbers")
    if isinstance(phrases, list) and phrases and all(map(is_number, phrases)):
        raise RowError(NUMBERS, f"they are {phrases!r:.80}; expected the names of the classes")
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise RowError(WRONG, f"phrases is {phrases!r:.80}; expected a list of strings")
    if len(phrases) != len(boxes):
        raise RowError(WRONG, f"{len(boxes)} boxes but {len(phrases)} phrases; expected one a box")
    if scores is not None and not (isinstance(scores, list) and all(map(is_number, scores))):
        raise RowError(WRONG, f"scores is {scores!r:.80}; expected a list of finite numbers")
    if scores is not None and len(scores) != len(boxes):
        raise RowError(WRONG, f"{len(boxes)} boxes but {len(scores)} scores; expected one a box")
