"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .limits import MAX_SETTINGS


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes its place when the block ends without an error.

    A kill or a full disk leaves the old file, or none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        settle(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where this process writes `path` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def settle(partial: Path, path: Path) -> None:
    """A file that is whole takes its place, on the disk itself."""
    _flush(partial)
    partial.replace(path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """As `whole_file`, for a folder. One that stood there before is moved aside until the new one is in its place;
    a kill between these two moves is mended the next time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, former = (path.with_name(f".{path.name}{ending}") for ending in (f".{os.getpid()}.partial", ".former"))
    if former.exists() and not path.exists():
        former.replace(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
            path.replace(former)
            partial.replace(path)
            shutil.rmtree(former)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """As UTF-8. A file name that is not text, and has surrogates for its bytes, is written with JSON's escapes."""
    with whole_file(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def read_json(path: str | Path, *, limit: int = MAX_SETTINGS) -> Any:
    """Parsed JSON; a broken file, or one of more than `limit` bytes, is a ValueError that names it."""
    path = Path(path)
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size} bytes; expected a JSON file of at most {limit}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _flush(path: Path) -> None:
    """Onto the disk itself, so that the rename cannot come before the contents."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
