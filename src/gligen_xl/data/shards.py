"""Shards: latents and their table, as a pair of files with one latent shape (format version 1, see docs).

    NAME.safetensors   latents float16 (N, C, h, w), already scaled; header metadata says how they were made
    NAME.parquet       row i describes latents[i]

Latents are mapped into memory or read one by one, so a shard of any size costs a process next to nothing.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..limits import MAX_SETTINGS, memory_limit

FORMAT, VERSION = "gligen-xl-shard", "1"
MIRRORED = "-mirrored"  # after the id of an image, where the row shows its mirror image
DOWNSAMPLING = 8  # of every Stable Diffusion VAE, where a shard does not say otherwise
SDXL_VAE, SDXL_SCALING_FACTOR = "madebyollin/sdxl-vae-fp16-fix", "0.13025"  # SDXL's VAE, safe in half precision
METADATA_NUMBERS = {"resolution": int, "downsampling": int, "scaling_factor": float, "shift_factor": float}

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one image. Boxes are xyxy, 0-1, in the image that the latents show; sizes in pixels."""

    image_id: str
    caption: str
    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    phrases: list[str]
    original_height: int
    original_width: int
    crop_top: int = 0
    crop_left: int = 0


class Shard:
    """One pair of files, open for reading by row.

    Args:
        with_table: read the table now; else when a row is asked for.
    """

    def __init__(self, stem: str | Path, *, with_table: bool = True):
        self.stem = Path(stem)
        self._file = self.stem.with_name(self.stem.name + ".safetensors")
        self.table_file = self.stem.with_name(self.stem.name + ".parquet")
        for file in (self._file, self.table_file):
            if not file.is_file():
                raise FileNotFoundError(f"shard {self.stem} lacks {file.name}")
        self.metadata, self._shape, self._offset = read_header(self._file)
        if with_table:
            _ = self._table

    @cached_property
    def _table(self) -> pa.Table:
        return self.read_table()

    def read_table(self) -> pa.Table:
        """The whole table, checked.

        Raises:
            ValueError: it is not such a table, or does not fit the latents.
        """
        table = read_table(self.table_file)
        if len(table) != len(self):
            raise ValueError(f"shard {self.stem}: {len(self)} latents but {len(table)} rows in the table")
        return table

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def latents(self) -> np.ndarray:
        """(N, C, h, w) float16, mapped anew each time: a thousand shards hold no thousand files open."""
        return np.memmap(self._file, np.float16, mode="r", offset=self._offset, shape=self._shape)

    def read_latents(self, index: int, out: np.ndarray) -> None:
        """Latents of one row into `out`, (C, h, w) float16: what is read this way is no memory of the process."""
        file = self.open_latents()
        try:
            size = os.preadv(file, [out.data], self._offset + index * out.nbytes)
        except OSError as error:  # of the disk, which does not say of what file
            raise OSError(error.errno, error.strerror, str(self._file)) from error
        finally:
            os.close(file)
        if size != out.nbytes:
            raise OSError(f"{self._file} has become shorter since it was opened")

    def open_latents(self) -> int:
        """A descriptor of the file of latents, for the caller to close."""
        return os.open(self._file, os.O_RDONLY)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape[1:]

    @property
    def downsampling(self) -> int:
        """Image pixels a latent pixel, both ways."""
        return int(self.metadata.get("downsampling", DOWNSAMPLING))

    def row(self, index: int) -> Row:
        return Row(**self._table.slice(index, 1).to_pylist()[0])

    def rows(self, *columns: str) -> list[dict[str, Any]]:
        """Some columns of every row."""
        return self._table.select(columns).to_pylist()


def find_shards(folder: str | Path) -> list[Shard]:
    """Every shard of a folder, by name. Pairs are complete: a lone file is an error that names it."""
    return [Shard(stem) for stem in shard_stems(folder)]


