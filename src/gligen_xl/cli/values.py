"""Values of options, checked before anything heavy is imported: numbers, devices, folders to read and to write."""

from __future__ import annotations

import os
import re
import secrets
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..suggestions import did_you_mean

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "vulkan", "privateuseone")
_ALSO_CUDA = ("gpu", "nvidia", "rocm", "hip", "amd")  # torch calls AMD's GPUs cuda, too


class UsageError(ValueError):
    """The command line itself is wrong."""


# Single values ------------------------------------------------------------------------------------------------------


def dtype(text: str) -> str:
    """The type of an option: "fp16" -> "float16"."""
    try:
        return dtype_name(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{{option}}: {error}") from None


def device(text: str) -> str:
    """The type of an option: a name that torch may know; whether there is such a device is seen later."""
    name = str(text).strip().lower()
    kind, colon, number = name.partition(":")
    if kind in _ALSO_CUDA:
        hint = f"; did you mean cuda{colon}{number}?"
    elif kind in _DEVICES and (not colon or number.isdecimal()):
        return name
    else:
        hint = did_you_mean(kind, _DEVICES[:4])
    raise ArgumentTypeError(f"{{option}} is {text!r}; expected cpu, cuda, cuda:1, mps, ...{hint}")


def count(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    number = whole(text)
    if number < 1:
        raise ArgumentTypeError(f"{{option}} is {number}; expected at least 1")
    return number


def whole(text: str) -> int:
    """The type of an option: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{{option}} is {text!r}; expected a whole number") from None


def seed(text: str) -> int:
    """The type of an option: 0 to 2**62 - 1."""
    number = whole(text)
    if not 0 <= number < 2**62:
        raise ArgumentTypeError(f"{{option}} is {number}; expected 0 to 2**62 - 1")
    return number


def seed_or_random(text: str) -> int:
    """The type of an option: as `seed`; -1 is a random one."""
    return secrets.randbelow(2**32) if str(text).strip() == "-1" else seed(text)


def numbers(text: str, name: str) -> list[float]:
    """Numbers with spaces or commas between them."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{name} is {text!r}; expected numbers") from None


# Files and folders --------------------------------------------------------------------------------------------------


def check_source(option: str, source: str, what: str, *, file: bool = False, known: tuple[str, ...] = ()) -> None:
    """Refuse what is no folder and cannot be a Hub repository.

    Args:
        what: for the error, as "pipeline".
        file: a file will do as well.
        known: names that are neither, as "shapes".

    Raises:
        FileNotFoundError: there is none. UsageError: a file where a folder is expected, or no name at all.
    """
    if source in known:
        return
    if not source.strip() or "\0" in source:
        raise UsageError(f"--{option} is {source!r}; expected the {what}'s folder, or a Hub repository (owner/name)")
    path = Path(source).expanduser()
    if path.is_dir() or (file and is_there(path)):
        return
    if not names_repository(source):
        hint = did_you_mean(source, known) or _near(path)
        also = f"{', '.join(known)}, " if known else ""
        raise FileNotFoundError(
            f"no {what} folder {source} (--{option}); expected {also}a folder or a Hub repository (owner/name){hint}"
        )


def names_repository(source: str) -> bool:
    """Whether it may be the name of a Hub repository: owner/name, and nothing of a path."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source, re.ASCII) is not None


def check_file(option: str, name: str, what: str) -> None:
    """Refuse what is no file.

    Raises:
        FileNotFoundError: there is none. UsageError: it is a folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"--{option} {name} is a folder; expected {what}")
    if not is_there(path):
        raise FileNotFoundError(f"no {what.removeprefix('a ')} {name} (--{option}){_near(path)}")


def check_folder(name: str, what: str) -> None:
    """Refuse what is no folder.

    Raises:
        FileNotFoundError: there is none. UsageError: it is a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if is_there(path):
        raise UsageError(f"{name} is a file; expected {what}")
    raise FileNotFoundError(f"{name} is not {what}: there is no such folder{_near(path)}")


def check_out(name: str, option: str = "out") -> None:
    """Refuse an output folder that is a file, or that cannot be written; nothing is made.

    Raises:
        UsageError: which it is.
    """
    path = Path(name)
    if not name or "\0" in name:
        raise UsageError(f"--{option} is {name!r}; expected a folder")
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise UsageError(f"--{option} {name[:80]} cannot be written: {error.strerror}") from error
    if not there.is_dir():
        what = "is a file" if there == path else f"lies in {there}, which is a file"
        raise UsageError(f"--{option} {name} {what}; expected a folder, or none yet")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--{option} {name} cannot be written: {there} is not yours to write in")


def check_out_file(name: str, option: str = "out") -> None:
    """Refuse an output file that is a folder, or that cannot be written; nothing is made."""
    if Path(name).is_dir():
        raise UsageError(f"--{option} {name} is a folder; expected the file to write")
    check_out(str(Path(name).parent), option)


def is_there(path: str | Path) -> bool:
    """Whether there is a file or folder of that name; one that cannot be a name is not there."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long
        return False


def _near(path: Path) -> str:
    """ "; did you mean X?", of what lies beside it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    hint = did_you_mean(path.name, beside[:1000])
    return hint.replace("did you mean ", f"did you mean {path.parent}/") if hint and str(path.parent) != "." else hint


def given(arguments: Any, parser: Any, *names: str) -> list[str]:
    """Those options that are not as they are by default."""
    return [name for name in names if arguments[name] != parser.get_default(name)]
