"""Sets of COCO as they lie on a disk: an instances file that is given, or the one that a folder holds.

result.json, images/                       Label Studio
annotations/instances_default.json         CVAT
train/_annotations.coco.json               Roboflow; valid/ and test/ beside it
annotations/instances_train2017.json       COCO; there are several, so one is chosen by --instances or --split
"""

from __future__ import annotations

import mmap
from pathlib import Path

from .coco import CocoChunk, coco_chunks
from .label_files import SPLITS, split_name, tell_splits
from .links import refuse_leaving
from .options import SourceOptions

ROBOFLOW = "_annotations.coco.json"


def is_coco(path: Path) -> bool:
    """Whether a file is one of instances, or a folder holds one."""
    return bool(find_instances(path))


def find_instances(path: Path) -> list[Path]:
    """The instances files of a folder, or the file itself."""
    if path.is_file():
        return [path] if path.suffix == ".json" and _looks_like_instances(path) else []
    found = [file for pattern in ("*.json", "annotations/*.json", f"*/{ROBOFLOW}") for file in path.glob(pattern)]
    return [file for file in sorted(set(found)) if not file.name.startswith(".") and _looks_like_instances(file)]


def open_coco(options: SourceOptions) -> list[CocoChunk]:
    """Units of a COCO set.

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
    splits = {file: _split_of(file, path) for file in files}
    if options.split is not None:
        files = [file for file in files if split_name(options.split) == split_name(splits[file])]
        if not files:
            known = ", ".join(sorted({split for split in splits.values() if split})) or "none"
            raise ValueError(f"{path} has no split {options.split}; it has {known}")
    if all(file.name == ROBOFLOW for file in files):
        chunks = {file.parent.name: _chunks(options, images or file.parent, file, prefixed=several) for file in files}
        tell_splits(path, {name: sum(chunk.weight for chunk in part) for name, part in chunks.items()})
        return [chunk for part in chunks.values() for chunk in part]
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise ValueError(f"{path} has several instances files, {names}; choose one by --instances")
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    return _chunks(options, images or folder, files[0])


def _chunks(options: SourceOptions, folder: Path, instances: Path, *, prefixed: bool = False) -> list[CocoChunk]:
    """Units of one file; those of Roboflow's have the names of their folders.

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
    """The split that a file is of by its folder or its name, as it is called there; "" for none."""
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    words = (*folders, *file.stem.replace("-", "_").split("_"))
    return next((word for word in words if word.lower() in SPLITS), "")


def _looks_like_instances(file: Path) -> bool:
    """Whether the words of an instances file stand in it, and not those of captions alone."""
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
