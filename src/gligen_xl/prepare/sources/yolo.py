"""YOLO sets as Ultralytics, Roboflow, CVAT, Label Studio, LabelImg and darknet write them.

    data.yaml             names, and path, train, val, test: folders, lists of folders, or .txt files that list images
    images/, labels/      with or without splits in them; or train/images, train/labels
    obj.data, obj.names   darknet's, with train.txt
    a.jpg, a.txt          beside each other, with classes.txt

A row of a label file is a class's number and where the object is, as shares of the image:

    0 0.5 0.5 0.2 0.2              class, centre x, centre y, width, height
    0 0.5 0.5 0.2 0.2 0.87         and a confidence, as predictions have
    0 0.1 0.1 0.3 0.1 0.3 0.4      class, a polygon of three corners or more (segmentation, oriented boxes)
    0 0.5 0.5 0.2 0.2 0.4 0.4 2    class, box, keypoints of two or three numbers each, where `kpt_shape` says so

An empty label file says that there are no objects; an image without one is taken to have none, and such are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS
from ...io import decode_text, read_text
from ...layout import TOLERANCE, Box
from ..item import Annotation
from .labelled import LabelledChunk, LabelledImage, labelled_chunks
from .options import (
    LEFT_OUT,
    SourceOptions,
    check_words,
    choose_split,
    class_phrases,
    split_name,
    splits_by_folder,
    warn_of_all_splits,
)
from .paths import ImageFinder, find_files, find_images, read_head, refuse_leaving, relative, stem, without_ending
from .rows import RowError, is_numeral, looks_like_labels
from .yolo_set import YoloSet, descriptions_in, ends_in, is_description, lines_of_names

NOT_TEXT = "its label file is not UTF-8"  # why an image is left out
BAD_ROW, BAD_CLASS = "its row is none of YOLO's", "its class has no name"  # why a box is dropped
OUTSIDE_SHARES, PIXELS = "it lies outside of the image", "its numbers look like pixels"
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
IMAGE_FOLDERS = ("images", "jpegimages")  # the last such folder in an image's path, for which labels have one of these
LABEL_FOLDERS = ("labels", "Labels", "LABELS")
MAX_LIST = 2**28  # bytes
FIRST_FILES = 1000  # in which labels are looked for

_ROW = "class, centre x, centre y, width and height as shares of the image (and confidence), or class and polygon"


# Rows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class YoloReader:
    """Reads label files.

    Args:
        phrases: of the classes by number, None for those that are left out.
        keypoints: how many numbers of keypoints follow each box, where the set is one of poses.
    """

    phrases: Mapping[int, str | None]
    keypoints: int = 0

    def read(self, label: bytes, image: Path) -> Annotation:
        """Read the objects of an image; rows that cannot be used are counted as dropped boxes."""
        try:
            text = decode_text(label)
        except ValueError as error:
            raise RowError(NOT_TEXT, f"{error}; expected rows as 0 0.5 0.5 0.2 0.2") from error
        return self.read_rows(text)

    def read_rows(self, text: str) -> Annotation:
        objects: list[tuple[Box, str, float]] = []
        dropped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                which, box, score = _read_row(line, self.keypoints)
                phrase = self._phrase(which)
            except RowError as error:
                dropped[error.reason] += 1
                if error.detail:
                    examples.setdefault(error.reason, f"line {number}, {line.strip()[:60]!r}: {error.detail}")
            else:
                objects.append((box, phrase, score))
        boxes, phrases, scores = zip(*objects, strict=True) if objects else ((), (), ())
        return Annotation(boxes=boxes, phrases=phrases, scores=scores, dropped=dropped, dropped_examples=examples)

    def _phrase(self, which: int) -> str:
        if which not in self.phrases:
            known = f"classes 0 to {max(self.phrases)}" if self.phrases else "no classes"
            raise RowError(BAD_CLASS, f"class {which}; expected one of {known}, as the names of the set say")
        if (phrase := self.phrases[which]) is None:
            raise RowError(LEFT_OUT, "")
        return phrase

    def identity(self) -> dict[str, Any]:
        return {"classes": {str(k): phrase for k, phrase in self.phrases.items()}, "keypoints": self.keypoints}


def _read_row(line: str, keypoints: int) -> tuple[int, Box, float]:
    """Read class, box and score.

    Raises:
        RowError: the row cannot be used.
    """
    words = line.split()
    if bad := [word for word in words if not is_numeral(word)]:
        raise RowError(BAD_ROW, f"{bad[0][:20]!r} is no number; expected {_ROW}")
    values = [float(word) for word in words]
    if not all(map(math.isfinite, values)) or values[0] != int(values[0]) or values[0] < 0:
        raise RowError(BAD_ROW, f"its class is {words[0][:20]}; expected the number of a class")
    rest, score = values[1:], 1.0
    posed = bool(keypoints) and len(rest) in (4 + keypoints, 5 + keypoints)
    if len(rest) == 5 or (posed and len(rest) == 5 + keypoints):
        score = rest[-1]
        if not 0 <= score <= 1:
            raise RowError(BAD_ROW, f"its last number, {score:g}, is no confidence; expected {_ROW}")
    if len(rest) in (4, 5) or posed:
        box = _from_centre(rest[:4])
    elif len(rest) >= 6 and len(rest) % 2 == 0:
        _check_shares(rest)
        x, y = rest[::2], rest[1::2]
        box = min(x), min(y), max(x), max(y)
    else:
        expected = "keypoints need kpt_shape in data.yaml" if len(rest) > 6 else f"expected {_ROW}"
        raise RowError(BAD_ROW, f"it has {len(words)} numbers; {expected}")
    return int(values[0]), box, score


def _from_centre(values: list[float]) -> Box:
    _check_shares(values)
    x, y, width, height = values
    if width < 0 or height < 0:
        raise RowError(OUTSIDE_SHARES, f"width {width:g}, height {height:g}; expected 0 to 1")
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _check_shares(values: list[float]) -> None:
    """Raise RowError if these are no shares of an image; rounding may take them a little out of it."""
    low, high = min(values), max(values)
    if high > 2:
        raise RowError(PIXELS, f"a number is {high:g}; expected shares of the image, 0 to 1")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        bad = low if low < -TOLERANCE else high
        raise RowError(OUTSIDE_SHARES, f"a number is {bad:g}; expected 0 to 1")


# Sets ---------------------------------------------------------------------------------------------------------------


def is_yolo(path: Path) -> bool:
    """Tell whether a file is a data.yaml or an obj.data, or a folder holds YOLO's labels."""
    if path.is_file():
        return is_description(path)
    return any(map(is_description, descriptions_in(path))) or first_label(path) is not None


