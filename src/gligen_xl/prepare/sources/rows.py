"""What one row of an annotation file says of an image: its caption, and boxes in one of six conventions.

A row is a JSON object with boxes and phrases, or with objects as Hugging Face's sets hold them:

    {"bbox": [[x, y, w, h], ...], "category": ["cat", ...]}
    [{"bbox": [x, y, w, h], "category": "cat"}, ...]
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ...images.decode import ImageError, image_size
from ...io import decode_text
from ...layout import Box, xyxy_from_cxcywh, xyxy_from_xywh
from ..item import BAD_TEXT, Annotation, Item, Skipped, text_fault

BOX_FORMATS = ("xyxy", "xywh", "cxcywh", "xyxy_pixels", "xywh_pixels", "cxcywh_pixels")
CAPTION_KEYS = ("text", "caption", "prompt")
BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
NAME_KEYS = (
    "categories", "category", "phrases", "phrase", "labels", "label", "class_name", "class_names", "classes", "class",
    "names", "name", "category_name", "category_id", "category_ids", "class_id",
)  # fmt: skip
SCORE_KEYS = ("scores", "score", "confidence")

# Reasons why a row, and its image with it, is left out.
NOT_JSON, NO_PATH, OUTSIDE = "its row is not JSON", "its row names no file", "its path leaves the folder"
NOT_UTF8, CAPTION_NOT_UTF8 = "its row is not UTF-8", "its caption is not UTF-8"
WRONG_BOXES, WRONG_PHRASES, WRONG_SCORES = "its boxes are wrong", "its phrases are wrong", "its scores are wrong"
WRONG_CAPTION, WRONG_SIZE, UNEQUAL = "its caption is wrong", "its size is wrong", "boxes and phrases differ in number"
WRONG, NUMBERS, NO_FORMAT = "its boxes or phrases are wrong", "phrases are numbers", "its box_format is not known"
PIXELS, SHARES = "boxes look like pixels", "boxes look like shares of the image"
LABELS = "its caption is rows of YOLO labels"
MISSING, UNREADABLE = "file is missing", "file cannot be read"

OF_ALL = (NUMBERS, NO_FORMAT, PIXELS, SHARES, LABELS)  # what is so in one row is so in all
FIRST_ROWS = 100  # in which these are looked for; where so many fail alike, whatever it is, nothing is begun

NO_PHRASE = "no phrase"  # why a box is dropped

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_EXAMPLE = '{"file_name": "a.jpg", "boxes": [[0.1, 0.2, 0.5, 0.9]], "phrases": ["a cat"], "box_format": "xyxy"}'


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        reason: the same words for all of its kind.
        detail: what is wrong with this one, and what it should be.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# Rows ---------------------------------------------------------------------------------------------------------------


def read_row(line: bytes | str) -> dict[str, Any]:
    """Parse a row of JSON.

    Raises:
        RowError: it is no JSON object, or no UTF-8.
    """
    try:
        text = line if isinstance(line, str) else decode_text(line)
    except ValueError as error:
        raise RowError(NOT_UTF8, f"{line[:40]!r}: {error}") from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(NOT_JSON, f"{text.strip()[:80]!r}: {error}; expected an object {_EXAMPLE}") from error
    if not isinstance(row, dict):
        raise RowError(NOT_JSON, f"{line[:80]!r}; expected an object {_EXAMPLE}")
    return row


def read_annotation(
    row: Mapping[str, Any], image: bytes | Path, box_format: str | None, *, with_size: bool = True
) -> Annotation:
    """Read the caption and the boxes of a row. A box whose phrase is blank is dropped.

    Args:
        image: its size is read where boxes are in pixels and the row does not say it.
        box_format: of rows that do not name their own. `objects`, as Hugging Face writes them, are COCO's xywh_pixels
            where neither does.
        with_size: `width` and `height` of the row are the image's, in pixels.

    Raises:
        RowError: boxes, phrases or scores that do not fit, boxes of an unknown convention, or texts that hold
            control characters.
        ImageError, OSError: the size of the image could not be read.
    """
    size = _size(row) if with_size else None
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), "")
    if not isinstance(caption, str):
        raise RowError(WRONG_CAPTION, f"it is {caption!r:.80}; expected a string")
    check_caption(caption)
    if (objects := row.get("objects")) is not None:
        if (columns := read_objects(objects)) is None:
            raise RowError(WRONG, f'objects is {objects!r:.80}; expected {{"bbox": [...], "categories": [...]}}')
        values, phrases, scores = columns
        box_format = box_format or "xywh_pixels"
    else:
        values, phrases, scores = (row.get(key) for key in ("boxes", "phrases", "scores"))
    values, phrases = ([] if value is None else value for value in (values, phrases))
    _check(values, phrases, scores)
    boxes: list[Box] = []
    if values:
        convention = _convention(row.get("box_format") or box_format)
        if convention.endswith("_pixels"):
            size = size or image_size(image)
        boxes = convert_boxes(values, convention, size)
    for text in (caption, *phrases):
        if fault := text_fault(text):
            raise RowError(BAD_TEXT, fault)
    named = [k for k, phrase in enumerate(phrases) if phrase.strip()]
    blank = next((k for k, phrase in enumerate(phrases) if not phrase.strip()), None)
    return Annotation(
        caption=caption.strip(),
        boxes=tuple(boxes[k] for k in named),
        phrases=tuple(phrases[k].strip() for k in named),
        scores=tuple(1.0 if scores is None else float(scores[k]) for k in named),
        size=size,
        dropped={} if blank is None else {NO_PHRASE: len(phrases) - len(named)},
        dropped_examples={} if blank is None else {NO_PHRASE: f"phrases[{blank}] is {phrases[blank]!r:.40}"},
    )


def read_objects(objects: Any) -> tuple[Any, Any, Any] | None:
    """Return boxes, names and scores, a list each; names or scores are None if there are none. None for another form.

    Of several keys of names one whose values are texts is taken before one of numbers.
    """
    if isinstance(objects, Mapping):
        columns: Mapping[str, Any] = objects
    elif isinstance(objects, list) and all(isinstance(entry, Mapping) for entry in objects):
        if not objects:
            return [], [], None
        columns = {key: [entry.get(key) for entry in objects] for key in objects[0]}
    else:
        return None
    if (boxes := first_value(columns, BOX_KEYS)) is None:
        return None
    texts = [key for key in NAME_KEYS if isinstance(names := columns.get(key), list) and any(map(_is_text, names))]
    return boxes, first_value(columns, (*texts, *NAME_KEYS)), first_value(columns, SCORE_KEYS)


def first_value(columns: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of `keys` that has one."""
    return next((columns[key] for key in keys if columns.get(key) is not None), None)


