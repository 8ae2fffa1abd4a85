"""Rows of a file that describe images, some thousand at a time: metadata.jsonl, metadata.parquet, layouts."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...io import decode_text
from ..file_stats import files_identity
from ..item import Item, Skipped, unique
from .rows import (
    NOT_UTF8,
    RowError,
    check_first,
    clean,
    file_within,
    item_or_why_not,
    read_annotation,
    read_row,
    text_id,
)

METADATA = ("metadata.jsonl", "metadata.parquet")
PATH_KEYS = {"imagefolder": "file_name", "layouts": "image"}

# Rows are read with their number in the file, from 1; a broken one comes as its error.
_Rows = Iterator[tuple[int, Mapping[str, Any] | RowError]]


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
        said = {"kind": self.kind, "file": self.file.name, "box_format": self.box_format, **numbers}
        return said | {"images": files_identity(self.file.parent, self._paths())}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def rows(self) -> _Rows:
        return _parquet_rows(self) if self.file.suffix == ".parquet" else _jsonl_rows(self)

    def _paths(self) -> Iterator[str]:
        """What the rows name; nothing of a row that is broken."""
        key = PATH_KEYS[self.kind]
        for _, row in _parquet_rows(self, [key]) if self.file.suffix == ".parquet" else _jsonl_rows(self):
            path = "" if isinstance(row, RowError) else row.get(key)
            yield path if isinstance(path, str) else ""

    def item(self, number: int, row: Mapping[str, Any] | RowError) -> Item:
        """The image of a row.

        Raises:
            RowError, ImageError, OSError: as `file_within` and `read_annotation`.
        """
        if isinstance(row, RowError):
            raise row
        path = file_within(self.file.parent, row.get(PATH_KEYS[self.kind]))
        # The width and height of a layout are those of the image to be generated.
        known = read_annotation(row, path, self.box_format, with_size=self.kind != "layouts")
        return Item(
            image_id=self.image_id(number, row),
            image=path,
            done=number - self.first,
            where=self.where(number),
            **vars(known),
        )

    def where(self, number: int) -> str:
        return f"{self.file}, row {number}"

    def image_id(self, number: int, row: Mapping[str, Any] | RowError) -> str:
        """What the row calls itself, or its path without the ending; for a broken row, where it stands."""
        said = {} if isinstance(row, RowError) else row
        given = next((said[key] for key in ("image_id", "id") if said.get(key) is not None), None)
        if (name := text_id(given)) is not None:
            return clean(name)
        path = said.get(PATH_KEYS[self.kind])
        if isinstance(path, str) and path.strip():
            return clean(os.path.splitext(path)[0])  # noqa: PTH122, a Path would change what it does not know
        return f"{self.file.name} row {number}"

    def _items(self) -> Iterator[Item | Skipped]:
        for number, row in self.rows():
            image_id, where = self.image_id(number, row), self.where(number)
            yield item_or_why_not(partial(self.item, number, row), image_id, number - self.first, where)


def row_chunks(file: Path, name: str, kind: str, box_format: str | None, unit_size: int) -> list[RowChunk]:
    """Units of `unit_size` rows each, of a file that is read through once.

    Raises:
        ValueError: it holds no rows.
    """
    shared = {"kind": kind, "file": file, "box_format": box_format}
    if file.suffix == ".parquet":
        chunks = _parquet_chunks(file, name, shared, unit_size)
    else:
        chunks = _jsonl_chunks(file, name, shared, unit_size)
    if not chunks:
        raise ValueError(f"{file} holds no rows; expected one of each image")
    return chunks


def check_rows(chunks: list[RowChunk]) -> None:
    """Raises ValueError where the first rows have a fault that all have, see `check_first`."""
    check_first(
        (chunk.where(number), partial(chunk.item, number, row)) for chunk in chunks for number, row in chunk.rows()
    )


def _jsonl_chunks(file: Path, name: str, shared: Mapping[str, Any], unit_size: int) -> list[RowChunk]:
    chunks: list[RowChunk] = []
    offset = start = count = first = 0
    digest = hashlib.sha256()

    def close() -> None:
        place = {"first": first, "count": count, "offset": start, "sha256": digest.hexdigest()}
        chunks.append(RowChunk(name=f"{name}-{len(chunks):05d}", **shared, **place))

    with file.open("rb") as lines:
        _check_encoding(file, lines.read(4))
        lines.seek(0)
        for line in lines:
            if count == unit_size:
                close()
                start, first, count, digest = offset, first + count, 0, hashlib.sha256()
            offset += len(line)
            if line.strip():
                count += 1
                digest.update(line)
    if count:
        close()
    return chunks


def _check_encoding(file: Path, first: bytes) -> None:
    """Refuse UTF-16 and UTF-32 as a whole: there, a line has no end that can be found."""
    if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in first:
        try:
            decode_text(first)
        except ValueError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _jsonl_rows(chunk: RowChunk) -> _Rows:
    with chunk.file.open("rb") as file:
        file.seek(chunk.offset)
        lines = (line for line in file if line.strip())
        for number, line in enumerate(islice(lines, chunk.count), start=chunk.first + 1):
            try:
                yield number, read_row(line)
            except RowError as error:
                yield number, error


def _parquet_chunks(file: Path, name: str, shared: Mapping[str, Any], unit_size: int) -> list[RowChunk]:
    try:
        total = pq.read_metadata(file).num_rows
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    with file.open("rb") as contents:
        sha256 = hashlib.file_digest(contents, "sha256").hexdigest()
    return [
        RowChunk(
            name=f"{name}-{k:05d}",
            first=first,
            count=min(unit_size, total - first),
            offset=0,
            sha256=sha256,
            **shared,
        )
        for k, first in enumerate(range(0, total, unit_size))
    ]


def _parquet_rows(chunk: RowChunk, columns: list[str] | None = None) -> _Rows:
    """Row groups that end before the chunk are not read.

    Args:
        columns: that are read; by default all.
    """
    table = pq.ParquetFile(chunk.file)
    end, behind = chunk.first + chunk.count, 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if behind + rows > chunk.first and behind < end:
            number = behind
            for batch in table.iter_batches(batch_size=128, row_groups=[group], columns=columns):
                low, high = max(chunk.first - number, 0), min(end - number, len(batch))
                if low < high:
                    yield from enumerate(_python_rows(batch.slice(low, high - low)), start=number + low + 1)
                number += len(batch)
        behind += rows


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | RowError]:
    """Rows as Python's values. A column of strings may hold bytes that are no UTF-8: then row by row."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_python_row(batch.slice(k, 1)) for k in range(len(batch))]


def _python_row(batch: pa.RecordBatch) -> dict[str, Any] | RowError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(NOT_UTF8, f"a text of its holds {error.object[:40]!r}; expected UTF-8")
