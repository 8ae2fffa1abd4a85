"""What an evaluation found: JSON for programs, a table for the terminal, a page and a grid of images for the eye.

report = Report(protocol, detector, conditions, settings)
write_report(report, "out")       # out/report.json, report.md, report.html, grid.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..detect.detectors import Detector
from ..detect.matching import ImageScore
from ..escape import markdown
from ..images.decode import ImageError, decode
from ..images.draw import draw_boxes, grid
from ..io import whole_file
from ..redact import public, public_text
from . import report_words as words
from .ap import AP_NAMES
from .metrics import Estimate, summarize
from .protocols import Protocol
from .report_page import report_page
from .sampling import keyed
from .slices import Slice, slices

if TYPE_CHECKING:
    from .compare import Comparison
    from .run import Condition

SCHEMA_VERSION = 1  # of report.json: another one, where a program that reads it would have to change
_SHOWN = 8  # layouts in the grid of images
_CELL = 512  # pixels of an image in it, at most
_DEEPEST = 4  # from there on a value of report.json is on one line: conditions, one of them, its images, an image


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Args:
        conditions: the first one is what the page begins with.
        settings: how images were generated; "distances" are FID and KID by condition, where they were measured.
        compared: paired differences from another evaluation.
    """

    protocol: Protocol
    detector: Detector
    conditions: Sequence[Condition]
    settings: Mapping[str, Any]
    compared: Sequence[Comparison] | None = None

    def __post_init__(self) -> None:
        """Reports are shared: of paths their last names stay."""
        object.__setattr__(self, "settings", public(self.settings))

    @cached_property
    def metrics(self) -> dict[str, dict[str, Estimate]]:
        """By condition and name, as `summarize` has them, and "fid" and "kid"; rounded as they are written.

        A condition without images has none.
        """
        ap = bool(set(AP_NAMES) & set(self.protocol.metrics)) and find_spec("faster_coco_eval") is not None
        metrics = {}
        for condition in self.conditions:
            found = summarize(condition.images, ap=ap) if condition.images else {}
            metrics[condition.name] = _rounded(found | self._distances(condition.name))
        return metrics

    def _distances(self, name: str) -> dict[str, Estimate]:
        distance = self.settings.get("distances", {}).get(name)
        if distance is None:
            return {}
        return {name: Estimate(*(distance[name + end] for end in ("", "_low", "_high"))) for name in ("fid", "kid")}

    @cached_property
    def names(self) -> list[str]:
        """The metrics of the protocol that were measured, in its order; KID beside FID."""
        names = [part for name in self.protocol.metrics for part in (("fid", "kid") if name == "fid" else (name,))]
        # Whatever the protocol: what success depends on, and what was asked for.
        also = (*self.detector.attributes, "clip", "clip_objects", "fid", "kid")
        names += [name for name in also if name not in names]
        return [name for name in names if any(name in of_one for of_one in self.metrics.values())]

    def compared_names(self, compared: Comparison) -> list[str]:
        return [name for name in self.names if name in compared.difference]

    @cached_property
    def slices(self) -> dict[str, dict[str, list[Slice]]]:
        """By condition and grouping: of the first condition, and what it is measured against."""
        return {
            condition.name: {
                grouping: [replace(part, metrics=_rounded(part.metrics)) for part in parts]
                for grouping, parts in slices(condition.images, self.protocol.layouts, self.detector.query).items()
            }
            for condition in self.conditions
            if condition is self.conditions[0] or condition.kind in ("off", "real")
        }

    def seen(self, condition: Condition) -> float:
        """How many objects an image the detector is sure of, whatever they are. The condition has images."""
        numbers = [len(self.sure(image)) for image in condition.images]
        return sum(numbers) / len(numbers)

    def sure(self, image: ImageScore) -> list[int]:
        """The numbers of the detections that count: those from the detector's threshold on."""
        threshold = self.detector.settings.get("threshold", 0.0)
        return [number for number, found in enumerate(image.detections) if found.score >= threshold]

    def table(self) -> str:
        """For the terminal, 120 columns wide; says what `markdown` says."""
        lacking = words.unread(self)
        unread = "Images that could not be read are in no figure.\n\n"
        parts = [
            words.wrapped(words.about(self)),
            *([unread + "".join(words.wrapped(line, "- ") for line in lacking)] if lacking else []),
            words.wrapped(words.bounds(self)),
            words.terminal_table(self),
            *([words.terminal_differences(self)] if self.compared else []),
            *(["".join(words.wrapped(note, "- ") for note in notes)] if (notes := words.notes(self)) else []),
        ]
        return "\n".join(parts)

    def markdown(self) -> str:
        """What lacks, what the detector itself gets wrong, and the metrics of the conditions."""
        lacking = words.unread(self)
        parts = [
            markdown(words.about(self)) + "\n",
            *(["**Images that could not be read are in no figure.**\n\n" + _listed(lacking)] if lacking else []),
            markdown(words.bounds(self)) + "\n",
            words.table(self),
            *([words.differences(self)] if self.compared else []),
            *([_listed(notes)] if (notes := words.notes(self)) else []),
        ]
        return "\n".join(parts)

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """What `report.json` holds.

        Args:
            folder: that paths of images are relative to.
        """
        protocol, detector = self.protocol, self.detector
        document = {
            "settings": self.settings,
            "protocol": {
                "name": protocol.name,
                "paper": protocol.paper,
                "parameters": public(protocol.parameters),
                "metrics": protocol.metrics,
                "layouts": len(protocol.layouts),
                "objects": sum(len(layout.boxes) for layout in protocol.layouts),
            },
            "detector": {
                "name": detector.name,
                "settings": detector.settings,
                "attributes": detector.attributes,
                "labels_decide": detector.labels_decide,
            },
            "conditions": [self._condition(condition, folder) for condition in self.conditions],
            "compared": [
                {
                    "condition": one.condition,
                    "other": one.other,
                    "difference": _estimates(_rounded(one.difference)),
                }
                for one in self.compared or ()
            ],
        }
        return words.plain_json(document)

    def _condition(self, condition: Condition, folder: str | Path | None) -> dict[str, Any]:
        return {
            "name": condition.name,
            "kind": condition.kind,
            "settings": condition.settings,
            "metrics": _estimates(self.metrics[condition.name]),
            "detections_a_picture": self.seen(condition) if condition.images else None,
            "unread": {key: public_text(why) for key, why in condition.unread.items()},
            "slices": {
                grouping: [
                    {"name": part.name, "objects": part.objects, "pictures": part.images, **_estimates(part.metrics)}
                    for part in parts
                ]
                for grouping, parts in self.slices.get(condition.name, {}).items()
            },
            "pictures": [self._image(image, condition, folder) for image in condition.images],
        }

    def _image(self, image: ImageScore, condition: Condition, folder: str | Path | None) -> dict[str, Any]:
        sure = self.sure(image)
        measured = {"clip": image.clip, "clip_objects": image.clip_objects}
        path = condition.paths.get(image.key)
        return {
            "key": image.key,
            **({} if path is None or folder is None else {"path": _path_from(path, Path(folder))}),
            "layout": image.layout.to_dict(),
            "success": image.success,
            "objects": [
                {
                    "iou": score.iou,
                    "success": score.success,
                    "attributes": score.attributes,
                    "assigned": None if score.assigned is None else sure.index(score.assigned),
                }
                for score in image.objects
            ],
            "found": [image.detections[number].to_dict() for number in sure],
            "extra": image.extra,
            "missing": image.missing,
            **{name: value for name, value in measured.items() if value is not None},
        }

    def grid(self) -> Image.Image:
        """The first layouts, a row each, under every condition; boxes are drawn."""
        shown = [condition for condition in self.conditions if condition.kind != "shuffled"]
        layouts = dict(list(keyed(self.protocol.layouts).items())[:_SHOWN])
        rows = [
            [draw_boxes(_image_of(condition, key), layout) for condition in shown] for key, layout in layouts.items()
        ]
        for image in (image for row in rows for image in row):
            image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        captions = [layout.prompt for layout in layouts.values()]
        return grid(rows, columns=[condition.name for condition in shown], captions=captions)


