"""Pages of one HTML file that fetches nothing: for light and dark, narrow screens and paper, without JavaScript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .escape import html_text


def page(
    title: str, *, kicker: str, head: str, sections: Iterable[tuple[str, str]], foot: str = "", style: str = ""
) -> str:
    """Return a whole page.

    Args:
        kicker: what kind of page it is, above the title.
        head, foot: HTML under the title, and at the end.
        sections: headings (HTML) and contents (HTML); those without content are left out.
        style: CSS after that of all pages.
    """
    body = "\n".join(f"<section><h2>{heading}</h2>\n{content}</section>" for heading, content in sections if content)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>
{Path(__file__).with_name("page.css").read_text(encoding="utf-8")}{style}</style>
</head>
<body>
<header>
<p class=kicker>{text(kicker)}</p>
<h1>{text(title)}</h1>
{head}
</header>
{body}
<footer>{foot}
</footer>
</body>
</html>
"""


def tiles(cells: Sequence[tuple[str, str, str]]) -> str:
    """Return the figures to look at first: label, value, and the text next to it."""
    each = (
        f"<div><dt>{text(label)}</dt><dd>{text(value)}</dd><small>{text(beside)}</small></div>"
        for label, value, beside in cells
    )
    return f"<dl class=tiles>{''.join(each)}</dl>" if cells else ""


def charts(*figures: str) -> str:
    """Figures side by side, those that are there."""
    there = [one for one in figures if one]
    return f"<div class=charts>{''.join(there)}</div>\n" if there else ""


def figure(title: str, what: str, svg: str) -> str:
    """Return a drawing with its title; empty where there is none."""
    if not svg:
        return ""
    return f"<figure><figcaption><b>{text(title)}</b> {text(what)}</figcaption>{svg}</figure>\n"


def text(value: object) -> str:
    """Return text that HTML shows as it is."""
    return html_text(value)
