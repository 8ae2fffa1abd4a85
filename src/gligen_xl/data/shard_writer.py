"""Writing shards: whole or not at all, batch by batch, the same bytes for the same contents. See `shards`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..io import partial_path, settle
from ..layout import validate
from .shards import FORMAT, TABLE_ENDINGS, VERSION, Row, latents_file, table_files
from .table import BATCH_ROWS, TABLE, arrow_writer


def write_shard(stem: str | Path, latents: np.ndarray, rows: Iterable[Row], metadata: Mapping[str, str]) -> None:
    """Write `stem`.safetensors and `stem`.arrow, each whole or not at all, latents first.

    Args:
        latents: (N, C, h, w) float16, finite.
        metadata: resolution, vae, scaling_factor.

    Raises:
        ValueError: the latents or a row cannot be trained on; names the row.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents are {latents.dtype} {latents.shape}; expected float16 (N, C, h, w)")
    with ShardWriter(stem, latents.shape[1:], metadata) as writer:
        writer.add(latents, list(rows))


class ShardWriter:
    """A shard that grows batch by batch, in bounded memory, and appears whole when the block ends without an error.

        with ShardWriter(stem, (4, 64, 64), metadata) as writer:
            writer.add(latents, rows)

    The same contents make the same files, byte for byte, however they are cut into batches.

    Args:
        latent_shape: (C, h, w).
        metadata: resolution, vae, scaling_factor.
    """

    def __init__(self, stem: str | Path, latent_shape: tuple[int, ...], metadata: Mapping[str, str]):
        self.stem, self.latent_shape, self.metadata = Path(stem), tuple(latent_shape), dict(metadata)
        self.count = 0
        self._rows: list[Row] = []
        self._places = [latents_file(self.stem), self.stem.with_name(self.stem.name + TABLE_ENDINGS[VERSION])]
        self._partials = [partial_path(place) for place in self._places]
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._latents = self._partials[0].open("wb")
            self._latents.write(self._header(0))  # reserves its place: the number of images comes last
            self._sink = pa.OSFile(str(self._partials[1]), "wb")
            self._table = arrow_writer(self._sink)
        except BaseException:
            self.discard()
            raise

    def add(self, latents: np.ndarray, rows: Sequence[Row]) -> None:
        """Add images: latents (n, C, h, w) float16, finite, and a row for each.

        Raises:
            ValueError: the latents or a row cannot be trained on; names the row.
        """
        if latents.shape[1:] != self.latent_shape or latents.dtype != np.float16:
            expected = ", ".join(map(str, ("N", *self.latent_shape)))
            raise ValueError(f"latents are {latents.dtype} {latents.shape}; expected float16 ({expected})")
        if len(latents) != len(rows):
            raise ValueError(f"{len(latents)} latents but {len(rows)} rows; each image needs both")
        if not np.isfinite(latents).all():
            bad = self.count + int(np.argwhere(~np.isfinite(latents))[0, 0])
            raise ValueError(f"latents of row {bad} hold NaN or infinity")
        for k, row in enumerate(rows, start=self.count):
            try:
                validate(row.phrases, row.boxes)
            except ValueError as error:
                raise ValueError(f"row {k} ({row.image_id}): {error}") from error
            if len(row.scores) != len(row.boxes):
                raise ValueError(f"row {k} ({row.image_id}): {len(row.scores)} scores but {len(row.boxes)} boxes")
        self._latents.write(np.ascontiguousarray(latents, "<f2").data)
        self.count += len(latents)
        self._rows += rows
        while len(self._rows) >= BATCH_ROWS:
            self._write_rows(BATCH_ROWS)

    def commit(self) -> None:
        """Move both files to their places, latents first. A former table goes before, so that it never stands beside
        other latents."""
        try:
            if self._rows:
                self._write_rows(len(self._rows))
            self._table.close()  # once: each time it writes the end of an Arrow file
            self._sink.close()
            self._latents.seek(0)
            self._latents.write(self._header(self.count))
            self._latents.close()
            for former in table_files(self.stem):
                former.unlink(missing_ok=True)
            for partial, place in zip(self._partials, self._places, strict=True):
                settle(partial, place)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what is not in its place yet."""
        for name in ("_latents", "_sink"):
            if hasattr(self, name):
                with suppress(OSError):  # a full disk does not matter for what is thrown away
                    getattr(self, name).close()
        for partial in self._partials:
            partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.commit() if kind is None else self.discard()

    def _write_rows(self, count: int) -> None:
        rows, self._rows = self._rows[:count], self._rows[count:]
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Row)}
        self._table.write_table(pa.table(columns, schema=TABLE))

    def _header(self, count: int) -> bytes:
        """Return the header of a safetensors file. It is equally long for any number of images, and the same for the
        same contents (the library's own writer orders metadata at random)."""
        metadata = dict(sorted({"format": FORMAT, "version": VERSION, **self.metadata}.items()))
        text, longest = (
            json.dumps({"__metadata__": metadata, "latents": self._entry(number)}).encode()
            for number in (count, 10**12)
        )
        length = -(-(8 + len(longest)) // 64) * 64 - 8  # the data begins at a multiple of 64
        return length.to_bytes(8, "little") + text.ljust(length)

    def _entry(self, count: int) -> dict[str, Any]:
        size = 2 * count * int(np.prod(self.latent_shape))
        return {"dtype": "F16", "shape": [count, *self.latent_shape], "data_offsets": [0, size]}
