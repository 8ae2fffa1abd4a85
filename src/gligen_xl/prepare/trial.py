"""Tries the first images of a source before anything is begun: a fault that all of them have shows within a second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from .captions.table import CaptionTable
from .framing import Framed, Reason, frame_image
from .item import Item, Skipped, Unit, items_of, skipped
from .report import UnitReport
from .settings import Settings
from .sources.rows import check_not_all_alike
from .unit import TOO_FEW, WORK_FOLDER, captioned, open_captions
from .views import views


def check_first_images(units: Iterable[Unit], settings: Settings, out: Path) -> None:
    """Read, caption and decode the images of a source up to the first that can be used; most often that is one.

    Raises:
        ValueError: none of the first hundred can be, all for the same reason.
    """
    if settings.captions is not None:
        opened = open_captions(settings.captions, out / WORK_FOLDER)
    else:
        opened = nullcontext(None)
    with opened as captions:
        check_not_all_alike(_tried(units, settings, captions))


def _tried(units: Iterable[Unit], settings: Settings, captions: CaptionTable | None) -> Iterator[Item | Skipped]:
    for source_item in items_of(units):
        item = captioned(source_item, captions, needed=captions is not None)
        if isinstance(item, Skipped):
            yield item
            continue
        framed = frame_image(item.image, item.size, settings.framing)
        if isinstance(framed, Reason):
            yield skipped(item, framed, framed.detail)
        elif fault := _lacks_boxes(item, framed, settings):
            yield skipped(item, TOO_FEW, fault)
        else:
            yield item


def _lacks_boxes(item: Item, framed: Framed, settings: Settings) -> str:
    """Say why an image has too few boxes in all resolutions; empty if it has enough, or is still to be detected in."""
    report = UnitReport()
    pairs = zip(framed.frames, framed.pixels, strict=True)
    if settings.detector is not None or any(list(views(item, *pair, settings, report)) for pair in pairs):
        return ""
    dropped = next(iter(report.dropped_examples.items()), None)
    what = f"{dropped[0]}: {dropped[1].removeprefix(f'{item.place}: ')}" if dropped else "no more"
    return f"it has {len(item.boxes)} boxes, {what}; expected {settings.min_boxes}"
