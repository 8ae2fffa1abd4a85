"""Shards: latents and their table, as a pair of files with one latent shape (format version 1, see docs).

    NAME.safetensors   latents float16 (N, C, h, w), already scaled; header metadata says how they were made
    NAME.parquet       row i describes latents[i]

Reading maps the latents into memory, so a shard of any size costs a process only the pages that it touches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import whole_file
from ..layout import validate

FORMAT, VERSION = "gligen-xl-shard", "1"
DOWNSAMPLING = 8  # of every Stable Diffusion VAE, where a shard does not say otherwise

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
    """What is known of one picture. Boxes are xyxy, 0-1, in the picture that the latents show; sizes in pixels."""

    image_id: str
    caption: str
    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    phrases: list[str]
    original_height: int
    original_width: int
    crop_top: int = 0
    crop_left: int = 0


def write_shard(stem: str | Path, latents: np.ndarray, rows: Iterable[Row], metadata: Mapping[str, str]) -> None:
    """Write `stem`.safetensors and `stem`.parquet, each whole or not at all, latents first.

    Args:
        latents: (N, C, h, w) float16, finite.
        metadata: resolution, vae, scaling_factor.

    Raises:
        ValueError: latents or a row that cannot be trained on; it names the row.
    """
    stem, rows = Path(stem), list(rows)
    if latents.ndim != 4 or latents.dtype != np.float16:
        raise ValueError(f"latents are {latents.dtype} {latents.shape}; expected float16 (N, C, h, w)")
    if len(latents) != len(rows):
        raise ValueError(f"{len(latents)} latents but {len(rows)} rows; each picture needs both")
    if not np.isfinite(latents).all():
        raise ValueError(f"latents of row {int(np.argwhere(~np.isfinite(latents))[0, 0])} hold NaN or infinity")
    for k, row in enumerate(rows):
        try:
            validate(row.phrases, row.boxes)
        except ValueError as error:
            raise ValueError(f"row {k} ({row.image_id}): {error}") from error
        if len(row.scores) != len(row.boxes):
            raise ValueError(f"row {k} ({row.image_id}): {len(row.scores)} scores but {len(row.boxes)} boxes")
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Row)}
    table = pa.table(columns, schema=TABLE)
    with whole_file(stem.with_name(stem.name + ".safetensors")) as partial:
        _write_latents(partial, latents, {"format": FORMAT, "version": VERSION, **metadata})
    with whole_file(stem.with_name(stem.name + ".parquet")) as partial:
        pq.write_table(table, partial)


def _write_latents(path: Path, latents: np.ndarray, metadata: Mapping[str, str]) -> None:
    """A safetensors file, the same bytes for the same contents: the library's own writer orders metadata by chance."""
    entry = {"dtype": "F16", "shape": list(latents.shape), "data_offsets": [0, latents.nbytes]}
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), "latents": entry}).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        np.ascontiguousarray(latents, "<f2").tofile(file)


class Shard:
    """One pair of files, open for reading by row."""

    def __init__(self, stem: str | Path):
        self.stem = Path(stem)
        latents_file = self.stem.with_name(self.stem.name + ".safetensors")
        table_file = self.stem.with_name(self.stem.name + ".parquet")
        for file in (latents_file, table_file):
            if not file.is_file():
                raise FileNotFoundError(f"shard {self.stem} lacks {file.name}")
        self.metadata, self._shape, self._offset = _read_header(latents_file)
        self._file = latents_file
        try:
            table = pq.read_table(table_file, memory_map=True).combine_chunks()
        except pa.ArrowException as error:
            raise ValueError(f"{table_file} is not a readable parquet file: {error}") from error
        if missing := set(TABLE.names) - set(table.column_names):
            raise ValueError(f"{table_file} lacks the columns {sorted(missing)}")
        if len(table) != self._shape[0]:
            raise ValueError(f"shard {self.stem}: {self._shape[0]} latents but {len(table)} rows in the table")
        self._table = table.select(TABLE.names)
        lengths = [
            pc.call_function("list_value_length", [table[name]]).to_numpy() for name in ("boxes", "phrases", "scores")
        ]
        if len(uneven := np.flatnonzero((lengths[0] != lengths[1]) | (lengths[0] != lengths[2]))):
            raise ValueError(f"{table_file}: row {uneven[0]} has unlike numbers of boxes, phrases and scores")

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def latents(self) -> np.ndarray:
        """(N, C, h, w) float16, mapped anew each time: a thousand shards hold no thousand files open."""
        return np.memmap(self._file, np.float16, mode="r", offset=self._offset, shape=self._shape)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape[1:]

    @property
    def downsampling(self) -> int:
        """Picture pixels a latent pixel, both ways."""
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


def _read_header(path: Path) -> tuple[dict[str, str], tuple[int, int, int, int], int]:
    """Metadata, shape of the latents, and the byte where they begin.

    A memory map from there is four times as fast at random as reading slices.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file, or only part of one")
        try:
            header = json.loads(file.read(length))
            entry, metadata = header["latents"], header["__metadata__"]
            begin, end = entry["data_offsets"]
            kind, shape = entry["dtype"], tuple(entry["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no latents with metadata in its header: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        got = f"{metadata.get('format')} version {metadata.get('version')}"
        raise ValueError(f"{path} is {got}; this program reads {FORMAT} version {VERSION}")
    if kind != "F16" or len(shape) != 4 or end - begin != 2 * int(np.prod(shape)):
        raise ValueError(f"{path} holds latents {kind} {shape}; expected F16 (N, C, h, w)")
    if 8 + length + end > size:
        raise ValueError(f"{path} is cut short: {size} bytes, its header asks for {8 + length + end}")
    return metadata, shape, 8 + length + begin
