"""Pascal VOC sets: `Annotations/*.xml` with `JPEGImages/`, or `a.xml` beside `a.jpg`; class names are phrases.

In VOC's boxes pixels are counted from 1, and the last one is within: xmin 1 and xmax 80 are the whole width of an
image of 80 pixels (the development kit of VOC 2012; supervision writes so, and detectron2 reads so). Other programs, as
LabelImg and CVAT, write places between pixels, counted from 0, and do not say which they mean. A file that has a 0 or a
fraction can only be one of those, and is read so. What remains unknown is one pixel at the left and at the top.

Objects that are difficult or truncated are taken; boxes of their parts are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...images.decode import ENDINGS, image_size
from ...io import read_text
from ..item import BAD_TEXT, Annotation, text_fault
from .labelled import MAX_LABEL, LabelledChunk, LabelledImage, labelled_chunks
from .options import (
    LEFT_OUT,
    SourceOptions,
    check_words,
    class_phrases,
    split_name,
    splits_by_folder,
    warn_of_all_splits,
)
from .paths import ImageFinder, find_files, find_images, read_head, relative, stem, without_ending
from .rows import NO_PHRASE, SHARES, RowError
from .voc_xml import VocAnnotation, XmlError, is_voc, read_xml

BAD_XML = "its XML is none of Pascal VOC"  # why an image is left out
NO_BOX = "its box is wrong"  # why a box is dropped
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "img")
MASK_FOLDERS = {"SegmentationClass", "SegmentationObject"}  # which stand beside VOC's photographs
FIRST_FILES = 100  # in which a set is looked for
_BOX = ("xmin", "ymin", "xmax", "ymax")
_Corners = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class VocReader:
    """Reads annotations of Pascal VOC.

    Args:
        phrases: of classes, None for those that are left out; the phrase of one that it lacks is its name.
    """

    phrases: Mapping[str, str | None] = field(default_factory=dict)

    def read(self, label: bytes, image: Path) -> Annotation:
        """Read the objects of an image; those that cannot be used are counted as dropped boxes."""
        try:
            annotation = read_xml(label)
        except XmlError as error:
            raise RowError(BAD_XML, str(error)) from error
        size = _size(annotation)
        height, width = size or image_size(image)
        corners = [_corners(entry) for entry in annotation.objects]
        sound = [box for box in corners if box is not None]
        if sound and 0 < (highest := max(map(max, sound))) <= 1:
            raise RowError(SHARES, f"no number is above {highest:g}; Pascal VOC's boxes are in pixels")
        shift = 1.0 if _counts_from_one(sound) else 0.0
        boxes, phrases = [], []
        dropped: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for number, (entry, box) in enumerate(zip(annotation.objects, corners, strict=True), start=1):
            name = entry.get("name", "")
            if fault := text_fault(name):
                raise RowError(BAD_TEXT, fault)
            phrase = self.phrases.get(name, name)
            if box is not None and phrase:
                x0, y0, x1, y1 = box
                boxes.append(((x0 - shift) / width, (y0 - shift) / height, x1 / width, y1 / height))
                phrases.append(phrase)
                continue
            if box is None:
                values = ", ".join(f"{side} {entry.get(side, 'missing')[:20]}" for side in _BOX)
                reason, detail = NO_BOX, f"{values}; expected <bndbox> with four numbers"
            else:
                reason, detail = (LEFT_OUT, "") if phrase is None else (NO_PHRASE, "it has no <name>")
            dropped[reason] += 1
            if detail:
                examples.setdefault(reason, f"object {number}, {name!r:.40}: {detail}")
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


def _corners(entry: Mapping[str, str]) -> _Corners | None:
    try:
        x0, y0, x1, y1 = (float(entry[side]) for side in _BOX)
    except (KeyError, ValueError):
        return None
    return (x0, y0, x1, y1) if all(abs(value) < 1e9 for value in (x0, y0, x1, y1)) else None


def _counts_from_one(boxes: list[_Corners]) -> bool:
    return all(value == int(value) for box in boxes for value in box) and all(min(box[:2]) >= 1 for box in boxes)


def _size(annotation: VocAnnotation) -> tuple[int, int] | None:
    """Return (height, width) that the file states; None if it states none, or 0 as some programs do."""
    try:
        height, width = (int(float(annotation.image.get(side, "0"))) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if 0 < height < 2**31 and 0 < width < 2**31 else None


# Sets ---------------------------------------------------------------------------------------------------------------


def is_voc_folder(path: Path) -> bool:
    """Tell whether a folder holds annotations of Pascal VOC, in its first hundred XML files."""
    return path.is_dir() and any(
        is_voc(read_head(file, 4096)) for file in islice(find_files(path, ".xml"), FIRST_FILES)
    )


def open_voc(options: SourceOptions) -> list[LabelledChunk]:
    """Cut a Pascal VOC set into units.

    Raises:
        ValueError: it has no annotations, no such split; or none of its boxes can be used.
    """
    root = options.path
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder of Pascal VOC: Annotations/*.xml and JPEGImages/, or both beside")
    labels = [relative(file, root) for file in find_files(root, ".xml")]
    paths = [relative(path, root) for path in find_images(options.images or root)]
    images = _joined(root, labels, [path for path in paths if not MASK_FOLDERS & set(path.split("/"))], options.images)
    images = _of_split(options, images)
    if not any(entry.label for entry in images):
        raise ValueError(f"{root} holds no annotations of Pascal VOC (.xml)")
    reader = VocReader(phrases=_phrases(root, images, options.classes))
    return labelled_chunks("voc", root, images, reader, options.unit_size, options.split)


def _joined(root: Path, labels: list[str], paths: list[str], images: Path | None) -> list[LabelledImage]:
    """Give each image its annotations: those beside it; those of the same name in a folder of annotations; or those
    that name it."""
    finder = ImageFinder(images or root)
    by_stem: dict[str, list[str]] = {}
    for path in paths:
        by_stem.setdefault(stem(path), []).append(path)
    label_of: dict[str, str] = {}
    orphans = []
    for label in labels:
        image = _image_of(root, label, by_stem.get(stem(label), []), finder)
        if image is None or image in label_of:
            orphans.append(label)
        else:
            label_of[image] = label
    joined = [LabelledImage(path, label_of.get(path, "")) for path in dict.fromkeys([*paths, *label_of])]
    joined += [LabelledImage("", label) for label in orphans]
    return sorted(joined, key=lambda entry: entry.path.split("/"))


def _image_of(root: Path, label: str, same: list[str], finder: ImageFinder) -> str | None:
    """Return the image of a file of annotations.

    Args:
        same: images of the same name, in whatever folders.
    """
    beside = [path for path in same if without_ending(path) == without_ending(label)]
    if len(beside) == 1 or len(same) == 1:
        return (beside or same)[0]
    # Of one name in several folders: that of the folder of images nearest to the annotations.
    near = [path for path in same if _is_near(path, label)]
    if len(near) == 1:
        return near[0]
    try:
        name = read_xml(read_head(root / label, MAX_LABEL)).image.get("filename", "")
    except XmlError:
        return None
    found = finder.find(name) if name else None
    return relative(finder.root / found, root) if found and found.rpartition(".")[2].lower() in ENDINGS else None


def _is_near(path: str, label: str) -> bool:
    """Tell whether an image lies in `x/JPEGImages/y` for annotations in `x/Annotations/y`."""
    image, annotations = path.split("/")[:-1], label.split("/")[:-1]
    if len(image) != len(annotations):
        return False
    other = [a for a, b in zip(image, annotations, strict=True) if a != b]
    return len(other) <= 1 and all(name in IMAGE_FOLDERS for name in other)


def _of_split(options: SourceOptions, images: list[LabelledImage]) -> list[LabelledImage]:
    """Return the images that ImageSets/Main/<split>.txt names, or those in the folders of that name."""
    root, split = options.path, options.split
    lists = {file.stem: file for file in sorted(root.glob("**/ImageSets/Main/*.txt"))}
    if split is not None and split in lists:
        names = {line.split()[0] for line in read_text(lists[split]).splitlines() if line.strip()}
        chosen = [entry for entry in images if stem(entry.path) in names]
        missing = names - {stem(entry.path) for entry in chosen}
        return chosen + [LabelledImage(f"{name}.jpg", "") for name in sorted(missing)]
    split_of = splits_by_folder([entry.path for entry in images])
    counts = Counter(split_of.get(entry.path, "without a split") for entry in images)
    if split is None:
        warn_of_all_splits(root, counts)
        return images
    if (name := split_name(split)) not in counts:
        known = ", ".join([*lists, *counts])
        raise ValueError(f"{root} has no split {split} in ImageSets/Main or as a folder; it has {known}")
    return [entry for entry in images if split_of.get(entry.path) == name]


def _phrases(root: Path, images: list[LabelledImage], classes: Path | None) -> dict[str, str | None]:
    """Return the phrases of all classes, if a mapping is to be checked against them; else none: names are phrases."""
    labels = [root / entry.label for entry in images if entry.label]
    names: set[str] = set()
    for file in labels if classes is not None else labels[:FIRST_FILES]:
        try:
            names |= {entry.get("name", "") for entry in read_xml(read_head(file, MAX_LABEL)).objects}
        except XmlError:
            continue
    names.discard("")
    phrases = class_phrases(names, classes) if classes is not None else {}
    check_words([phrases.get(name, name) for name in sorted(names)], str(root))
    return phrases
