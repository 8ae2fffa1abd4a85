"""Images of the training's own data that are held out of it, for validation.

They are those whose ids have the smallest hashes. So they are the same each time and in every process, whatever else
the run does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .shards import MIRRORED, Shard
from .streaming import RemoteShard

FEWEST = 10  # images a source must have for one of them to be held out
MOST = 500  # images that are held out of a source
SEARCHED = 20_000  # rows: of a larger source, some shards alone are searched
SEARCHED_REMOTE = 2 * MOST  # rows of shards that are fetched: one or two shards serve for all validations


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The images that are held out of one source.

    Args:
        rows: their rows, by number of the shard; sorted.
        images: how many images these rows show.
        of: how many images they were chosen from.
    """

    rows: dict[int, np.ndarray]
    images: int
    of: int


def hold_out(shards: Sequence[Shard], share: float) -> HeldOut:
    """Choose the images of a source that are held out: `share` of all, but at least one and at most `MOST`.

    All rows of an image are held out together: its mirror image, and other rows of the same id. A source of fewer than
    `FEWEST` images holds none out.

    Args:
        shards: those of the source; their tables are read.
        share: 0 for none.
    """
    total = sum(len(shard) for shard in shards)
    remote = any(isinstance(shard, RemoteShard) for shard in shards)
    limit, chosen, seen = SEARCHED_REMOTE if remote else SEARCHED, [], 0
    for k in sorted(range(len(shards)), key=lambda k: _hash(shards[k].stem.name.partition(".")[0])):
        if share > 0 and len(shards[k]) and (seen < limit or (total <= SEARCHED and not remote)):
            chosen.append(k)
            seen += len(shards[k])
    ids = {k: [image_of(name) for name in _image_ids(shards[k])] for k in chosen}
    images = {name for names in ids.values() for name in names}
    if len(images) < FEWEST:
        return HeldOut(rows={}, images=0, of=len(images))
    count = min(max(round(share * len(images) * total / seen), 1), MOST, len(images) // 2)
    out = {*sorted(images, key=_hash)[:count]}
    rows = {k: np.flatnonzero([name in out for name in names]) for k, names in ids.items()}
    return HeldOut(rows={k: some for k, some in rows.items() if len(some)}, images=count, of=len(images))


def image_of(image_id: str) -> str:
    """Return the id of the image that a row shows, mirrored or not."""
    return image_id.removesuffix(MIRRORED)


def digest(parts: Sequence[HeldOut], shards: Sequence[Sequence[Shard]]) -> str:
    """Return a checksum of everything that is held out of several sources, 16 hexadecimal digits."""
    content = hashlib.sha256()
    for held, of_source in zip(parts, shards, strict=True):
        for k, rows in sorted(held.rows.items()):
            ids = _image_ids(of_source[k])
            content.update("\n".join([str(k), *(ids[row] for row in rows)]).encode(errors="surrogatepass"))
    return content.hexdigest()[:16]


def _image_ids(shard: Shard) -> list[str]:
    return [name or "" for name in shard.read_column("image_id").to_pylist()]


def _hash(name: str) -> bytes:
    return hashlib.sha256(b"held out " + name.encode(errors="surrogatepass")).digest()
