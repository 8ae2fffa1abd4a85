"""Many units: on this machine, as one of many jobs, or on a Ray cluster.

    prepare(open_source("sa1b"), "shards", Settings(framing=Framing(resolutions=(512,))), Machine(workers=8))

A unit that is done is skipped, so the same call goes on after a kill. One that fails does not stop the others, and is
tried once more at the end. Several processes may share one folder: each unit is done by one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from ..io import whole_file, write_json
from .captions.files import survey
from .file_stats import weights_of
from .item import Unit
from .report import ALREADY, ELSEWHERE, HELD, WAITING, WRITTEN, PrepareReport
from .runners import SUCCESSES, Execute, Machine, runner_for
from .settings import Settings
from .trial import check_first_images
from .unit import Progress, no_progress
from .unit_folder import UnitFolder

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


def prepare(
    units: Sequence[Unit],
    out: str | Path,
    settings: Settings,
    machine: Machine,
    *,
    source: str = "",
    part: tuple[int, int] = (1, 1),
    progress: Progress = no_progress,
) -> PrepareReport:
    """Write the shards of all units, or of a part of them, under `out`; those that are there are kept.

    Args:
        units: all of the source.
        source: what they are of, in words that are the same every time, as its absolute path. What is done of it, and
            is cut otherwise now, is removed; units of another source that are called the same are refused. Empty:
            nothing is known of it, and nothing removed.
        part: (k, n): every n-th unit from the k-th, 1 to n; n such calls do all.
        progress: called with the weight and the images that came to an end; a unit that fails takes its weight back.

    Returns:
        The report, of all that is done in `out`; also written there, as `prepare.json` and `prepare.txt`.

    Raises:
        FileNotFoundError: no such captions, VAE or detector.
        ValueError: settings that contradict the VAE, or what is done in `out`.
        OSError: the disk is full. What is done stays.
    """
    captions = survey(Path(settings.captions).expanduser())[1] if settings.captions is not None else ""
    folder = UnitFolder(Path(out), settings, source, captions, weights_of(settings))
    folder.check(units)
    mine = list(units[part[0] - 1 :: part[1]])
    report = PrepareReport(
        {unit.name: ELSEWHERE for unit in units}, folders=[str(path) for path in folder.shard_folders]
    )
    report.removed, report.stay = folder.remove_orphans(units)
    older = [unit.name for unit in mine if folder.is_older(unit)]
    waiting = [unit for unit in mine if _waits(unit, folder, report)]
    report.older = [name for name in older if name not in {unit.name for unit in waiting}]
    if len(waiting) == len(units):  # nothing is done yet
        check_first_images(units, settings, folder.out)
    report.units |= {unit.name: ALREADY for unit in mine} | {unit.name: WAITING for unit in waiting}
    progress(sum(unit.weight for unit in mine) - sum(unit.weight for unit in waiting), 0)
    with runner_for(folder, machine, progress) if waiting else nullcontext() as execute:
        try:
            if execute is not None:
                failed = _pass(execute, waiting, report, folder)
                _pass(execute, failed, report, folder)
        except BaseException:
            with suppress(OSError):  # of a disk that is full: the first error says more
                _write_report(units, folder, report)
            raise
    _write_report(units, folder, report)
    return report


def _waits(unit: Unit, folder: UnitFolder, report: PrepareReport) -> bool:
    """Tell whether a unit is still to be done; the report notes what has changed of one that was done."""
    if not folder.is_marked(unit):
        return True
    changes = folder.changes(unit)
    if changes:
        report.again[unit.name] = ", ".join(dict.fromkeys(_CHANGES.get(name, name) for name in changes))
    return bool(changes)


def _pass(execute: Execute, units: list[Unit], report: PrepareReport, folder: UnitFolder) -> list[Unit]:
    """Do the units and return those that failed. Warn at once of the first one without boxes."""
    failed, warned = [], False
    for unit, what in execute(units):
        report.units[unit.name] = what
        if what not in SUCCESSES:
            failed.append(unit)
        if what == WRITTEN and not warned:
            counts = folder.report(unit)
            if warned := counts.written > 0 and counts.statistics.unusable:
                _LOGGER.warning("%s: none of its %s rows has a box", unit.name, f"{counts.written:,}")
    return failed


def _write_report(units: Sequence[Unit], folder: UnitFolder, report: PrepareReport) -> None:
    """Complete the report with all that is done, also where other processes did it, and write it."""
    for unit in units:
        state = report.units[unit.name]
        elsewhere = state in (ELSEWHERE, HELD) and folder.is_marked(unit)  # that part checks what it is made of
        if state in (WRITTEN, ALREADY) or elsewhere or (state == WAITING and folder.is_done(unit)):
            report.total.add(folder.report(unit))
            report.counted += 1
            if (source := folder.source_of(unit)) not in ("", folder.source):
                report.moved[unit.name] = source
            if report.units[unit.name] == WAITING:  # an interrupt came just then
                report.units[unit.name] = WRITTEN
    write_json(folder.out / f"{REPORT_NAME}.json", report.to_dict())
    with whole_file(folder.out / f"{REPORT_NAME}.txt") as partial:
        partial.write_text(f"{report}\n", encoding="utf-8")
