"""Pascal VOC sets: `Annotations/*.xml` with `JPEGImages/`, or `a.xml` beside `a.jpg`; class names are phrases.

In VOC's boxes pixels are counted from 1, and the last one is within: xmin 1 and xmax 80 are the whole width of an
image of 80 pixels (the development kit of VOC 2012; supervision writes so, and detectron2 reads so). Other programs, as
LabelImg and CVAT, write places between pixels, counted from 0, and do not say which they mean. A file that has a 0 or a
fraction can only be one of those, and is read so. What remains unknown is one pixel at the left and at the top.

Objects that are difficult or truncated are taken; boxes of their parts are not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS, image_size
from ...io import read_text
from ..item import BAD_TEXT, Annotation, text_fault
from .class_phrases import LEFT_OUT, check_words, class_phrases
from .folders import find_images
from .image_paths import ImageFinder
from .label_files import (
    MAX_LABEL,
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
from .options import SourceOptions
from .rows import NO_PHRASE, SHARES, RowError
from .voc_xml import VocAnnotation, XmlError, is_voc, read_xml

BAD_XML = "its XML is none of Pascal VOC"  # why an image is left out
NO_BOX = "its box is wrong"  # why a box is dropped
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "img")
LOOKED_AT = 100  # files, where a set is looked for
_BOX = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True)
class VocReader:
    """Reads annotations of Pascal VOC.

    Args:
        phrases: of classes, None for those that are left out; one that does not stand there is its name.
    """

    phrases: Mapping[str, str | None] = field(default_factory=dict)

    def read(self, label: bytes, image: Path) -> Annotation:
        """Objects of an image; those that cannot be used are counted as dropped boxes."""
        try:
            given = read_xml(label)
        except XmlError as error:
            raise RowError(BAD_XML, str(error)) from error
        size = _size(given)
        height, width = size or image_size(image)
        boxes, phrases = [], []
        dropped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        corners = [_corners(entry) for entry in given.objects]
        if (sound := [box for box in corners if box is not None]) and 0 < max(map(max, sound)) <= 1:
            raise RowError(SHARES, f"no number is above {max(map(max, sound)):g}; Pascal VOC's boxes are in pixels")
        shift = 1.0 if _counts_from_one(sound) else 0.0
        for number, (entry, box) in enumerate(zip(given.objects, corners, strict=True), start=1):
            name = entry.get("name", "")
            if fault := text_fault(name):
                raise RowError(BAD_TEXT, fault)
            phrase = self.phrases.get(name, name)
            if box is None:
                told = ", ".join(f"{side} {entry.get(side, 'missing')[:20]}" for side in _BOX)
                reason, told = NO_BOX, f"{told}; expected <bndbox> with four numbers"
            elif phrase is None:
                reason, told = LEFT_OUT, ""
            elif not phrase:
                reason, told = NO_PHRASE, "it has no <name>"
            else:
                x0, y0, x1, y1 = box
                boxes.append(((x0 - shift) / width, (y0 - shift) / height, x1 / width, y1 / height))
                phrases.append(phrase)
                continue
            dropped[reason] += 1
            if told:
                examples.setdefault(reason, f"object {number}, {name!r:.40}: {told}")
        return Annotation(
            boxes=tuple(boxes),
            phrases=tuple(phrases),
            scores=(1.0,) * len(boxes),
            size=size,
            dropped=dropped,
            dropped_examples=examples,
        )

    def identity(self) -> dict[str, Any]:
        return {"classes": dict(self.phrases)}


def is_voc_folder(path: Path) -> bool:
    """Whether a folder holds annotations of Pascal VOC; looked for in its first hundred XML files."""
    return path.is_dir() and any(map(_is_voc_file, islice(_annotations(path), LOOKED_AT)))


def open_voc(options: SourceOptions) -> list[LabelledChunk]:
    """Units of a Pascal VOC set.

    Raises:
        ValueError: it has no annotations, no such split; or none of its boxes can be used.
    """
    root = options.path
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of Pascal VOC: Annotations/*.xml and JPEGImages/, or both beside")
    labels = [relative(file, root) for file in _annotations(root)]
    paths = [relative(path, root) for path in find_images(options.images or root)]
    images = _joined(root, labels, [path for path in paths if not _is_mask(path)], options.images)
    images = _of_split(options, images)
    if not any(entry.label for entry in images):
        raise ValueError(f"{root} holds no annotations of Pascal VOC (.xml)")
    phrases = _phrases(root, images, options.classes)
    chunks = labelled_chunks("voc", root, images, VocReader(phrases=phrases), options.unit_size, options.split)
    check_boxes(chunks)
    return chunks


def _annotations(folder: Path) -> Iterator[Path]:
    return find_files(folder, ".xml")


def _is_voc_file(file: Path) -> bool:
    return is_voc(head_of(file, 4096))


def _is_mask(path: str) -> bool:
    """Whether an image is a segmentation of VOC's, which stand beside its photographs."""
    return any(part in ("SegmentationClass", "SegmentationObject") for part in path.split("/"))