def first_label(folder: Path) -> Path | None:
    """Return a label file of an image in the folder or below, or in a folder of labels; of the first thousand texts."""
    for file in islice(_texts(folder), FIRST_FILES):
        beside = any(file.with_suffix(f".{ending}").is_file() for ending in ("jpg", "JPG", *ENDINGS))
        if (beside or _is_label_folder(file.parent, folder)) and _holds_rows(file):
            return file
    return None


def open_yolo(options: SourceOptions) -> list[LabelledChunk]:
    """Cut a YOLO set into units.

    Raises:
        ValueError: it has no labels, no names of its classes, no such split; or none of its rows can be used.
    """
    description = YoloSet.find(options.path)
    root = description.base if description.file else options.path
    listed = _listed_images(description, options, root)
    by_split = listed or _images_by_folder(options.images or root, root)
    if options.split is None:
        counts = {name or "without a split": len(paths) for name, paths in by_split.items()}
        warn_of_all_splits(options.path, counts)
    chosen = choose_split(options.path, by_split, options.split)
    finder = _LabelFinder(root, {relative(file, root) for file in _texts(root)}, options.images)
    images = [
        LabelledImage(path, finder.label(path))
        for path in dict.fromkeys(path for name in chosen for path in by_split[name])
    ]
    images += [LabelledImage("", path) for path in finder.orphans(everywhere=not listed and options.split is None)]
    images.sort(key=lambda entry: entry.path.split("/"))
    if not images:
        raise ValueError(f"{options.path} holds no images and no labels of YOLO")
    names = description.names or _names_beside(root, images)
    if not names:
        raise ValueError(
            f"{root} has YOLO's labels, but nothing names the classes; expected data.yaml (names) or "
            f"{' or '.join(NAME_FILES[:2])} (a name a line, that of class 0 first)"
        )
    phrases = class_phrases(set(names.values()), options.classes)
    check_words(phrases.values(), str(description.file or root))
    reader = YoloReader(phrases={k: phrases[name] for k, name in names.items()}, keypoints=description.keypoints)
    return labelled_chunks("yolo", root, images, reader, options.unit_size, options.split)


def _names_beside(root: Path, images: Iterable[LabelledImage]) -> dict[int, str]:
    """Read the names of a classes.txt or the like: in the root, or with the labels or images."""
    folders = [
        folder
        for entry in images
        for path in (entry.label, entry.image)
        if path
        for folder in (root / path).parents
        if folder == root or root in folder.parents
    ]
    for folder in dict.fromkeys((root, root / "labels", *folders)):
        for name in NAME_FILES:
            if (file := folder / name).is_file():
                refuse_leaving(root, file)
                if names := lines_of_names(file):
                    return names
    return {}


# Images -------------------------------------------------------------------------------------------------------------


def _images_by_folder(folder: Path, root: Path) -> dict[str, list[str]]:
    """Find all images, as paths from the root, by the splits that their folders are called like."""
    paths = [relative(path, root) for path in find_images(folder)]
    split_of = splits_by_folder(paths)
    by_split: dict[str, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_of.get(path, ""), []).append(path)
    return by_split


