"""Shards of a hub dataset or of S3-like storage, read through a local cache of bounded size.

    hf://datasets/OWNER/NAME/FOLDER      s3://BUCKET/FOLDER      any other URL that fsspec knows

Tables, and the headers of latents, are fetched when the folder is opened; latents when a sample of the shard is first
asked for, or in a thread before the training comes to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
from filelock import FileLock
from fsspec.registry import known_implementations
from tqdm import tqdm

from ..io import whole_file
from ..manifest import checksum
from ..redact import redacted
from .cache import BoundedCache, checksum_file, is_as_fetched
from .shards import Shard, read_header
from .table import cache_folder, mark_used, remove_unused

CHUNK = 8 * 2**20  # bytes fetched at once
HEADER = 2**16  # bytes that hold almost any header
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further try
AT_ONCE = 4  # tables that are fetched
IDENTITY = ("ETag", "etag", "sha256", "oid", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime")


def is_remote(data: str | Path) -> bool:
    return isinstance(data, str) and "://" in data


def open_remote(url: str, cache_bytes: int, folder: Path | None = None) -> list[RemoteShard]:
    """The shards that stand at a URL, their tables and headers fetched.

    Args:
        cache_bytes: what their latents may take of the disk, those of other URLs in the same cache included.
        folder: the cache; by default the user's.

    Raises:
        FileNotFoundError: nothing there, or one file of a pair.
        ValueError: no such kind of storage, or a shard that is larger than the cache.
        OSError: the network fails again and again.
    """
    files = _list(url)
    cache = BoundedCache(folder or cache_folder("shards"), cache_bytes)
    shown = redacted(url)
    place = cache.folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', shown).strip('-')[-40:]}-{_hash(shown)}"
    place.mkdir(parents=True, exist_ok=True)
    remove_unused(place, "*.parquet", "*.header", "*.parquet.sha256", "*.header.sha256")
    names = sorted({name.rpartition(".")[0] for name in files})
    for name in names:
        for ending in ("safetensors", "parquet"):
            if f"{name}.{ending}" not in files:
                raise FileNotFoundError(f"shard {name} of {shown} lacks {name}.{ending}")
        if (size := files[f"{name}.safetensors"].size) > cache_bytes:
            raise ValueError(
                f"shard {name} of {shown} has {size / 1e9:.2f} GB, the cache {cache_bytes / 1e9:.2f} GB; give it "
                "room for two shards at least (cache_gb)"
            )
    with FileLock(place / ".lock"), ThreadPoolExecutor(AT_ONCE) as pool:
        shards = pool.map(lambda n: _open_shard(cache, place, files[n + ".safetensors"], files[n + ".parquet"]), names)
        return list(tqdm(shards, desc=f"tables of {shown}", total=len(names), unit="shard", leave=False, disable=None))


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int  # bytes
    identity: str  # another one when the contents change

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The contents, or some of them, piece by piece. A failing network is tried again where it failed.

        Raises:
            FileNotFoundError, PermissionError: at once.
            OSError: it fails as often as there are `PAUSES` and once more, without any progress.
        """
        stop, pauses = self.size if stop is None else min(stop, self.size), iter(PAUSES)
        while start < stop:
            try:
                system, path = _file_system(self.url)
                with system.open(path, "rb") as source:
                    source.seek(start)
                    while start < stop and (chunk := source.read(min(CHUNK, stop - start))):
                        start, pauses = start + len(chunk), iter(PAUSES)
                        yield chunk
                if start < stop:
                    raise OSError(f"it ends after {start} bytes of {self.size}")
            except Exception as error:  # each kind of storage has its own
                _pause_or_raise(error, pauses, self.url)


class RemoteShard(Shard):
    """A shard whose table and header are here, and whose latents come when they are wanted."""

    def __init__(self, cache: BoundedCache, stem: Path, latents: RemoteFile):
        self.stem, self._cache, self._remote = stem, cache, latents
        self._file, self.table_file = (stem.with_name(f"{stem.name}.{ending}") for ending in ("safetensors", "parquet"))
        header = stem.with_name(stem.name + ".header")
        try:
            self.metadata, self._shape, self._offset = read_header(header, latents.size)
        except ValueError as error:
            raise ValueError(f"{redacted(latents.url)}: {error}") from error

    @property
    def bytes(self) -> int:
        """Of the file of latents."""
        return self._remote.size

    @property
    def latents(self) -> np.ndarray:
        with os.fdopen(self.open_latents(), "rb") as file:
            return np.memmap(file, np.float16, mode="r", offset=self._offset, shape=self._shape)

    def open_latents(self) -> int:
        return self._cache.open(self._file, self._remote.size, self._fetch)

    def _fetch(self, place: Path) -> None:
        with place.open("r+b") as file:
            for chunk in self._remote.chunks():
                file.write(chunk)


