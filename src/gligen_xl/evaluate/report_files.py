"""The files of a report: JSON for programs, Markdown, a page, and a grid of images.

report = Report(protocol, detector, conditions, settings)
write_report(report, "out")       # out/report.json, report.md, report.html, grid.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..images.decode import ImageError, decode
from ..images.draw import draw_boxes, grid
from ..io import whole_file
from . import report_words as words
from .report import Report
from .report_page import report_page
from .sampling import keyed

if TYPE_CHECKING:
    from .run import Condition

SCHEMA_VERSION = 1  # of report.json: another one, where a program that reads it would have to change
_SHOWN = 8  # layouts in the grid of images
_CELL = 512  # pixels of an image in it, at most
_DEEPEST = 4  # from there on a value of report.json is on one line: conditions, one of them, its images, an image


def write_report(report: Report, folder: str | Path, **about: Any) -> None:
    """Write `report.json`, `report.md`, `report.html` and `grid.png`; `about` is added to the JSON (as versions)."""
    folder = Path(folder)
    document = {"schema_version": SCHEMA_VERSION, **about, **report.to_dict(folder)}
    texts = {
        "report.json": _lines(document) + "\n",
        "report.md": f"{words.markdown_text(report)}\n{words.DEFINITIONS}\n",
    }
    texts["report.html"] = report_page(report, about)
    for name, text in texts.items():
        with whole_file(folder / name) as partial:
            partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))  # of file names that are not text
    with whole_file(folder / "grid.png") as partial:
        image_grid(report).save(partial, format="PNG")


def image_grid(report: Report) -> Image.Image:
    """Return the first layouts, a row each, as every condition drew them, with their boxes."""
    shown = [condition for condition in report.conditions if condition.kind != "shuffled"]
    layouts = dict(list(keyed(report.protocol.layouts).items())[:_SHOWN])
    rows = [[draw_boxes(_image_of(condition, key), layout) for condition in shown] for key, layout in layouts.items()]
    for image in (image for row in rows for image in row):
        image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    captions = [layout.prompt for layout in layouts.values()]
    return grid(rows, columns=[condition.name for condition in shown], captions=captions)


def _image_of(condition: Condition, key: str) -> Image.Image:
    """Grey, where there is none."""
    try:
        return decode(condition.paths[key])
    except (KeyError, OSError, ImageError):
        return Image.new("RGB", (256, 256), (128, 128, 128))


def _lines(value: Any, depth: int = 0) -> str:
    """Return JSON with one image, or one metric, per line."""
    if depth == _DEEPEST or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        items = [f"{json.dumps(name, ensure_ascii=False)}: {_lines(item, depth + 1)}" for name, item in value.items()]
        start, end = "{}"
    else:
        items, (start, end) = [_lines(item, depth + 1) for item in value], "[]"
    return f"{start}\n" + ",\n".join("  " * (depth + 1) + item for item in items) + f"\n{'  ' * depth}{end}"