def _joined(root: Path, labels: list[str], paths: list[str], images: Path | None) -> list[LabelledImage]:
    """Each image with its annotations: those beside it; those of the same name in a folder of annotations; or those
    that name it."""
    finder = ImageFinder(images or root)
    by_stem: dict[str, list[str]] = {}
    for path in paths:
        by_stem.setdefault(_stem(path), []).append(path)
    taken: dict[str, str] = {}
    orphans = []
    for label in labels:
        image = _image_of(root, label, by_stem, finder, images)
        if image is None or image in taken:
            orphans.append(label)
        else:
            taken[image] = label
    joined = [LabelledImage(path, taken.get(path, "")) for path in dict.fromkeys([*paths, *taken])]
    joined += [LabelledImage("", label) for label in orphans]
    return sorted(joined, key=lambda entry: (entry.image or entry.label).split("/"))


def _image_of(
    root: Path, label: str, by_stem: Mapping[str, list[str]], finder: ImageFinder, images: Path | None
) -> str | None:
    stem = label[: -len(".xml")]
    same = by_stem.get(_stem(label), [])
    beside = [path for path in same if os.path.splitext(path)[0] == stem]  # noqa: PTH122
    if len(beside) == 1 or len(same) == 1:
        return (beside or same)[0]
    if same:  # of one name in several folders: that of the folder of images nearest to the annotations
        above = stem.rpartition("/")[0]
        near = [path for path in same if _is_near(path, above)]
        if len(near) == 1:
            return near[0]
    said = _filename(root / label)
    found = finder.find(said) if said else None
    return relative(finder.root / found, root) if found and found.rpartition(".")[2].lower() in ENDINGS else None


def _is_near(path: str, annotations: str) -> bool:
    """Whether an image stands in `x/JPEGImages/y` for annotations in `x/Annotations/y`."""
    image, label = path.split("/")[:-1], annotations.split("/") if annotations else []
    if len(image) != len(label):
        return False
    other = [(a, b) for a, b in zip(image, label, strict=True) if a != b]
    return len(other) <= 1 and all(a in IMAGE_FOLDERS for a, _ in other)


def _stem(path: str) -> str:
    return os.path.splitext(path)[0].rpartition("/")[2]  # noqa: PTH122


def _filename(file: Path) -> str:
    try:
        return read_xml(head_of(file, MAX_LABEL)).image.get("filename", "")
    except XmlError:
        return ""


def _of_split(options: SourceOptions, images: list[LabelledImage]) -> list[LabelledImage]:
    """Of ImageSets/Main/<split>.txt, or of the folders of that name."""
    root, split = options.path, options.split
    lists = {file.stem: file for file in sorted(root.glob("**/ImageSets/Main/*.txt"))}
    if split is not None and split in lists:
        names = {line.split()[0] for line in read_text(lists[split]).splitlines() if line.strip()}
        chosen = [entry for entry in images if _stem(entry.image or entry.label) in names]
        there = {_stem(entry.image or entry.label) for entry in chosen}
        chosen += [LabelledImage(f"{name}.jpg", "") for name in sorted(names - there)]
        return chosen
    split_of = splits_in([entry.image or entry.label for entry in images])
    counts = Counter(split_of.get(entry.image or entry.label, "without a split") for entry in images)
    if split is None:
        tell_splits(root, dict(counts))
        return images
    split = split_name(split)
    if split not in counts:
        known = ", ".join([*lists, *counts])
        raise ValueError(f"{root} has no split {split} in ImageSets/Main or as a folder; it has {known}")
    return [entry for entry in images if split_of.get(entry.image or entry.label) == split]


def _phrases(root: Path, images: list[LabelledImage], classes: Path | None) -> dict[str, str | None]:
    """Of all classes, where a mapping is to be checked against them; else nothing, and names are phrases."""
    labels = [root / entry.label for entry in images if entry.label]
    names: set[str] = set()
    for file in labels if classes is not None else labels[:LOOKED_AT]:
        try:
            names |= {entry.get("name", "") for entry in read_xml(head_of(file, MAX_LABEL)).objects}
        except XmlError:
            continue
    names.discard("")
    phrases = class_phrases(names, classes) if classes is not None else {}
    check_words([phrases.get(name, name) for name in sorted(names)], str(root))
    return phrases


def _corners(entry: Mapping[str, str]) -> tuple[float, float, float, float] | None:
    try:
        values = [float(entry[side]) for side in _BOX]
    except (KeyError, ValueError):
        return None
    return (values[0], values[1], values[2], values[3]) if all(abs(value) < 1e9 for value in values) else None


def _counts_from_one(boxes: list[tuple[float, float, float, float]]) -> bool:
    return all(value == int(value) for box in boxes for value in box) and all(min(box[:2]) >= 1 for box in boxes)


def _size(given: VocAnnotation) -> tuple[int, int] | None:
    """(height, width) that it states; None where it states none, or 0 as some programs do."""
    try:
        height, width = (int(float(given.image.get(side, "0"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else None
