"""What stands in the folder of a run, read for people: settings, measurements, images.

    run = read_run("runs/mine")
    run.training[-1]["loss"]

Reading changes nothing, and a run may be written to meanwhile: half of a line is left out, as is one that is broken.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from PIL import Image

from ..adapter.io import CONFIG_NAME
from ..io import read_json
from .config import TrainConfig

Row = dict[str, Any]
Point = tuple[float, float]  # samples seen, value


@dataclass(frozen=True)
class RunRecord:
    """One run, as far as it has come.

    Args:
        config: the resolved settings; empty where config.json is missing.
        versions: of the libraries, by name.
        training, validations: lines of metrics.jsonl, by "samples"; what is no finite number is left out of them.
        skipped: steps left out as not finite, a line each.
        images: validation images, by the samples seen.
        finished: whether the finished adapter stands there.
        unread: lines of metrics.jsonl that are broken.
    """

    folder: Path
    config: dict[str, Any]
    versions: dict[str, str]
    training: list[Row]
    validations: list[Row]
    skipped: list[Row]
    images: dict[int, Path]
    finished: bool
    unread: int

    @property
    def samples(self) -> int:
        """How many the run has seen, as far as it has been written down."""
        rows = [rows[-1]["samples"] for rows in (self.training, self.validations) if rows]
        return max(rows, default=0)

    @property
    def measured(self) -> Row:
        """Each measurement of the validations, as it was last taken."""
        latest: Row = {}
        for row in self.validations:
            latest |= {name: value for name, value in row.items() if _is_number(value)}
        return latest

    @property
    def seconds(self) -> float:
        """Time in training steps: of the samples between two lines at the speed of the second. Validations and
        checkpoints are not in it."""
        total, before = 0.0, 0
        for row in self.training:
            speed = row.get("samples_per_s", 0)
            if _is_number(speed) and speed > 0:
                total += (row["samples"] - before) / speed
            before = row["samples"]
        return total

    def until(self, samples: int) -> RunRecord:
        """Return the run as it was after so many samples."""
        return RunRecord(
            folder=self.folder,
            config=self.config,
            versions=self.versions,
            training=[row for row in self.training if row["samples"] <= samples],
            validations=[row for row in self.validations if row["samples"] <= samples],
            skipped=[row for row in self.skipped if row["samples"] <= samples],
            images={seen: path for seen, path in self.images.items() if seen <= samples},
            finished=self.finished and samples >= self.samples,
            unread=self.unread,
        )


def read_run(folder: str | Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: it has neither config.json nor metrics.jsonl.
        ValueError: config.json is broken, or a setting in it is of another kind.
    """
    folder = Path(folder)
    settings, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has neither config.json nor metrics.jsonl")
    document = read_json(settings) if settings.is_file() else {}
    if not isinstance(document, dict) or not isinstance(document.get("versions", {}), dict | None):
        raise ValueError(f"{settings} does not hold the settings of a run")
    check_kinds(document.get("config", {}), settings)
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [row for row in map(_parsed, lines) if row]
    return RunRecord(
        folder=folder,
        config=document.get("config", {}),
        versions={str(name): str(value) for name, value in (document.get("versions") or {}).items()},
        training=_in_order(rows, "train"),
        validations=_in_order(rows, "validation"),
        skipped=[row for row in rows if row["kind"] == "skipped"],
        images={int(path.stem): path for path in sorted(folder.glob("validation/*.png")) if path.stem.isdecimal()},
        finished=(folder / "adapter" / CONFIG_NAME).is_file(),
        unread=len(lines) - len(rows),
    )


def check_kinds(config: Any, path: Path) -> None:
    """Tell whether settings, as far as a run has such, are of the kinds that they have in a run. They may be
    incomplete.

    Raises:
        ValueError: one is of another kind; it names the file and the setting.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold the settings of a run: its config is {config!s:.60}")
    for group, kind in ({"": TrainConfig} | _GROUPS).items():
        values = config if kind is TrainConfig else config.get(group)
        if not isinstance(values, dict | None):
            raise ValueError(f"{path} is damaged: {group} is {values!r:.60}; expected settings")
        hints = get_type_hints(kind)
        for name, value in (values or {}).items():
            if name in hints and name not in _GROUPS and not _is_of(value, hints[name]):
                full = f"{group}.{name}" if group else name
                raise ValueError(f"{path} is damaged: {full} is {value!r:.60}; expected {_in_words(hints[name])}")


_GROUPS: dict[str, Any] = {
    entry.name: entry.default_factory for entry in fields(TrainConfig) if is_dataclass(entry.default_factory)
}


def _is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value read from JSON is of the type that a setting has."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, kind) for kind in inner)
    if origin is Literal:
        return isinstance(value, str)  # of which there may be more in another version
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(item, inner[1]) for item in value.values())
    if hint in (int, float):
        return _is_number(value)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return "a text"
    words = {int: "a number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(hint, str(get_origin(hint) or hint).replace("<class '", "a ").replace("'>", ""))


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "metrics.jsonl").is_file()


def series(rows: list[Row], name: str) -> list[Point]:
    """Return one measurement over the run, where it was taken."""
    return [(row["samples"], row[name]) for row in rows if _is_number(row.get(name))]


def evenly(items: list[Any], count: int) -> list[Any]:
    """Return at most `count` of the items: the first, the last, and some between."""
    if len(items) <= count:
        return items
    if count == 1:
        return items[-1:]
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def image_bytes(path: Path, *, width: int, height: int, quality: int = 85) -> bytes:
    """Return the image as a JPEG of at most so many pixels, with nothing but pixels in it.

    Raises:
        OSError: the file is no image, or half of one.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of a damaged file, as Pillow has them
        raise OSError(f"{path} is no image that can be read: {error}") from error
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _parsed(line: str) -> Row | None:
    """Return a line of metrics.jsonl without its nulls, or None if it is broken."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not _is_number(row.get("samples")):
        return None
    if isinstance(gates := row.get("gates"), dict):
        row["gates"] = {str(name): value for name, value in gates.items() if _is_number(value)}
    else:
        row.pop("gates", None)
    return {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_order(rows: list[Row], kind: str) -> list[Row]:
    """Return the lines of one kind by samples seen; of two lines at one place the later one."""
    by_samples = {row["samples"]: row for row in rows if row["kind"] == kind}
    return [by_samples[samples] for samples in sorted(by_samples)]
