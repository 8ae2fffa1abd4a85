"""Marks of an evaluation's page: a value with its interval on a scale, a map of the image, boxes over images.

Each stands beside the same figures as text, or says what it shows in words of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..page import text
from .metrics import Estimate

COLOURS = 8  # of boxes: classes o0 to o7 of the page


def strip(estimate: Estimate, low: float, high: float, others: Mapping[str, float] | None = None) -> str:
    """Return a dot on a line from `low` to `high`, a bar for its interval, and a stroke for each other value, by its
    class.

    Hidden from readers of text, for whom the figures stand beside it.
    """
    span = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{100 * min(max((value - low) / span, 0), 1):.2f}%"

    parts = ['<line class=scale x1="0%" x2="100%" y1="9" y2="9"/>']
    if low < 0 < high:
        parts.append(f'<line class=zero x1="{x(0)}" x2="{x(0)}" y1="0" y2="18"/>')
    for kind, value in (others or {}).items():
        title = f"<title>{text(kind)}</title>"
        parts.append(f'<line class="mark {kind}" x1="{x(value)}" x2="{x(value)}" y1="2" y2="16">{title}</line>')
    parts.append(f'<line class=interval x1="{x(estimate.low)}" x2="{x(estimate.high)}" y1="9" y2="9"/>')
    parts.append(f'<circle class=value cx="{x(estimate.value)}" cy="9" r="4"/>')
    return f'<svg class=strip height="18" aria-hidden="true">{"".join(parts)}</svg>'


def heat_map(cells: Sequence[tuple[float, str, str, str] | None], columns: int, caption: str) -> str:
    """Return a table whose cells are the darker the larger their value, 0-1.

    Args:
        cells: row by row: share, its text, and two lines of small text; None is an empty cell.
        caption: HTML.
    """
    shown = []
    for cell in cells:
        if cell is None:
            shown.append("<td class=none>no box</td>")
            continue
        share, written, *below = cell
        small = "".join(f"<small>{text(line)}</small>" for line in below)
        shown.append(f'<td style="--share:{share:.3f}"><b>{text(written)}</b>{small}</td>')
    rows = ("".join(shown[k : k + columns]) for k in range(0, len(shown), columns))
    return f"<table class=map><caption>{caption}</caption>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>\n"


def boxes_over(requested: Sequence[Sequence[float]], found: Sequence[tuple[Sequence[float], int | None]]) -> str:
    """Return boxes to lie over an image: requested ones solid, detected ones dashed.

    Args:
        found: boxes, and the number of the requested one that each stands for; None: for none.
    """
    parts = [_rectangle(box, f"asked o{k % COLOURS}") for k, box in enumerate(requested)]
    parts += [_rectangle(box, f"seen {'' if k is None else f'o{k % COLOURS}'}".strip()) for box, k in found]
    return (
        f'<svg class=boxes viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _rectangle(box: Sequence[float], style: str) -> str:
    """Draw a rectangle with a light edge under it, so that it can be seen on any image."""
    x0, y0, x1, y1 = (round(1000 * value) for value in box)
    at = f'x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"'
    return f'<rect class=edge {at}/><rect class="{style}" {at}/>'
