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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ..files import decode_text, read_text
from ..yaml_files import read_yaml
from .class_phrases import check_words, class_phrases
from .folders import find_pictures
from .image_paths import ImageFinder
from .item import Annotation
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
from .pictures import ENDINGS
from .rows import RowError
from .source_options import SourceOptions
from .yolo_rows import looks_like_rows, read_rows

NOT_TEXT = "its label file is not UTF-8"  # why an image is left out
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
IMAGE_FOLDERS = ("images", "jpegimages")  # the last such folder in an image's path, for which labels have one of these
LABEL_FOLDERS = ("labels", "Labels", "LABELS")
MAX_NAMES, MAX_LIST = 2**22, 2**28  # bytes
LOOKED_AT = 1000  # files, where a set is looked for
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # keys of data.yaml


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
        return _is_description(path)
    return any(map(_is_description, _files_of(path))) or first_label(path) is not None


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
    description = _Description.find(options.path)
    root = description.base if description.file else options.path
    splits = _listed_images(description, options) if description.lists else {}
    labels = {relative(file, root) for file in _texts(root)}
    if splits:
        by_split = {name: [relative(path, root) for path in paths] for name, paths in splits.items()}
    else:
        where = options.images or root
        paths = [relative(path, root) for path in find_pictures(where)]
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


