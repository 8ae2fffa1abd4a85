"""Where images come from: a path is recognised for what it is, and cut into units of work.

for unit in open_source("my-pictures", box_format="xywh_pixels"):
    for item in unit.items(): ...

A new kind of source is a module that gives units, and a line in `KINDS`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ..item import Unit, items_of
from .archives import Archive, archive_name, find_archives, is_archive
from .coco import is_coco, open_coco
from .folders import image_chunks
from .hugging_face import is_hugging_face, open_hugging_face
from .options import Kind, SourceOptions
from .other_annotations import describe, find_unread
from .paths import find_images, refuse_leaving
from .rows import BOX_FORMATS, check_not_all_alike
from .tables import METADATA, row_chunks
from .voc import is_voc_folder, open_voc
from .yolo import first_label, is_yolo, open_yolo

UNIT_SIZE = 10_000  # images

_LOGGER = logging.getLogger(__name__)


def open_source(
    path: str | Path,
    *,
    kind: str = "auto",
    box_format: str | None = None,
    instances: str | Path | None = None,
    classes: str | Path | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    unit_size: int = UNIT_SIZE,
    other_uses: Sequence[str | Path] = (),
) -> list[Unit]:
    """Cut a source into units, in an order that is the same every time.

    Args:
        kind: one of `KINDS`; "auto" recognises it.
        box_format: one of `BOX_FORMATS`, of rows that do not name their own. Layouts are "xyxy" by default.
        instances: COCO's annotations of the images in `path`. classes: category name to phrase.
        images: folder of the images, where they do not lie with their annotations.
        split: the part of the source that is taken, as "train"; all of it by default.
        unit_size: images in a unit; an archive is always one.
        other_uses: files and folders that may lie among the images and are no annotations of theirs, as captions that
            are joined.

    Raises:
        FileNotFoundError: no such path.
        ValueError: it is nothing of the kind, an argument does not go with it, or all rows have a fault.
    """
    path = Path(path)
    paths = {"instances": instances, "classes": classes, "images": images}
    files = {name: None if other is None else Path(other) for name, other in paths.items()}
    for file in (path, *filter(None, files.values())):
        if not file.exists():
            raise FileNotFoundError(f"there is no {file}")
    if files["images"] is not None and not files["images"].is_dir():
        raise ValueError(f"images is {images}, which is not a folder of images")
    exempt = [Path(other) for other in other_uses]
    if kind == "auto":
        kind = "coco" if instances is not None else recognise(path, exempt)
    elif kind == "imagefolder" and path.is_dir() and (unread := find_unread(path, exempt)):
        _LOGGER.warning("%s is not read: %s", unread, describe(unread))
    options = SourceOptions(path=path, box_format=box_format, split=split, unit_size=unit_size, **files)
    _check_arguments(kind, options)
    units = KINDS[kind].open(options)
    check_not_all_alike(items_of(units))
    return list(units)


def recognise(path: Path, other_uses: Sequence[Path] = ()) -> str:
    """Return the kind of a source.

    Raises:
        ValueError: none of them, or several; the error says what there is and what is expected.
    """
    if path.is_file():
        kinds = [name for name, kind in KINDS.items() if kind.recognises(path)]
        if not kinds:
            description = describe(path)
            shown = f" ({description})" if description else ""
            raise ValueError(f"{path} is a file of no known kind{shown}; {_expected()}")
        return kinds[0]
    if any(path.joinpath(name).is_file() for name in METADATA):
        return "imagefolder"
    if archives := [file for file in path.iterdir() if is_archive(file)]:
        return _kind_of_archives(archives)
    _refuse_other_metadata(path)
    kinds = [name for name in _OF_FOLDERS if KINDS[name].recognises(path)]
    if len(kinds) > 1:
        raise ValueError(f"{path} holds annotations of several kinds, {' and '.join(kinds)}; choose one by --kind")
    if kinds:
        return kinds[0]
    if unread := find_unread(path, other_uses):
        raise ValueError(
            f"{unread} may hold annotations, and is not read ({describe(unread)}); {_expected()}\n"
            "Move it elsewhere, or say --kind imagefolder, if images and captions are all that is wanted"
        )
    if next(find_images(path), None) is not None:
        return "imagefolder"
    names = sorted(file.name for file in path.iterdir())
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise ValueError(f"{path} holds {shown or 'nothing'}; {_expected()}")


def _expected() -> str:
    """Name the kinds of sources."""
    return "\n".join(["expected one of", *(f"  {name:<12} {kind.description}" for name, kind in KINDS.items())])


def _check_arguments(kind: str, options: SourceOptions) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected auto, {', '.join(KINDS)}")
    box_format = options.box_format
    if box_format is not None and box_format not in BOX_FORMATS:
        raise ValueError(f"box_format is {box_format!r}; expected one of {', '.join(BOX_FORMATS)}")
    if box_format is not None and "box_format" not in KINDS[kind].takes:
        raise ValueError(f"box_format is {box_format}, but {kind} has a format of its own; leave it out")
    for name in ("instances", "classes", "images", "split"):
        if getattr(options, name) is not None and name not in KINDS[kind].takes:
            having = ", ".join(other for other, entry in KINDS.items() if name in entry.takes)
            raise ValueError(f"{name} is of kind {having}; this is {kind}")
    if options.unit_size < 1:
        raise ValueError(f"unit_size is {options.unit_size}; expected a positive number of images")


# Kinds --------------------------------------------------------------------------------------------------------------


def _kind_of_archives(files: list[Path]) -> str:
    return "sa1b" if all(re.fullmatch(r"sa_\d+", archive_name(file)) for file in files) else "webdataset"


def _is_archive_of(kind: str, path: Path) -> bool:
    return is_archive(path) and _kind_of_archives([path]) == kind


def _open_archives(kind: str, options: SourceOptions) -> list[Archive]:
    archives = [Archive(path=file, kind=kind, box_format=options.box_format) for file in find_archives(options.path)]
    if not archives:
        raise ValueError(f"{options.path} holds no .tar, .tar.gz or .tgz; {_expected()}")
    archives[0].check()
    return archives


def _open_layouts(options: SourceOptions) -> Sequence[Unit]:
    path = options.path
    if not path.is_file():
        raise ValueError(f"{path} is not a file; {_expected()}")
    return row_chunks(path, path.stem, "layouts", options.box_format or "xyxy", options.unit_size)


def _open_imagefolder(options: SourceOptions) -> Sequence[Unit]:
    path = options.path
    files = [path] if path.is_file() else [path / name for name in METADATA if path.joinpath(name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} has both {' and '.join(METADATA)}; keep one of them, or name it as the source")
    if files:
        if path.is_dir():
            refuse_leaving(path, files[0])
        name = files[0].absolute().parent.name
        return row_chunks(files[0], name, "imagefolder", options.box_format, options.unit_size)
    _refuse_other_metadata(path)
    chunks = image_chunks(path, path.absolute().name, options.unit_size)
    if not chunks:
        raise ValueError(f"{path} holds no images; {_expected()}")
    if label := first_label(path):
        raise ValueError(f"{label} holds rows of YOLO labels and no caption; leave out --kind, or say --kind yolo")
    return chunks


def _refuse_other_metadata(folder: Path) -> None:
    """Refuse what would be overlooked if its images were taken alone."""
    if folder.joinpath("metadata.csv").is_file():
        raise ValueError(f"{folder}/metadata.csv: a table of text cannot hold boxes; write the rows as metadata.jsonl")
    deeper = sorted(str(file.parent) for name in METADATA for file in folder.glob(f"*/{name}"))
    if deeper:
        raise ValueError(f"{folder} has no metadata file, but {', '.join(deeper)} has; give that folder")


_ELSEWHERE = ("classes", "images", "split")

KINDS: Mapping[str, Kind] = {
    "sa1b": Kind(
        description="sa_000000.tar ..., or a folder of them (plain or gzip)",
        recognises=partial(_is_archive_of, "sa1b"),
        open=partial(_open_archives, "sa1b"),
    ),
    "webdataset": Kind(
        description="any other .tar, or a folder of them: images with .txt and .json beside them",
        recognises=partial(_is_archive_of, "webdataset"),
        open=partial(_open_archives, "webdataset"),
        takes=("box_format",),
    ),
    "imagefolder": Kind(
        description="a folder with metadata.jsonl or metadata.parquet, or of images alone",
        recognises=lambda path: path.name in METADATA,
        open=_open_imagefolder,
        takes=("box_format",),
    ),
    "layouts": Kind(
        description="a .jsonl file: prompt, phrases, boxes, image",
        recognises=lambda path: path.suffix == ".jsonl" and path.name not in METADATA,
        open=_open_layouts,
        takes=("box_format",),
    ),
    "coco": Kind(
        description="a folder of images, and an instances file (in it, or --instances)",
        recognises=is_coco,
        open=open_coco,
        takes=("instances", *_ELSEWHERE),
    ),
    "yolo": Kind(
        description="data.yaml, or a folder with images/ and labels/, or of images with .txt and classes.txt",
        recognises=is_yolo,
        open=open_yolo,
        takes=_ELSEWHERE,
    ),
    "voc": Kind(
        description="a folder with Annotations/*.xml and JPEGImages/, or of images with .xml",
        recognises=is_voc_folder,
        open=open_voc,
        takes=_ELSEWHERE,
    ),
    "huggingface": Kind(
        description=".parquet with image and objects, a folder of such, or one of datasets.save_to_disk",
        recognises=is_hugging_face,
        open=open_hugging_face,
        takes=("box_format", *_ELSEWHERE),
    ),
}
_OF_FOLDERS = ("huggingface", "coco", "yolo", "voc")  # what is looked for in a folder
