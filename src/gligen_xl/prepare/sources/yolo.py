"""YOLO sets as Ultralytics, Roboflow, CVAT, Label Studio, LabelImg and darknet write them.

    data.yaml             names, and path, train, val, test: folders, lists of folders, or .txt files that list images
    images/, labels/      with or without splits in them; or train/images, train/labels
    obj.data, obj.names   darknet's, with train.txt
    a.jpg, a.txt          beside each other, with classes.txt

Rows of the label files: see `yolo_rows`. An empty label file says that there are no objects; an image without one is
taken to have none, and such are counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS
from ...io import decode_text, read_text
from ..item import Annotation
from .class_phrases import check_words, class_phrases
from .folders import find_images
from .image_paths import ImageFinder
from .label_files import (
    LabelledChunk,
    LabelledImage,
    check_boxes,
    find_files,
    head_of,
    labelled_chunks,
    relative,
    split_name,
    splits_in,
    tell_splits,
)
from .links import refuse_leaving
from .options import SourceOptions
from .rows import RowError
from .yolo_description import YoloDescription, candidates, descriptions_in, ends_in, is_description, lines_of_names
from .yolo_rows import looks_like_rows, read_rows

NOT_TEXT = "its label file is not UTF-8"  # why an image is left out
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
IMAGE_FOLDERS = ("images", "jpegimages")  # the last such folder in an image's path, for which labels have one of these
LABEL_FOLDERS = ("labels", "Labels", "LABELS")
MAX_LIST = 2**28  # bytes
LOOKED_AT = 1000  # files, where a set is looked for


@dataclass(frozen=True, kw_only=True)
class YoloReader:
    """Reads label files.

    Args:
        phrases: of the classes by number, None for those that are left out.
        keypoints: numbers of keypoints behind each box.
    """

    phrases: Mapping[int, str | None]
    keypoints: int = 0

    def read(self, label: bytes, image: Path) -> Annotation:
        """Objects of an image; rows that cannot be used are counted as dropped boxes."""
        try:
            text = decode_text(label)
        except ValueError as error:
            raise RowError(NOT_TEXT, f"{error}; expected rows as 0 0.5 0.5 0.2 0.2") from error
        rows = read_rows(text, self.phrases, self.keypoints)
        return Annotation(
            boxes=tuple(rows.boxes),
            phrases=tuple(self.phrases[which] or "" for which in rows.classes),
            scores=tuple(rows.scores),
            dropped=rows.dropped,
            dropped_examples=rows.examples,
        )

    def identity(self) -> dict[str, Any]:
        return {"classes": {str(k): phrase for k, phrase in self.phrases.items()}, "keypoints": self.keypoints}


def is_yolo(path: Path) -> bool:
    """Whether a file is a data.yaml or an obj.data, or a folder holds YOLO's labels."""
    if path.is_file():
        return is_description(path)
    return any(map(is_description, descriptions_in(path))) or first_label(path) is not None


def first_label(folder: Path) -> Path | None:
    """A label file of an image in the folder or below, or of a folder of labels; looked for in a thousand texts."""
    for file in islice(_texts(folder), LOOKED_AT):
        beside = any(file.with_suffix(f".{ending}").is_file() for ending in ("jpg", "JPG", *ENDINGS))
        if (beside or _is_label_folder(file.parent, folder)) and _holds_rows(file):
            return file
    return None


def open_yolo(options: SourceOptions) -> list[LabelledChunk]:
    """Units of a YOLO set.

    Raises:
        ValueError: it has no labels, no names of its classes, no such split; or none of its rows can be used.
    """
    description = YoloDescription.find(options.path)
    root = description.base if description.file else options.path
    splits = _listed_images(description, options) if description.lists else {}
    labels = {relative(file, root) for file in _texts(root)}
    if splits:
        by_split = {name: [relative(path, root) for path in paths] for name, paths in splits.items()}
    else:
        where = options.images or root
        paths = [relative(path, root) for path in find_images(where)]
        split_of = splits_in(paths)
        by_split = {}
        for path in paths:
            by_split.setdefault(split_of.get(path, ""), []).append(path)
    tell = {name or "without a split": len(paths) for name, paths in by_split.items()}
    if options.split is None:
        tell_splits(options.path, tell)
    elif (chosen := split_name(options.split)) in by_split:
        by_split = {chosen: by_split[chosen]}
    else:
        raise ValueError(f"{options.path} has no split {options.split}; it has {', '.join(tell) or 'no images'}")
    finder = _LabelFinder(root, labels, options.images)
    images = [
        LabelledImage(path, finder.label(path))
        for path in dict.fromkeys(path for paths in by_split.values() for path in paths)
    ]
    images += [LabelledImage("", path) for path in finder.orphans(everywhere=not splits and options.split is None)]
    images.sort(key=lambda entry: (entry.image or entry.label).split("/"))
    if not images:
        raise ValueError(f"{options.path} holds no images and no labels of YOLO")
    names = description.names or _names_beside(root, images)
    phrases = class_phrases(set(names.values()), options.classes) if names else {}
    if not names:
        raise ValueError(
            f"{root} has YOLO's labels, but nothing names the classes; expected data.yaml (names) or "
            f"{' or '.join(NAME_FILES[:2])} (a name a line, that of class 0 first)"
        )
    check_words(phrases.values(), str(description.file or root))
    reader = YoloReader(phrases={k: phrases[name] for k, name in names.items()}, keypoints=description.keypoints)
    chunks = labelled_chunks("yolo", root, images, reader, options.unit_size, options.split)
    check_boxes(chunks)
    return chunks


