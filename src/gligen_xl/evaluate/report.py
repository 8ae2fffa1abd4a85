"""The figures of an evaluation, as Python and JSON values. `report_files` writes them for people and programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..detect.detectors import Detector
from ..detect.matching import ImageScore
from ..redact import public, public_text
from .ap import AP_NAMES
from .metrics import Estimate, summarize
from .protocol import Protocol
from .slices import Slice, slices

if TYPE_CHECKING:
    from .compare import Comparison
    from .run import Condition


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
        """Shorten paths to their last names, as reports are shared."""
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
        """Return how many objects per image the detector is sure of, whatever they are. The condition has images."""
        numbers = [len(self.sure(image)) for image in condition.images]
        return sum(numbers) / len(numbers)

    def sure(self, image: ImageScore) -> list[int]:
        """Return the numbers of the detections that count: those from the detector's threshold on."""
        threshold = self.detector.settings.get("threshold", 0.0)
        return [number for number, found in enumerate(image.detections) if found.score >= threshold]

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return what `report.json` holds.

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
        return plain_json(document)

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


def _path_from(path: Path, folder: Path) -> str:
    """Return the image's path in the report's folder, or the name of its folder and its own if it lies elsewhere."""
    path, folder = path.absolute(), folder.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else f"{path.parent.name}/{path.name}"


def _rounded(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Round the estimates as they are written, so that all files say the same."""
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


def plain_json(item: Any) -> Any:
    """Return what JSON can say: floats rounded to six digits after the point, and null if they are not finite."""
    if isinstance(item, Mapping):
        return {str(name): plain_json(inner) for name, inner in item.items()}
    if isinstance(item, list | tuple | set | frozenset):
        return [plain_json(inner) for inner in item]
    if isinstance(item, float):
        return round(item, 6) if math.isfinite(item) else None
    return item if isinstance(item, str | int | None) else str(item)
