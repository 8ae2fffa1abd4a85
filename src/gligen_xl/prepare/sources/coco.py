"""COCO detection: an instances file, with category names as phrases, and a folder of images.

result.json, images/                       Label Studio
annotations/instances_default.json         CVAT
train/_annotations.coco.json               Roboflow; valid/ and test/ beside it
annotations/instances_train2017.json       COCO; there are several, so one is chosen by --instances or --split
"""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...images.decode import image_size
from ..file_stats import files_identity
from ..item import Item, Skipped, unique
from .coco_file import CocoFile, read_coco
from .options import LEFT_OUT, SPLITS, SourceOptions, check_words, choose_split, class_phrases, warn_of_all_splits
from .paths import ImageFinder, refuse_leaving
from .rows import SHARES, clean, convert_boxes, file_within, item_or_skipped

NO_CATEGORY = "its category is not in the file"  # why a box is dropped
NO_IMAGE = "annotations of an image that the file does not list"  # why an image is left out
ROBOFLOW = "_annotations.coco.json"

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CocoChunk:
    """Consecutive images of an instances file, with the boxes of all of them.

    The file orders annotations by no image, so a unit carries its own: some 200 bytes an image.

    Args:
        first: number of its first image, from 0.
        image_ids, file_names: of each image. sizes: (n, 2) height and width, 0 where it is not said.
        owners: (m,) the image of each box, counted within the chunk, in order. phrases: of each box.
        boxes: (m, 4) xywh in pixels, float32.
        dropped: boxes left out, by image and reason. examples: one of each reason, by image and reason.
        orphans: ids of images that annotations are of and the file does not list, and what these are.
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
    examples: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    orphans: tuple[tuple[str, str], ...] = ()

    @property
    def weight(self) -> int:
        return len(self.image_ids)

    def identity(self) -> dict[str, Any]:
        parts = (self.image_ids, self.file_names, self.phrases, *([self.orphans] if self.orphans else []))
        digest = hashlib.sha256(repr(parts).encode("utf-8", "replace"))
        for numbers in (self.sizes, self.owners, self.boxes):
            digest.update(numbers.tobytes())
        numbers = {"bytes": self.instances.stat().st_size, "first": self.first, "count": self.weight}
        values = {"kind": "coco", "file": self.instances.name, **numbers, "sha256": digest.hexdigest()}
        return values | {"images": files_identity(self.folder, self.file_names)}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item | Skipped]:
        for k, image_id in enumerate(self.image_ids):
            yield item_or_skipped(partial(self._item, k), image_id, k + 1, self._where(k))
        for image_id, detail in self.orphans:
            where = f"{self.instances}, image_id {image_id}"
            yield Skipped(image_id=image_id, reason=NO_IMAGE, detail=detail, done=self.weight, where=where)

    def _where(self, k: int) -> str:
        return f"{self.instances}, image {self.image_ids[k]} ({self.file_names[k]})"

    def _item(self, k: int) -> Item:
        path = file_within(self.folder, self.file_names[k])
        height, width = (int(side) for side in self.sizes[k])
        size = (height, width) if height and width else image_size(path)
        first, end = np.searchsorted(self.owners, [k, k + 1])
        phrases = self.phrases[first:end]
        return Item(
            image_id=self.image_ids[k],
            image=path,
            boxes=tuple(convert_boxes(self.boxes[first:end], "xywh_pixels", size)),
            phrases=phrases,
            scores=(1.0,) * len(phrases),
            size=size,
            done=k + 1,
            dropped=self.dropped.get(k, {}),
            dropped_examples=self.examples.get(k, {}),
            where=self._where(k),
        )


def coco_chunks(
    folder: Path,
    instances: Path,
    classes: Path | None,
    unit_size: int,
    *,
    name: str | None = None,
    prefix: str = "",
    find_images: bool = False,
) -> list[CocoChunk]:
    """Cut the images of an instances file into units of `unit_size`.

    Args:
        classes: see `class_phrases`.
        name: of the units, before their numbers; by default that of the file. prefix: of the ids of images.
        find_images: look in the folder for the images as `ImageFinder` says; else names are taken as they are.

    Raises:
        ValueError: the file is not of the kind, contradicts itself, or the mapping does not fit it; or none of its
            annotations is of an image and a category that it lists.
    """
    content = read_coco(instances)
    phrases = class_phrases(set(content.categories.values()), classes)
    check_words(phrases.values(), str(instances))
    phrase_of = {number: phrases[category] for number, category in content.categories.items()}
    place = {image_id: k for k, image_id in enumerate(content.ids)}
    owners = np.array([place.get(image_id, -1) for image_id in content.images_of], np.int64)
    orphans = _orphans(content, owners, instances)
    boxes = np.array(content.boxes, np.float32).reshape(-1, 4)
    if boxes.size and 0 < boxes.max() <= 1:
        raise ValueError(f"{instances}: {SHARES}, no number is above {boxes.max():g}; COCO's are xywh in pixels")
    files = _files_in(folder, content.files) if find_images else content.files
    chunks = []
    for first in range(0, len(content.ids), unit_size):
        end = first + unit_size
        mine = np.flatnonzero((owners >= first) & (owners < end))
        mine = mine[np.argsort(owners[mine], kind="stable")]
        used, dropped, examples = _select(content, phrase_of, mine, owners - first)
        chunk = CocoChunk(
            name=f"{name or instances.stem}-{len(chunks):05d}",
            folder=folder,
            instances=instances,
            first=first,
            image_ids=tuple(clean(f"{prefix}{image_id}") for image_id in content.ids[first:end]),
            file_names=tuple(files[first:end]),
            sizes=np.array(content.sizes[first:end], np.int32),
            owners=(owners[used] - first).astype(np.int32),
            phrases=tuple(phrase_of[content.categories_of[k]] or "" for k in used),
            boxes=boxes[used],
            dropped=dropped,
            examples=examples,
            orphans=orphans if end >= len(content.ids) else (),
        )
        chunks.append(chunk)
    return chunks


def _files_in(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the images that names mean, as paths below the folder. A name whose image is not found, or is that of
    another name too, stays as it is, and so is missing."""
    finder = ImageFinder(folder)
    paths = [finder.find(name) for name in names]
    names_of: dict[str, set[str]] = {}
    for name, path in zip(names, paths, strict=True):
        if path is not None:
            names_of.setdefault(path, set()).add(name)
    return [
        path if path is not None and (len(names_of[path]) == 1 or path == name) else name
        for name, path in zip(names, paths, strict=True)
    ]


