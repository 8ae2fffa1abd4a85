"""Locks of the system's own (flock), which go with a process however it ends.

A file that says who holds it would outlive a killed process, and refuse the next one on another machine.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HELD = (errno.EACCES, errno.EAGAIN)

_LOGGER = logging.getLogger(__name__)


@contextmanager
def only_one(path: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Inside the block no other process that asks for the lock `path` has it.

    Where the file system has no locks, nothing is held, and a warning says so.

    Args:
        busy: what to say where another process holds it.
        patience: seconds to wait for that one.

    Raises:
        ValueError: another process holds it, or there can be no such file.
    """
    if fcntl is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"the folder {path.parent} cannot be made or written: {error.strerror}") from error
    try:
        _acquire(file, path, busy, patience)
        yield
    finally:
        os.close(file)  # and with it the lock


def _acquire(file: int, path: Path, busy: str, patience: float) -> None:
    assert fcntl is not None
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return _LOGGER.warning("%s cannot be locked (%s); see that no two processes write there", path, error)
        if time.monotonic() > end:
            raise ValueError(busy)
        time.sleep(0.1)
