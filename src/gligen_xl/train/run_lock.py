"""One run at a time in a folder: two would take each other's checkpoints away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

PATIENCE = 20.0  # seconds; loading processes outlive a killed run by some, and hold what it held


@contextmanager
def only_run_in(out: Path, *, is_main: bool) -> Iterator[None]:
    """Inside the block the folder `out` is this run's. The lock goes with the process, however that ends.

    Where the file system has no locks, nothing is held.

    Args:
        is_main: whether this process is the one that writes; the others hold nothing.

    Raises:
        ValueError: another run is at work there, as one whose launcher was killed while its processes were not.
    """
    if not is_main:
        yield
        return
    lock = FileLock(out / ".lock", timeout=PATIENCE)
    try:
        with suppress(NotImplementedError):
            lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run is at work in {out}; wait for it, or end its processes (a launcher that was killed leaves "
            "them behind), or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
