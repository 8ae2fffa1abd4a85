"""One run at a time in a folder: two would take each other's checkpoints away."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..locks import only_one

PATIENCE = 20.0  # seconds; loading processes outlive a killed run by some, and hold what it held


def only_run_in(out: Path, *, is_main: bool) -> AbstractContextManager[None]:
    """Inside the block the folder `out` is this run's.

    Args:
        is_main: whether this process is the one that writes; the others hold nothing.

    Raises:
        ValueError: another run is at work there; or there can be no folder.
    """
    busy = f"another run is at work in {out}; wait for it, or end its processes, or choose another folder"
    return only_one(out / ".lock", busy, PATIENCE) if is_main else nullcontext()
