"""How an evaluation's figures are named and written, and the sentences that go before them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from ..escape import markdown, printable
from ..redact import public_text
from .metrics import Estimate
from .report import Report

_NAMES = {
    "mean_iou": "mean IoU",
    "mean_iou_right": "mean IoU, attributes right",
    "recall_50": "recall@0.5",
    "recall_75": "recall@0.75",
    "success": "success",
    "picture_success": "whole images",
    "wrong_count": "wrong count",
    "extra_objects": "extra objects",
    "ap": "AP",
    "ap_50": "AP50",
    "ap_75": "AP75",
    "ar": "AR",
    "clip": "CLIP",
    "clip_objects": "CLIP of boxes",
    "fid": "FID",
    "kid": "KID",
}
_FACTORS_AND_DIGITS = {
    "mean_iou": (1, 3),
    "mean_iou_right": (1, 3),
    "extra_objects": (1, 2),
    "ap": (100, 1),
    "ap_50": (100, 1),
    "ap_75": (100, 1),
    "ar": (100, 1),
    "clip": (1, 1),
    "clip_objects": (1, 1),
    "fid": (1, 1),
    "kid": (1, 4),
}
LESS_IS_BETTER = frozenset({"wrong_count", "extra_objects", "fid", "kid"})
_UNREAD = 5  # images that are named of each condition
_DIFFERENCES = "Differences from the other evaluation; shares in points of percent."
_WIDTH = 120  # of a terminal
_HEADING_WIDTH = 24  # of a column of the terminal's tables; longer names go on in the next line

DEFINITIONS = (
    "Success: the share of objects that are found (a detection of the right label, IoU at least 0.5) and right in "
    "every attribute; whole images: the share of images of which all objects are. Mean IoU counts 0 for an object "
    "to which no detection belongs; with attributes right it counts 0 for one that is found and wrong in one. Colour "
    "and other attributes are shares of all objects, those of found of the found alone. Wrong count: the share of "
    "images with more or fewer objects of a requested label than "
    "requested; extra objects: how many too many an image has. AP and AR are times 100. In brackets: 95 % intervals "
    "of the bootstrap over images. They hold the chance of layouts and noise, not that of another training."
)


def label(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def is_share(name: str) -> bool:
    """Tell whether it is from 0 to 1."""
    return name in ("mean_iou", "mean_iou_right", "ap", "ap_50", "ap_75", "ar") or name not in _FACTORS_AND_DIGITS


def value(name: str, number: float, *, sign: bool = False) -> str:
    """ "71.2 %", "0.643"; with a sign, as of differences, "+3.1"."""
    figure = _figure(name, number, "+" if sign else "")
    return figure if sign or name in _FACTORS_AND_DIGITS else f"{figure} %"


def interval(name: str, estimate: Estimate, *, sign: bool = False) -> str:
    """ "[68.0, 74.1]", in the unit of `value`."""
    ends = (estimate.low, estimate.high)
    return f"[{', '.join(_figure(name, end, '+' if sign else '') for end in ends)}]"


def _figure(name: str, number: float, sign: str) -> str:
    factor, digits = _FACTORS_AND_DIGITS.get(name, (100, 1))
    rounded = round(factor * number, digits) + 0.0  # no -0
    return f"{rounded:{sign}.{digits}f}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# Sentences ----------------------------------------------------------------------------------------------------------


def bounds(report: Report) -> str:
    """Describe what the detector makes of real images and of empty ones: its own mistakes."""
    metrics = {condition.kind: report.metrics[condition.name] for condition in report.conditions}
    sentences = []
    if "success" in metrics.get("real", {}):
        of_real, ap = metrics["real"]["success"], metrics["real"].get("ap")
        precision = f" (AP {value('ap', ap.value)})" if ap and "ap" in report.names else ""
        sentences.append(
            f"Of real images with their true boxes the detector {report.detector.name} counts "
            f"{value('success', of_real.value)} {interval('success', of_real)} of the objects as a success{precision}. "
            "That is about the most a model can reach here (upper bound): what lacks to 100 % are its mistakes, and "
            "those of the boxes."
        )
    elif "real" not in metrics:
        sentences.append(
            f"No real images were scored (upper bound), so how much the detector {report.detector.name} misses "
            "itself is not known."
        )
    if "success" in metrics.get("empty", {}):
        of_empty = metrics["empty"]["success"]
        (empty,) = (condition for condition in report.conditions if condition.kind == "empty")
        sentences.append(
            f"Of images that hold none of the objects it counts {value('success', of_empty.value)} "
            f"{interval('success', of_empty)} (lower bound), and sees {report.seen(empty):.2f} objects an image."
        )
    elif "empty" not in metrics:
        sentences.append("No empty images were scored (lower bound), so what it invents is not known.")
    return " ".join(sentences)


def unread(report: Report) -> list[str]:
    """Return a line for each condition that lacks images; none if no condition does."""
    lines = []
    for condition in report.conditions:
        if condition.unread:
            named = [f"{key} ({public_text(why)})" for key, why in list(condition.unread.items())[:_UNREAD]]
            more = len(condition.unread) - len(named)
            whole = len(condition.unread) + len(condition.images)
            rest = f"; and {more} more" if more else ""
            lines.append(f"{condition.name}: {len(condition.unread)} of {whole} images: {'; '.join(named)}{rest}")
    return lines


def about(report: Report) -> str:
    """Say what was evaluated, by which protocol, with which detector."""
    protocol = report.protocol
    paper = f" ({protocol.paper})" if protocol.paper else ""
    objects = sum(len(layout.boxes) for layout in protocol.layouts)
    attributes = report.detector.attributes
    judged = f", which judges {' and '.join(attributes)} as well" if attributes else ""
    return (
        f"Protocol {protocol.name}{paper}: {counted(len(protocol.layouts), 'layout')}, {counted(objects, 'object')}. "
        f"Detector {report.detector.name}{judged}."
    )


def notes(report: Report) -> list[str]:
    """Say what else the reader should know."""
    lacking = [name for name in report.protocol.metrics if name not in report.names]
    lines = []
    if "ap" in lacking and any(condition.images for condition in report.conditions):
        lines.append("AP was not measured: it needs pip install 'gligen-xl[evaluation]'.")
    if others := [label(name) for name in lacking if name in ("clip", "fid")]:
        lines.append(f"Not measured, as it was not asked for: {', '.join(others)}.")
    few = min((len(condition.images) for condition in report.conditions if condition.images), default=0)
    if few and few < 30:
        lines.append(f"{counted(few, 'image')} a condition are few: intervals are too narrow.")
    return lines


def table(report: Report) -> str:
    """Return Markdown with metrics as rows and conditions as columns."""
    rows = [["", *(condition.name for condition in report.conditions)]]
    every = [report.metrics[condition.name] for condition in report.conditions]
    rows += [[_heading(name), *(_cell(name, metrics.get(name)) for metrics in every)] for name in report.names]
    return markdown_table([*rows, ["pictures", *(f"{len(condition.images):,}" for condition in report.conditions)]])


def differences(report: Report) -> str:
    """Return Markdown of the paired differences from the other evaluation; it is empty if there are none."""
    if not report.compared:
        return ""
    heads = compared_heads(report)
    rows = [["", *(head for head, _ in heads)]]
    for name in _compared_names(report):
        cells = [_cell(name, one.difference.get(name), sign=True) for one in report.compared]
        rows.append([_heading(name), *cells])
    return f"{_DIFFERENCES}\n\n" + markdown_table([*rows, ["pictures", *(f"{number:,}" for _, number in heads)]])


def compared_heads(report: Report) -> list[tuple[str, int]]:
    """Return, for each comparison, what it compares and the number of images."""
    return [
        (f"{one.condition} less the other {one.other}", int(one.difference["pictures"].value))
        for one in report.compared or ()
    ]


def _compared_names(report: Report) -> list[str]:
    compared = [report.compared_names(one) for one in report.compared or ()]
    return [name for name in report.names if any(name in of_one for of_one in compared)]


def _heading(name: str) -> str:
    return label(name) + (" (less is better)" if name in LESS_IS_BETTER else "")


def _cell(name: str, estimate: Estimate | None, *, sign: bool = False) -> str:
    if estimate is None:
        return "-"
    return f"{value(name, estimate.value, sign=sign)} {interval(name, estimate, sign=sign)}".strip()


# Tables for the terminal ----------------------------------------------------------------------------------------------


def terminal_table(report: Report) -> str:
    """Return metrics as rows with their intervals under them, conditions as columns."""
    heads = [(condition.name, len(condition.images)) for condition in report.conditions]
    columns = [report.metrics[condition.name] for condition in report.conditions]
    return _stacked_rows(report.names, heads, columns)


def terminal_differences(report: Report) -> str:
    """Return the paired differences from the other evaluation; the text is empty if there are none."""
    if not report.compared:
        return ""
    columns = [one.difference for one in report.compared]
    rows = _stacked_rows(_compared_names(report), compared_heads(report), columns, sign=True)
    return f"{_DIFFERENCES}\n\n{rows}"


def _stacked_rows(
    names: Sequence[str],
    heads: Sequence[tuple[str, int]],
    columns: Sequence[Mapping[str, Estimate]],
    *,
    sign: bool = False,
) -> str:
    """Args: heads: of each column its name, and number of images."""
    rows: list[list[Lines]] = [
        [(), *((*textwrap.wrap(printable(name), _HEADING_WIDTH), counted(n, "image")) for name, n in heads)]
    ]
    for name in names:
        below = ("less is better",) if name in LESS_IS_BETTER else ()
        cells = [_stacked(name, metrics.get(name), sign=sign) for metrics in columns]
        rows.append([(label(name), *below), *cells])
    return stacked_table(rows)


def _stacked(name: str, estimate: Estimate | None, *, sign: bool) -> Lines:
    if estimate is None:
        return ("-",)
    return value(name, estimate.value, sign=sign), interval(name, estimate, sign=sign)


Lines = tuple[str, ...]  # of a cell


def stacked_table(rows: Sequence[Sequence[Lines]], width: int = _WIDTH) -> str:
    """Cells of several lines. The first row is the heading, the first column says what the rows are; columns beyond
    the width stand in further tables below."""
    names, *columns = zip(*rows, strict=True)
    whole = sum(map(_width, (names, *columns)))
    gap = 1 if whole + len(columns) <= width < whole + 2 * len(columns) else 2
    tables, wide = [[names]], _width(names)
    for column in columns:
        wide += gap + _width(column)
        if wide > width and len(tables[-1]) > 1:
            tables.append([names])
            wide = _width(names) + gap + _width(column)
        tables[-1].append(column)
    return "\n".join("".join(f"{line}\n" for line in _stacked_lines(table, gap)) for table in tables)


def _stacked_lines(columns: Sequence[Sequence[Lines]], gap: int) -> Iterator[str]:
    widths = [_width(column) for column in columns]
    for number, row in enumerate(zip(*columns, strict=True)):
        for k in range(max(map(len, row))):
            first, *others = (cell[k] if k < len(cell) else "" for cell in row)
            line = [first.ljust(widths[0]), *(text.rjust(wide) for text, wide in zip(others, widths[1:], strict=True))]
            if any(map(str.strip, line)):
                yield (" " * gap).join(line).rstrip()
        if number == 0:
            yield "-" * (sum(widths) + gap * (len(widths) - 1))


def _width(column: Sequence[Lines]) -> int:
    return max((len(line) for cell in column for line in cell), default=0)


def wrapped(text: str, first: str = "") -> str:
    """Return a paragraph of the terminal's width; `first` begins it, and the other lines are indented as far."""
    return textwrap.fill(printable(text), _WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) + "\n"


