"""Curves as SVG, drawn for a page that may be light or dark, narrow or printed.

Colours are CSS classes of the page: `c1` to `c4` are hues, `s1` to `s4` shades of one hue from light to strong. Curves
carry their names at their ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .escape import html_text

Point = tuple[float, float]  # x, value

WIDTH, HEIGHT = 420, 210  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 62, 8, 24  # margins: numbers, names, nothing, what x is
SMOOTHED = 1 / 40  # share of the run that a mean is taken over
SPANS = 200  # a noisy curve is drawn by so many points at most
_DOTS = 25  # values at most that get a dot each
_LINE_HEIGHT = 14


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        name: written at its end; may be empty where the chart has one curve.
        noisy: taken at every line of the log. Drawn as a running mean, before the range of the values.
        dots: one on each value, where they are few and not noisy.
        intervals: low and high of each value, shaded.
    """

    name: str
    points: list[Point]
    style: str = "c1"
    noisy: bool = False
    dots: bool = True
    intervals: Sequence[tuple[float, float]] = ()


def chart(
    curves: Sequence[Curve],
    *,
    end: float,
    write: Callable[[float], str],
    zero: bool = False,
    reach: float | None = None,
    log: bool = False,
    over: str = "samples",
    label: str = "",
) -> str:
    """Return the curves over samples seen, or what else begins at 0; empty if none has a point.

    Args:
        end: where the axis of samples ends.
        write: how a value is written at the axis.
        zero: the axis of values begins at 0, or includes it.
        reach: it goes so far up at least, so that little does not look like much.
        log: a logarithmic axis of values, where all are positive and they span more than a factor of 20.
        over: what the curves are over.
        label: what it shows, for those who do not see it.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    lines = [_smoothed(curve.points, end) if curve.noisy else _plain(curve) for curve in curves]
    low, high = _range(curves, lines)
    log = log and low > 0 and high / low > 20
    if zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if reach is not None:
        high = max(high, reach)
    ticks, low, high = _log_ticks(low, high) if log else _ticks(low, high)
    scale = math.log if log else float
    span = (scale(high) - scale(low)) or 1.0

    def x(samples: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * samples / end

    def y(value: float) -> float:
        inside = (scale(max(value, low * 1e-3 if log else value)) - scale(low)) / span
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - inside)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{write(tick)}</text>')
    parts += x_axis(end, x, over)
    frame = (LEFT, TOP - 3, WIDTH - LEFT - RIGHT + 4, HEIGHT - TOP - BOTTOM + 6)  # an inner svg cuts off at its edges
    x0, y0, width, height = frame
    box = f'viewBox="{x0} {y0} {width} {height}"'
    parts.append(f'<svg x="{x0}" y="{y0}" width="{width}" height="{height}" {box}>')
    for curve, line in zip(curves, lines, strict=True):
        parts += _drawn(curve, line, x, y, over)
    parts.append("</svg>")
    parts += _end_names([(curve, x(line[-1][0]), y(line[-1][1])) for curve, line in zip(curves, lines, strict=True)])
    labelled = f' aria-label="{html_text(label)}"' if label else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{labelled}>{"".join(parts)}</svg>'


def short(value: float) -> str:
    """12800 -> "12.8 k", 32000000 -> "32 M"."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}" if abs(value) < 100 * factor else f"{value / factor:.0f} {letter}"
    return f"{value:.4g}"


# Values -------------------------------------------------------------------------------------------------------------


def _plain(curve: Curve) -> list[tuple[float, float, float, float]]:
    """Draw as `_smoothed` does, but each point itself, and its interval."""
    ranges = curve.intervals or [(y, y) for _, y in curve.points]
    return [(x, y, low, high) for (x, y), (low, high) in zip(curve.points, ranges, strict=True)]


def _smoothed(points: list[Point], end: float) -> list[tuple[float, float, float, float]]:
    """Samples, mean over the run's `SMOOTHED` around there, and least and largest value of the nearest points."""
    x, y = np.array(points, float).T
    if len(x) > SPANS:
        edges = np.searchsorted(x, np.linspace(x[0], x[-1], SPANS + 1)[:-1])
        edges = np.unique(edges)
        centres, low, high = x[edges], np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    else:
        centres, low, high = x, y, y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first = np.searchsorted(x, centres - end * SMOOTHED / 2, "left")
    last = np.searchsorted(x, centres + end * SMOOTHED / 2, "right")
    means = (sums[last] - sums[first]) / (last - first)
    return list(zip(centres.tolist(), means.tolist(), low.tolist(), high.tolist(), strict=True))


