"""Columns of a table with images inside: which holds the images, which the objects, and what its classes are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...images.decode import ENDINGS
from .objects import BOX_KEYS, NAME_KEYS, SCORE_KEYS
from .rows import CAPTION_KEYS

IMAGE_KEYS = ("image", "img", "picture", "photo", "pixel_values", *ENDINGS)
ID_KEYS = ("image_id", "id", "__key__")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a file are used.

    Args:
        objects: the column of objects; empty where boxes are columns of their own, or there are none.
        flat: those columns. names: of classes by number, where the file describes them.
        others: ids, captions, sizes.
    """

    image: str
    objects: str = ""
    flat: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        return [self.image, *([self.objects] if self.objects else []), *self.flat, *self.others]


def columns_of(file: Path, schema: pa.Schema) -> Columns:
    """The columns of a file that are used.

    Raises:
        ValueError: none holds images, or that of objects is of another form.
    """
    image = image_column(schema)
    if image is None:
        raise ValueError(
            f"{file} has the columns {', '.join(schema.names)[:200]}, and none of images; expected image (bytes, or "
            "bytes and path) and objects (bbox, category), as datasets writes them"
        )
    nested = [name for name in schema.names if _holds_boxes(schema.field(name).type)]
    objects = next((name for name in ("objects", *nested) if name in nested), "")
    if not objects and "objects" in schema.names:
        kind = schema.field("objects").type
        raise ValueError(f"{file}: objects is {kind}; expected bbox and category in it, one of {', '.join(BOX_KEYS)}")
    flat = () if objects else tuple(key for key in (*BOX_KEYS, *NAME_KEYS, *SCORE_KEYS) if key in schema.names)
    if not any(key in BOX_KEYS for key in flat):
        flat = ()
    features = _features(schema)
    said = features.get(objects) if objects else {key: features.get(key) for key in flat}
    others = (*ID_KEYS, *CAPTION_KEYS, "width", "height", "box_format")
    return Columns(
        image=image,
        objects=objects,
        flat=flat,
        names=_class_names(said),
        others=tuple(key for key in others if key in schema.names and key not in (image, objects, *flat)),
    )


def image_column(schema: pa.Schema) -> str | None:
    """The column that is described as one of images, or is called so."""
    features = _features(schema)
    said = [name for name in schema.names if isinstance(f := features.get(name), dict) and f.get("_type") == "Image"]
    called = [name for name in IMAGE_KEYS if name in schema.names and _may_hold_image(schema.field(name).type)]
    return next(iter([*said, *called]), None)


def _may_hold_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_boxes(kind: pa.DataType) -> bool:
    while _is_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and any(kind.get_field_index(key) >= 0 for key in BOX_KEYS)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` notes of the columns, in the file itself; nothing where it is lacking or broken."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    """Names of the classes of objects, however versions of `datasets` nest them."""
    feature = _within(feature)
    if not isinstance(feature, dict):
        return ()
    for key in NAME_KEYS:
        names = inner.get("names") if isinstance(inner := _within(feature.get(key)), dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def _within(feature: Any) -> Any:
    for _ in range(8):
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        elif isinstance(feature, dict) and "feature" in feature and "_type" in feature:
            feature = feature["feature"]
        else:
            break
    return feature
