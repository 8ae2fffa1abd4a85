"""A folder of shards with the marks of its units: small files that say what is done, of what, and with which settings.

.prepared/settings.json      what all shards of the folder have in common
.prepared/units/UNIT.json    the mark of a unit that is done: source and settings, what the unit is made of, its
                             shards, what became of its images
.prepared/units/UNIT.lock    held by the process that works on the unit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.box_statistics import of_shards
from ..data.shards import Shard, has_shard, remove_shard
from ..io import read_json, write_json
from ..workdir import Busy, check_settings, claim_settings, exclusive, read_settings, remove_partial_files
from .item import Unit
from .report import UnitReport, is_report
from .settings import WORK_FOLDER, Settings
from .sources.archives import Archive

_KEYS = {"source", "settings", "identity", "shards", "report"}  # of a mark
_ARCHIVES = ("sa1b", "webdataset")  # kinds of units that are files of their own
_SHA256_OF_ARCHIVE = "sha256_of_archive"  # in a mark alone: nobody reads an archive only to ask whether it is done
_TIMES = {"images", "mtime_ns"}
_OPTIONAL = {"vae_weights"}  # settings that folders of older versions, and VAEs of the Hub, do not have
_LATER = _TIMES | {"detector_weights"}  # what marks of older versions do not say


@dataclass(frozen=True)
class UnitFolder:
    """The units that are done in a folder of shards. Can be pickled.

    Two identities of a unit are the same where they are equal, but for two things. An archive with another time of
    change is read, and is the same if its bytes are: so copies do not cost what encoding them does. And an older mark,
    which says nothing of the times of files, is taken to be of the files that are there now. Either is then brought up
    to date.

    Args:
        out: the folder.
        source: what the units are of, in words that are the same every time. Empty: not known.
        captions: fingerprint of the captions that are joined.
        weights: checksums of the VAE and the detector; see `file_stats.weights_of`.
    """

    out: Path
    settings: Settings
    source: str = ""
    captions: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def shard_folders(self) -> list[Path]:
        resolutions = self.settings.framing.resolutions
        return [self.out / f"{size}" for size in resolutions] if len(resolutions) > 1 else [self.out]

    @property
    def _marks(self) -> Path:
        return self.out / WORK_FOLDER / "units"

    @property
    def _settings_file(self) -> Path:
        return self.out / WORK_FOLDER / "settings.json"

    # What may go into the folder ---------------------------------------------------------------------------------

    def check(self, units: Iterable[Unit]) -> None:
        """Refuse what would not belong to the shards that are there. Nothing is changed.

        Raises:
            ValueError: the folder, or a unit of this source in it, has other settings; or a unit of another source
                has the same name.
        """
        if self._settings_file.is_file():
            self._check_settings("shards", read_settings(self._settings_file), self._shared_settings())
        by_name = {unit.name: unit for unit in units}
        for name, mark in self._read_marks():
            if name in by_name:
                self.check_unit(by_name[name])
            elif self._is_ours(mark):
                self._check_settings(name, mark["settings"], self.settings.to_dict())

    def check_unit(self, unit: Unit) -> None:
        """Check one unit as `check` does."""
        mark = self._read_mark(unit.name)
        if mark is None:
            return
        if mark["source"] != self.source and self.changes(unit):
            was, now = (source or "a source without a name" for source in (mark["source"], self.source))
            raise ValueError(
                f"{self.out} holds {unit.name} of {was}, and {now} has another one of that name; choose another folder "
                f"for it. If it is the same source, moved and then changed, remove {self._mark_file(unit.name)}: "
                "the unit is then done again (copies are the same files if they keep their times: cp -p, rsync -a)"
            )
        self._check_settings(unit.name, mark["settings"], self.settings.to_dict())

    def claim(self) -> None:
        """Write what all shards of the folder have in common; a later process has to agree.

        Raises:
            ValueError: this one does not.
        """
        what = f"{self.out} holds shards prepared"
        claim_settings(self._settings_file, self._shared_settings(), what, optional=_OPTIONAL)

    def _shared_settings(self) -> dict[str, Any]:
        vae = {"vae_weights": self.weights["vae"]} if "vae" in self.weights else {}
        return self.settings.shared() | vae

    def _check_settings(self, what: str, former: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        check_settings(f"{self.out} holds {what} prepared", former, settings, optional=_OPTIONAL)

    # What is done ------------------------------------------------------------------------------------------------

    def identity(self, unit: Unit) -> dict[str, Any]:
        """Return what the shards of a unit are made of, with the captions that are joined."""
        captions = {"joined_captions": self.captions} if self.captions else {}
        detector = {"detector_weights": self.weights["detector"]} if "detector" in self.weights else {}
        return unit.identity() | captions | detector

    def is_marked(self, unit: Unit) -> bool:
        """Tell whether there are shards of the unit with these settings, whatever they are made of."""
        mark = self._read_mark(unit.name)
        return (
            mark is not None
            and mark["settings"] == self.settings.to_dict()
            and all(has_shard(self.out / shard) for shard in mark["shards"])
        )

    def is_done(self, unit: Unit) -> bool:
        return self.is_marked(unit) and not self.changes(unit)

    def changes(self, unit: Unit) -> list[str]:
        """Name the parts of a marked unit's identity that have changed. If none has, its mark is brought up to date."""
        if (mark := self._read_mark(unit.name)) is None:
            return []
        was, now = mark["identity"], self.identity(unit)
        names = [
            name
            for name in sorted((was.keys() | now.keys()) - {_SHA256_OF_ARCHIVE})
            if was.get(name) != now.get(name) and (name not in _LATER or (name in was and name in now))
        ]
        if names == ["mtime_ns"] and isinstance(unit, Archive) and was.get(_SHA256_OF_ARCHIVE) == unit.sha256():
            names = []
        current = {name: was[name] for name in (_SHA256_OF_ARCHIVE,) if name in was} | now
        if not names and current != was:
            write_json(self._mark_file(unit.name), mark | {"identity": current})
        return names

    def is_older(self, unit: Unit) -> bool:
        """Tell whether the mark of a unit says nothing of the times of its files."""
        mark = self._read_mark(unit.name)
        if mark is None or _TIMES & mark["identity"].keys():
            return False
        return bool(_TIMES & self.identity(unit).keys())

    def report(self, unit: Unit) -> UnitReport:
        mark = self._read_mark(unit.name)
        if mark is None:
            return UnitReport()
        report = UnitReport.from_dict(mark["report"])
        if "rows_without_boxes" not in mark["report"]:  # of version 0.1
            report.rows_without_boxes = of_shards(
                Shard(self.out / name, with_table=False) for name in mark["shards"]
            ).without
        return report

    def source_of(self, unit: Unit) -> str:
        """Return the source that a unit was made from."""
        mark = self._read_mark(unit.name)
        return mark["source"] if mark is not None else self.source

    def mark(self, unit: Unit, identity: dict[str, Any], report: UnitReport, shards: list[str]) -> None:
        """Mark a unit as done, and remove shards that it had before and has no more.

        Args:
            identity: of the unit when it was begun; one that was changed meanwhile is done again.
        """
        former = self._read_mark(unit.name)
        if former is not None:  # while that still names them
            self._remove_shards(set(former["shards"]) - set(shards))
        if isinstance(unit, Archive) and unit.reading.sha256:
            identity = identity | {_SHA256_OF_ARCHIVE: unit.reading.sha256}
        values = {"source": self.source, "settings": self.settings.to_dict(), "identity": identity, "shards": shards}
        write_json(self._mark_file(unit.name), values | {"report": report.to_dict()})

    def remove_orphans(self, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
        """Remove the units that this source no longer has, as it is cut otherwise now: others hold their images.

        Units that another process works on are left. So are archives that are gone: they may have been deleted to make
        room.

        Args:
            units: all of the source, those of other parts too.

        Returns:
            names of the units that were removed, and of the archives that stay.
        """
        names = {unit.name for unit in units}
        removed, stay = [], []
        for name, mark in self._read_marks():
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
        """Hold a unit during the block, if no other process does, and remove what a killed one left of it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self._marks / f"{name}.lock", f"another process works on {name}"))
            except Busy:
                yield False
                return
            for folder in (self._marks, *self.shard_folders):
                remove_partial_files(folder, name)
            yield True

    def _remove_shards(self, shards: Iterable[str]) -> None:
        for shard in shards:
            remove_shard(self.out / shard)

    # Marks -------------------------------------------------------------------------------------------------------

    def _is_ours(self, mark: Mapping[str, Any]) -> bool:
        return bool(self.source) and mark["source"] == self.source

    def _mark_file(self, name: str) -> Path:
        return self._marks / f"{name}.json"

    def _read_marks(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self._marks.glob("*.json")):
            if (mark := self._read_mark(path.stem)) is not None:  # else another process has just removed it
                yield path.stem, mark

    def _read_mark(self, name: str) -> dict[str, Any] | None:
        path = self._mark_file(name)
        try:
            mark = read_json(path)
        except FileNotFoundError:
            return None
        if not _is_mark(mark):
            raise ValueError(f"{path} is no mark of a unit; remove it, and the unit is done again")
        return mark


def _is_mark(mark: Any) -> bool:
    """Tell whether this is a mark, all of whose shards lie in the folder itself."""
    return (
        isinstance(mark, dict)
        and mark.keys() >= _KEYS
        and isinstance(mark["source"], str)
        and all(isinstance(mark[name], dict) for name in ("settings", "identity", "report"))
        and isinstance(mark["shards"], list)
        and all(isinstance(name, str) and _is_inside(name) for name in mark["shards"])
        and is_report(mark["report"])
    )


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
