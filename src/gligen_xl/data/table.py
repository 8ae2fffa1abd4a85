"""The table of a shard: its columns, and reading them from an Arrow file (version 2) or a parquet file (version 1).

An Arrow file is mapped into memory, where its columns are used as they lie. A parquet file has to be unpacked.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..io import reading
from ..limits import memory_limit

TABLE = pa.schema(
    [
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
        ("phrases", pa.list_(pa.string())),
        ("original_height", pa.int32()),
        ("original_width", pa.int32()),
        ("crop_top", pa.int32()),
        ("crop_left", pa.int32()),
    ]
)
BATCH_ROWS = 1024  # rows of a batch in an Arrow file
BEGIN, END = b"ARROW1\0\0", b"ARROW1"  # of an Arrow file; a stream of messages stands between them


def read_table(path: Path) -> pa.Table:
    """Read the columns of `TABLE`, without a null in them.

    Raises:
        ValueError: the file is no such table; names the column or the row.
    """
    table = pa.Table.from_batches(open_arrow(map_file(path), path), TABLE) if _is_arrow(path) else _read_parquet(path)
    for name in TABLE.names:
        _validate(table[name], path)
    refuse_bad_rows(table, path)
    return table


def refuse_bad_rows(table: pa.Table | pa.RecordBatch, path: Path) -> None:
    """Raise ValueError for nulls, and for a row with unlike numbers of boxes, phrases and scores."""
    for name in TABLE.names:
        _refuse_nulls(table.column(name), f"{path}: column {name}")
    boxes, phrases, scores = (list_lengths(table.column(name)) for name in ("boxes", "phrases", "scores"))
    if len(unlike := np.flatnonzero((boxes != phrases) | (boxes != scores))):
        raise ValueError(f"{path}: row {unlike[0]} has unlike numbers of boxes, phrases and scores")


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Read one column of a table. Nulls are not looked for.

    Raises:
        ValueError: the file is no such table.
    """
    if _is_arrow(path):
        column = pa.Table.from_batches(open_arrow(map_file(path), path), TABLE)[name]
        _validate(column, path)
        return column
    try:
        return pq.ParquetFile(path, memory_map=True).read([name])[name].cast(TABLE.field(name).type)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable table of a shard: {error}") from error


def flatten(lists: Any) -> Any:
    """Return the items of a column of lists, one after another."""
    return pc.call_function("list_flatten", [lists])


def list_lengths(lists: Any) -> np.ndarray:
    """Return how many items each list of a column has."""
    return pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)


def _is_arrow(path: Path) -> bool:
    return path.suffix == ".arrow"


def _validate(column: pa.ChunkedArray, path: Path) -> None:
    """Raise where offsets lead out of the file, or a text is not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _refuse_nulls(values: Any, what: str) -> None:
    """Raise for a null, or one within the lists."""
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{what} has no value in {values.null_count} places, first in place {first}; fill them")
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        _refuse_nulls(flatten(values), what + " (its lists, one after another)")


# Arrow --------------------------------------------------------------------------------------------------------------


def map_file(path: Path) -> pa.Buffer:
    """Map a file into memory; no descriptor of it stays open."""
    with reading(path, "a readable Arrow file"), pa.memory_map(str(path)) as file:
        return file.read_buffer()


def arrow_writer(sink: pa.NativeFile) -> pa.ipc.RecordBatchFileWriter:
    """Open an Arrow file for writing, uncompressed as it is to be mapped. The same batches make the same bytes."""
    return pa.ipc.new_file(sink, TABLE)


def open_arrow(content: pa.Buffer, path: Path) -> list[pa.RecordBatch]:
    """Return the batches of rows in an Arrow file, as they lie in `content`.

    Raises:
        ValueError: it is no Arrow file, has other columns than `TABLE`, or is compressed.
    """
    with reading(path, "a readable Arrow file"):
        if content.slice(0, len(BEGIN)) != BEGIN or content.slice(max(content.size - len(END), 0)) != END:
            raise ValueError("its begin or its end is missing")
        reader = pa.ipc.open_stream(content.slice(len(BEGIN)))
        if not reader.schema.equals(TABLE):
            raise ValueError(f"{path} has the columns {_described(reader.schema)}; expected {_described(TABLE)}")
        # Compression is looked for before a batch is opened: unpacked, it may have any size.
        _, *messages = pa.ipc.MessageReader.open_stream(content.slice(len(BEGIN)))
        if any(message.type != "record batch" or _is_compressed(message.metadata) for message in messages):
            raise ValueError(f"{path} is compressed; expected an Arrow file that can be mapped into memory")
        batches = list(reader)
        for batch in batches:
            batch.validate()  # the ends of its buffers
        return batches


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:300]


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Tell whether the metadata of a record batch name a compression.

    They are a flatbuffer (Arrow's format/Message.fbs), which pyarrow has verified: field 2 of a Message is its
    RecordBatch, whose field 3 is the compression.
    """
    content = memoryview(metadata)

    def number(place: int, size: int) -> int:
        return int.from_bytes(content[place : place + size], "little")

    def field(table: int, which: int) -> int | None:
        vtable = table - int.from_bytes(content[table : table + 4], "little", signed=True)
        entry = 4 + 2 * which
        offset = number(vtable + entry, 2) if entry < number(vtable, 2) else 0
        return table + offset if offset else None

    header = field(number(0, 4), 2)
    return header is not None and field(header + number(header, 4), 3) is not None


# Parquet ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> pa.Table:
    """Read a table, also where the types of its columns are spelled otherwise (as large strings or doubles)."""
    try:
        schema = pq.read_schema(path)
        if missing := set(TABLE.names) - set(schema.names):
            raise ValueError(f"{path} lacks the columns {sorted(missing)}")
        texts = [name for name in ("image_id", "caption") if pa.types.is_string(schema.field(name).type)]
        file = pq.ParquetFile(path, memory_map=True, read_dictionary=texts)
        table = _read_within(file, path, memory_limit(path.stat().st_size))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    columns = []
    for name, kind in zip(TABLE.names, TABLE.types, strict=True):
        try:
            columns.append(table[name].cast(kind).combine_chunks())
        except pa.ArrowException as error:
            raise ValueError(f"{path}: column {name} is {table[name].type}; expected {kind}: {error}") from error
    return pa.table(columns, schema=TABLE)


def _read_within(file: pq.ParquetFile, path: Path, limit: int) -> pa.Table:
    """Read the columns of a table that takes no more than `limit` bytes of memory: in the file, values that repeat take
    next to nothing. Texts are measured while they are packed, or some rows at a time."""
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    number = sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
    if number > limit // 4:
        raise ValueError(f"{path} unpacks to {number} values; expected at most {limit // 4} in a file of its size")
    table = file.read(columns=[name for name in TABLE.names if name != "phrases"])
    size, batches = sum(_text_bytes(table[name]) for name in ("image_id", "caption")), []
    for batch in chain(file.iter_batches(batch_size=256, columns=["phrases"]), [None]):
        if size > limit:
            raise ValueError(f"{path} unpacks to {size} bytes of text; expected at most {limit} in a file of its size")
        if batch is not None:
            batches.append(batch)
            size += batch.nbytes
    phrases = pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field("phrases")]))
    return table.append_column("phrases", phrases["phrases"])


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes of all texts; one that stands in a dictionary counts as often as it is used."""
    total = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            lengths = pc.call_function("binary_length", [chunk.dictionary]).cast(pa.int64())
            total += pc.call_function("sum", [lengths.take(chunk.indices)]).as_py() or 0
        else:
            total += chunk.nbytes
    return total
