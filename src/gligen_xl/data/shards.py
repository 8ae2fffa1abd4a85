"""Shards: latents and a table about them, as a pair of files with one latent shape. docs/data.md has the format.

    NAME.safetensors   latents float16 (N, C, h, w), already scaled; header metadata says how they were made
    NAME.arrow         row i describes latents[i] (in version 1 of the format: NAME.parquet)

Latents are mapped into memory or read one by one, so a shard of any size needs almost no memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..limits import MAX_SETTINGS
from .table import read_column, read_table

FORMAT, VERSION = "gligen-xl-shard", "2"  # of shards that are written
TABLE_ENDINGS = {"2": ".arrow", "1": ".parquet"}  # by version
MIRRORED = "-mirrored"  # after the id of an image, where the row shows its mirror image
DOWNSAMPLING = 8  # of every Stable Diffusion VAE, where a shard does not say otherwise
SDXL_VAE, SDXL_SCALING_FACTOR = "madebyollin/sdxl-vae-fp16-fix", "0.13025"  # SDXL's VAE, safe in half precision
METADATA_NUMBERS = {"resolution": int, "downsampling": int, "scaling_factor": float, "shift_factor": float}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The description of one image. Boxes are xyxy, 0-1, in the image that the latents show; sizes are pixels."""

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
        with_table: read the table now; otherwise it is read when a row is asked for.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, or is no shard.
    """

    def __init__(self, stem: str | Path, *, with_table: bool = True):
        self.stem = Path(stem)
        self._file = latents_file(self.stem)
        if not self._file.is_file():
            raise FileNotFoundError(f"shard {self.stem} lacks {self._file.name}")
        self._read_header(self._file)
        if not self.table_file.is_file():
            raise FileNotFoundError(f"shard {self.stem} lacks {self.table_file.name}")
        if with_table:
            _ = self._table

    def _read_header(self, path: Path, size: int | None = None) -> None:
        self.metadata, self._shape, self._offset = read_header(path, size)
        self.table_file = self.stem.with_name(self.stem.name + TABLE_ENDINGS[self.metadata["version"]])

    @cached_property
    def _table(self) -> pa.Table:
        return self.read_table()

    def read_table(self) -> pa.Table:
        """Read the whole table and check it.

        Raises:
            ValueError: it is damaged, or does not fit the latents.
        """
        table = read_table(self.table_file)
        self.check_rows(len(table))
        return table

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Read one column of the table. Nulls are not looked for."""
        return read_column(self.table_file, name)

    def check_rows(self, count: int) -> None:
        """Raise ValueError unless the table has a row for each of the latents."""
        if count != len(self):
            raise ValueError(f"shard {self.stem}: {len(self)} latents but {count} rows in the table")

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def latents(self) -> np.ndarray:
        """(N, C, h, w) float16, mapped anew each time, so that a thousand shards do not hold a thousand files open."""
        return np.memmap(self._file, np.float16, mode="r", offset=self._offset, shape=self._shape)

    def read_latents(self, index: int, out: np.ndarray) -> None:
        """Read the latents of one row into `out`, (C, h, w) float16, without adding to the memory of the process."""
        file = self.open_latents()
        try:
            size = os.preadv(file, [out.data], self._offset + index * out.nbytes)
        except OSError as error:  # an error of the disk does not name the file
            raise OSError(error.errno, error.strerror, str(self._file)) from error
        finally:
            os.close(file)
        if size != out.nbytes:
            raise OSError(f"{self._file} has become shorter since it was opened")

    def open_latents(self) -> int:
        """Return a descriptor of the file of latents, for the caller to close."""
        return os.open(self._file, os.O_RDONLY)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape[1:]

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        return int(self.metadata.get("downsampling", DOWNSAMPLING))

    def row(self, index: int) -> Row:
        return Row(**self._table.slice(index, 1).to_pylist()[0])

    def rows(self, *columns: str) -> list[dict[str, Any]]:
        """Return some columns of every row."""
        return self._table.select(columns).to_pylist()


def find_shards(folder: str | Path) -> list[Shard]:
    """Open every shard of a folder, in the order of their names. A lone file of a pair is an error that names it."""
    return [Shard(stem) for stem in shard_stems(folder)]


def shard_stems(folder: str | Path) -> list[Path]:
    """Return the paths of a folder's shards, without the endings of their files.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of shards")
    endings = (".safetensors", *TABLE_ENDINGS.values())
    stems = sorted({path.with_suffix("") for path in folder.iterdir() if path.suffix in endings})
    if not stems:
        raise FileNotFoundError(f"{folder} holds no shards (NAME.safetensors with NAME.arrow)")
    return stems


def latents_file(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def table_files(stem: Path) -> list[Path]:
    """Return where a shard's table may stand: a path for each version of the format."""
    return [stem.with_name(stem.name + ending) for ending in TABLE_ENDINGS.values()]


def has_shard(stem: Path) -> bool:
    """Tell whether both files of a shard are there; they are not opened."""
    return latents_file(stem).is_file() and any(table.is_file() for table in table_files(stem))


def remove_shard(stem: Path) -> None:
    """Remove the files of a shard, as far as they are there."""
    for file in (latents_file(stem), *table_files(stem)):
        file.unlink(missing_ok=True)


def read_header(path: Path, size: int | None = None) -> tuple[dict[str, str], tuple[int, int, int, int], int]:
    """Read the header of a file of latents: its metadata, the shape of the latents, and the byte where they begin.

    Args:
        size: bytes of the whole file, where `path` holds only its beginning.

    Raises:
        ValueError: the file is damaged, or no shard; names the file.
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
    if metadata.get("format") != FORMAT or metadata.get("version") not in TABLE_ENDINGS:
        got = f"{metadata.get('format')!s:.60} version {metadata.get('version')!s:.60}"
        raise ValueError(f"{path} is {got}; this program reads {FORMAT} versions {' and '.join(sorted(TABLE_ENDINGS))}")
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
    """Tell whether `values` are `number` whole numbers that can be sizes or places."""
    return isinstance(values, list) and len(values) == number and all(type(n) is int and 0 <= n < 2**63 for n in values)
