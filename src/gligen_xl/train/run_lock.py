"""One run at a time in a folder: two would take each other's checkpoints away."""

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

PATIENCE = 20.0  # seconds; loading processes outlive a killed run by some, and hold what it held
_HELD = (errno.EACCES, errno.EAGAIN)

_LOGGER = logging.getLogger(__name__)


@contextmanager
def only_run_in(out: Path, *, is_main: bool) -> Iterator[None]:
    """Inside the block the folder `out` is this run's. The lock goes with the process, however that ends.

    It is the system's own (flock): a file that says who holds it would outlive a killed run, and refuse the next one
    on another machine. Where the file system has no locks, nothing is held, and a warning says so.

    Args:
        is_main: whether this process is the one that writes; the others hold nothing.

    Raises:
        ValueError: another run is at work there, as one whose launcher was killed while its processes were not; or
            there can be no folder.
    """
    if not is_main or fcntl is None:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"the run's folder {out} cannot be made or written: {error.strerror}") from error
    try:
        _acquire(file, out)
        yield
    finally:
        os.close(file)  # and with it the lock


def _acquire(file: int, out: Path) -> None:
    assert fcntl is not None
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                return _LOGGER.warning("%s cannot be locked (%s); see that no two runs write there", out, error)
        if time.monotonic() > end:
            raise ValueError(
                f"another run is at work in {out}; wait for it, or end its processes (a launcher that was killed "
                "leaves them behind), or choose another folder"
            )
        time.sleep(0.1)
