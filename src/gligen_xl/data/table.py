"""The rows of many shards, by number, without their tables in memory.

When a dataset is opened, its parquet tables are written once into one file of the cache, row after row; reading a row
is then two reads of that one open file, and of what it holds only what is asked for becomes Python objects. The file's
name tells which tables it was made of, so a table that changes makes another one.

    row by row:  checksum (CRC-32) of the row and its number                      uint32
                 number of boxes, original height and width, crop top and left    5 x int32
                 x0, y0, x1, y1, score of each box                                5 x float32
                 image id, caption and phrases in UTF-8, with a byte 0xFF between
    at the end:  where each row begins, and where the last one ends               (rows + 1) x int64
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from tqdm import tqdm

from ..io import whole_file
from .shards import Row, Shard

FORM = "2"
HEAD = struct.Struct("<5i")
PLACE = struct.Struct("<2q")
CHECK = struct.Struct("<I")
BETWEEN = b"\xff"  # no byte of UTF-8
FOOTER = 2**14  # bytes at the end of a table that are looked at, to tell it from others
SMALL = 2_000_000  # bytes of parquet that stay in memory
MANY = 20  # shards, whose tables take long enough for a progress bar
UNUSED = 30  # days, after which a file of the cache goes


def cache_folder(name: str) -> Path:
    """Where files are kept that can be made again: GLIGEN_XL_CACHE, or the user's own cache."""
    if root := os.environ.get("GLIGEN_XL_CACHE"):
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gligen-xl" / name


class Record:
    """One row as it stands in the file."""

    __slots__ = ("_bytes", "count", "crop_left", "crop_top", "original_height", "original_width")

    def __init__(self, content: bytes):
        self._bytes = content
        head = HEAD.unpack_from(content)
        self.count, self.original_height, self.original_width, self.crop_top, self.crop_left = head

    @property
    def boxes(self) -> np.ndarray:
        """(count, 5) float32: x0, y0, x1, y1, score."""
        return np.frombuffer(self._bytes, "<f4", 5 * self.count, HEAD.size).reshape(-1, 5)

    @property
    def texts(self) -> list[bytes]:
        """Image id, caption, and `count` phrases, in UTF-8."""
        return self._bytes[HEAD.size + 20 * self.count :].split(BETWEEN)


class Table:
    """The rows of shards, one shard after another.

    Args:
        shards: their tables are read, and checked, the first time.
        cache: folder for the file; by default the user's cache. One that cannot be written costs memory instead.

    Raises:
        ValueError: a table that is not one, or does not fit its latents.
    """

    def __init__(self, shards: Sequence[Shard], cache: Path | None = None):
        self.rows = sum(len(shard) for shard in shards)
        self._file: io.FileIO | None = None
        self._content = b""
        stats = [shard.table_file.stat() for shard in shards]
        if sum(stat.st_size for stat in stats) <= SMALL:
            self._content = _in_memory(shards)
        else:
            names = [(str(shard.table_file.absolute()), len(shard)) for shard in shards]
            parts = [
                (*name, stat.st_size, stat.st_mtime_ns, _footer(shard.table_file))
                for name, stat, shard in zip(names, stats, shards, strict=True)
            ]
            key = hashlib.sha256(json.dumps([FORM, parts]).encode()).hexdigest()
            self._path = (cache or cache_folder("tables")) / f"{key}.rows"
            try:
                _make(self._path, shards)
                if not _is_whole(self._path, self.rows):
                    self._path.unlink(missing_ok=True)
                    _make(self._path, shards)
                self._file = io.FileIO(self._path)
            except (OSError, NotImplementedError) as error:  # the latter of a disk without locks
                warnings.warn(f"the table of {self.rows} rows is kept in memory: {error}", stacklevel=2)
                self._content = _in_memory(shards)
        size = os.fstat(self._file.fileno()).st_size if self._file else len(self._content)
        self._places = size - 8 * (self.rows + 1)

    def record(self, number: int) -> Record:
        """One row.

        Raises:
            ValueError: the file of the cache was damaged since it was made; it is removed.
        """
        begin, end = PLACE.unpack(self._read(self._places + 8 * number, PLACE.size))
        whole = 0 <= begin <= end - CHECK.size - HEAD.size and end <= self._places
        content = self._read(begin, end - begin) if whole else b""
        if not whole or CHECK.unpack_from(content)[0] != zlib.crc32(content[CHECK.size :], number):
            self._path.unlink(missing_ok=True)
            raise ValueError(f"{self._path} of the cache is damaged and was removed; the same command makes it again")
        return Record(content[CHECK.size :])

    def row(self, number: int) -> Row:
        record = self.record(number)
        texts, numbers = [text.decode() for text in record.texts], record.boxes.tolist()
        return Row(
            image_id=texts[0],
            caption=texts[1],
            boxes=[tuple(box[:4]) for box in numbers],
            scores=[box[4] for box in numbers],
            phrases=texts[2 : 2 + record.count],
            original_height=record.original_height,
            original_width=record.original_width,
            crop_top=record.crop_top,
            crop_left=record.crop_left,
        )

    def _read(self, begin: int, size: int) -> bytes:
        if self._file is None:
            return self._content[begin : begin + size]
        try:
            content = os.pread(self._file.fileno(), size, begin)  # forked processes share the file's own place
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if len(content) != size:
            raise OSError(f"{self._path} has become shorter since it was opened")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None if self._file is None else self._file.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = None if state["_file"] is None else io.FileIO(state["_file"])


