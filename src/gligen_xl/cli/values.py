"""Values of options, checked before anything heavy is imported: numbers, devices, folders to read and to write."""

from __future__ import annotations

import os
import re
import secrets
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..io import names_repository
from ..suggestions import did_you_mean

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "xla", "mtia", "vulkan", "privateuseone")
_ALSO_CUDA = ("gpu", "nvidia", "rocm", "hip", "amd")  # torch calls AMD's GPUs cuda, too


class UsageError(ValueError):
    """The command line itself is wrong."""


# Types of options ---------------------------------------------------------------------------------------------------


def dtype(text: str) -> str:
    """Parse a number format: "fp16" -> "float16"."""
    try:
        return dtype_name(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{{option}}: {error}") from None


def device(text: str) -> str:
    """Parse the name of a device that torch may know; whether this machine has it is seen later."""
    name = str(text).strip().lower()
    kind, colon, number = name.partition(":")
    if kind in _DEVICES and (not colon or number.isdecimal()):
        return name
    hint = f"; did you mean cuda{colon}{number}?" if kind in _ALSO_CUDA else did_you_mean(kind, _DEVICES[:4])
    raise ArgumentTypeError(f"{{option}} is {text!r}; expected cpu, cuda, cuda:1, mps, ...{hint}")


def whole_number(least: int, most: float = float("inf"), expected: str = "") -> Callable[[str], int]:
    """Make the type of an option that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{{option}} is {text!r}; expected a whole number") from None
        if not least <= number <= most:
            raise ArgumentTypeError(f"{{option}} is {number}; expected {expected or f'at least {least}'}")
        return number

    return parse


count = whole_number(1)
seed = whole_number(0, 2**62 - 1, "0 to 2**62 - 1")


def seed_or_random(text: str) -> int:
    """Parse a seed; -1 draws one at random."""
    return secrets.randbelow(2**32) if str(text).strip() == "-1" else seed(text)


def numbers(text: str, name: str) -> list[float]:
    """Parse numbers with spaces or commas between them."""
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{name} is {text!r}; expected numbers") from None


# Files and folders --------------------------------------------------------------------------------------------------


def is_there(path: str | Path) -> bool:
    """Tell whether a file or folder of that name exists; a text that cannot be a name does not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # the name is too long
        return False


def is_file(path: str | Path) -> bool:
    return is_there(path) and Path(path).is_file()


def check_source(option: str, source: str, what: str, *, file: bool = False, known: tuple[str, ...] = ()) -> None:
    """Refuse what is not a folder and cannot be a Hub repository.

    Args:
        what: for the error, such as "pipeline".
        file: whether a file will do as well.
        known: names that are neither, such as "shapes".

    Raises:
        FileNotFoundError: there is no such folder. UsageError: the text is empty.
    """
    if source in known:
        return
    if not source.strip() or "\0" in source:
        raise UsageError(f"--{option} is {source!r}; expected the {what}'s folder, or a Hub repository (owner/name)")
    path = Path(source).expanduser()
    if (is_there(path) and (file or path.is_dir())) or names_repository(source):
        return
    hint = did_you_mean(source, known) or _near(path)
    also = f"{', '.join(known)}, " if known else ""
    raise FileNotFoundError(
        f"no {what} folder {source} (--{option}); expected {also}a folder or a Hub repository (owner/name){hint}"
    )


def check_file(option: str, name: str, what: str) -> None:
    """Refuse what is not a file.

    Raises:
        FileNotFoundError: there is none. UsageError: it is a folder.
    """
    path = Path(name).expanduser()
    if not is_there(path):
        raise FileNotFoundError(f"no {re.sub('^an? ', '', what)} {name} (--{option}){_near(path)}")
    if path.is_dir():
        raise UsageError(f"--{option} {name} is a folder; expected {what}")


def check_folder(name: str, what: str) -> None:
    """Refuse what is not a folder.

    Raises:
        FileNotFoundError: there is none. UsageError: it is a file.
    """
    path = Path(name).expanduser()
    if not is_there(path):
        raise FileNotFoundError(f"{name} is not {what}: there is no such folder{_near(path)}")
    if not path.is_dir():
        raise UsageError(f"{name} is a file; expected {what}")


def check_out(name: str, option: str = "out") -> None:
    """Refuse an output folder that is a file, or that cannot be written; nothing is created.

    Raises:
        UsageError: says which it is.
    """
    path = Path(name)
    if not name or "\0" in name:
        raise UsageError(f"--{option} is {name!r}; expected a folder")
    try:
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise UsageError(f"--{option} {name[:80]} cannot be written: {error.strerror}") from error
    if not existing.is_dir():
        what = "is a file" if existing == path else f"is inside {existing}, which is a file"
        raise UsageError(f"--{option} {name} {what}; expected a folder, or a new name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--{option} {name} cannot be written: you have no permission to write in {existing}")


def check_out_file(name: str, option: str = "out") -> None:
    """Refuse an output file that is a folder, or that cannot be written; nothing is created."""
    if Path(name).is_dir():
        raise UsageError(f"--{option} {name} is a folder; expected the file to write")
    check_out(str(Path(name).parent), option)


def _near(path: Path) -> str:
    """Return "; did you mean X?" for a similar name in the same folder."""
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    hint = did_you_mean(path.name, names[:1000])
    return hint.replace("did you mean ", f"did you mean {path.parent}/") if hint and str(path.parent) != "." else hint


# Options that need one another --------------------------------------------------------------------------------------


def given(arguments: Any, parser: Any, *names: str) -> list[str]:
    """Return those options that differ from their defaults."""
    return [name for name in names if arguments[name] != parser.get_default(name)]