# Markdown -----------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is the heading; columns are padded, so that it can be read as text."""
    rows = [[markdown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])]) + "\n"


# Whole texts --------------------------------------------------------------------------------------------------------


def terminal_text(report: Report) -> str:
    """Return what the terminal shows, 120 columns wide; it says what `markdown_text` says."""
    lacking = unread(report)
    unread_note = "Images that could not be read are in no figure.\n\n"
    parts = [
        wrapped(about(report)),
        *([unread_note + "".join(wrapped(line, "- ") for line in lacking)] if lacking else []),
        wrapped(bounds(report)),
        terminal_table(report),
        *([terminal_differences(report)] if report.compared else []),
        *(["".join(wrapped(note, "- ") for note in remarks)] if (remarks := notes(report)) else []),
    ]
    return "\n".join(parts)


def markdown_text(report: Report) -> str:
    """Return what is missing, what the detector itself gets wrong, and the metrics of the conditions."""
    lacking = unread(report)
    parts = [
        markdown(about(report)) + "\n",
        *(["**Images that could not be read are in no figure.**\n\n" + _listed(lacking)] if lacking else []),
        markdown(bounds(report)) + "\n",
        table(report),
        *([differences(report)] if report.compared else []),
        *([_listed(remarks)] if (remarks := notes(report)) else []),
    ]
    return "\n".join(parts)


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"- {markdown(line)}\n" for line in lines)