def read_caption(contents: bytes, where: str) -> str:
    """Decode a caption that has a file of its own.

    Raises:
        RowError: it is not UTF-8, holds control characters, or is rows of numbers.
    """
    try:
        caption = decode_text(contents).strip()
    except ValueError as error:
        raise RowError(CAPTION_NOT_UTF8, f"{where}: {error}") from error
    if fault := text_fault(caption):
        raise RowError(BAD_TEXT, f"{where}: {fault}")
    check_caption(caption, where)
    return caption


def check_caption(caption: str, where: str = "it") -> None:
    """Raise RowError for rows of numbers: a label file of YOLO has the name of a caption, beside an image."""
    if looks_like_labels(caption):
        raise RowError(
            LABELS,
            f"{where} is {caption.strip()[:40]!r}; YOLO sets are folders with data.yaml or classes.txt (--kind yolo), "
            "elsewhere boxes are written as boxes and phrases",
        )


def looks_like_labels(text: str) -> bool:
    """Tell whether a text is rows of numbers as a label file of YOLO holds them, and so no caption."""
    if not text.lstrip()[:1].isdigit():
        return False
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return bool(lines) and all(
        len(words) >= 5 and words[0].partition(".")[0].isdigit() and all(map(is_numeral, words)) for words in lines
    )


