"""Shards of a Hub dataset or of S3-like storage, read through a local cache of bounded size.

    hf://datasets/OWNER/NAME/FOLDER      s3://BUCKET/FOLDER      any other URL that fsspec knows

Tables, and the headers of latents, are fetched when the folder is opened; latents when a sample of the shard is first
read, or earlier by `prefetch`.
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

from ..redact import redacted
from .cache import BoundedCache, cache_folder, keep, remove_unused
from .shards import TABLE_ENDINGS, Shard, latents_file

CHUNK = 8 * 2**20  # bytes fetched at once
HEADER = 2**16  # bytes that hold almost any header
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt
AT_ONCE = 4  # tables that are fetched at the same time
IDENTITY = ("ETag", "etag", "sha256", "oid", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime")


def is_remote(data: str | Path) -> bool:
    return isinstance(data, str) and "://" in data


def open_remote(url: str, cache_bytes: int, folder: Path | None = None) -> list[RemoteShard]:
    """Open the shards at a URL; fetch their tables and headers.

    Args:
        cache_bytes: disk space for latents, including those of other URLs in the same cache.
        folder: the cache; by default the user's.

    Raises:
        FileNotFoundError: there are no shards, or one file of a pair is missing.
        ValueError: such storage is not known, or a shard is larger than the cache.
        OSError: the network fails again and again.
    """
    files = _list(url)
    cache = BoundedCache(folder or cache_folder("shards"), cache_bytes)
    shown = redacted(url)
    place = cache.folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', shown).strip('-')[-40:]}-{_hash(shown)}"
    place.mkdir(parents=True, exist_ok=True)
    remove_unused(place, *(f"*{ending}" for ending in (*TABLE_ENDINGS.values(), ".header")))
    names = sorted({name.rpartition(".")[0] for name in files})
    for name in names:
        if (latents := f"{name}.safetensors") not in files:
            raise FileNotFoundError(f"shard {name} of {shown} lacks {latents}")
        if (size := files[latents].size) > cache_bytes:
            raise ValueError(
                f"shard {name} of {shown} has {size / 1e9:.2f} GB, the cache {cache_bytes / 1e9:.2f} GB; give it "
                "room for two shards at least (cache_gb)"
            )
    with FileLock(place / ".lock"), ThreadPoolExecutor(AT_ONCE) as pool:
        shards = pool.map(lambda name: _open_shard(cache, place, name, files, shown), names)
        return list(tqdm(shards, desc=f"tables of {shown}", total=len(names), unit="shard", leave=False, disable=None))


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int  # bytes
    identity: str  # changes with the contents

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Read the contents, or some of them, piece by piece. If the network fails, try again from there.

        Raises:
            FileNotFoundError, PermissionError: at once.
            OSError: all attempts failed, one more than there are `PAUSES`, without progress between them.
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
    """A shard whose header and table are in the cache, and whose latents are fetched when they are read."""

    def __init__(self, cache: BoundedCache, stem: Path, latents: RemoteFile):
        self.stem, self._cache, self._remote = stem, cache, latents
        self._file = latents_file(stem)
        try:
            self._read_header(_header_file(stem), latents.size)
        except ValueError as error:
            raise ValueError(f"{redacted(latents.url)}: {error}") from error

    @property
    def bytes(self) -> int:
        """Size of the file of latents."""
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
    """List the files of shards at a URL, by name."""
    entries, files = _ask(url, lambda system, path: system.ls(path, detail=True)), {}
    endings = (".safetensors", *TABLE_ENDINGS.values())
    for entry in entries:
        path = PurePosixPath(entry["name"])
        if entry["type"] == "file" and path.suffix in endings and not path.name.startswith("."):
            file = f"{url.rstrip('/')}/{path.name}"
            identity = _identity(entry) or _identity(_ask(file, lambda system, path: system.info(path)))
            files[path.name] = RemoteFile(file, int(entry["size"]), identity)
    if not files:
        raise FileNotFoundError(f"{redacted(url)} holds no shards (NAME.safetensors with NAME.arrow)")
    return files


def _identity(facts: Mapping[str, Any]) -> str:
    return next((str(facts[name]) for name in IDENTITY if facts.get(name)), "")


def _ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """Ask the storage of a URL; ask again if the network fails."""
    pauses = iter(PAUSES)
    while True:
        try:
            return question(*_file_system(url))
        except Exception as error:  # each kind of storage has its own
            _pause_or_raise(error, pauses, url)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the storage of a URL, and the path there. fsspec caches storages, and makes new ones after a fork."""
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
    """Wait before the next attempt; raise if none is left, or if it would not help."""
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


def _open_shard(
    cache: BoundedCache, place: Path, name: str, files: Mapping[str, RemoteFile], shown: str
) -> RemoteShard:
    """Fetch the table and the header of a shard, unless they are here. Files that changed have another name here."""
    latents = files[f"{name}.safetensors"]
    tables = [file for ending in TABLE_ENDINGS.values() if (file := files.get(name + ending))]
    identity = _hash(json.dumps([(file.size, file.identity or _ends(file)) for file in (latents, *tables)]))
    stem = place / f"{name}.{identity}"
    keep(_header_file(stem), lambda path: _write(path, _header(latents)))
    shard = RemoteShard(cache, stem, latents)
    table = files.get(name + shard.table_file.suffix)
    if table is None:
        raise FileNotFoundError(f"shard {name} of {shown} lacks {name}{shard.table_file.suffix}")
    keep(shard.table_file, lambda path: _write(path, table.chunks()), table.size)
    return shard


def _header_file(stem: Path) -> Path:
    return stem.with_name(stem.name + ".header")


def _ends(file: RemoteFile) -> str:
    """Return a checksum of both ends of a file, to tell it from another one of its size if the storage does not."""
    begin = b"".join(file.chunks(0, HEADER))
    end = b"".join(file.chunks(max(file.size - HEADER, HEADER)))
    return hashlib.sha256(begin + end).hexdigest()


def _header(latents: RemoteFile) -> Iterator[bytes]:
    start = b"".join(latents.chunks(0, HEADER))
    yield start
    if (end := 8 + int.from_bytes(start[:8], "little")) > len(start) and end <= latents.size:
        yield from latents.chunks(len(start), end)


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