def _range(curves: Sequence[Curve], lines: Sequence[list[tuple[float, ...]]]) -> tuple[float, float]:
    """Return the range of the drawing: every line and interval, and all but the outermost hundredth of noisy values."""
    values = [point[1] for line in lines for point in line]
    values += [end for curve in curves for interval in curve.intervals for end in interval]
    noisy = [value for curve in curves if curve.noisy for _, value in curve.points]
    if noisy:
        values += np.percentile(noisy, (1, 99)).tolist()
    return min(values), max(values)


def _ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """Round numbers, four to six of them, and the ends of the axis."""
    if low == high == 0:
        high = 1.0
    least = 0.05 * max(abs(low), abs(high))
    if high - low < least:  # what hardly moves shall not look as if it did, and its numbers differ
        low, high = (low + high - least) / 2, (low + high + least) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks, ticks[0], ticks[-1]


def _log_ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """Powers of ten, with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**k for k in range(first, last + 1) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=low)
    above = min((tick for tick in ticks if tick >= high), default=high)
    return [tick for tick in ticks if below <= tick <= above], below, above


# Marks --------------------------------------------------------------------------------------------------------------


def _drawn(
    curve: Curve,
    line: list[tuple[float, float, float, float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
    over: str,
) -> list[str]:
    """Draw a line, with dots if it has few points, over the range of its values if it is noisy, or over their
    intervals."""
    parts = []
    if (curve.noisy and len(line) > 2) or curve.intervals:
        upper = [f"{x(at):.1f},{y(high):.1f}" for at, _, _, high in line]
        lower = [f"{x(at):.1f},{y(low):.1f}" for at, _, low, _ in reversed(line)]
        if len(curve.points) > SPANS or curve.intervals:
            parts.append(f'<polygon class="range {curve.style}" points="{" ".join(upper + lower)}"/>')
        else:  # each value is there
            parts.append(f'<polyline class="raw {curve.style}" points="{" ".join(upper)}"/>')
    points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value, _, _ in line)
    parts.append(f'<polyline class="line {curve.style}" points="{points}"/>')
    if curve.dots and not curve.noisy and len(line) <= _DOTS:
        for at, value, _, _ in line:
            title = f"{curve.name} {value:.4g} at {short(at)} {over}".strip()
            parts.append(
                f'<circle class="dot {curve.style}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.6">'
                f"<title>{html_text(title)}</title></circle>"
            )
    return parts


def x_axis(
    end: float, x: Callable[[float], float], over: str = "samples", *, bottom: float = HEIGHT - BOTTOM
) -> list[str]:
    """Return the axis from 0 to `end` in parts of an SVG; `x` places a value."""
    ticks, _, _ = _ticks(0, end)
    parts = [f'<line class="axis" x1="{x(0):.1f}" x2="{x(end):.1f}" y1="{bottom}" y2="{bottom}"/>']
    for at in (tick for tick in ticks if tick <= end * 1.001):
        parts.append(f'<line class="axis" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x(at):.1f}" y="{bottom + 17}" text-anchor="middle">{short(at)}</text>')
    return [*parts, f'<text class="tick" x="{WIDTH}" y="{bottom + 17}" text-anchor="end">{html_text(over)}</text>']


def _end_names(ends: list[tuple[Curve, float, float]]) -> list[str]:
    """Return the names of the curves at their ends (x, y), moved apart where they would lie on each other."""
    placed: list[float] = []
    parts = []
    bottom = HEIGHT - BOTTOM - 2
    ordered = sorted((end for end in ends if end[0].name), key=lambda end: end[2])
    for _, _, y in ordered:
        place = min(max(y + 4, TOP + 8), bottom)
        placed.append(max(place, placed[-1] + _LINE_HEIGHT) if placed else place)
    for k in range(len(placed) - 1, -1, -1):  # those that were pushed out at the foot go up again
        limit = placed[k + 1] - _LINE_HEIGHT if k + 1 < len(placed) else bottom
        placed[k] = min(placed[k], limit)
    for (curve, x, _), place in zip(ordered, placed, strict=True):
        name = html_text(curve.name)
        parts.append(f'<text class="name {curve.style}" x="{x + 7:.1f}" y="{place:.1f}">{name}</text>')
    return parts