def _orphans(content: CocoFile, owners: np.ndarray, instances: Path) -> tuple[tuple[str, str], ...]:
    """Return images that annotations are of and the file lacks, each with what these are.

    Raises:
        ValueError: all annotations are of such images, or of categories that are missing.
    """
    count = len(content.images_of)
    numbers = np.flatnonzero(owners < 0).tolist()
    strange = [k for k, category in enumerate(content.categories_of) if category not in content.categories]
    for what, lacking, ids, known in (
        ("image_id", numbers, content.images_of, content.ids),
        ("category_id", strange, content.categories_of, list(content.categories)),
    ):
        if not lacking:
            continue
        some = ", ".join(dict.fromkeys(ids[k] for k in lacking[:5]))
        message = f"{instances}: the {what} of {len(lacking)} of {count} annotations is not in the file, as {some}"
        if len(lacking) == count:
            known_ids = ", ".join(known[:5]) or "none"
            raise ValueError(f"{message}; its ids are {known_ids}: it is put together wrongly")
        _LOGGER.warning("%s; they are left out", message)
    if set(numbers) | set(strange) >= set(range(count)) and count:
        raise ValueError(f"{instances}: each of its {count} annotations lacks its image or its category in the file")
    of_image = Counter(content.images_of[k] for k in numbers)
    first = {content.images_of[k]: content.annotations[k] for k in reversed(numbers)}
    return tuple(
        (clean(image_id), f"{number} annotations, the first is {first[image_id]}; expected an entry of its images")
        for image_id, number in of_image.items()
    )


