"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed. And texts,
which are UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
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
        with naming(path):
            yield partial
            settle(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system in the block that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
        with naming(path):
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


@contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Any error that arises while a file is read becomes one that names it and says what was expected there.

    Args:
        expected: for the error, as "the configuration of a run".

    Raises:
        OSError: as it came, where it names its file. ValueError: all others.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.filename is not None) or (
            isinstance(error, ValueError | OSError) and str(path) in str(error)
        ):
            raise
        text = " ".join(str(error).split())
        what = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{path} is not {expected}: {what}") from error


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
        return json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON object; anything else is a ValueError that names the file.

    Args:
        what: for the error, as "the index of a pipeline".
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected {what}, a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """What an error says, as far as one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: str | Path) -> str:
    """The text of a file; one that is not UTF-8 is a ValueError that names it."""
    path = Path(path)
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def decode_text(contents: bytes) -> str:
    """UTF-8, without the byte order mark that may stand before it. Line ends stay as they are.

    Raises:
        ValueError: it is of another encoding, or no text; the error says which bytes tell.
    """
    for name, marks in _OTHER_MARKS.items():
        if contents.startswith(marks):
            raise ValueError(f"it begins with the byte order mark of {name}; save it as UTF-8")
    if (place := contents.find(0)) >= 0:
        raise ValueError(f"byte {place} is NUL, as in UTF-16 or in a file that is no text; save it as UTF-8")
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = contents[error.start : error.start + 1].hex()
        raise ValueError(
            f"byte {error.start} is 0x{byte}, of another encoding (as Latin-1); save it as UTF-8"
        ) from error


_OTHER_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # the first begins as UTF-16's
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def _flush(path: Path) -> None:
    """Onto the disk itself, so that the rename cannot come before the contents."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
