"""Objects of an image as Hugging Face's sets hold them: a dictionary of lists, or a list of dictionaries.

{"bbox": [[x, y, w, h], ...], "category": ["cat", ...]}
[{"bbox": [x, y, w, h], "category": "cat"}, ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
NAME_KEYS = (
    "categories", "category", "phrases", "phrase", "labels", "label", "class_name", "class_names", "classes", "class",
    "names", "name", "category_name", "category_id", "category_ids", "class_id",
)  # fmt: skip
SCORE_KEYS = ("scores", "score", "confidence")


def read_objects(objects: Any) -> tuple[Any, Any, Any] | None:
    """Boxes, names and scores, a list each; names or scores are None where there are none. None for another form.

    Of several keys of names one whose values are texts is taken before one of numbers.
    """
    if isinstance(objects, Mapping):
        columns: Mapping[str, Any] = objects
    elif isinstance(objects, list) and all(isinstance(entry, Mapping) for entry in objects):
        if not objects:
            return [], [], None
        columns = {key: [entry.get(key) for entry in objects] for key in objects[0]}
    else:
        return None
    boxes = _chosen(columns, BOX_KEYS)
    if boxes is None:
        return None
    names = columns.get(key) if (key := name_key(columns)) else None
    scores = columns.get(key) if (key := _chosen(columns, SCORE_KEYS)) else None
    return columns[boxes], names, scores


def name_key(columns: Mapping[str, Any]) -> str | None:
    """The key of the names of objects, where there is one."""
    keys = [key for key in NAME_KEYS if columns.get(key) is not None]
    texts = [key for key in keys if isinstance(columns[key], list) and any(isinstance(v, str) for v in columns[key])]
    return next(iter([*texts, *keys]), None)


def _chosen(columns: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if columns.get(key) is not None), None)
