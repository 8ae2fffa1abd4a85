"""Which units are done, with which settings, and which another process is at: small files beside the shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import read_json, write_json
from .item import Unit
from .report import UnitReport
from .settings import Settings
from .unit import WORK_FOLDER, shard_files


class Done:
    """The state of a folder of shards.

    .prepared/UNIT.json    settings, what the unit is made of, its shards, what became of its pictures
    .prepared/UNIT.lock    held by the process that is at it
    """

    def __init__(self, out: str | Path, settings: Settings):
        self.out, self.settings = Path(out), settings
        self.folder = self.out / WORK_FOLDER

    def check_settings(self, units: Iterable[Unit]) -> None:
        """Refuse to go on with other settings than those that units which are done were made with."""
        current = self.settings.to_dict()
        for unit in units:
            former = self._read(unit)
            if former is None or former["settings"] == current:
                continue
            for name in sorted(former["settings"].keys() | current):
                was, now = former["settings"].get(name), current.get(name)
                if was != now:
                    raise ValueError(
                        f"{self.out} holds {unit.name} prepared with {name} {was!r}, now it is {now!r}; "
                        "go on with the same settings, or choose another folder"
                    )

    def is_done(self, unit: Unit) -> bool:
        former = self._read(unit)
        return (
            former is not None
            and former["settings"] == self.settings.to_dict()
            and former["identity"] == unit.identity()
            and all(path.is_file() for shard in former["shards"] for path in shard_files(self.out / shard))
        )

    def report(self, unit: Unit) -> UnitReport:
        former = self._read(unit)
        return UnitReport.from_dict(former["report"]) if former is not None else UnitReport()

    def mark(self, unit: Unit, identity: dict[str, Any], report: UnitReport, shards: list[str]) -> None:
        """A unit is done. Shards that it had before, and has no more, are removed.

        Args:
            identity: of the unit when it was begun; one that was changed meanwhile is done again.
        """
        former = self._read(unit)
        for shard in set(former["shards"]) - set(shards) if former is not None else ():  # while that still names them
            for path in shard_files(self.out / shard):
                path.unlink(missing_ok=True)
        values = {"settings": self.settings.to_dict(), "identity": identity, "shards": shards}
        write_json(self.folder / f"{unit.name}.json", values | {"report": report.to_dict()})

    @contextmanager
    def hold(self, unit: Unit) -> Iterator[bool]:
        """Whether this process may do the unit; no other does meanwhile. Rests of one that was killed are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{unit.name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            self._remove_rests(unit)
            yield True
        finally:
            lock.release()

    def _remove_rests(self, unit: Unit) -> None:
        """Of this unit alone: another one, whose name begins as this one's, may be in work."""
        name = rf"\.{re.escape(unit.name)}(-\d+x\d+)?\.(safetensors|parquet|json)\.\d+\.partial"
        resolutions = {str(size) for size in self.settings.framing.resolutions}
        for folder in (self.out, self.folder, *(self.out / size for size in resolutions)):
            for path in folder.iterdir() if folder.is_dir() else ():
                if re.fullmatch(name, path.name):
                    path.unlink(missing_ok=True)

    def _read(self, unit: Unit) -> dict[str, Any] | None:
        path = self.folder / f"{unit.name}.json"
        return read_json(path) if path.is_file() else None
