"""Where pictures come from: a path is recognised for what it is, and cut into units of work.

for unit in open_source("my-pictures", box_format="xywh_pixels"):
    for item in unit.items(): ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .archives import Archive, archive_name, find_archives, is_archive
from .coco import coco_chunks
from .folders import find_pictures, picture_chunks
from .item import Unit
from .links import leaves
from .row_chunks import METADATA, check_rows, row_chunks
from .rows import BOX_FORMATS, check_not_all_alike, items_of

KINDS = ("sa1b", "webdataset", "imagefolder", "layouts", "coco")
UNIT_SIZE = 10_000  # pictures

_EXPECTED = """expected one of
  sa1b         sa_000000.tar ..., or a folder of them (plain or gzip)
  webdataset   any other .tar, or a folder of them: pictures with .txt and .json beside them
  imagefolder  a folder with metadata.jsonl or metadata.parquet, or of pictures alone
  layouts      a .jsonl file: prompt, phrases, boxes, image
  coco         a folder of pictures, and an instances file (--instances)"""


def open_source(
    path: str | Path,
    *,
    kind: str = "auto",
    box_format: str | None = None,
    instances: str | Path | None = None,
    classes: str | Path | None = None,
    unit_size: int = UNIT_SIZE,
) -> list[Unit]:
    """Units of a source, in an order that is the same every time.

    Args:
        kind: one of `KINDS`; "auto" recognises it.
        box_format: one of `BOX_FORMATS`, of rows that do not name their own. Layouts are "xyxy" by default.
        instances: COCO's annotations of the pictures in `path`. classes: category name to phrase, for these.
        unit_size: pictures in a unit; an archive is always one.

    Raises:
        FileNotFoundError: no such path.
        ValueError: it is nothing of the kind, an argument does not go with it, or all rows have a fault.
    """
    path = Path(path)
    given = {"instances": instances, "classes": classes}
    for file in (path, *(Path(other) for other in given.values() if other is not None)):
        if not file.exists():
            raise FileNotFoundError(f"there is no {file}")
    if kind == "auto":
        kind = "coco" if instances is not None else recognise(path)
    _check_arguments(kind, box_format, instances, classes, unit_size)
    units: Sequence[Unit]
    if kind in ("sa1b", "webdataset"):
        units = _archives(path, kind, box_format)
    elif kind == "coco":
        assert instances is not None
        units = coco_chunks(_folder(path), Path(instances), Path(classes) if classes is not None else None, unit_size)
    elif kind == "layouts":
        if not path.is_file():
            raise ValueError(f"{path} is not a file; {_EXPECTED}")
        units = row_chunks(path, path.stem, kind, box_format or "xyxy", unit_size)
        check_rows(units)
    else:
        units = _imagefolder(path, box_format, unit_size)
    check_not_all_alike(items_of(units))
    return list(units)


def recognise(path: Path) -> str:
    """The kind of a source.

    Raises:
        ValueError: none of them; it says what was found and what is expected.
    """
    if path.is_file():
        if is_archive(path):
            return _kind_of_archives([path])
        if path.name in METADATA:
            return "imagefolder"
        if path.suffix == ".jsonl":
            return "layouts"
        raise ValueError(f"{path} is a file of no known kind; {_EXPECTED}")
    if any(path.joinpath(name).is_file() for name in METADATA):
        return "imagefolder"
    if archives := [file for file in path.iterdir() if is_archive(file)]:
        return _kind_of_archives(archives)
    _refuse_other_metadata(path)
    if next(find_pictures(path), None) is not None:
        return "imagefolder"
    found = sorted(file.name for file in path.iterdir())
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise ValueError(f"{path} holds {shown or 'nothing'}; {_EXPECTED}")


def _kind_of_archives(files: list[Path]) -> str:
    return "sa1b" if all(re.fullmatch(r"sa_\d+", archive_name(file)) for file in files) else "webdataset"


def _check_arguments(kind: str, box_format: str | None, instances: object, classes: object, unit_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected auto, {', '.join(KINDS)}")
    if box_format is not None and box_format not in BOX_FORMATS:
        raise ValueError(f"box_format is {box_format!r}; expected one of {', '.join(BOX_FORMATS)}")
    if box_format is not None and kind in ("sa1b", "coco"):
        raise ValueError(f"box_format is {box_format}, but {kind} has a format of its own; leave it out")
    if kind == "coco" and instances is None:
        raise ValueError("coco needs instances (--instances), as annotations/instances_train2017.json")
    if kind != "coco" and (instances is not None or classes is not None):
        raise ValueError(f"instances and classes are of kind coco; this is {kind}")
    if unit_size < 1:
        raise ValueError(f"unit_size is {unit_size}; expected a positive number of pictures")


def _archives(path: Path, kind: str, box_format: str | None) -> list[Archive]:
    archives = [Archive(path=file, kind=kind, box_format=box_format) for file in find_archives(path)]
    if not archives:
        raise ValueError(f"{path} holds no .tar, .tar.gz or .tgz; {_EXPECTED}")
    archives[0].check()
    return archives


def _imagefolder(path: Path, box_format: str | None, unit_size: int) -> Sequence[Unit]:
    files = [path] if path.is_file() else [path / name for name in METADATA if path.joinpath(name).is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} has both {' and '.join(METADATA)}; keep one of them, or name it as the source")
    if files:
        if path.is_dir() and leaves(path, files[0]):
            raise ValueError(
                f"{files[0]} is a link to a file outside of {path}; copy that file there, or give {files[0]} itself"
            )
        chunks = row_chunks(files[0], files[0].absolute().parent.name, "imagefolder", box_format, unit_size)
        check_rows(chunks)
        return chunks
    _refuse_other_metadata(path)
    alone = picture_chunks(path, path.absolute().name, unit_size)
    if not alone:
        raise ValueError(f"{path} holds no pictures; {_EXPECTED}")
    return alone


def _refuse_other_metadata(folder: Path) -> None:
    """What would be overlooked if its pictures were taken alone."""
    if folder.joinpath("metadata.csv").is_file():
        raise ValueError(f"{folder}/metadata.csv: a table of text cannot hold boxes; write the rows as metadata.jsonl")
    deeper = sorted(str(file.parent) for name in METADATA for file in folder.glob(f"*/{name}"))
    if deeper:
        raise ValueError(f"{folder} has no metadata file, but {', '.join(deeper)} has; give that folder")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder of pictures")
    return path
