"""An instances file of COCO as COCO itself, Label Studio, CVAT, Roboflow and others write it.

Ids are compared as text, since one program writes 7 where another one writes "7". A box may be given as text, or be
that around a segmentation.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...io import read_text
from .json_members import members
from .rows import clean, is_number, stated_size, text_id
from .segments import segment_box

CROWD, NO_BOX = "crowd", "its box is wrong"


@dataclass
class CocoFile:
    """What is used of an instances file, in columns: images, then annotations.

    Args:
        categories: names by id.
        ids, files, sizes: of images; (0, 0) where a size is not said.
        annotations, images_of, categories_of: ids of annotations, of their images and of their categories.
        boxes: four each, xywh in pixels.
        faults: why an annotation is not used, by its number; and what it has.
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
        box = _box(entry)
        if _number(entry.get("iscrowd")):
            self.faults[len(self.images_of)] = CROWD, ""
        elif box is None:
            told = f"bbox is {entry.get('bbox')!r:.60}; expected [x, y, width, height] in pixels, or a segmentation"
            self.faults[len(self.images_of)] = NO_BOX, told
        self.boxes.extend(box or (0.0, 0.0, 0.0, 0.0))
        self.annotations.append(text_id(entry.get("id")) or f"number {len(self.images_of) + 1}")
        self.images_of.append(image)
        self.categories_of.append(category)


def read_coco(path: Path) -> CocoFile:
    """An instances file.

    Raises:
        ValueError: it is none, or contradicts itself.
    """
    content = CocoFile()
    add = {
        "categories": content.add_category,
        "images": content.add_image,
        "annotations": content.add_annotation,
    }
    text = read_text(path)
    try:
        for key, entry in members(text):
            if key in add and entry is not None:  # null for an empty list
                add[key](_object(key, entry))
    except KeyError as error:
        raise ValueError(f"{path}: one of its images, annotations or categories has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a COCO instances file: {error}") from error
    if not content.ids:
        raise ValueError(f"{path} has no images; expected a COCO instances file")
    if len(set(content.ids)) < len(content.ids):
        seen: set[str] = set()
        twice = next(number for number in content.ids if number in seen or seen.add(number))
        raise ValueError(f"{path}: two images have the id {twice}")
    return content


def _object(key: str, entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"one of its {key} is {entry!r:.80}; expected an object")
    return entry


def _number(value: Any) -> Any:
    """The number that a text is; anything else as it is."""
    if isinstance(value, str):
        try:
            return float(value) if len(value) < 40 else value
        except ValueError:
            return value
    return value


def _box(entry: Mapping[str, Any]) -> list[float] | None:
    """Four numbers, xywh in pixels; where none are given, those around the segmentation."""
    given = entry.get("bbox")
    if given is None or given == []:
        return segment_box(entry.get("segmentation"))
    if not isinstance(given, list) or len(given) != 4:
        return None
    box = [_number(value) for value in given]
    return [float(value) for value in box] if all(is_number(v) and abs(v) < 1e9 for v in box) else None
