"""COCO detection: `instances_*.json`, with category names as phrases, and a folder of pictures."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_text
from ..yaml_files import read_yaml
from .file_facts import files_identity
from .item import Item, Skipped
from .json_members import members
from .pictures import picture_size
from .rows import SHARES, clean, convert_boxes, file_within, is_number, item_or_why_not, stated_size, unique

CROWD, LEFT_OUT, NO_BOX = "crowd", "class left out by the mapping", "its box is wrong"


@dataclass(frozen=True, kw_only=True)
class CocoChunk:
    """Consecutive images of an instances file, with the boxes of all of them.

    The file orders annotations by no image, so a unit carries its own: some 200 bytes a picture.

    Args:
        first: number of its first image, from 0.
        image_ids, file_names: of each image. sizes: (n, 2) height and width, 0 where it is not said.
        owners: (m,) the image of each box, counted within the chunk, in order. phrases: of each box.
        boxes: (m, 4) xywh in pixels, float32.
        dropped: boxes left out, by image and reason.
    """

    name: str
    folder: Path
    instances: Path
    first: int
    image_ids: tuple[str, ...]
    file_names: tuple[str, ...]
    phrases: tuple[str, ...]
    sizes: np.ndarray
    owners: np.ndarray
    boxes: np.ndarray
    dropped: Mapping[int, Mapping[str, int]]

    @property
    def weight(self) -> int:
        return len(self.image_ids)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr((self.image_ids, self.file_names, self.phrases)).encode("utf-8", "replace"))
        for numbers in (self.sizes, self.owners, self.boxes):
            digest.update(numbers.tobytes())
        numbers = {"bytes": self.instances.stat().st_size, "first": self.first, "count": self.weight}
        said = {"kind": "coco", "file": self.instances.name, **numbers, "sha256": digest.hexdigest()}
        return said | {"images": files_identity(self.folder, self.file_names)}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item | Skipped]:
        for k, image_id in enumerate(self.image_ids):
            yield item_or_why_not(partial(self._item, k), image_id, k + 1, self._where(k))

    def _where(self, k: int) -> str:
        return f"{self.instances}, image {self.image_ids[k]} ({self.file_names[k]})"

    def _item(self, k: int) -> Item:
        path = file_within(self.folder, self.file_names[k])
        height, width = (int(side) for side in self.sizes[k])
        size = (height, width) if height and width else picture_size(path)
        first, end = np.searchsorted(self.owners, [k, k + 1])
        phrases = self.phrases[first:end]
        return Item(
            image_id=self.image_ids[k],
            picture=path,
            boxes=tuple(convert_boxes(self.boxes[first:end], "xywh_pixels", size)),
            phrases=phrases,
            scores=(1.0,) * len(phrases),
            size=size,
            done=k + 1,
            dropped=self.dropped.get(k, {}),
            where=self._where(k),
        )


def coco_chunks(folder: Path, instances: Path, classes: Path | None, unit_size: int) -> list[CocoChunk]:
    """Units of `unit_size` images each.

    Args:
        classes: JSON or YAML file of `category name: phrase`; a category of phrase null is left out, one that does
            not stand there keeps its name.

    Raises:
        ValueError: the file is not of the kind, contradicts itself, or the mapping does not fit it.
    """
    content = _read(instances)
    phrases = _phrases(content.categories, classes)
    place = {image_id: k for k, image_id in enumerate(content.ids)}
    if len(place) < len(content.ids):
        twice = next(image_id for image_id, n in Counter(content.ids).items() if n > 1)
        raise ValueError(f"{instances}: two images have the id {twice}")
    if strange := set(content.categories_of) - set(phrases):
        raise ValueError(f"{instances}: annotations are of category {min(strange)}, which its categories lack")
    # Annotations of images that the file does not list have no picture to go with.
    owners = np.array([place.get(image_id, -1) for image_id in content.images_of], np.int64)
    boxes = np.array(content.boxes, np.float32).reshape(-1, 4)
    if boxes.size and 0 < boxes.max() <= 1:
        raise ValueError(f"{instances}: {SHARES}, no number is above {boxes.max():g}; COCO's are xywh in pixels")
    chunks = []
    for first in range(0, len(content.ids), unit_size):
        mine = np.flatnonzero((owners >= first) & (owners < first + unit_size))
        mine = mine[np.argsort(owners[mine], kind="stable")]
        end, name = first + unit_size, f"{instances.stem}-{len(chunks):05d}"
        ids = tuple(clean(str(image_id)) for image_id in content.ids[first:end])
        kept, dropped = _sorted_out(content, phrases, mine, owners - first)
        chunk = CocoChunk(
            name=name,
            folder=folder,
            instances=instances,
            first=first,
            image_ids=ids,
            file_names=tuple(content.files[first:end]),
            sizes=np.array(content.sizes[first:end], np.int32),
            owners=(owners[kept] - first).astype(np.int32),
            phrases=tuple(phrases[content.categories_of[k]] or "" for k in kept),
            boxes=boxes[kept],
            dropped=dropped,
        )
        chunks.append(chunk)
    return chunks


def _sorted_out(
    content: _Content, phrases: Mapping[int, str | None], numbers: np.ndarray, owners: np.ndarray
) -> tuple[list[int], dict[int, Counter[str]]]:
    """Of the annotations of these numbers, those that are used; and how many are not, by image and reason."""
    kept: list[int] = []
    dropped: dict[int, Counter[str]] = {}
    for k in numbers.tolist():
        unused = LEFT_OUT if phrases[content.categories_of[k]] is None else None
        if reason := content.faults.get(k, unused):
            dropped.setdefault(int(owners[k]), Counter())[reason] += 1
        else:
            kept.append(k)
    return kept, dropped


# The file -----------------------------------------------------------------------------------------------------------


@dataclass
class _Content:
    """What is used of an instances file, in columns: images, then annotations."""

    categories: dict[int, str] = field(default_factory=dict)
    ids: list[int | str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    images_of: list[int | str] = field(default_factory=list)
    categories_of: list[int] = field(default_factory=list)
    boxes: array[float] = field(default_factory=lambda: array("f"))  # four each
    faults: dict[int, str] = field(default_factory=dict)  # annotations that are not used, by number

    def add_category(self, entry: Mapping[str, Any]) -> None:
        number, name = entry["id"], entry["name"]
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {entry!r:.80} has no number or no name")
        if number in self.categories:
            raise ValueError(f"two categories have the id {number}")
        self.categories[number] = clean(name)

    def add_image(self, entry: Mapping[str, Any]) -> None:
        number, file = entry["id"], entry["file_name"]
        if not isinstance(number, int | str) or not isinstance(file, str):
            raise ValueError(f"image {entry!r:.80} has no id or no file_name")
        self.ids.append(number)
        self.files.append(file)
        self.sizes.append(stated_size(entry) or (0, 0))

    def add_annotation(self, entry: Mapping[str, Any]) -> None:
        if "bbox" not in entry and "caption" in entry:
            raise ValueError("it holds captions; expected instances_*.json, whose annotations have a bbox")
        image, category, box = entry["image_id"], entry["category_id"], entry.get("bbox")
        if not isinstance(image, int | str) or not isinstance(category, int):
            raise ValueError(f"annotation {entry!r:.80} has no image_id or no category_id")
        sound = isinstance(box, list) and len(box) == 4 and all(is_number(value) and abs(value) < 1e9 for value in box)
        if entry.get("iscrowd") or not sound:
            self.faults[len(self.images_of)] = CROWD if entry.get("iscrowd") else NO_BOX
        self.boxes.extend(box if sound else (0.0, 0.0, 0.0, 0.0))  # type: ignore[arg-type]
        self.images_of.append(image)
        self.categories_of.append(category)


def _read(instances: Path) -> _Content:
    content = _Content()
    add = {
        "categories": content.add_category,
        "images": content.add_image,
        "annotations": content.add_annotation,
    }
    text = read_text(instances)
    try:
        for key, entry in members(text):
            if key in add:
                add[key](_object(key, entry))
    except KeyError as error:
        raise ValueError(f"{instances}: one of its images, annotations or categories has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{instances} is not a COCO instances file: {error}") from error
    if lacking := [key for key, found in (("categories", content.categories), ("images", content.ids)) if not found]:
        raise ValueError(f"{instances} has no {' and no '.join(lacking)}; expected a COCO instances file")
    return content


def _object(key: str, entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"one of its {key} is {entry!r:.80}; expected an object")
    return entry


def _phrases(categories: Mapping[int, str], classes: Path | None) -> dict[int, str | None]:
    """The phrase of each category; None for those left out."""
    mapping: Any = {}
    if classes is not None:
        mapping = read_yaml(classes)
        if not isinstance(mapping, dict) or not all(
            isinstance(name, str) and (phrase is None or (isinstance(phrase, str) and phrase.strip()))
            for name, phrase in mapping.items()
        ):
            raise ValueError(f"{classes}: expected a mapping of category name to phrase or null, as person: a person")
        if strange := sorted(set(mapping) - set(categories.values())):
            known = ", ".join(sorted(categories.values()))
            raise ValueError(f"{classes}: there is no category {', '.join(strange)}; there are {known}")
    return {number: mapping.get(name, name) for number, name in categories.items()}