def _listed_images(description: YoloSet, options: SourceOptions, root: Path) -> dict[str, list[str]]:
    """Find the images of each split that a description lists, as paths from the root.

    Raises:
        ValueError: a list is missing.
    """
    folder = options.path if options.path.is_dir() else options.path.parent
    splits: dict[str, list[Path]] = {}
    lacking = []
    for split, entries in description.lists.items():
        for entry in entries:
            places = [*description.candidates(folder, entry), *ends_in(options.images, entry)]
            place = next((place for place in places if place.exists()), None)
            if place is None:
                lacking.append(f"{split}: {entry}")
            elif place.is_dir():
                splits.setdefault(split, []).extend(find_images(place))
            elif place.suffix == ".txt":
                splits.setdefault(split, []).extend(_images_in_list(place, description.base, options.images))
            else:
                splits.setdefault(split, []).append(place)
    splits = {split: paths for split, paths in splits.items() if paths}
    if lacking and (not splits or (options.split and split_name(options.split) not in splits)):
        if description.file is not None and description.file.suffix == ".data":
            return {}  # CVAT writes lists of images, and leaves out both if it is told to
        raise ValueError(
            f"{description.file} names {', '.join(lacking)}, which is not there; looked in {description.base}"
        )
    return {name: [relative(path, root) for path in paths] for name, paths in splits.items()}


def _images_in_list(file: Path, base: Path, images: Path | None) -> Iterator[Path]:
    """Give the images that a text names, one a line; missing ones too, which are counted later."""
    if file.stat().st_size > MAX_LIST:
        raise ValueError(f"{file} has more than {MAX_LIST} bytes; expected the path of an image a line")
    finders = [ImageFinder(folder) for folder in ((images,) if images else dict.fromkeys((base, file.parent)))]
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        direct = base / line
        if images is None and direct.is_file():
            yield direct
            continue
        found = next((finder.root / path for finder in finders if (path := finder.find(line))), None)
        yield found or base / line.replace("\\", "/")


# Labels -------------------------------------------------------------------------------------------------------------


class _LabelFinder:
    """Finds the label file of an image; all are paths from the root.

    Args:
        labels: all texts below the root that may be some.
        images: another folder of the images, where they do not lie with their labels.
    """

    def __init__(self, root: Path, labels: set[str], images: Path | None):
        self.root, self.labels, self.used = root, labels, set[str]()
        self.elsewhere = relative(images, root) if images is not None and images != root else None
        self.by_text_name = {f"{without_ending(label)}.txt": label for label in labels}
        self.folders: set[str] = set()
        self.by_stem: dict[str, list[str]] = {}
        if self.elsewhere is not None:
            for label in sorted(labels):
                self.by_stem.setdefault(Path(label).stem, []).append(label)

    def label(self, image: str) -> str:
        """Return the label file of an image, "" if there is none."""
        path = without_ending(image)
        for candidate in (*_mirrored(path), f"{path}.txt"):
            self.folders.add(candidate.rpartition("/")[0])
            if (label := self.by_text_name.get(candidate)) is not None:
                self.used.add(label)
                return label
            if candidate.startswith("../") and (self.root / candidate).is_file():
                return candidate
        if self.elsewhere is not None:
            inner = path.removeprefix(self.elsewhere).strip("/")
            same = self.by_stem.get(stem(image), [])
            ends = [label for label in same if f"/{label}".endswith(f"/{inner}.txt")] or same
            if len(ends) == 1:
                self.used.add(ends[0])
                return ends[0]
        return ""

    def orphans(self, *, everywhere: bool) -> list[str]:
        """Return label files that no image has: in the folders of labels that images have, or anywhere."""
        return [
            label
            for label in sorted(self.labels - self.used)
            if (everywhere or label.rpartition("/")[0] in self.folders) and _holds_rows(self.root / label)
        ]


def _mirrored(path: str) -> Iterator[str]:
    """`a/images/b` -> `a/labels/b.txt`."""
    parts = path.split("/")
    for k in range(len(parts) - 2, -1, -1):
        if parts[k].lower() in IMAGE_FOLDERS:
            for name in LABEL_FOLDERS:
                yield "/".join([*parts[:k], name, *parts[k + 1 :]]) + ".txt"
            return


def _texts(folder: Path) -> Iterator[Path]:
    """Give files that may be labels, here and below, by name; no lists of names."""
    return (file for file in find_files(folder, ".txt") if file.name not in NAME_FILES)


def _is_label_folder(folder: Path, root: Path) -> bool:
    parts = folder.relative_to(root).parts if folder != root else (root.absolute().name,)
    return any(part in LABEL_FOLDERS or part.startswith("obj_") for part in parts)


def _holds_rows(file: Path) -> bool:
    head = read_head(file, 4096)
    whole = head if len(head) < 4096 else head.rpartition(b"\n")[0]
    try:
        return looks_like_labels(decode_text(whole))
    except ValueError:
        return False