def write_report(report: Report, folder: str | Path, **about: Any) -> None:
    """Write `report.json`, `report.md`, `report.html` and `grid.png`; `about` is added to the JSON (as versions)."""
    folder = Path(folder)
    document = {"schema_version": SCHEMA_VERSION, **about, **report.to_dict(folder)}
    texts = {"report.json": _lines(document) + "\n", "report.md": f"{report.markdown()}\n{words.DEFINITIONS}\n"}
    texts["report.html"] = report_page(report, about)
    for name, text in texts.items():
        with whole_file(folder / name) as partial:
            partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))  # of file names that are not text
    with whole_file(folder / "grid.png") as partial:
        report.grid().save(partial, format="PNG")


def _path_from(path: Path, folder: Path) -> str:
    """The image's path in the report's folder; of one that lies elsewhere, the name of its folder and its own."""
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else f"{path.parent.name}/{path.name}"


def _image_of(condition: Condition, key: str) -> Image.Image:
    """Grey, where there is none."""
    try:
        return decode(condition.paths[key])
    except (KeyError, OSError, ImageError):
        return Image.new("RGB", (256, 256), (128, 128, 128))


def _rounded(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """As they are written, so that all files say the same."""
    return {
        name: Estimate(*(round(number, 6) for number in (estimate.value, estimate.low, estimate.high)))
        for name, estimate in estimates.items()
    }


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {
        name: int(estimate.value)
        if name in ("objects", "pictures")
        else {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        for name, estimate in estimates.items()
    }


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"- {markdown(line)}\n" for line in lines)


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with an image, or a metric, on a line."""
    if depth == _DEEPEST or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        items = [f"{json.dumps(name, ensure_ascii=False)}: {_lines(item, depth + 1)}" for name, item in value.items()]
        start, end = "{}"
    else:
        items, (start, end) = [_lines(item, depth + 1) for item in value], "[]"
    return f"{start}\n" + ",\n".join("  " * (depth + 1) + item for item in items) + f"\n{'  ' * depth}{end}"
