"""Many units: on this machine, as one of many jobs, or on a Ray cluster.

    prepare(open_source("sa1b"), "shards", Settings(framing=Framing(resolutions=(512,))), Machine(workers=8))

A unit that is done is skipped, so the same call goes on after a kill. One that fails does not stop the others, and is
tried once more at the end. Several processes may share one folder: each unit is done by one of them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..io import whole_file, write_json
from .captions.files import survey
from .file_stats import weights_of
from .item import Unit
from .report import ALREADY, ELSEWHERE, HELD, WAITING, WRITTEN, PrepareReport
from .settings import Settings
from .trial import check_first_images
from .unit import Progress, UnitMaker
from .unit_folder import Done

_LOGGER = logging.getLogger(__name__)
REPORT_NAME = "prepare"  # .json and .txt, beside the shards

_CHANGES = {  # parts of an identity, in words
    "images": "its images' files",
    "mtime_ns": "the archive",
    "bytes": "the source's size",
    "sha256": "rows, paths or captions",
    "labels": "its files of annotations",
    "classes": "the phrases of the classes",
    "joined_captions": "the joined captions",
    "detector_weights": "the detector's weights",
}
ENDS = (WRITTEN, ALREADY, HELD)  # what becomes of a unit that does not fail

Execute = Callable[[Sequence[Unit]], Iterator[tuple[Unit, str]]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the work is done; what is written does not depend on it.

    Args:
        workers: decoding processes of each runner; 0 decodes in the runner itself.
        device: of the VAE and the detector.
        batch_size: images that are detected and encoded together.
        runner: "local" does units one after another here; "ray" on a Ray cluster (that of RAY_ADDRESS, or one of this
            machine), which has to see the same files.
        runners: on Ray, units at a time; by default one for each GPU, or for each `workers` + 1 CPUs.
    """

    workers: int = 0
    device: str = "cpu"
    batch_size: int = 8
    runner: Literal["local", "ray"] = "local"
    runners: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.runners is not None and (self.runners < 1 or self.runner != "ray"):
            raise ValueError(f"runners is {self.runners} with runner {self.runner!r}; expected at least 1, and ray")


def prepare(
    units: Sequence[Unit],
    out: str | Path,
    settings: Settings,
    machine: Machine,
    *,
    source: str = "",
    part: tuple[int, int] = (1, 1),
    progress: Progress = lambda weight, images: None,
) -> PrepareReport:
    """Write the shards of all units, or of a part of them, under `out`; those that stand there are kept.

    Args:
        units: all of the source.
        source: what they are of, in words that are the same every time, as its absolute path. What is done of it, and
            is cut otherwise now, is removed; units of another source that are called the same are refused. Empty:
            nothing is known of it, and nothing removed.
        part: (k, n): every n-th unit from the k-th, 1 to n; n such calls do all.
        progress: told (weight, images) that came to an end; a unit that fails takes its weight back.

    Returns:
        The report, of all that is done in `out`; also written there, as `prepare.json` and `prepare.txt`.

    Raises:
        FileNotFoundError: no such captions, VAE or detector.
        ValueError: settings that contradict the VAE, or what is done in `out`.
        OSError: the disk is full. What is done stays.
    """
    captions = survey(Path(settings.captions).expanduser())[1] if settings.captions is not None else ""
    done = Done(Path(out), settings, source, captions, weights_of(settings))
    done.check(units)
    mine = list(units[part[0] - 1 :: part[1]])
    report = PrepareReport({unit.name: ELSEWHERE for unit in units}, folders=[str(path) for path in done.folders])
    report.removed, report.stay = done.remove_orphans(units)
    older = [unit.name for unit in mine if done.is_older(unit)]
    waiting = [unit for unit in mine if _waits(unit, done, report)]
    report.older = [name for name in older if name not in {unit.name for unit in waiting}]
    if len(waiting) == len(units):  # nothing stands there yet
        check_first_images(units, settings, done.out)
    report.units |= {unit.name: ALREADY for unit in mine} | {unit.name: WAITING for unit in waiting}
    progress(sum(unit.weight for unit in mine) - sum(unit.weight for unit in waiting), 0)
    with _executor(done, machine, progress) if waiting else nullcontext(_nothing) as execute:
        try:
            failed = _pass(execute, waiting, report, done)
            _pass(execute, failed, report, done)
        except BaseException:
            with suppress(OSError):  # of a disk that is full: the first error says more
                _finish(units, done, report)
            raise
        _finish(units, done, report)
    return report


