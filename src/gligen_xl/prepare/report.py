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

WRITTEN, ALREADY, WAITING = "written", "already there", "not done yet"  # states of a unit
HELD, ELSEWHERE = "held by another process", "not of this part"
_STATES = (WRITTEN, ALREADY, WAITING, HELD, ELSEWHERE)  # all others say why a unit failed

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
            reason, as `gligen_xl.prepare.captions.table.Counts`.
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
        """Count an image that is left out.

        Args:
            example: where it is described, what was got and what was expected; the first of a reason is shown whole.
        """
        self._add_skipped(reason, {"count": 1, "examples": [image_id]} | ({"example": example} if example else {}))

    def _add_skipped(self, reason: str, entry: dict[str, Any]) -> None:
        mine = self.skipped.setdefault(reason, {"count": 0, "examples": []})
        mine["count"] += entry["count"]
        mine["examples"] = (mine["examples"] + entry["examples"])[:EXAMPLES]
        if "example" in entry:
            mine.setdefault("example", entry["example"])

    def drop(self, reason: str, number: int, example: str | Callable[[], str] = "") -> None:
        """Count boxes that are left out; `example` says which one of them is, and what was expected."""
        self.dropped_boxes[reason] += number
        if reason not in self.dropped_examples:
            text = example if isinstance(example, str) else example()
            if text:
                self.dropped_examples[reason] = text

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
            self._add_skipped(reason, entry)
        self.incomplete.update(other.incomplete)
        self.dropped_boxes.update(other.dropped_boxes)
        self.dropped_examples = other.dropped_examples | self.dropped_examples
        count_unread(self.unread, other.unread)
        self.captions |= other.captions
        for stage, seconds in other.seconds.items():
            self.spend(stage, seconds)

    @property
    def statistics(self) -> BoxStatistics:
        """Statistics of the boxes in the rows that were written."""
        return BoxStatistics(images=self.written, boxes=self.boxes, without=self.rows_without_boxes)

    def to_dict(self) -> dict[str, Any]:
        seconds = {stage: round(value, 3) for stage, value in self.seconds.items()}
        return vars(self) | {name: dict(getattr(self, name)) for name in _COUNTERS} | {"seconds": seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UnitReport:
        counters: dict[str, Any] = {name: Counter(values.get(name, {})) for name in _COUNTERS}
        return cls(**values | counters)

    def lines(self) -> Iterator[str]:
        """Describe it for a reader, a line at a time."""
        yield f"images: {self.seen} seen, {self.used} used, {self.written} rows of {_size(self.bytes)} written"
        if self.written:
            yield f"boxes: {self.statistics}"
        for reason, entry in sorted(self.skipped.items(), key=lambda item: -item[1]["count"]):
            yield f"  skipped, {reason}: {entry['count']} (as {', '.join(entry['examples'])})"
            if "example" in entry:
                yield f"    {entry['example']}"
        for reason, number in self.incomplete.most_common():
            yield f"  used, but lack a row, {reason}: {number}"
        for reason, number in self.dropped_boxes.most_common():
            yield f"  boxes dropped, {reason}: {number}"
            if reason in self.dropped_examples:
                yield f"    {self.dropped_examples[reason]}"
        if self.unread:
            counts = ", ".join(f"{ending}: {number}" for ending, number in self.unread.most_common())
            yield f"  files that were not read, by ending: {counts}"
        if self.repeated_in_float32:
            yield f"  encoded again in float32: {self.repeated_in_float32}"
        if self.cut_texts:
            yield f"  texts cut, too long for the detector: {self.cut_texts}"
        for name, why in _LEFT_OUT.items():
            if number := self.captions.get(name):
                example = self.captions.get("example") if name == "refused" else ""
                yield f"  captions left out, {why}: {number}" + (f" (as {example})" if example else "")
        if self.seconds.get("all"):
            stages = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if name != "all")
            speed = f"{self.seconds['all']:.1f} in all ({self.seen / self.seconds['all']:.1f} images/s)"
            yield f"seconds: {speed}; {stages}; device busy {self.busy:.0%}"

    @property
    def busy(self) -> float:
        """Share of the time in which the VAE or the detector worked."""
        return sum(self.seconds.get(stage, 0.0) for stage in ("encode", "detect")) / (self.seconds.get("all") or 1.0)


