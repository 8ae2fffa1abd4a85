"""The curves of a run, as `charts` draws them, and the strip of its gates."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from ..charts import BOTTOM, LEFT, RIGHT, SPANS, TOP, WIDTH, Curve, chart, short, x_axis
from ..escape import html_text

__all__ = ["Curve", "chart", "heat_strip", "short"]


def heat_strip(columns: Sequence[tuple[float, Mapping[str, float]]], *, end: float) -> tuple[str, float]:
    """Many curves of values from 0 on, a row each, darker where the value is larger.

    Args:
        columns: samples seen, and values by name of a block. Rows are the names of the last column, from the U-Net's
            input to its output.

    Returns:
        the SVG, and the value of the darkest cell.
    """
    names = sorted(columns[-1][1], key=_depth)
    width = min(SPANS, len(columns))
    values, counts = np.zeros((len(names), width)), np.zeros((len(names), width))
    begin, reach = columns[0][0], (columns[-1][0] - columns[0][0]) or 1.0
    for samples, by_name in columns:
        column = min(int((samples - begin) / reach * width), width - 1)
        for row, name in enumerate(names):
            if name in by_name:
                values[row, column] += by_name[name]
                counts[row, column] += 1
    for column in range(1, width):  # a span without a line shows what was before it
        empty = counts[:, column] == 0
        values[empty, column], counts[empty, column] = values[empty, column - 1], counts[empty, column - 1]
    means = values / np.maximum(counts, 1)
    largest = float(means.max())
    height = min(max(12 * len(names), 96), 320)
    x0, x1 = LEFT, WIDTH - RIGHT
    left, right = (x0 + (x1 - x0) * samples / end for samples in (begin, columns[-1][0]))
    parts = [
        f'<rect class="ground" x="{x0}" y="{TOP}" width="{x1 - x0}" height="{height}"/>',
        f'<image x="{left:.1f}" y="{TOP}" width="{max(right - left, 2):.1f}" height="{height}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="{_shaded(means / (largest or 1))}"/>',
    ]
    groups = [_group(name) for name in names]
    for group in dict.fromkeys(groups):
        first, number = groups.index(group), groups.count(group)
        if first:
            edge = TOP + height * first / len(names)
            parts.append(f'<line class="cut" x1="{x0}" x2="{x1}" y1="{edge:.1f}" y2="{edge:.1f}"/>')
        middle = TOP + height * (first + number / 2) / len(names) + 4
        parts.append(f'<text class="tick" x="{x0 - 6}" y="{middle:.1f}" text-anchor="end">{html_text(group)}</text>')
    parts += x_axis(end, lambda samples: x0 + (x1 - x0) * samples / end, bottom=TOP + height)
    svg = f'<svg viewBox="0 0 {WIDTH} {TOP + height + BOTTOM}" role="img">{"".join(parts)}</svg>'
    return svg, largest


def _shaded(shares: np.ndarray) -> str:
    """Return an image of one hue, (rows, columns) of shares 0-1 as its opacity, so that it serves on light and dark."""
    pixels = np.zeros((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (42, 111, 187)
    pixels[..., 3] = np.round(255 * np.clip(shares, 0, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _depth(name: str) -> int:
    """A U-Net holds its middle behind its end."""
    return next((k for k, start in enumerate(("down_", "mid_", "up_")) if name.startswith(start)), 3)


def _group(name: str) -> str:
    """ "down_blocks.1.attentions.0..." -> "down 1", "mid_block..." -> "mid"."""
    kind, _, rest = name.partition("_")
    number = rest.split(".")[1] if rest.startswith("blocks.") else ""
    return f"{kind} {number}".strip() if kind in ("down", "mid", "up") else name.split(".")[0]