def _waits(unit: Unit, done: Done, report: PrepareReport) -> bool:
    """Whether a unit is still to be done; what has changed of one that was done goes into the report."""
    if not done.is_marked(unit):
        return True
    changes = done.changes(unit)
    if changes:
        report.again[unit.name] = ", ".join(dict.fromkeys(_CHANGES.get(name, name) for name in changes))
    return bool(changes)


def _pass(execute: Execute, units: list[Unit], report: PrepareReport, done: Done) -> list[Unit]:
    """Do the units; those that failed come back. Of the first one without boxes a warning tells at once."""
    failed, warned = [], False
    for unit, what in execute(units):
        report.units[unit.name] = what
        if what not in ENDS:
            failed.append(unit)
        if what == WRITTEN and not warned:
            made = done.report(unit)
            if warned := made.written > 0 and made.statistics.unusable:
                _LOGGER.warning("%s: none of its %s rows has a box", unit.name, f"{made.written:,}")
    return failed


def _nothing(units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
    return iter(())


def _finish(units: Sequence[Unit], done: Done, report: PrepareReport) -> None:
    """The report of all that is done, also where other processes did it."""
    for unit in units:
        state = report.units[unit.name]
        elsewhere = state in (ELSEWHERE, HELD) and done.is_marked(unit)  # whose part looks at what it is made of
        if state in (WRITTEN, ALREADY) or elsewhere or (state == WAITING and done.is_done(unit)):
            report.total.add(done.report(unit))
            report.counted += 1
            if (source := done.source_of(unit)) not in ("", done.source):
                report.moved[unit.name] = source
            if report.units[unit.name] == WAITING:  # an interrupt came just then
                report.units[unit.name] = WRITTEN
    write_json(done.out / f"{REPORT_NAME}.json", report.to_dict())
    with whole_file(done.out / f"{REPORT_NAME}.txt") as partial:
        partial.write_text(f"{report}\n", encoding="utf-8")


def _executor(done: Done, machine: Machine, progress: Progress) -> Local:
    if machine.runner == "ray":
        from .ray_runner import Cluster

        return Cluster(done, machine, progress)
    return Local(done, machine, progress)


class Local:
    """Units one after another, here."""

    def __init__(self, done: Done, machine: Machine, progress: Progress):
        self.done, self.machine, self.progress = done, machine, progress

    def __enter__(self) -> Execute:
        machine = self.machine
        self.maker = UnitMaker(
            self.done.out,
            self.done.settings,
            workers=machine.workers,
            device=machine.device,
            batch_size=machine.batch_size,
        )
        return self.execute

    def __exit__(self, *_: object) -> None:
        self.maker.close()

    def execute(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        for unit in units:
            yield unit, run_unit(self.maker, self.done, unit, self.progress)


def run_unit(maker: UnitMaker, done: Done, unit: Unit, progress: Progress = lambda weight, images: None) -> str:
    """Do one unit, unless it is done or another process is at it; what became of it.

    Raises:
        OSError: the disk is full.
    """
    told = 0

    def tell(weight: int, images: int) -> None:
        nonlocal told
        told += weight
        progress(weight, images)

    with done.hold(unit.name) as free:
        if not free or done.is_done(unit):  # by another process, since this one looked
            tell(unit.weight, 0)
            return ALREADY if free else HELD
        try:
            done.claim()
            done.check_unit(unit)
            identity = done.identity(unit)
            report, shards = maker.make(unit, tell)
            done.mark(unit, identity, report, shards)
            return WRITTEN
        except Exception as error:  # whatever it is, other units may still be done
            tell(-told, 0)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno, f"the disk of {maker.out} is full; make room, and the same command goes on"
                ) from error
            text = " ".join(str(error).split())
            return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
