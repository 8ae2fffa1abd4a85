"""Tables of images, some thousand rows at a time: metadata.jsonl, metadata.parquet, layouts."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...io import checksum, decode_text
from ..file_stats import files_identity
from ..item import Item, Skipped, unique
from .paths import without_ending
from .rows import (
    NOT_UTF8,
    RowError,
    check_first,
    clean,
    file_within,
    first_value,
    item_or_skipped,
    read_annotation,
    read_row,
    text_id,
)

METADATA = ("metadata.jsonl", "metadata.parquet")
PATH_KEYS = {"imagefolder": "file_name", "layouts": "image"}

Row = Mapping[str, Any] | RowError  # a broken row is its error


@dataclass(frozen=True, kw_only=True)
class RowChunk:
    """Consecutive rows of a JSONL or parquet file, and the images they name.

    Args:
        kind: "imagefolder" or "layouts".
        first: number of its first row, from 0. count: of rows.
        offset: byte where its first line begins, in JSONL.
        sha256: of its lines, or of the whole parquet file.
    """

    name: str
    kind: str
    file: Path
    box_format: str | None
    first: int
    count: int
    offset: int
    sha256: str

    @property
    def weight(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        numbers = {"bytes": self.file.stat().st_size, "first": self.first, "count": self.count, "sha256": self.sha256}
        values = {"kind": self.kind, "file": self.file.name, "box_format": self.box_format, **numbers}
        return values | {"images": files_identity(self.file.parent, self._paths())}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def _items(self) -> Iterator[Item | Skipped]:
        for number, row in self._rows():
            read = partial(self._item, number, row)
            yield item_or_skipped(read, self._id(number, row), number - self.first, self._where(number))

    def readers(self) -> Iterator[tuple[str, partial[Item]]]:
        """Yield where each row is written, and what reads it."""
        return ((self._where(number), partial(self._item, number, row)) for number, row in self._rows())

    def _rows(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
        """Give rows with their number in the file, from 1.

        Args:
            columns: of parquet, that are read; by default all.
        """
        if self.file.suffix == ".parquet":
            with pq.ParquetFile(self.file) as table:
                batches = parquet_batches(table, columns, self.first, self.count, batch_size=128)
                yield from enumerate((row for batch in batches for row in _python_rows(batch)), start=self.first + 1)
            return
        with self.file.open("rb") as file:
            file.seek(self.offset)
            lines = (line for line in file if line.strip())
            for number, line in enumerate(islice(lines, self.count), start=self.first + 1):
                try:
                    yield number, read_row(line)
                except RowError as error:
                    yield number, error

    def _paths(self) -> Iterator[str]:
        """Give what the rows name; nothing for a row that is broken."""
        key = PATH_KEYS[self.kind]
        for _, row in self._rows([key]):
            path = "" if isinstance(row, RowError) else row.get(key)
            yield path if isinstance(path, str) else ""

    def _item(self, number: int, row: Row) -> Item:
        """Read the image of a row.

        Raises:
            RowError, ImageError, OSError: as `file_within` and `read_annotation`.
        """
        if isinstance(row, RowError):
            raise row
        path = file_within(self.file.parent, row.get(PATH_KEYS[self.kind]))
        # The width and height of a layout are those of the image to be generated.
        annotation = read_annotation(row, path, self.box_format, with_size=self.kind != "layouts")
        done, where = number - self.first, self._where(number)
        return Item(image_id=self._id(number, row), image=path, done=done, where=where, **vars(annotation))

    def _where(self, number: int) -> str:
        return f"{self.file}, row {number}"

    def _id(self, number: int, row: Row) -> str:
        """Return what the row calls itself, or its path without the ending; for a broken row, where it is written."""
        values = {} if isinstance(row, RowError) else row
        if (name := text_id(first_value(values, ("image_id", "id")))) is not None:
            return clean(name)
        path = values.get(PATH_KEYS[self.kind])
        if isinstance(path, str) and path.strip():
            return clean(without_ending(path))
        return f"{self.file.name} row {number}"


def row_chunks(file: Path, name: str, kind: str, box_format: str | None, unit_size: int) -> list[RowChunk]:
    """Cut a file, which is read through once, into units of `unit_size` rows.

    Raises:
        ValueError: it holds no rows, or the first rows have a fault that all have, see `check_first`.
    """
    cut = _cut_parquet if file.suffix == ".parquet" else _cut_jsonl
    chunks = [
        RowChunk(name=f"{name}-{k:05d}", kind=kind, file=file, box_format=box_format, **place)
        for k, place in enumerate(cut(file, unit_size))
    ]
    if not chunks:
        raise ValueError(f"{file} holds no rows; expected one of each image")
    check_first(reader for chunk in chunks for reader in chunk.readers())
    return chunks


def _cut_jsonl(file: Path, unit_size: int) -> Iterator[dict[str, Any]]:
    offset = start = count = first = 0
    digest = hashlib.sha256()
    with file.open("rb") as lines:
        _check_encoding(file, lines.read(4))
        lines.seek(0)
        for line in lines:
            if count == unit_size:
                yield {"first": first, "count": count, "offset": start, "sha256": digest.hexdigest()}
                start, first, count, digest = offset, first + count, 0, hashlib.sha256()
            offset += len(line)
            if line.strip():
                count += 1
                digest.update(line)
    if count:
        yield {"first": first, "count": count, "offset": start, "sha256": digest.hexdigest()}


def _check_encoding(file: Path, first: bytes) -> None:
    """Refuse UTF-16 and UTF-32 as a whole: there, a line has no end that can be found."""
    if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in first:
        try:
            decode_text(first)
        except ValueError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _cut_parquet(file: Path, unit_size: int) -> Iterator[dict[str, Any]]:
    try:
        total = pq.read_metadata(file).num_rows
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    sha256 = checksum(file)
    for first in range(0, total, unit_size):
        yield {"first": first, "count": min(unit_size, total - first), "offset": 0, "sha256": sha256}


def parquet_batches(
    table: pq.ParquetFile, columns: Sequence[str] | None, first: int, count: int, *, batch_size: int
) -> Iterator[pa.RecordBatch]:
    """Give rows `first` to `first + count`. Row groups outside of these are not read."""
    begin = 0
    for group in range(table.num_row_groups):
        end = begin + table.metadata.row_group(group).num_rows
        if end > first and begin < first + count:
            batches = table.iter_batches(batch_size, row_groups=[group], columns=columns, use_threads=False)
            yield from sliced(batches, first - begin, first + count - begin)
        begin = end


def sliced(batches: Iterator[pa.RecordBatch], begin: int, end: int) -> Iterator[pa.RecordBatch]:
    """Give what batches have of the rows from `begin` to `end`."""
    for batch in batches:
        low, high = max(begin, 0), min(end, batch.num_rows)
        if low < high:
            yield batch.slice(low, high - low)
        begin, end = begin - batch.num_rows, end - batch.num_rows
        if end <= 0:
            return


def _python_rows(batch: pa.RecordBatch) -> list[Row]:
    """Convert rows to Python's values: one by one if the texts of a column are not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [RowError(NOT_UTF8, f"a text of its holds {error.object[:40]!r}; expected UTF-8")]
        return [row for k in range(len(batch)) for row in _python_rows(batch.slice(k, 1))]