def _select(
    content: CocoFile, phrase_of: Mapping[str, str | None], numbers: np.ndarray, owners: np.ndarray
) -> tuple[list[int], dict[int, Counter[str]], dict[int, dict[str, str]]]:
    """Return the annotations of these numbers that are used; how many are not, by image and reason; and examples."""
    used: list[int] = []
    dropped: dict[int, Counter[str]] = {}
    examples: dict[int, dict[str, str]] = {}
    for k in numbers.tolist():
        category = content.categories_of[k]
        if k in content.faults:
            reason, detail = content.faults[k]
        elif category not in phrase_of:
            reason, detail = NO_CATEGORY, f"category_id is {category}"
        elif phrase_of[category] is None:
            reason, detail = LEFT_OUT, ""
        else:
            used.append(k)
            continue
        image = int(owners[k])
        dropped.setdefault(image, Counter())[reason] += 1
        if detail:
            examples.setdefault(image, {}).setdefault(reason, f"annotation {content.annotations[k]}: {detail}")
    return used, dropped, examples


# Sets as they lie on a disk -------------------------------------------------------------------------------------------


def is_coco(path: Path) -> bool:
    """Tell whether a file is one of instances, or a folder holds one."""
    return bool(find_instances(path))


def find_instances(path: Path) -> list[Path]:
    """Return the instances files of a folder, or the file itself."""
    if path.is_file():
        return [path] if path.suffix == ".json" and _looks_like_instances(path) else []
    found = {file for pattern in ("*.json", "annotations/*.json", f"*/{ROBOFLOW}") for file in path.glob(pattern)}
    return [file for file in sorted(found) if not file.name.startswith(".") and _looks_like_instances(file)]


def open_coco(options: SourceOptions) -> list[CocoChunk]:
    """Cut a COCO set into units.

    Raises:
        ValueError: there is no instances file, there are several, or it is broken.
    """
    path, images = options.path, options.images
    if options.instances is not None:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder of images")
        return _chunks(options, images or path, options.instances)
    files = [path] if path.is_file() else find_instances(path)
    if not files:
        raise ValueError(
            f"coco needs instances (--instances), as annotations/instances_train2017.json; {path} holds none"
        )
    for file in files if path.is_dir() else ():
        refuse_leaving(path, file)
    several = len(files) > 1
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, path), []).append(file)
    if options.split is not None:
        chosen = choose_split(path, by_split, options.split)
        files = [file for file in files if any(file in by_split[name] for name in chosen)]
    if all(file.name == ROBOFLOW for file in files):
        parts = {file.parent.name: _chunks(options, images or file.parent, file, prefixed=several) for file in files}
        warn_of_all_splits(path, {name: sum(chunk.weight for chunk in chunks) for name, chunks in parts.items()})
        return [chunk for chunks in parts.values() for chunk in chunks]
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise ValueError(f"{path} has several instances files, {names}; choose one by --instances")
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    return _chunks(options, images or folder, files[0])


def _chunks(options: SourceOptions, folder: Path, instances: Path, *, prefixed: bool = False) -> list[CocoChunk]:
    """Cut one file; units of a file of Roboflow's have the name of its folder.

    Args:
        prefixed: ids begin with that name, as those of another split may be the same.
    """
    split = instances.absolute().parent.name
    return coco_chunks(
        folder,
        instances,
        options.classes,
        options.unit_size,
        name=split if instances.name == ROBOFLOW else None,
        prefix=f"{split}/" if prefixed else "",
        find_images=True,
    )


def _split_of(file: Path, root: Path) -> str:
    """Return the split that a file is of by its folder or its name, as it is called there; "" for none."""
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    words = (*folders, *file.stem.replace("-", "_").split("_"))
    return next((word for word in words if word.lower() in SPLITS), "")


def _looks_like_instances(file: Path) -> bool:
    """Tell whether the words of an instances file are in it, and not those of captions alone."""
    if not file.is_file():  # a pipe would be waited for
        return False
    try:
        with file.open("rb") as opened:
            if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                return False
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
                return text.find(b'"images"') >= 0 and text.find(b'"categories"') >= 0
    except (OSError, ValueError):  # ValueError: an empty file
        return False
