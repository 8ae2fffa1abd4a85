"""An output folder that the same command goes on filling after it was killed.

    with exclusive(out / ".lock", "another run writes there"):               # one process at a time
        claim_settings(out / "settings.json", now, "OUT holds shards made")  # the same settings, or refused
        remove_partial_files(out, "unit-3")                                  # what a killed process left half written

Whatever is finished is marked by a file that appears whole or not at all (see `io`): a shard, a checkpoint, an image,
or a small JSON file about a unit of work.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .io import read_json, setting_changed, write_json

FOREVER = -1.0  # patience that does not end
_CLAIM_PATIENCE = 60.0  # seconds; the lock of the settings is held for the time of two small files

_LOGGER = logging.getLogger(__name__)


class Busy(ValueError):
    """Another process holds the lock."""


@contextmanager
def exclusive(path: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` during the block. The system frees it when the process ends, however it ends.

    Where the file system has no locks, as on some network disks, nothing is held and a warning says so.

    Args:
        busy: the message of the error if another process holds the lock.
        patience: seconds to wait for that process; `FOREVER` waits without end.

    Raises:
        Busy: another process holds the lock.
        ValueError: the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"the folder {path.parent} cannot be made or written: {error.strerror}") from error
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise Busy(busy) from error
    except (OSError, NotImplementedError) as error:
        _LOGGER.warning("%s cannot be locked (%s); see that no two processes write there", path, error)
    try:
        yield
    finally:
        lock.release()


def claim_settings(
    path: Path, settings: Mapping[str, Any], what: str, *, optional: Collection[str] | None = None
) -> None:
    """Write `settings` to `path` if this is the first process to use the folder, else check that they agree.

    Settings that the file lacks, as those that an older version did not write, are added to it.

    Args:
        what: begin of the error's sentence, as "OUT holds images generated".
        optional: see `check_settings`.

    Raises:
        ValueError: the file has another value of a setting, or is no such file.
    """
    busy = f"another process has kept {path} locked for a minute"
    with exclusive(path.with_name(f".{path.name}.lock"), busy, _CLAIM_PATIENCE):
        remove_partial_files(path.parent, path.stem)
        former = read_settings(path) if path.is_file() else {}
        if former:
            check_settings(what, former, settings, optional=optional)
        if settings.keys() - former.keys():
            write_json(path, former | dict(settings))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings that `claim_settings` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} does not hold settings, so it does not say what the files beside it were made with; "
            "remove it, or choose another folder"
        )
    return settings


def check_settings(
    what: str, former: Mapping[str, Any], settings: Mapping[str, Any], *, optional: Collection[str] | None = None
) -> None:
    """Refuse settings that differ from the former ones.

    Args:
        optional: the settings that either side may lack; by default all.

    Raises:
        ValueError: names the first setting that differs.
    """
    names = former.keys() | settings.keys()
    for name in sorted(names, key=lambda name: (name.endswith("checksum"), name)):  # a name says more than a checksum
        if not (name in former and name in settings) and (optional is None or name in optional):
            continue
        was, now = former.get(name), settings.get(name)
        if was != now:
            advice = "go on with the same settings, or choose another folder (--out)"
            raise setting_changed(f"{what} with", name, was, now, advice)


def remove_partial_files(folder: Path, name: str) -> None:
    """Remove what killed processes left half written of `name` and of its buckets (`name-512x768`), whatever the kind.

    Files of a name that only begins like it are left: another process may be writing them.
    """
    pattern = re.compile(rf"\.{re.escape(name)}(-\d+x\d+)?\.(safetensors|arrow|parquet|json)\.\d+\.partial")
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)
