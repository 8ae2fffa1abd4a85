"""Which images of the training's own data are kept out of it, for validation.

They follow from the image ids alone: those with the smallest hashes. So they are the same each time, on every process,
and whatever else the run does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .shards import MIRRORED, Shard
from .streaming import RemoteShard

FEWEST = 10  # images, of which a source has to have so many before one is held out
MOST = 500  # images that are held out of a source
LOOKED_AT = 20_000  # rows: of larger sources some shards alone are looked at
LOOKED_AT_REMOTE = 2 * MOST  # of shards that are fetched: one or two serve for all validations


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Of one source.

    Args:
        rows: those that are held out, by number of the shard; sorted.
        images: how many these show. of: how many images were looked at to choose them.
    """

    rows: dict[int, np.ndarray]
    images: int
    of: int


def hold_out(shards: Sequence[Shard], share: float) -> HeldOut:
    """Choose the images of a source that are held out: `share` of all, but at least one and at most `MOST`.

    An image is held out with all of its rows: its mirror image, and another row of the same id. Of sources of less than
    `FEWEST` images nothing is.

    Args:
        shards: of the source; their tables are read.
        share: 0 for none.
    """
    total = sum(len(shard) for shard in shards)
    remote = any(isinstance(shard, RemoteShard) for shard in shards)
    limit, chosen, seen = LOOKED_AT_REMOTE if remote else LOOKED_AT, [], 0
    for k in sorted(range(len(shards)), key=lambda k: _hash(shards[k].stem.name.partition(".")[0])):
        if share > 0 and len(shards[k]) and (seen < limit or (total <= LOOKED_AT and not remote)):
            chosen.append(k)
            seen += len(shards[k])
    ids = {k: [image_of(name) for name in _image_ids(shards[k])] for k in chosen}
    images = {name for names in ids.values() for name in names}
    if len(images) < FEWEST:
        return HeldOut(rows={}, images=0, of=len(images))
    wanted = min(max(round(share * len(images) * total / seen), 1), MOST, len(images) // 2)
    out = {*sorted(images, key=_hash)[:wanted]}
    rows = {k: np.flatnonzero([name in out for name in names]) for k, names in ids.items()}
    return HeldOut(rows={k: found for k, found in rows.items() if len(found)}, images=wanted, of=len(images))


def image_of(image_id: str) -> str:
    """The id of the image that a row shows, mirrored or not."""
    return image_id.removesuffix(MIRRORED)


def digest(parts: Sequence[HeldOut], shards: Sequence[Sequence[Shard]]) -> str:
    """Of all that is held out of several sources, to know it again: 16 hexadecimal digits."""
    content = hashlib.sha256()
    for held, of_source in zip(parts, shards, strict=True):
        for k, rows in sorted(held.rows.items()):
            ids = _image_ids(of_source[k])
            content.update("\n".join([str(k), *(ids[row] for row in rows)]).encode(errors="surrogatepass"))
    return content.hexdigest()[:16]


def _image_ids(shard: Shard) -> list[str]:
    try:
        column = pq.ParquetFile(shard.table_file, memory_map=True).read(["image_id"])["image_id"]
        return [name or "" for name in column.cast(pa.string()).to_pylist()]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{shard.table_file} is not a readable table of a shard: {error}") from error


def _hash(name: str) -> bytes:
    return hashlib.sha256(b"held out " + name.encode(errors="surrogatepass")).digest()
