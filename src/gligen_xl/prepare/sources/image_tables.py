"""Tables with images inside, parquet or Arrow: their columns, and their rows, a few at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...images.decode import ENDINGS
from .rows import BOX_KEYS, CAPTION_KEYS, NAME_KEYS, SCORE_KEYS
from .tables import parquet_batches, sliced

BATCH = 4  # rows of parquet that are in memory at a time
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
    """Choose the columns of a file that are used.

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
    described = features.get(objects) if objects else {key: features.get(key) for key in flat}
    others = (*ID_KEYS, *CAPTION_KEYS, "width", "height", "box_format")
    return Columns(
        image=image,
        objects=objects,
        flat=flat,
        names=_class_names(described),
        others=tuple(key for key in others if key in schema.names and key not in (image, objects, *flat)),
    )


def image_column(schema: pa.Schema) -> str | None:
    """Return the column that is described as one of images, or is named so."""
    features = _features(schema)
    described = [
        name for name in schema.names if isinstance(f := features.get(name), dict) and f.get("_type") == "Image"
    ]
    named = [name for name in IMAGE_KEYS if name in schema.names and _may_hold_image(schema.field(name).type)]
    return next(iter([*described, *named]), None)


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
    """Read what `datasets` notes of the columns, in the file itself; nothing if it is missing or broken."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of the classes of objects, however versions of `datasets` nest them."""
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


# Rows ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _open_arrow(file: Path) -> Iterator[tuple[Iterator[pa.RecordBatch], pa.Schema]]:
    """Map an Arrow file into memory: a stream as `datasets` writes it, or one with an index."""
    with pa.memory_map(os.fspath(file)) as mapped:
        begin = mapped.read(6)
        mapped.seek(0)
        if begin == b"ARROW1":
            reader: Any = pa.ipc.open_file(mapped)
            yield (reader.get_batch(k) for k in range(reader.num_record_batches)), reader.schema
        else:
            stream = pa.ipc.open_stream(mapped)
            yield iter(stream), stream.schema


def describe_table(file: Path) -> tuple[pa.Schema, int]:
    """Read the schema and the number of rows of a table.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        if file.suffix == ".parquet":
            with closing(pq.ParquetFile(file)) as table:
                return table.schema_arrow, table.metadata.num_rows
        with _open_arrow(file) as (batches, schema):
            return schema, sum(batch.num_rows for batch in batches)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = "parquet" if file.suffix == ".parquet" else "Arrow"
        raise ValueError(f"{file} is not a readable {what} file: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def table_rows(file: Path, columns: Sequence[str], first: int, count: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Give rows `first` to `first + count` of a table, one at a time.

    Raises:
        ValueError: the file is damaged, as far as that is noticed on the way.
    """
    try:
        if file.suffix == ".parquet":
            # Without these arguments it holds whole row groups, which are hundreds of megabytes of images.
            with closing(pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)) as table:
                yield _python_rows(parquet_batches(table, list(columns), first, count, batch_size=BATCH))
        else:
            with _open_arrow(file) as (batches, _):
                yield _python_rows(sliced((batch.select(list(columns)) for batch in batches), first, first + count))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:300]}") from error


def _python_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        batch.validate(full=True)  # what a hostile file says of its own lengths
        for k in range(batch.num_rows):
            yield batch.slice(k, 1).to_pylist()[0]