def shard_stems(folder: str | Path) -> list[Path]:
    """What the files of a folder's shards are called, without their endings.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of shards")
    stems = sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in (".safetensors", ".parquet")})
    if not stems:
        raise FileNotFoundError(f"{folder} holds no shards (NAME.safetensors with NAME.parquet)")
    return stems


def read_table(path: Path) -> pa.Table:
    """A shard's table with the columns of `TABLE`, without a null in it.

    Raises:
        ValueError: not such a table; it names the column or the row.
    """
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
            column = table[name].cast(kind).combine_chunks()
        except pa.ArrowException as error:
            raise ValueError(f"{path}: column {name} is {table[name].type}; expected {kind}: {error}") from error
        _refuse_nulls(column, f"{path}: column {name}")
        columns.append(column)
    lengths = [_lengths(columns[TABLE.get_field_index(name)]) for name in ("boxes", "phrases", "scores")]
    if len(uneven := np.flatnonzero((lengths[0] != lengths[1]) | (lengths[0] != lengths[2]))):
        raise ValueError(f"{path}: row {uneven[0]} has unlike numbers of boxes, phrases and scores")
    return pa.table(columns, schema=TABLE)


def _read_within(file: pq.ParquetFile, path: Path, limit: int) -> pa.Table:
    """The columns of a table, where they take no more than `limit` bytes: values that repeat take next to nothing in
    the file. Texts are looked at as they are packed, or some rows at a time."""
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
    """Bytes of all texts, those that stand in a dictionary once counted as often as they are named."""
    total = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            lengths = pc.call_function("binary_length", [chunk.dictionary]).cast(pa.int64())
            total += pc.call_function("sum", [lengths.take(chunk.indices)]).as_py() or 0
        else:
            total += chunk.nbytes
    return total


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)


def _refuse_nulls(values: pa.Array, what: str) -> None:
    """Complain about a null, or one within the lists."""
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{what} has no value in {values.null_count} places, first in place {first}; fill them")
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        _refuse_nulls(pc.call_function("list_flatten", [values]), what + " (its lists, one after another)")


def read_header(path: Path, size: int | None = None) -> tuple[dict[str, str], tuple[int, int, int, int], int]:
    """Metadata, shape of the latents, and the byte where they begin.

    Args:
        size: bytes of the whole file, where `path` holds only its beginning.

    Raises:
        ValueError: not such a file, or not a shard; it names the file.
    """
    size = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a safetensors file, or only part of one")
        if length > MAX_SETTINGS:
            raise ValueError(f"{path} has a header of {length} bytes; expected at most {MAX_SETTINGS}")
        try:
            header = json.loads(file.read(length))
            entry, metadata = header["latents"], header["__metadata__"]
            kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} has no latents with metadata in its header: {error}") from error
    _check_metadata(path, metadata)
    if others := sorted(header.keys() - {"latents", "__metadata__"}):
        raise ValueError(f"{path} holds {', '.join(others)[:60]} beside its latents; expected nothing else")
    if kind != "F16" or not _are_counts(shape, 4) or 0 in shape[1:] or not _are_counts(offsets, 2):
        raise ValueError(
            f"{path} holds latents {kind!s:.60} {shape!s:.60}; expected F16 (N, C, h, w) and where they are"
        )
    begin, end = offsets
    if end - begin != 2 * math.prod(shape):
        raise ValueError(f"{path} holds latents {kind} {shape} in {end - begin} bytes; expected {2 * math.prod(shape)}")
    if 8 + length + end > size:
        raise ValueError(f"{path} is cut short: {size} bytes, its header asks for {8 + length + end}")
    return metadata, tuple(shape), 8 + length + begin  # type: ignore[return-value]


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has metadata {metadata!s:.60}; expected texts by name")
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        got = f"{metadata.get('format')} version {metadata.get('version')}"
        raise ValueError(f"{path} is {got}; this program reads {FORMAT} version {VERSION}")
    for name, kind in METADATA_NUMBERS.items():
        if name in metadata and not _is_number(metadata[name], kind, positive=name != "shift_factor"):
            what = "whole number" if kind is int else "number"
            raise ValueError(f"{path} says that {name} is {metadata[name]!r:.60}; expected a {what}")


def _is_number(text: str, kind: type[int] | type[float], *, positive: bool) -> bool:
    try:
        value = kind(text)
        return math.isfinite(value) and (value > 0 or not positive)
    except (ValueError, OverflowError):
        return False


def _are_counts(values: Any, number: int) -> bool:
    """Whether these are so many whole numbers that can be sizes or places."""
    return isinstance(values, list) and len(values) == number and all(type(n) is int and 0 <= n < 2**63 for n in values)
