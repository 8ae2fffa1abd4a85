"""Tells which processes of a run on this machine have ended before all had met.

Each process locks a file of its own from the start; the system releases the lock however the process ends. Nothing is
known of processes on other machines. This module imports nothing heavy.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FORMER = 60.0  # seconds; files that are older are of an earlier run
_SURE = 3.0  # seconds that a lock has to be free

_file: int | None = None
_began = 0.0
_free_since: dict[int, float] = {}


def announce() -> None:
    """Lock the file of this process, until it ends or has met the others."""
    global _file, _began
    if fcntl is None or _file is not None or int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return
    with suppress(OSError, ValueError):
        path = _path(int(os.environ["RANK"]))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.utime(_file)
        _began = time.time()


def withdraw() -> None:
    """Remove the file of this process once all have met."""
    global _file
    if _file is not None:
        os.close(_file)
        with suppress(OSError):
            _path(int(os.environ["RANK"])).unlink()
        _file = None


def gone(ranks: Iterable[int]) -> int | None:
    """Return one of these processes that has certainly ended; the caller polls this."""
    if _file is None:
        return None
    now = time.monotonic()
    for rank in ranks:
        if not _is_free(_path(rank)):
            _free_since.pop(rank, None)
        elif now - _free_since.setdefault(rank, now) > _SURE:
            return rank
    return None


def _path(rank: int) -> Path:
    """Return the file of a process; the processes of a run have the same parent, a launcher or shell."""
    names = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
    run = "-".join("".join(letter for letter in name if letter.isalnum() or letter == ".") for name in names)
    folder = Path(tempfile.gettempdir()) / f"gligen-xl-processes-{os.getuid()}"
    return folder / f"{run}-{os.getppid()}-{rank}"


def _is_free(path: Path) -> bool:
    """Tell whether the process of the file has started and ended."""
    assert fcntl is not None
    try:
        if path.stat().st_mtime < _began - _FORMER:
            return False
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(file)