def is_report(values: dict[str, Any]) -> bool:
    """Tell whether these are the values of a unit's report, as `UnitReport.to_dict` returns them."""

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float)

    def is_entry(entry: Any) -> bool:
        examples = entry.get("examples") if isinstance(entry, dict) else None
        if not isinstance(examples, list) or type(entry.get("count")) is not int:
            return False
        return all(map(is_text, [*examples, entry.get("example", "")]))

    kinds: dict[str, Callable[[Any], bool]] = dict.fromkeys((*_COUNTERS, "seconds"), is_number)
    kinds |= {"skipped": is_entry, "dropped_examples": is_text, "captions": lambda value: True}
    return (
        values.keys() <= {part.name for part in fields(UnitReport)}
        and all(type(values.get(name, 0)) is int for name in _COUNTS)
        and all(isinstance(values.get(name, {}), dict) for name in kinds)
        and all(all(map(kind, values.get(name, {}).values())) for name, kind in kinds.items())
    )


@dataclass
class PrepareReport:
    """Of a whole source, as far as it is done.

    Args:
        units: name -> one of the states above, or why it failed.
        total: of all units that are done. counted: how many these are.
        folders: that hold the shards, one for each resolution.
        removed: units that the source no longer has, and whose shards are gone.
        stay: units whose archive the source no longer has; their shards are left.
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
        return {name: what for name, what in self.units.items() if what not in _STATES}

    @property
    def in_work(self) -> bool:
        """Tell whether other processes have units that are not done."""
        return any(what in (HELD, ELSEWHERE) for what in self.units.values())

    @property
    def whole(self) -> bool:
        """Tell whether all units are done, whoever did them."""
        return self.counted == len(self.units)

    @property
    def warnings(self) -> list[str]:
        """What is hardly meant so."""
        if self.total.dropped_boxes and not self.total.boxes:
            return ["no image has a box left: look at the reasons, and whether box_format is that of the source"]
        return []

    def to_dict(self) -> dict[str, Any]:
        more = {"boxes_per_row": round(self.total.boxes / max(self.total.written, 1), 2)}
        if busy := self.total.busy:
            more["share_of_time_device_was_busy"] = round(busy, 3)
        names = ("folders", "removed", "stay", "moved", "again", "older", "warnings")
        values = {name: getattr(self, name) for name in names}
        return {"units": self.units, "failed": len(self.failed), **values, **self.total.to_dict(), **more}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        states = Counter(self.units.values())
        rest = ", ".join(f"{states[what]} {what}" for what in (ALREADY, WAITING, HELD, ELSEWHERE) if states[what])
        done = states[WRITTEN] + states[ALREADY]
        yield f"{done} of {len(self.units)} units done" + (f" ({rest})" if rest else "")
        for title, reasons in (("taken for the same, made from", self.moved), ("done again, changed:", self.again)):
            for reason in sorted(set(reasons.values())):
                names = [name for name, other in reasons.items() if other == reason]
                yield f"  {title} {reason}: {_first(sorted(names))}"
        for title, names in (
            ("made before times of change were noted, taken to be unchanged (else remove their shards)", self.older),
            ("removed, the source has them no more", self.removed),
            ("left, of archives that the source has no more (were they renamed, remove these)", self.stay),
        ):
            if names:
                yield f"  {title}: {_first(names)}"
        yield from self.total.lines()
        yield from (f"failed: {name}: {what}" for name, what in self.failed.items())
        yield from (f"warning: {text}" for text in self.warnings)
        if len(self.folders) > 1:
            yield "each resolution is a folder of its own, to train on, check and show:"
        yield from (f"in {folder}" for folder in self.folders)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else "")


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.2f} TB"
