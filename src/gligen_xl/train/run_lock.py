"""One run at a time in a folder: two would remove each other's checkpoints."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..workdir import exclusive

PATIENCE = 20.0  # seconds; loader processes outlive a killed run by some, and hold what it held


def only_run_in(out: Path, *, is_main: bool) -> AbstractContextManager[None]:
    """Hold the folder `out` for this run during the block.

    Args:
        is_main: whether this process is the one that writes; the others hold nothing.

    Raises:
        ValueError: another run is at work there, or the folder cannot be made.
    """
    busy = f"another run is at work in {out}; wait for it, or end its processes, or choose another folder"
    return exclusive(out / ".lock", busy, PATIENCE) if is_main else nullcontext()
