"""Reads and writes files: whole or not at all, text as UTF-8, JSON, and tensors of safetensors files.

A file is written under a temporary name next to its place, then renamed. Errors in reading name the file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .limits import MAX_SETTINGS, check_safetensors

if TYPE_CHECKING:
    from torch import Tensor

# Whole or not at all ------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` when the block ends without an error.

    After a kill or on a full disk, `path` is the old file or missing, never half of the new one.
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
    """Add `path` to errors of the operating system that name no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def partial_path(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def settle(partial: Path, path: Path) -> None:
    """Flush a finished file to the disk and rename it to its final name."""
    _flush(partial)
    partial.replace(path)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Do what `whole_file` does, for a folder. An existing folder is moved aside until the new one is in its place;
    a kill between these two moves is repaired by the next call."""
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


# Reading ------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Turn any error in the block into one that names the file and says what was expected in it.

    Args:
        expected: for the error, such as "the configuration of a run".

    Raises:
        OSError: unchanged, if it names its file. ValueError: in place of all others.
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
    """Write JSON as UTF-8. Surrogates, which stand for the bytes of a file name that is not text, become escapes."""
    with whole_file(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def read_json(path: str | Path, *, limit: int = MAX_SETTINGS) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is broken, or larger than `limit` bytes; the error names the file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size} bytes; expected a JSON file of at most {limit}")
    try:
        return json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """Parse a JSON file that must hold an object; anything else is a ValueError that names the file.

    Args:
        what: for the error, such as "the index of a pipeline".
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected {what}, a JSON object")
    return value


def names_repository(source: str | Path) -> bool:
    """Tell whether a name reads as a Hub repository, owner/name, and not as a path."""
    return isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: str | Path) -> str:
    """Read a text file; a ValueError that names it says so if it is not UTF-8."""
    path = Path(path)
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def decode_text(contents: bytes) -> str:
    """Decode UTF-8, without a byte order mark. Line ends stay as they are.

    Raises:
        ValueError: the bytes are not UTF-8; the error says which byte shows it.
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
    """Write a file through to the disk, so that the rename cannot reach it before the contents."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


# Tensors and checksums ----------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file, whose header alone is read, as `safetensors.safe_open` does.

    Raises:
        ValueError: it is damaged, or its header is absurdly large; the error names the file.
    """
    check_safetensors(Path(path))
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, by name. Errors are those of `open_tensors`."""
    with open_tensors(path) as opened:
        return {name: opened.get_tensor(name) for name in opened.offset_keys()}


def tensor_names(path: str | Path) -> list[str]:
    """Read the names of the tensors of a safetensors file. Errors are those of `open_tensors`."""
    with open_tensors(path) as opened:
        return list(opened.keys())


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def setting_changed(holds: str, name: str, was: Any, now: Any, advice: str) -> ValueError:
    """Make the error for continuing in a folder with a setting other than the one it was begun with.

    Args:
        holds: the folder and its contents, such as "runs/a holds images generated with".
        advice: what to do, such as "choose another folder".
    """
    return ValueError(f"{holds} {name} {was!r:.200}, now it is {now!r:.200}; {advice}")
