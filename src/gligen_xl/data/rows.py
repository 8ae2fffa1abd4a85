"""Rows of shards by number, read from Arrow files that are mapped into memory.

Nothing is unpacked: a row is a few places in the file, found through the offsets of its columns. The system keeps pages
of the files in memory while it has room, and all processes share them.

A parquet table (version 1) is written once as an Arrow file of the user's cache. The name of that file tells which
table it was made from, so a table that changes makes another one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from .cache import cache_folder, is_kept, keep, remove_unused
from .shards import Row, Shard
from .table import BATCH_ROWS, arrow_writer, map_file, open_arrow, refuse_bad_rows

FOOTER = 2**14  # bytes at the end of a parquet file that are compared to tell it from others
MANY = 20  # parquet tables whose conversion takes long enough for a progress bar
PAIR, NUMBER = struct.Struct("<2i"), struct.Struct("<i")


def open_tables(shards: Sequence[Shard], cache: Path | None = None) -> list[MappedTable]:
    """Open the tables of shards for reading by row.

    Args:
        cache: folder for converted parquet tables; by default the user's cache. If it cannot be written, these tables
            are kept in memory.

    Raises:
        ValueError: a table is damaged, or does not fit its latents.
    """
    converted = _convert([shard for shard in shards if shard.table_file.suffix == ".parquet"], cache)
    return [MappedTable(converted.get(shard.table_file, shard.table_file), shard) for shard in shards]


class MappedTable:
    """The rows of one shard. When it is pickled, its rows stay behind: the file is mapped again.

    Args:
        source: an Arrow file, or the contents of one.
    """

    def __init__(self, source: Path | bytes, shard: Shard):
        self._source, self._name = source, shard.table_file
        batches = self._open()
        for batch in batches:
            refuse_bad_rows(batch, self._name)
        shard.check_rows(sum(batch.num_rows for batch in batches))

    def _open(self) -> list[pa.RecordBatch]:
        content = map_file(self._source) if isinstance(self._source, Path) else pa.py_buffer(self._source)
        batches = [batch for batch in open_arrow(content, self._name) if batch.num_rows]
        self._content = memoryview(content)
        self._starts = [0, *accumulate(batch.num_rows for batch in batches)]
        self._places = np.array([_places(batch, content.address) for batch in batches], np.int64)
        return batches

    def row(self, number: int) -> Row:
        """Read one row.

        Raises:
            ValueError: the file is damaged.
        """
        batch = bisect_right(self._starts, number) - 1
        try:
            return self._read(number - self._starts[batch], self._places[batch].tolist())
        except (struct.error, ValueError) as error:
            raise ValueError(f"{self._name} is damaged: row {number} cannot be read: {error}") from error

    def _read(self, k: int, places: list[int]) -> Row:
        """Read row `k` of the batch whose buffers begin at `places`."""
        content = self._content
        ids, id_text, captions, caption_text, box_lists, boxes, score_lists, scores, *rest = places
        phrase_lists, phrases, phrase_text, *numbers = rest
        (box, box_end), (score, _), (phrase, _) = (
            PAIR.unpack_from(content, lists + 4 * k) for lists in (box_lists, score_lists, phrase_lists)
        )
        count = box_end - box
        corners = iter(struct.unpack_from(f"<{4 * count}f", content, boxes + 16 * box))
        ends = struct.unpack_from(f"<{count + 1}i", content, phrases + 4 * phrase) if count else (0,)
        first = ends[0]
        text = bytes(content[phrase_text + first : phrase_text + ends[-1]])
        height, width, top, left = (NUMBER.unpack_from(content, place + 4 * k)[0] for place in numbers)
        return Row(
            image_id=_text(content, ids, id_text, k),
            caption=_text(content, captions, caption_text, k),
            boxes=list(zip(corners, corners, corners, corners, strict=True)),
            scores=list(struct.unpack_from(f"<{count}f", content, scores + 4 * score)),
            phrases=[text[begin - first : end - first].decode() for begin, end in pairwise(ends)],
            original_height=height,
            original_width=width,
            crop_top=top,
            crop_left=left,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "_name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _text(content: memoryview, offsets: int, texts: int, k: int) -> str:
    begin, end = PAIR.unpack_from(content, offsets + 4 * k)
    return str(content[texts + begin : texts + end], "utf-8")


def _places(batch: pa.RecordBatch, base: int) -> list[int]:
    """Return where the buffers of a batch, those of `_BUFFERS`, begin in the file that is mapped at `base`."""
    buffers = {name: column.buffers() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    chosen = [buffers[name][k] for name in batch.schema.names for k in _BUFFERS.get(name, (1,))]
    return [buffer.address - base if buffer else 0 for buffer in chosen]  # empty ones are not in the file


# Of each column the buffers that are read: 0 tells where it has nulls, then come the offsets of texts and lists, then
# the same of their items, and values last. Columns of numbers have buffer 1 alone.
_BUFFERS = {"image_id": (1, 2), "caption": (1, 2), "boxes": (1, 4), "scores": (1, 3), "phrases": (1, 3, 4)}


# Tables of version 1 ------------------------------------------------------------------------------------------------


def _convert(shards: Sequence[Shard], cache: Path | None) -> dict[Path, Path | bytes]:
    """Write parquet tables as Arrow files of the cache, unless they are there; return the file of each table.

    One process writes them, others wait. Where the cache cannot be written, the contents are returned instead.
    """
    folder = cache or cache_folder("tables")
    files = {shard.table_file: folder / f"{_key(shard)}.arrow" for shard in shards}
    try:
        if not all(map(is_kept, files.values())):  # which is looked at without the lock, by all processes at once
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                remove_unused(folder, "*.arrow", "*.rows")
                for shard in _progress(shards):
                    keep(files[shard.table_file], partial(_convert_to_file, shard))
        return {**files}
    except (OSError, NotImplementedError) as error:  # the latter from a disk without locks
        warnings.warn(f"the rows of {len(files)} parquet tables are kept in memory: {error}", stacklevel=3)
        contents = {}
        for shard in _progress(shards):
            sink = pa.BufferOutputStream()
            _write_arrow(shard, sink)
            contents[shard.table_file] = sink.getvalue().to_pybytes()
        return contents


def _convert_to_file(shard: Shard, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink:
        _write_arrow(shard, sink)


def _write_arrow(shard: Shard, sink: pa.NativeFile) -> None:
    with arrow_writer(sink) as writer:
        writer.write_table(shard.read_table(), max_chunksize=BATCH_ROWS)


def _progress(shards: Sequence[Shard]) -> Iterable[Shard]:
    return tqdm(shards, "reading tables", unit="shard", leave=False, disable=None if len(shards) > MANY else True)


def _key(shard: Shard) -> str:
    """Return a name for the contents of a parquet table: of its path, size, time, and its end, where the places and the
    extremes of its columns stand. (A copy may have the size and the time of the file that it replaced.)"""
    file, stat = shard.table_file, shard.table_file.stat()
    with file.open("rb") as opened:
        opened.seek(max(stat.st_size - FOOTER, 0))
        footer = hashlib.sha256(opened.read()).hexdigest()
    parts = [str(file.absolute()), len(shard), stat.st_size, stat.st_mtime_ns, footer]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
