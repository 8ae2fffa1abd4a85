"""Files of annotations that nothing here reads: known by what they hold, so that none is passed over in silence."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..settings import WORK_FOLDER
from .paths import read_head

HEAD = 2**16  # bytes by which a file is known
_CONVERT = "export it as COCO, YOLO or Pascal VOC from the program that made it, or by supervision or labelme2coco"

_TABLE = "a table; boxes are written as rows of metadata.jsonl, captions as .jsonl or .parquet for --captions; or "
_TABLE += _CONVERT
_IMAGELESS = "a table without images; rows about files are called metadata.parquet, captions go by --captions"
_YAML = "YAML without names of classes; YOLO's data.yaml has names"
_OTHER_FORMAT = f"not a format that is read here; {_CONVERT}"
_OTHER_JSON = "JSON of no known form; rows about files are called metadata.jsonl"
_OTHER_XML = f"XML that is none of Pascal VOC; {_CONVERT}"

# Endings of files that describe images, in programs of this field; and what such a file seems to be.
_BY_ENDING = {
    ".json": _OTHER_JSON, ".jsonl": _OTHER_JSON, ".ndjson": _OTHER_JSON, ".xml": _OTHER_XML, ".csv": _TABLE,
    ".tsv": _TABLE, ".yaml": _YAML, ".yml": _YAML, ".parquet": _IMAGELESS, ".arrow": _IMAGELESS,
    ".tfrecord": _OTHER_FORMAT, ".tfrecords": _OTHER_FORMAT, ".record": _OTHER_FORMAT, ".mat": _OTHER_FORMAT,
}  # fmt: skip

# Keys that are all in the begin of a JSON file, and what it then is; the first that fits.
_BY_KEYS = [
    ({"shapes", "imagePath"}, f"LabelMe; {_CONVERT}"),
    ({"shapes", "flags"}, f"LabelMe; {_CONVERT}"),
    ({"regions", "shape_attributes"}, f"VGG Image Annotator (VIA); {_CONVERT}"),
    ({"regions", "file_attributes"}, f"VGG Image Annotator (VIA); {_CONVERT}"),
    ({"coordinates", "annotations"}, f"CreateML; {_CONVERT}"),
    ({"coordinates", "annotation"}, f"CreateML; {_CONVERT}"),
    ({"annotations", "result"}, f"Label Studio's own JSON; {_CONVERT}"),
    ({"completions", "result"}, f"Label Studio's own JSON; {_CONVERT}"),
    ({"images", "annotations"}, "COCO, as it seems; name it by --instances, or captions by --captions"),
    ({"annotations", "categories"}, "COCO, as it seems; name it by --instances, or captions by --captions"),
    ({"objects", "classTitle"}, f"Supervisely; {_CONVERT}"),
]


def find_unread(folder: Path, other_uses: Sequence[Path] = ()) -> Path | None:
    """Return the first file of annotations below a folder of images; not hidden ones, nor those in folders of shards.

    Args:
        other_uses: files and folders that are of other use.
    """
    exempt = {os.path.realpath(path) for path in other_uses}
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(Path(where, name)) not in exempt
            and not Path(where, name, WORK_FOLDER).is_dir()
        )
        for name in sorted(names):
            hidden = name.startswith(".") or not name.lower().endswith(tuple(_BY_ENDING))
            if not hidden and os.path.realpath(file := Path(where, name)) not in exempt:
                return file
    return None


def describe(file: Path) -> str:
    """Say what a file seems to hold, and what can be done with it; empty if that is not known."""
    ending = file.suffix.lower()
    description = _BY_ENDING.get(ending, "")
    head = read_head(file, HEAD).decode("utf-8", "replace") if description in (_OTHER_JSON, _OTHER_XML) else ""
    if description == _OTHER_XML and re.search(r"<annotations\b", head):
        return f"CVAT's own XML, or one like it; {_CONVERT}"
    if "_via_" in head and description == _OTHER_JSON:
        return f"VGG Image Annotator (VIA); {_CONVERT}"
    if description == _OTHER_JSON:
        keys = set(re.findall(r'"(\w+)"\s*:', head))
        return next((text for needed, text in _BY_KEYS if needed <= keys), description)
    return description
