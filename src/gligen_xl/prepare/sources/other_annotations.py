"""Files of annotations that nothing here reads: known by what they hold, so that none is passed over in silence."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..settings import WORK_FOLDER
from .paths import read_head

# Endings of files that describe images, in programs of this field.
ENDINGS = (
    ".json", ".jsonl", ".ndjson", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".parquet", ".arrow", ".tfrecord",
    ".tfrecords", ".record", ".mat",
)  # fmt: skip
HEAD = 2**16  # bytes by which a file is known
_CONVERT = "export it as COCO, YOLO or Pascal VOC from the program that made it, or by supervision or labelme2coco"


def find_unread(folder: Path, other_uses: Sequence[Path] = ()) -> Path | None:
    """The first file of annotations below a folder of images; hidden ones and folders of shards are left out.

    Args:
        other_uses: files and folders that are of other use.
    """
    exempt = {os.path.realpath(path) for path in other_uses}
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(where, name)) not in exempt  # noqa: PTH118
            and not os.path.isdir(os.path.join(where, name, WORK_FOLDER))  # noqa: PTH112, PTH118
        )
        for name in sorted(names):
            file = Path(where, name)
            if name.startswith(".") or not name.lower().endswith(ENDINGS) or os.path.realpath(file) in exempt:
                continue
            return file
    return None


def describe(file: Path) -> str:
    """What a file seems to hold, and what can be done with it."""
    ending = file.suffix.lower()
    if ending == ".xml":
        return _describe_xml(_head(file))
    if ending in (".json", ".jsonl", ".ndjson"):
        return _describe_json(_head(file))
    if ending in (".csv", ".tsv"):
        return (
            "a table; boxes are written as rows of metadata.jsonl, captions as .jsonl or .parquet for --captions; or "
            f"{_CONVERT}"
        )
    if ending in (".parquet", ".arrow"):
        return "a table without images; rows about files are called metadata.parquet, captions go by --captions"
    if ending in (".yaml", ".yml"):
        return "YAML without names of classes; YOLO's data.yaml has names"
    if ending in (".tfrecord", ".tfrecords", ".record", ".mat"):
        return f"not a format that is read here; {_CONVERT}"
    return ""


def _head(file: Path) -> str:
    return read_head(file, HEAD).decode("utf-8", "replace")


def _describe_xml(head: str) -> str:
    if re.search(r"<annotations\b", head):
        return f"CVAT's own XML, or one like it; {_CONVERT}"
    return f"XML that is none of Pascal VOC; {_CONVERT}"


def _describe_json(head: str) -> str:
    def has(*keys: str) -> bool:
        return all(re.search(rf'"{key}"\s*:', head) for key in keys)

    if has("shapes") and (has("imagePath") or has("flags")):
        return f"LabelMe; {_CONVERT}"
    if "_via_" in head or has("regions", "shape_attributes") or has("regions", "file_attributes"):
        return f"VGG Image Annotator (VIA); {_CONVERT}"
    if has("coordinates") and (has("annotations") or has("annotation")):
        return f"CreateML; {_CONVERT}"
    if has("annotations", "result") or has("completions", "result"):
        return f"Label Studio's own JSON; {_CONVERT}"
    if has("images", "annotations") or has("annotations", "categories"):
        return "COCO, as it seems; name it by --instances, or captions by --captions"
    if has("objects", "classTitle"):
        return f"Supervisely; {_CONVERT}"
    return "JSON of no known form; rows about files are called metadata.jsonl"