# Descriptions: data.yaml, obj.data --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What a data.yaml or obj.data says.

    Args:
        file: None where there is none.
        base: that its paths begin at. names: of classes by number. lists: what it names for each split.
        keypoints: numbers behind each box.
    """

    file: Path | None = None
    base: Path = field(default_factory=Path)
    names: Mapping[int, str] = field(default_factory=dict)
    lists: Mapping[str, list[str]] = field(default_factory=dict)
    keypoints: int = 0

    @classmethod
    def find(cls, path: Path) -> _Description:
        """Of the file itself, or of the one that a folder holds.

        Raises:
            ValueError: it is broken, or there are several.
        """
        files = [path] if path.is_file() else [file for file in _files_of(path) if _is_description(file)]
        if len(files) > 1:
            usual = [file for file in files if file.stem in ("data", "dataset", "obj")]
            files = usual[:1] if len({file.suffix for file in files}) > 1 or len(usual) == 1 else files
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} has several descriptions of its set, {names}; name one of them as the source")
        if not files:
            return cls()
        if path.is_dir():
            refuse_leaving(path, files[0])
        return cls._of_darknet(files[0]) if files[0].suffix == ".data" else cls._of_yaml(files[0])

    @classmethod
    def _of_yaml(cls, file: Path) -> _Description:
        content = _read_yaml(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: expected names, and train, val, test, as data.yaml of YOLO has them")
        names = _names(file, content.get("names"))
        count = content.get("nc")
        if isinstance(count, str) and count.isdigit() and names and max(names) >= int(count):
            raise ValueError(f"{file}: nc is {count}, but names has {len(names)}; expected as many")
        lists: dict[str, list[str]] = {}
        for key, split in _SPLITS.items():
            said = content.get(key)
            entries = said if isinstance(said, list) else [said]
            lists.setdefault(split, []).extend(entry for entry in entries if isinstance(entry, str) and entry.strip())
        shape = content.get("kpt_shape")
        keypoints = 0
        if shape is not None:
            if not isinstance(shape, list) or not shape or not all(isinstance(n, str) and n.isdigit() for n in shape):
                shown = shape[:40] if isinstance(shape, str) else f"a {type(shape).__name__}"
                raise ValueError(f"{file}: kpt_shape is {shown}; expected two numbers, as [17, 3]")
            keypoints = int(shape[0]) * (int(shape[1]) if len(shape) > 1 else 3)
        said = content.get("path")
        base = _base(file.parent, said) if isinstance(said, str) and said.strip() else file.parent
        lists = {split: entries for split, entries in lists.items() if entries}
        return cls(file=file, base=base, names=names, lists=lists, keypoints=keypoints)

    @classmethod
    def _of_darknet(cls, file: Path) -> _Description:
        said = {
            key.strip(): value.strip()
            for key, equals, value in (line.partition("=") for line in read_text(file).splitlines())
            if equals
        }
        names: Mapping[int, str] = {}
        if "names" in said:
            path = next((path for path in _candidates(file.parent, file.parent, said["names"]) if path.is_file()), None)
            names = _lines_of_names(path) if path is not None else {}
        lists = {split: [said[key]] for key, split in _SPLITS.items() if said.get(key)}
        return cls(file=file, base=file.parent, names=names, lists=lists)


def _read_yaml(file: Path) -> Any:
    """Scalars are texts here: a class may be called `no` or `1`."""
    return read_yaml(file, yaml.BaseLoader)


def _names(file: Path, said: Any) -> dict[int, str]:
    if said is None or said in ("", [], {}):
        return {}
    pairs = enumerate(said) if isinstance(said, list) else said.items() if isinstance(said, dict) else ()
    names = {}
    for number, name in pairs:
        if not str(number).isdigit() or not isinstance(name, str) or not name.strip():
            shown = repr(name)[:40] if isinstance(name, str) else f"a {type(name).__name__}"
            raise ValueError(f"{file}: names has {str(number)[:40]!r}: {shown}; expected a number and a name")
        names[int(number)] = name.strip()
    if not names:
        raise ValueError(f"{file}: names is {said!r:.80}; expected a list of names, or a mapping of number to name")
    return names


def _lines_of_names(file: Path) -> dict[int, str]:
    if file.stat().st_size > MAX_NAMES:
        raise ValueError(f"{file} has more than {MAX_NAMES} bytes; expected a name a line")
    lines = [line.strip() for line in read_text(file).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return {number: line for number, line in enumerate(lines) if line}


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
                if names := _lines_of_names(file):
                    return names
    return {}


def _is_description(file: Path) -> bool:
    try:
        if file.suffix == ".data" and file.is_file():
            with file.open("rb") as opened:
                return b"names" in (head := opened.read(4096)) and b"=" in head
        if file.suffix not in (".yaml", ".yml") or not file.is_file():
            return False
        content = _read_yaml(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("names"), list | dict)


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml", ".data"))


# Images -------------------------------------------------------------------------------------------------------------


def _base(folder: Path, said: str) -> Path:
    """The folder that `path` of a data.yaml means: as it stands there, from the file, or from the folder around it.

    One of another machine is taken to be that of the file.
    """
    said = said.replace("\\", "/")
    places = (folder / Path(said).expanduser(), folder.parent / said)
    return next((place for place in places if place.is_dir()), folder)


def _candidates(base: Path, folder: Path, said: str) -> Iterator[Path]:
    """What a path in a description may mean, the likeliest first; the ends of one of another machine last."""
    said = said.replace("\\", "/")
    yield base / said
    yield folder / said
    yield from _ends_in(base, said)


def _ends_in(base: Path | None, said: str) -> Iterator[Path]:
    """The ends of a path, the longest first, below a folder."""
    parts = [part for part in said.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:  # Roboflow's ../train/images stand beside data.yaml
        parts = parts[len(parts) - parts[::-1].index("..") :]
    for k in range(len(parts) if base is not None else 0):
        yield Path(base or "", *parts[k:])


def _listed_images(description: _Description, options: SourceOptions) -> dict[str, list[Path]]:
    """Images of each split that a description names; a list of images that are not there is an error."""
    folder = options.path if options.path.is_dir() else options.path.parent
    splits: dict[str, list[Path]] = {}
    lacking = []
    for split, entries in description.lists.items():
        for said in entries:
            places = [*_candidates(description.base, folder, said), *_ends_in(options.images, said)]
            place = next((place for place in places if place.exists()), None)
            if place is None:
                lacking.append(f"{split}: {said}")
            elif place.is_dir():
                splits.setdefault(split, []).extend(find_pictures(place))
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