def is_numeral(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None


def convert_boxes(values: Any, convention: str, size: tuple[int, int] | None) -> list[Box]:
    """Convert (n, 4) numbers of one of `BOX_FORMATS` to xyxy, 0-1; reversed or empty ones stay so.

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


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    size = stated_size(row)
    if size is None and height is not None and width is not None:
        raise RowError(WRONG_SIZE, f"height is {height!r:.40}, width {width!r:.40}; expected pixels")
    return size


def _convention(name: Any) -> str:
    if name is None:
        raise RowError(NO_FORMAT, f"name one of {', '.join(BOX_FORMATS)} by --box_format, or in the rows: {_EXAMPLE}")
    if name not in BOX_FORMATS:
        raise RowError(NO_FORMAT, f"it is {name!r:.40}; expected one of {', '.join(BOX_FORMATS)}")
    return name


def _check(boxes: Any, phrases: Any, scores: Any) -> None:
    if not isinstance(boxes, list):
        raise RowError(WRONG_BOXES, f"boxes is {boxes!r:.80}; expected boxes as [[x, y, x, y], ...]")
    for k, box in enumerate(boxes):
        if not isinstance(box, list) or len(box) != 4:
            raise RowError(WRONG_BOXES, f"boxes[{k}] is {box!r:.80}; expected boxes as [[x, y, x, y], ...]")
    for k, box in enumerate(boxes):
        if not all(map(is_number, box)):
            raise RowError(WRONG_BOXES, f"boxes[{k}] is {box!r:.80}; expected four finite numbers")
    if isinstance(phrases, list) and phrases and all(map(is_number, phrases)):
        raise RowError(NUMBERS, f"they are {phrases!r:.80}; expected the names of the classes")
    if not isinstance(phrases, list) or not all(map(_is_text, phrases)):
        raise RowError(WRONG_PHRASES, f"phrases is {phrases!r:.80}; expected a list of strings")
    if len(phrases) != len(boxes):
        raise RowError(UNEQUAL, f"{len(boxes)} boxes but {len(phrases)} phrases; expected one a box")
    if scores is not None and not (isinstance(scores, list) and all(map(is_number, scores))):
        raise RowError(WRONG_SCORES, f"scores is {scores!r:.80}; expected a list of finite numbers")
    if scores is not None and len(scores) != len(boxes):
        raise RowError(WRONG_SCORES, f"{len(boxes)} boxes but {len(scores)} scores; expected one a box")


# Values -------------------------------------------------------------------------------------------------------------


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether it is a finite number, as JSON has them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def stated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) if both are whole numbers that an image can have."""
    sides = [int(side) for side in (entry.get("height"), entry.get("width")) if is_number(side) and side == int(side)]
    return (sides[0], sides[1]) if len(sides) == 2 and all(0 < side < 2**31 for side in sides) else None


def text_id(value: Any) -> str | None:
    """Return an id as text, the same for 7, 7.0 and "7", as programs write one or the other; None for what is no id."""
    if is_number(value) and value == int(value):
        return str(int(value))
    return value.strip() or None if isinstance(value, str) else None


def clean(name: str) -> str:
    """Return an id or a name as the table of a shard can hold it, whatever bytes it has on a disk: question marks stand
    for halves of surrogate pairs, and for control characters."""
    return _CONTROL.sub("?", name.encode("utf-8", "replace").decode("utf-8")).strip()


def file_within(folder: Path, path: Any) -> Path:
    """Return the file that a row names, below `folder` as its text goes (links are the owner's own affair).

    Raises:
        RowError: the row names none, one elsewhere, or one that is missing.
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
        what = "it is no file" if file.exists() else "there is no such file"
        raise RowError(MISSING, f"{file}: {what}; expected the path of an image relative to {folder}")
    return file


def _can_be_a_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


# Rows that cannot be used -------------------------------------------------------------------------------------------


def item_or_skipped(read: Callable[[], Item], image_id: str, done: int, where: str = "") -> Item | Skipped:
    """Return what `read` returns, or why this one image is left out.

    Args:
        where: the image is described.
    """
    try:
        return read()
    except RowError as error:
        reason, detail = error.reason, error.detail
    except ImageError as error:
        reason, detail = error.reason, str(error).removeprefix(error.reason).removeprefix(": ")
    except OSError as error:
        reason, detail = f"{UNREADABLE} ({error.strerror or type(error).__name__})", str(error.filename or "")
    return Skipped(image_id=image_id, reason=reason, detail=detail, done=done, where=where)


def check_first(rows: Iterable[tuple[str, Callable[[], Item]]]) -> None:
    """Look for a fault that all rows have, up to the first row whose boxes are understood, in a hundred at most.

    Args:
        rows: where each is written, and what reads it.

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
        except (ImageError, OSError):
            pass


def check_not_all_alike(results: Iterable[Item | Skipped]) -> None:
    """Look at the first hundred images of a source, up to the first that can be used.

    Raises:
        ValueError: all of them are left out for the same reason; the error shows the first.
    """
    first: Skipped | None = None
    for number, result in enumerate(islice(results, FIRST_ROWS), start=1):
        if not isinstance(result, Skipped) or (first is not None and result.reason != first.reason):
            return
        first = first or result
        if number == FIRST_ROWS:
            detail = f": {first.detail}" if first.detail else ""
            raise ValueError(f"{first.place}: {first.reason}{detail}. So it is with all of the first {FIRST_ROWS}")
