"""Tables with images inside, parquet or Arrow: read a few rows at a time, however large they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 4  # rows of parquet that are in memory at a time


@contextmanager
def _arrow(file: Path) -> Iterator[Any]:
    """An Arrow file, mapped into memory: a stream as `datasets` writes it, or one with an index."""
    with pa.memory_map(os.fspath(file)) as mapped:
        begin = mapped.read(6)
        mapped.seek(0)
        if begin == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            yield (reader.get_batch(k) for k in range(reader.num_record_batches)), reader.schema
        else:
            stream = pa.ipc.open_stream(mapped)
            yield iter(stream), stream.schema


def describe_table(file: Path) -> tuple[pa.Schema, int]:
    """Schema and number of rows of a table.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        if file.suffix == ".parquet":
            with closing(pq.ParquetFile(file)) as table:
                return table.schema_arrow, table.metadata.num_rows
        with _arrow(file) as (batches, schema):
            return schema, sum(batch.num_rows for batch in batches)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = "parquet" if file.suffix == ".parquet" else "Arrow"
        raise ValueError(f"{file} is not a readable {what} file: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def table_rows(file: Path, columns: Sequence[str], first: int, count: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Rows `first` to `first + count` of a table, one at a time.

    Raises:
        ValueError: the file is damaged, as far as that is noticed on the way.
    """
    try:
        if file.suffix == ".parquet":
            # Else it holds whole row groups, which are hundreds of megabytes of images.
            with closing(pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)) as table:
                yield islice(_rows_of(_parquet_batches(table, list(columns), first)), count)
        else:
            with _arrow(file) as (batches, _):
                yield islice(_rows_of(_behind(((b.num_rows, b.select(list(columns))) for b in batches), first)), count)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:300]}") from error


def _parquet_batches(table: pq.ParquetFile, columns: list[str], first: int) -> Iterator[pa.RecordBatch]:
    """Row groups that end before the first row are not read."""
    behind = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if behind + rows > first:
            batches = table.iter_batches(batch_size=BATCH, row_groups=[group], columns=columns, use_threads=False)
            yield from _behind(((len(batch), batch) for batch in batches), max(first - behind, 0))
        behind += rows


def _behind(batches: Iterator[tuple[int, pa.RecordBatch]], first: int) -> Iterator[pa.RecordBatch]:
    """Batches without their first rows."""
    for rows, batch in batches:
        if first < rows:
            yield batch.slice(first)
        first = max(first - rows, 0)


def _rows_of(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        batch.validate(full=True)  # what a hostile file says of its own lengths
        for k in range(batch.num_rows):
            yield batch.slice(k, 1).to_pylist()[0]