def _names_beside(root: Path, images: Iterable[LabelledImage]) -> dict[int, str]:
    """Of a classes.txt or the like: in the root, or with the labels or images."""
    folders = dict.fromkeys(
        folder
        for entry in images
        for path in (entry.label, entry.image)
        if path
        for folder in (root / path).parents
        if folder == root or root in folder.parents
    )
    for folder in dict.fromkeys((root, root / "labels", *folders)):
        for name in NAME_FILES:
            if (file := folder / name).is_file():
                refuse_leaving(root, file)
                if names := lines_of_names(file):
                    return names
    return {}


# Images -------------------------------------------------------------------------------------------------------------


def _listed_images(description: YoloDescription, options: SourceOptions) -> dict[str, list[Path]]:
    """Images of each split that a description names; a list of images that are not there is an error."""
    folder = options.path if options.path.is_dir() else options.path.parent
    splits: dict[str, list[Path]] = {}
    lacking = []
    for split, entries in description.lists.items():
        for said in entries:
            places = [*candidates(description.base, folder, said), *ends_in(options.images, said)]
            place = next((place for place in places if place.exists()), None)
            if place is None:
                lacking.append(f"{split}: {said}")
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
    return splits


def _images_in_list(file: Path, base: Path, images: Path | None) -> Iterator[Path]:
    """Images that a text names, one a line; those that are not there are kept by name, and counted."""
    if file.stat().st_size > MAX_LIST:
        raise ValueError(f"{file} has more than {MAX_LIST} bytes; expected the path of an image a line")
    finders = [ImageFinder(folder) for folder in ((images,) if images else dict.fromkeys((base, file.parent)))]
    for line in read_text(file).splitlines():
        if not (said := line.strip()):
            continue
        direct = base / said
        if images is None and direct.is_file():
            yield direct
            continue
        found = next((finder.root / path for finder in finders if (path := finder.find(said))), None)
        yield found or base / said.replace("\\", "/")


# Labels -------------------------------------------------------------------------------------------------------------


class _LabelFinder:
    """Which label file goes with an image, all as paths from the root.

    Args:
        labels: all texts below the root that may be some.
        images: another folder of the images, where they do not stand with their labels.
    """

    def __init__(self, root: Path, labels: set[str], images: Path | None):
        self.root, self.labels, self.used = root, labels, set[str]()
        self.elsewhere = relative(images, root) if images is not None and images != root else None
        self.called = {f"{os.path.splitext(label)[0]}.txt": label for label in labels}  # noqa: PTH122
        self.folders: set[str] = set()
        self.by_stem: dict[str, list[str]] = {}
        if self.elsewhere is not None:
            for label in sorted(labels):
                self.by_stem.setdefault(Path(label).stem, []).append(label)

    def label(self, image: str) -> str:
        """The label file of an image, "" where there is none."""
        stem = os.path.splitext(image)[0]  # noqa: PTH122, a Path would change what it does not know
        for candidate in (*_mirrored(stem), f"{stem}.txt"):
            self.folders.add(candidate.rpartition("/")[0])
            if (label := self.called.get(candidate)) is not None:
                self.used.add(label)
                return label
            if candidate.startswith("../") and (self.root / candidate).is_file():
                return candidate
        if self.elsewhere is not None:
            inner = stem.removeprefix(self.elsewhere).strip("/")
            same = self.by_stem.get(stem.rpartition("/")[2], [])
            ends = [label for label in same if f"/{label}".endswith(f"/{inner}.txt")] or same
            if len(ends) == 1:
                self.used.add(ends[0])
                return ends[0]
        return ""

    def orphans(self, *, everywhere: bool) -> list[str]:
        """Label files that no image has: in the folders of labels that images have, or anywhere."""
        return [
            label
            for label in sorted(self.labels - self.used)
            if (everywhere or label.rpartition("/")[0] in self.folders) and _holds_rows(self.root / label)
        ]


def _mirrored(stem: str) -> Iterator[str]:
    """`a/images/b` -> `a/labels/b.txt`."""
    parts = stem.split("/")
    for k in range(len(parts) - 2, -1, -1):
        if parts[k].lower() in IMAGE_FOLDERS:
            for name in LABEL_FOLDERS:
                yield "/".join([*parts[:k], name, *parts[k + 1 :]]) + ".txt"
            return


def _texts(folder: Path) -> Iterator[Path]:
    """Files that may be labels, here and below, by name; no lists of names."""
    return (file for file in find_files(folder, ".txt") if file.name not in NAME_FILES)


def _is_label_folder(folder: Path, root: Path) -> bool:
    parts = folder.relative_to(root).parts if folder != root else (root.absolute().name,)
    return any(part in LABEL_FOLDERS or part.startswith("obj_") for part in parts)


def _holds_rows(file: Path) -> bool:
    head = head_of(file, 4096)
    whole = head if len(head) < 4096 else head.rpartition(b"\n")[0]
    try:
        return looks_like_rows(decode_text(whole))
    except ValueError:
        return False
