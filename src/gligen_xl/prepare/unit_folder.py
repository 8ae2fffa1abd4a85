"""Which units are done, of what source and with which settings, and which another process is at: small files beside the
shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.box_statistics import of_shards
from ..data.shards import Shard, has_shard, remove_shard
from ..io import read_json, write_json
from .item import Unit
from .report import UnitReport, is_report
from .settings import Settings
from .sources.archives import Archive
from .unit import WORK_FOLDER

_KEYS = {"source", "settings", "identity", "shards", "report"}  # of a mark
_ARCHIVES = ("sa1b", "webdataset")  # kinds of units that are files of their own
_SHA256_OF_ARCHIVE = "sha256_of_archive"  # in a mark alone: nobody reads an archive only to ask whether it is done
_TIMES = {"images", "mtime_ns"}
_LATER = _TIMES | {"detector_weights", "vae_weights"}  # what older marks do not say


@dataclass(frozen=True)
class Done:
    """The state of a folder of shards. Can be pickled.

    .prepared/settings.json      what all of its shards have in common
    .prepared/units/UNIT.json    the mark of a unit that is done: source and settings, what the unit is made of, its
                                 shards, what became of its images
    .prepared/units/UNIT.lock    held by the process that is at it

    Args:
        out: the folder.
        source: what the units are of, in words that are the same every time. Empty: not known.
        captions: fingerprint of those that are joined.
        weights: of the VAE and the detector, where these are local folders; see `file_facts.weights_of`.

    Two marks are the same where their identities are, but for two things. An archive of another time of change is read,
    and is the same if its bytes are: so copies do not cost what encoding them does. And an older mark, which says
    nothing of the times of files, is taken to be of the files that are there now. Either is then brought up to date.
    """

    out: Path
    settings: Settings
    source: str = ""
    captions: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        """Where the shards stand."""
        resolutions = self.settings.framing.resolutions
        return [self.out / f"{size}" for size in resolutions] if len(resolutions) > 1 else [self.out]

    @property
    def _marks(self) -> Path:
        return self.out / WORK_FOLDER / "units"

    @property
    def _shared(self) -> Path:
        return self.out / WORK_FOLDER / "settings.json"

    # What may go into the folder ---------------------------------------------------------------------------------

    def check(self, units: Iterable[Unit]) -> None:
        """Refuse what would not belong to the shards that are there. Nothing is changed.

        Raises:
            ValueError: other settings than those of the folder, or of what is done of this source; or a unit of
                another source that is called the same.
        """
        if self._shared.is_file():
            self._agree("shards", read_json(self._shared), self._now_shared())
        by_name = {unit.name: unit for unit in units}
        for name, mark in self._read_all():
            if name in by_name:
                self.check_unit(by_name[name])
            elif self._is_ours(mark):
                self._agree(name, mark["settings"], self.settings.to_dict())

    def check_unit(self, unit: Unit) -> None:
        """As `check`, of one unit."""
        mark = self._read(unit.name)
        if mark is None:
            return
        if mark["source"] != self.source and self.changes(unit):
            was, now = (source or "a source without a name" for source in (mark["source"], self.source))
            raise ValueError(
                f"{self.out} holds {unit.name} of {was}, and {now} has another one of that name; choose another folder "
                f"for it. If it is the same source, moved and then changed, remove {self._mark_file(unit.name)}: "
                "the unit is then done again (copies are the same files if they keep their times: cp -p, rsync -a)"
            )
        self._agree(unit.name, mark["settings"], self.settings.to_dict())

    def claim(self) -> None:
        """Say what all shards of the folder have in common: the first process does, the others agree.

        Raises:
            ValueError: this one does not.
        """
        self._shared.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._shared.with_suffix(".lock")):
            if not self._shared.is_file():
                for rest in self._shared.parent.glob(f".{self._shared.name}.*.partial"):  # of a process that was killed
                    rest.unlink()
                write_json(self._shared, self._now_shared())
            former = read_json(self._shared)
            if self._now_shared().keys() - former.keys() == {"vae_weights"}:  # written before weights were noted
                write_json(self._shared, former | self._now_shared())
        self._agree("shards", former, self._now_shared())

    def _now_shared(self) -> dict[str, Any]:
        vae = {"vae_weights": self.weights["vae"]} if "vae" in self.weights else {}
        return self.settings.shared() | vae

    def _agree(self, what: str, former: Any, current: Mapping[str, Any]) -> None:
        if not isinstance(former, dict):
            raise ValueError(f"{self._shared} does not hold settings; remove it, and the units are done again")
        for name in sorted(former.keys() | current):
            was, now = former.get(name), current.get(name)
            if was != now and not (name in _LATER and None in (was, now)):
                raise ValueError(
                    f"{self.out} holds {what} prepared with {name} {was!r}, now it is {now!r}; "
                    "go on with the same settings, or choose another folder"
                )

    # What is done ------------------------------------------------------------------------------------------------

    def identity(self, unit: Unit) -> dict[str, Any]:
        """What its shards are made of, with the captions that are joined."""
        captions = {"joined_captions": self.captions} if self.captions else {}
        detector = {"detector_weights": self.weights["detector"]} if "detector" in self.weights else {}
        return unit.identity() | captions | detector

    def is_marked(self, unit: Unit) -> bool:
        """Whether there are shards of the unit, with these settings; nothing is said of what they are made of."""
        mark = self._read(unit.name)
        return (
            mark is not None
            and mark["settings"] == self.settings.to_dict()
            and all(has_shard(self.out / shard) for shard in mark["shards"])
        )

    def is_done(self, unit: Unit) -> bool:
        return self.is_marked(unit) and not self.changes(unit)

    def changes(self, unit: Unit) -> list[str]:
        """What of a unit that has a mark is another now. A mark of the same, told otherwise, is brought up to date."""
        if (mark := self._read(unit.name)) is None:
            return []
        was, now = mark["identity"], self.identity(unit)
        names = [
            name
            for name in sorted((was.keys() | now.keys()) - {_SHA256_OF_ARCHIVE})
            if was.get(name) != now.get(name) and (name not in _LATER or (name in was and name in now))
        ]
        if names == ["mtime_ns"] and isinstance(unit, Archive) and was.get(_SHA256_OF_ARCHIVE) == unit.sha256():
            names = []
        told = {name: was[name] for name in (_SHA256_OF_ARCHIVE,) if name in was} | now
        if not names and told != was:
            write_json(self._mark_file(unit.name), mark | {"identity": told})
        return names

    def is_older(self, unit: Unit) -> bool:
        """Whether its mark says nothing of the times of its files."""
        mark = self._read(unit.name)
        if mark is None or _TIMES & mark["identity"].keys():
            return False
        return bool(_TIMES & self.identity(unit).keys())

    def report(self, unit: Unit) -> UnitReport:
        mark = self._read(unit.name)
        if mark is None:
            return UnitReport()
        report = UnitReport.from_dict(mark["report"])
        if "rows_without_boxes" not in mark["report"]:  # of version 0.1
            report.rows_without_boxes = of_shards(
                Shard(self.out / name, with_table=False) for name in mark["shards"]
            ).without
        return report

    def source_of(self, unit: Unit) -> str:
        """What a unit that is done was made from."""
        mark = self._read(unit.name)
        return mark["source"] if mark is not None else self.source

    def mark(self, unit: Unit, identity: dict[str, Any], report: UnitReport, shards: list[str]) -> None:
        """A unit is done. Shards that it had before, and has no more, are removed.

        Args:
            identity: of the unit when it was begun; one that was changed meanwhile is done again.
        """
        former = self._read(unit.name)
        if former is not None:  # while that still names them
            self._remove_shards(set(former["shards"]) - set(shards))
        if isinstance(unit, Archive) and unit.reading.sha256:
            identity = identity | {_SHA256_OF_ARCHIVE: unit.reading.sha256}
        values = {"source": self.source, "settings": self.settings.to_dict(), "identity": identity, "shards": shards}
        write_json(self._mark_file(unit.name), values | {"report": report.to_dict()})

    def remove_orphans(self, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
        """Remove what is done of units that this source has no more, as it is cut otherwise now: their images stand
        in the others. Those that another process is at are left.

        An archive that is gone is another matter: it may have been deleted to make room. Its shards stay.

        Args:
            units: all of the source, those of other parts too.

        Returns:
            names of the units that were removed, and of those that stay.
        """
        names = {unit.name for unit in units}
        removed, stay = [], []
        for name, mark in self._read_all():
            if name in names or not self._is_ours(mark):
                continue
            if mark["identity"].get("kind") in _ARCHIVES:
                stay.append(name)
                continue
            with self.hold(name) as free:
                if free:
                    self._remove_shards(mark["shards"])
                    self._mark_file(name).unlink(missing_ok=True)
                    removed.append(name)
        return removed, stay

    @contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Whether this process may do the unit; no other does meanwhile. Rests of one that was killed are removed."""
        self._marks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._marks / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            self._remove_rests(name)
            yield True
        finally:
            lock.release()

    def _remove_rests(self, name: str) -> None:
        """Of this unit alone: another one, whose name begins as this one's, may be in work."""
        pattern = rf"\.{re.escape(name)}(-\d+x\d+)?\.(safetensors|arrow|parquet|json)\.\d+\.partial"
        for folder in (self._marks, *self.folders):
            for path in folder.iterdir() if folder.is_dir() else ():
                if re.fullmatch(pattern, path.name):
                    path.unlink(missing_ok=True)

    def _remove_shards(self, shards: Iterable[str]) -> None:
        for shard in shards:
            remove_shard(self.out / shard)

    # Marks -------------------------------------------------------------------------------------------------------

    def _is_ours(self, mark: Mapping[str, Any]) -> bool:
        return bool(self.source) and mark["source"] == self.source

    def _mark_file(self, name: str) -> Path:
        return self._marks / f"{name}.json"

    def _read_all(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self._marks.glob("*.json")):
            if (mark := self._read(path.stem)) is not None:  # else another process has just removed it
                yield path.stem, mark

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._mark_file(name)
        try:
            mark = read_json(path)
        except FileNotFoundError:
            return None
        if not _is_mark(mark):
            raise ValueError(f"{path} is no mark of a unit; remove it, and the unit is done again")
        return mark


def _is_mark(mark: Any) -> bool:
    """Whether this is a mark, all of whose shards stand in the folder itself."""
    if not isinstance(mark, dict) or not mark.keys() >= _KEYS or not isinstance(mark["source"], str):
        return False
    if not all(isinstance(mark[name], dict) for name in ("settings", "identity", "report")):
        return False
    shards = mark["shards"]
    if not isinstance(shards, list) or not all(isinstance(name, str) and _is_inside(name) for name in shards):
        return False
    return is_report(mark["report"])


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
