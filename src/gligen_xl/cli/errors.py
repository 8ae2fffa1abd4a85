"""Any exception as one line for people: what was wrong, in which file, and nothing that a terminal would obey."""

from __future__ import annotations

import json

from ..escape import printable
from ..redact import redacted

LONGEST = 2000  # characters of a line; a file's contents may stand in a message
_SPOKEN = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError, NotImplementedError)


def one_line(error: BaseException) -> str:
    """What an error says, on one line.

    A kind that is not raised for people (KeyError, a panic of a library in another language) is named, since its text
    alone is no sentence.
    """
    text, kind = shown(str(error)), type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in kind:
        return f"out of memory ({text or kind}); take less at once (a smaller batch or image, --offload)"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply to be read ({text})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return shown(f"{_path(error.filename)}: {error.strerror}")
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {text}"
    if isinstance(error, _SPOKEN):
        return text or kind
    return f"{kind}: {text}" if text else kind


def shown(text: str) -> str:
    """The text on one line, without secrets, its hidden characters as escapes; cut where it is long."""
    text = printable(redacted(text))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-195:]}"


def _path(name: object) -> str:
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