def _footer(file: Path) -> str:
    """A checksum of the end of a parquet file, where the places and the least and largest values of its columns are: a
    copy may have the size and the time of what it took the place of."""
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - FOOTER, 0))
        return hashlib.sha256(opened.read()).hexdigest()


def _make(path: Path, shards: Sequence[Shard]) -> None:
    """The file, if it is not there yet: one process makes it, the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if not path.exists():
            remove_unused(path.parent, "*.rows")
            with whole_file(path) as partial, partial.open("wb") as file:
                _write(file, shards)
        mark_used(path)


def _is_whole(path: Path, rows: int) -> bool:
    """Whether the file is as long as its places say: rows are checked when they are read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 8 * (rows + 1):
            return False
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(8), "little") == size - 8 * (rows + 1)


def remove_unused(folder: Path, *patterns: str) -> None:
    """Remove files that were not used for `UNUSED` days, and what killed processes left."""
    oldest = time.time() - UNUSED * 24 * 3600
    for file in [file for pattern in (*patterns, ".*.partial") for file in folder.glob(pattern)]:
        with suppress(OSError):
            status = file.stat()
            if max(status.st_atime, status.st_mtime) < oldest:
                file.unlink()


def mark_used(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _in_memory(shards: Sequence[Shard]) -> bytes:
    file = io.BytesIO()
    _write(file, shards)
    return file.getvalue()


def _write(file: BinaryIO, shards: Sequence[Shard]) -> None:
    """Rows and their places; of the tables one is in memory at a time."""
    places, done = np.zeros(sum(map(len, shards)) + 1, "<i8"), 0
    for shard in tqdm(
        shards, "reading tables", unit="shard", leave=False, disable=None if len(shards) > MANY else True
    ):
        records = _records(shard.read_table())
        first = done
        lengths = np.array([CHECK.size + len(record) for record in records], "<i8")
        places[done + 1 : done + 1 + len(shard)] = places[done] + np.cumsum(lengths)
        done += len(shard)
        checked = (CHECK.pack(zlib.crc32(record, first + k)) + record for k, record in enumerate(records))
        file.write(b"".join(checked))
    file.write(places.data)


def _records(table: pa.Table) -> list[bytes]:
    counts = pc.call_function("list_value_length", [table["boxes"]]).to_numpy()
    names = ("original_height", "original_width", "crop_top", "crop_left")
    heads = np.column_stack([counts, *(table[name].to_numpy() for name in names)]).astype("<i4").tobytes()
    corners = _flat(_flat(table["boxes"])).to_numpy().reshape(-1, 4)
    boxes = np.column_stack([corners, _flat(table["scores"]).to_numpy()]).astype("<f4").tobytes()
    joined = pc.call_function("binary_join", [table["phrases"].cast(pa.list_(pa.binary())), pa.scalar(BETWEEN)])
    columns = [table[name].cast(pa.binary()) for name in ("image_id", "caption")]
    texts = pc.call_function("binary_join_element_wise", [*columns, joined, pa.scalar(BETWEEN)]).to_pylist()
    ends = 20 * np.cumsum(counts)
    records = zip(range(0, len(heads), HEAD.size), (ends - 20 * counts).tolist(), ends.tolist(), texts, strict=True)
    return [heads[k : k + HEAD.size] + boxes[begin:end] + text for k, begin, end, text in records]


def _flat(lists: Any) -> Any:
    return pc.call_function("list_flatten", [lists])