# Fetching -----------------------------------------------------------------------------------------------------------


def _list(url: str) -> dict[str, RemoteFile]:
    """The files of shards at a URL, by name."""
    entries, files = _ask(url, lambda system, path: system.ls(path, detail=True)), {}
    for entry in entries:
        path = PurePosixPath(entry["name"])
        if entry["type"] == "file" and path.suffix in (".safetensors", ".parquet") and not path.name.startswith("."):
            file = f"{url.rstrip('/')}/{path.name}"
            identity = _identity(entry) or _identity(_ask(file, lambda system, path: system.info(path)))
            files[path.name] = RemoteFile(file, int(entry["size"]), identity)
    if not files:
        raise FileNotFoundError(f"{redacted(url)} holds no shards (NAME.safetensors with NAME.parquet)")
    return files


def _identity(facts: Mapping[str, Any]) -> str:
    return next((str(facts[name]) for name in IDENTITY if facts.get(name)), "")


def _ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """What the storage of a URL answers; asked again where the network fails."""
    pauses = iter(PAUSES)
    while True:
        try:
            return question(*_file_system(url))
        except Exception as error:  # each kind of storage has its own
            _pause_or_raise(error, pauses, url)


def _file_system(url: str) -> tuple[Any, str]:
    """The storage of a URL, and the path there. fsspec keeps storages, and makes new ones after a fork."""
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        advice = f"pip install {package}" if package else str(error)
        raise ValueError(f"{redacted(url)} cannot be read yet: {advice}") from error
    except ValueError as error:
        reason = redacted(str(error), of=url)
        raise ValueError(f"{redacted(url)}: there is no storage of the kind {protocol}://: {reason}") from error


def _pause_or_raise(error: Exception, pauses: Iterator[float], url: str) -> None:
    """Wait before the next try; or raise, if that will not help or was done often enough."""
    if isinstance(error, FileNotFoundError | PermissionError | ValueError):
        if (said := redacted(str(error), of=url)) == str(error):
            raise error
        kinds = (FileNotFoundError, PermissionError, ValueError)
        raise next(kind for kind in kinds if isinstance(error, kind))(said) from None
    if (pause := next(pauses, None)) is None:
        reason = redacted(" ".join(str(error).split()), of=url) or type(error).__name__
        raise OSError(
            f"{redacted(url)} could not be fetched, tried {len(PAUSES) + 1} times: {reason}; the same command tries "
            "again"
        ) from error
    time.sleep(pause)


def _open_shard(cache: BoundedCache, place: Path, latents: RemoteFile, table: RemoteFile) -> RemoteShard:
    """Table and header are fetched, unless they are here. A changed file is another one, with another name."""
    name = PurePosixPath(latents.url).stem
    identity = _hash(json.dumps([(file.size, file.identity or _ends(file)) for file in (latents, table)]))
    stem = place / f"{name}.{identity}"
    _keep(stem.with_name(stem.name + ".parquet"), table.chunks, table.size)
    _keep(stem.with_name(stem.name + ".header"), lambda: _header(latents))
    return RemoteShard(cache, stem, latents)


def _ends(file: RemoteFile) -> str:
    """What tells a file from another one of its size, where the storage does not: a checksum of both its ends."""
    begin = b"".join(file.chunks(0, HEADER))
    end = b"".join(file.chunks(max(file.size - HEADER, HEADER)))
    return hashlib.sha256(begin + end).hexdigest()


def _header(latents: RemoteFile) -> Iterator[bytes]:
    start = b"".join(latents.chunks(0, HEADER))
    yield start
    if (end := 8 + int.from_bytes(start[:8], "little")) > len(start) and end <= latents.size:
        yield from latents.chunks(len(start), end)


def _keep(path: Path, chunks: Callable[[], Iterable[bytes]], size: int | None = None) -> None:
    """Write the file, unless it is here as it was fetched."""
    if not path.exists() or size not in (None, path.stat().st_size) or not is_as_fetched(path):
        with whole_file(path) as partial:
            with partial.open("wb") as file:
                for chunk in chunks():
                    file.write(chunk)
            checksum_file(path).write_text(checksum(partial))
    mark_used(path)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
