"""What became of the images: of one unit, and of all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.box_statistics import BoxStatistics
from .sources.tars import count_unread

EXAMPLES = 5  # of each reason
_COUNTS = ("seen", "used", "written", "boxes", "rows_without_boxes", "repeated_in_float32", "bytes", "cut_texts")
_COUNTERS = ("incomplete", "dropped_boxes", "unread")
_LEFT_OUT = {  # counts of a caption source, in words
    "duplicates": "of an image that had one already",
    "empty": "empty",
    "refused": "too long, rows of YOLO labels, with control characters, or no file of the archive",
}


@dataclass
class UnitReport:
    """Of one unit, or of several put together.

    Args:
        seen: images in the source. written: rows in shards (a mirrored image, or another resolution, is a row too).
        used, skipped: images that became rows, and those that did not: reason -> number, ids of some, and what
            was got of one of them and where.
        incomplete: used ones that lack a row, in one resolution or mirrored: reason -> number.
        dropped_boxes: reason -> number, in every resolution anew. dropped_examples: reason -> one of them whole.
        unread: files in archives that are of no use: ending -> number.
        boxes: in the rows. rows_without_boxes: rows that have none.
        seconds: by stage. `decode` is the sum over processes; `wait` is how long the device had nothing to do for want
            of images.
        bytes: of latents.
        cut_texts: that were too long for the detector.
        captions: of the whole source that is joined: how many images have one, and how many texts were left out by
            reason, as `gligen_xl.prepare.captions.Counts`.
    """

    seen: int = 0
    used: int = 0
    written: int = 0
    boxes: int = 0
    rows_without_boxes: int = 0
    repeated_in_float32: int = 0
    bytes: int = 0
    cut_texts: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    incomplete: Counter[str] = field(default_factory=Counter)
    dropped_boxes: Counter[str] = field(default_factory=Counter)
    dropped_examples: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)

    def skip(self, image_id: str, reason: str, example: str = "") -> None:
        """An image is left out.

        Args:
            example: where it is described, what was got and what was expected; the first of a reason is told whole.
        """
        entry = self.skipped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(image_id)
        if example:
            entry.setdefault("example", example)

    def drop(self, reason: str, number: int, example: str | Callable[[], str] = "") -> None:
        """Boxes are left out; `example` says which one of them is, and what was expected."""
        self.dropped_boxes[reason] += number
        if reason not in self.dropped_examples and (told := example if isinstance(example, str) else example()):
            self.dropped_examples[reason] = told

    def spend(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spend(stage, time.perf_counter() - begin)

    def add(self, other: UnitReport) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, entry in other.skipped.items():
            mine = self.skipped.setdefault(reason, {"count": 0, "examples": []})
            mine["count"] += entry["count"]
            mine["examples"] = (mine["examples"] + entry["examples"])[:EXAMPLES]
            if "example" in entry:
                mine.setdefault("example", entry["example"])
        self.incomplete.update(other.incomplete)
        self.dropped_boxes.update(other.dropped_boxes)
        self.dropped_examples = other.dropped_examples | self.dropped_examples
        count_unread(self.unread, other.unread)
        self.captions |= other.captions
        for stage, seconds in other.seconds.items():
            self.spend(stage, seconds)

    @property
    def statistics(self) -> BoxStatistics:
        """Of the rows that were written."""
        return BoxStatistics(images=self.written, boxes=self.boxes, without=self.rows_without_boxes)

    def to_dict(self) -> dict[str, Any]:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        seconds = {stage: round(value, 3) for stage, value in self.seconds.items()}
        counts = {name: dict(getattr(self, name)) for name in _COUNTERS}
        return values | counts | {"seconds": seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UnitReport:
        report = cls(**values)
        for name in _COUNTERS:
            setattr(report, name, Counter(getattr(report, name)))
        return report


def is_report(values: dict[str, Any]) -> bool:
    """Whether these are the values of a unit's report, as `UnitReport.to_dict` gives them."""

    def are_numbers(counts: Any) -> bool:
        return isinstance(counts, dict) and all(isinstance(number, int | float) for number in counts.values())

    def is_entry(entry: Any) -> bool:
        examples = entry.get("examples") if isinstance(entry, dict) else None
        if not isinstance(examples, list) or type(entry.get("count")) is not int:
            return False
        return all(map(_is_text, [*examples, entry.get("example", "")]))

    if values.keys() - {part.name for part in fields(UnitReport)}:
        return False
    if not all(type(values.get(name, 0)) is int for name in _COUNTS):
        return False
    tables = {name: values.get(name, {}) for name in ("skipped", "dropped_examples", "captions")}
    return (
        all(isinstance(table, dict) for table in tables.values())
        and all(map(is_entry, tables["skipped"].values()))
        and all(map(_is_text, tables["dropped_examples"].values()))
        and all(are_numbers(values.get(name, {})) for name in (*_COUNTERS, "seconds"))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass
class PrepareReport:
    """Of a whole source, as far as it is done.

    Args:
        units: name -> one of the states below, or why it failed.
        total: of all units that are done. counted: how many these are.
        folders: that hold the shards, one for each resolution.
        removed: units that the source has no more, and their shards are gone.
        stay: units whose archive the source has no more; their shards are left.
        moved: units that are there already, from another place: name -> the source as it was called then.
        again: units that are done anew, and what of them has changed.
        older: units that are there already, made before the times of their files were noted: these are taken to be as
            they were, and are noted now.
    """

    units: dict[str, str] = field(default_factory=dict)
    total: UnitReport = field(default_factory=UnitReport)
    counted: int = 0
    folders: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    stay: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    older: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        return {name: what for name, what in self.units.items() if what not in _FINE}

    @property
    def in_work(self) -> bool:
        """Whether other processes have units that are not done."""
        return any(what in (HELD, ELSEWHERE) for what in self.units.values())

    @property
    def whole(self) -> bool:
        """Whether all units are done, whoever did them."""
        return self.counted == len(self.units)

    def to_dict(self) -> dict[str, Any]:
        total = self.total
        more = {"boxes_per_row": round(total.boxes / max(total.written, 1), 2)}
        if busy := self.busy:
            more["share_of_time_device_was_busy"] = round(busy, 3)
        names = ("folders", "removed", "stay", "moved", "again", "older", "warnings")
        told = {name: getattr(self, name) for name in names}
        return {"units": self.units, "failed": len(self.failed), **told, **total.to_dict(), **more}

    @property
    def busy(self) -> float:
        """Share of the time in which the VAE or the detector worked."""
        seconds = self.total.seconds
        return sum(seconds.get(stage, 0.0) for stage in ("encode", "detect")) / (seconds.get("all") or 1.0)

    @property
    def warnings(self) -> list[str]:
        """What is hardly meant so."""
        if self.total.dropped_boxes and not self.total.boxes:
            return ["no image has a box left: look at the reasons, and whether box_format is that of the source"]
        return []

    def __str__(self) -> str:
        states = Counter(self.units.values())
        done = states[WRITTEN] + states[ALREADY]
        lines = [f"{done} of {len(self.units)} units done" + _rest(states)]
        for source in sorted(set(self.moved.values())):
            units = sorted(name for name, other in self.moved.items() if other == source)
            lines.append(f"  taken for the same, made from {source}: {_first(units)}")
        for why in sorted(set(self.again.values())):
            lines.append(
                f"  done again, changed: {why}: {_first([n for n, what in self.again.items() if what == why])}"
            )
        if self.older:
            lines.append(
                f"  made before times of change were noted, taken to be unchanged (else remove their shards): "
                f"{_first(self.older)}"
            )
        if self.removed:
            lines.append(f"  removed, the source has them no more: {_first(self.removed)}")
        if self.stay:
            what = "left, of archives that the source has no more (were they renamed, remove these)"
            lines.append(f"  {what}: {_first(self.stay)}")
        lines += self._images()
        lines += [f"failed: {name}: {what}" for name, what in self.failed.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        if len(self.folders) > 1:
            lines.append("each resolution is a folder of its own, to train on, check and show:")
        return "\n".join([*lines, *(f"in {folder}" for folder in self.folders)])

    def _images(self) -> Iterator[str]:
        total = self.total
        yield (f"images: {total.seen} seen, {total.used} used, {total.written} rows of {_size(total.bytes)} written")
        if total.written:
            yield f"boxes: {total.statistics}"
        for reason, entry in sorted(total.skipped.items(), key=lambda item: -item[1]["count"]):
            yield f"  skipped, {reason}: {entry['count']} (as {', '.join(entry['examples'])})"
            if "example" in entry:
                yield f"    {entry['example']}"
        for reason, number in total.incomplete.most_common():
            yield f"  used, but lack a row, {reason}: {number}"
        for reason, number in total.dropped_boxes.most_common():
            yield f"  boxes dropped, {reason}: {number}"
            if reason in total.dropped_examples:
                yield f"    {total.dropped_examples[reason]}"
        if total.unread:
            counts = ", ".join(f"{ending}: {number}" for ending, number in total.unread.most_common())
            yield f"  files that were not read, by ending: {counts}"
        if total.repeated_in_float32:
            yield f"  encoded again in float32: {total.repeated_in_float32}"
        if total.cut_texts:
            yield f"  texts cut, too long for the detector: {total.cut_texts}"
        for name, number in total.captions.items():
            if number and name in _LEFT_OUT:
                example = total.captions.get("example")
                told = f" (as {example})" if example and name == "refused" else ""
                yield f"  captions left out, {_LEFT_OUT[name]}: {number}{told}"
        if total.seconds.get("all"):
            stages = ", ".join(f"{name} {value:.1f}" for name, value in total.seconds.items() if name != "all")
            yield (
                f"seconds: {total.seconds['all']:.1f} in all ({total.seen / total.seconds['all']:.1f} pictures/s); "
                f"{stages}; device busy {self.busy:.0%}"
            )


WRITTEN, ALREADY, WAITING = "written", "already there", "not done yet"
HELD, ELSEWHERE = "held by another process", "not of this part"
_FINE = (WRITTEN, ALREADY, WAITING, HELD, ELSEWHERE)


def _rest(states: Counter[str]) -> str:
    parts = [f"{states[what]} {what}" for what in (ALREADY, WAITING, HELD, ELSEWHERE) if states[what]]
    return f" ({', '.join(parts)})" if parts else ""


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else "")


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} TB"
