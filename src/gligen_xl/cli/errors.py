"""Turns any exception into one line: what was wrong, in which file, and nothing that a terminal would obey."""

from __future__ import annotations

import json

from ..escape import printable
from ..redact import redacted

LONGEST = 2000  # characters of a line; a message may quote the contents of a file
_FOR_USERS = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError, NotImplementedError)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line.

    The class of an error that is not raised for users (KeyError, a panic of a library in Rust) is named, since its
    message alone is not a sentence.
    """
    text, kind = shown(str(error)), type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in kind:
        return f"out of memory ({text or kind}); use a smaller batch or image, or --offload"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply to be read ({text})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return shown(f"{_path(error.filename)}: {error.strerror}")
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {text}"
    if isinstance(error, _FOR_USERS):
        return text or kind
    return f"{kind}: {text}" if text else kind


def shown(text: str) -> str:
    """Put a text on one line, without secrets, with hidden characters as escapes, and cut if it is long."""
    text = printable(redacted(text))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-195:]}"


def _path(name: object) -> str:
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
