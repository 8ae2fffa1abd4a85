"""A protocol: which layouts are evaluated, with which detector, and by which metrics. `protocols` has those by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..layout import Layout

AP = ("ap", "ap_50", "ap_75", "ar")
PLACE = ("success", "mean_iou", "recall_50", "recall_75", "picture_success")
COLOUR = ("colour", "colour_of_found")
WRONG = ("wrong_count", "extra_objects")


@dataclass(frozen=True)
class Protocol:
    """What an evaluation evaluates: layouts, the detector, and the metrics.

    Args:
        paper: where it comes from; empty for a file of one's own.
        parameters: what the layouts depend on, for the report (JSON).
        detector: the default one's name.
        metrics: in their order of importance.
        real: a layout's real image, or None where there are none.
        empty: an image that holds nothing of a layout.
        attributes: what is judged of an object beside its place, as ("colour",).
    """

    name: str
    paper: str
    parameters: Mapping[str, Any]
    layouts: list[Layout]
    detector: str
    metrics: tuple[str, ...]
    real: Callable[[Layout], Image.Image] | None
    empty: Callable[[Layout], Image.Image]
    attributes: tuple[str, ...] = ()
