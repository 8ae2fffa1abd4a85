"""An instances file of COCO as COCO itself, Label Studio, CVAT, Roboflow and others write it.

Ids are compared as text, since one program writes 7 where another one writes "7". A box may be written as text, or be
that around a segmentation: polygons, or run lengths as numbers or as COCO's compressed text.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...images.decode import MAX_PIXELS
from ...io import read_text
from .json_members import members
from .rows import clean, is_number, stated_size, text_id

CROWD, NO_BOX = "crowd", "its box is wrong"  # why a box is dropped


@dataclass
class CocoFile:
    """What is used of an instances file, in columns: images, then annotations.

    Args:
        categories: names by id.
        ids, files, sizes: of images; (0, 0) where a size is not said.
        annotations, images_of, categories_of: ids of annotations, of their images and of their categories.
        boxes: four each, xywh in pixels.
        faults: reason and detail of the annotations that are not used, by number.
    """

    categories: dict[str, str] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)
    images_of: list[str] = field(default_factory=list)
    categories_of: list[str] = field(default_factory=list)
    boxes: array[float] = field(default_factory=lambda: array("f"))
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add_category(self, entry: Mapping[str, Any]) -> None:
        number, name = text_id(entry["id"]), entry["name"]
        if type(name) is int:
            name = str(name)
        if number is None or not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {entry!r:.80} has no id or no name")
        if number in self.categories:
            raise ValueError(f"two categories have the id {number}")
        self.categories[number] = clean(name)

    def add_image(self, entry: Mapping[str, Any]) -> None:
        number, file = text_id(entry["id"]), entry["file_name"]
        if number is None or not isinstance(file, str):
            raise ValueError(f"image {entry!r:.80} has no id or no file_name")
        self.ids.append(number)
        self.files.append(file)
        self.sizes.append(stated_size({side: _number(entry.get(side)) for side in ("height", "width")}) or (0, 0))

    def add_annotation(self, entry: Mapping[str, Any]) -> None:
        if "bbox" not in entry and "caption" in entry:
            raise ValueError("it holds captions; expected instances_*.json, whose annotations have a bbox")
        image, category = text_id(entry["image_id"]), text_id(entry["category_id"])
        if image is None or category is None:
            raise ValueError(f"annotation {entry!r:.80} has no image_id or no category_id")
        place, box = len(self.images_of), _box(entry)
        if _number(entry.get("iscrowd")):
            self.faults[place] = CROWD, ""
        elif box is None:
            detail = f"bbox is {entry.get('bbox')!r:.60}; expected [x, y, width, height] in pixels, or a segmentation"
            self.faults[place] = NO_BOX, detail
        self.boxes.extend(box or (0.0, 0.0, 0.0, 0.0))
        self.annotations.append(text_id(entry.get("id")) or f"number {place + 1}")
        self.images_of.append(image)
        self.categories_of.append(category)


def read_coco(path: Path) -> CocoFile:
    """Read an instances file, one entry at a time.

    Raises:
        ValueError: it is none, or contradicts itself.
    """
    content = CocoFile()
    add = {"categories": content.add_category, "images": content.add_image, "annotations": content.add_annotation}
    text = read_text(path)
    try:
        for key, entry in members(text):
            if key in add and entry is not None:  # null for an empty list
                if not isinstance(entry, dict):
                    raise ValueError(f"one of its {key} is {entry!r:.80}; expected an object")
                add[key](entry)
    except KeyError as error:
        raise ValueError(f"{path}: one of its images, annotations or categories has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a COCO instances file: {error}") from error
    if not content.ids:
        raise ValueError(f"{path} has no images; expected a COCO instances file")
    (most, count), *_ = Counter(content.ids).most_common(1)
    if count > 1:
        raise ValueError(f"{path}: two images have the id {most}")
    return content


def _number(value: Any) -> Any:
    """Return the number that a text is; anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value) if len(value) < 40 else value
        except ValueError:
            return value
    return value


def _box(entry: Mapping[str, Any]) -> list[float] | None:
    """Return xywh in pixels: the box that is given, else that around the segmentation."""
    given = entry.get("bbox")
    if given is None or given == []:
        return segment_box(entry.get("segmentation"))
    if not isinstance(given, list) or len(given) != 4:
        return None
    box = [_number(value) for value in given]
    return [float(value) for value in box] if all(is_number(v) and abs(v) < 1e9 for v in box) else None


# Segmentations ------------------------------------------------------------------------------------------------------

MAX_RUNS = 2**22  # of one mask; an image of noise at the limit of pixels has more, a mask of an object some thousand


def segment_box(segmentation: Any) -> list[float] | None:
    """Return the box (x, y, width, height) in pixels around a segmentation; None if it cannot be read."""
    if isinstance(segmentation, dict):
        return _box_of_runs(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if not all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in polygons):
        return None
    numbers = [value for polygon in polygons for value in polygon]
    if len(numbers) < 4 or not all(map(is_number, numbers)):
        return None
    x, y = numbers[::2], numbers[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _box_of_runs(mask: dict[str, Any]) -> list[float] | None:
    """Return the box around a mask. Run lengths count pixels column by column, background first."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    height, width = size
    if height * width > MAX_PIXELS or not isinstance(counts, str | list) or len(counts) > MAX_RUNS:
        return None
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and 0 <= run <= height * width for run in runs) or sum(runs) != height * width:
        return None
    ends = np.cumsum(np.asarray(runs, np.int64))
    begin, end = ends[:-1][::2], ends[1::2]  # of each run of the object, the second, the fourth, ...
    seen = end > begin
    begin, last = begin[: len(end)][seen], end[seen] - 1
    if not len(begin):
        return None
    columns = begin // height, last // height
    whole = columns[0] < columns[1]  # a run that goes on in the next column touches the top and the bottom
    top = int(np.where(whole, 0, begin % height).min())
    bottom = int(np.where(whole, height - 1, last % height).max())
    left, right = int(columns[0].min()), int(columns[1].max())
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _runs_of_text(text: str) -> list[int]:
    """Decode run lengths; [-1], which no mask has, if the text is none of COCO's.

    It holds numbers in groups of five bits, the lowest first, from the third on as differences to the last but one; see
    `maskApi.c` of the COCO API.
    """
    runs: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64 or shift > 60:
            return [-1]
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if shift == 0 else [-1]
