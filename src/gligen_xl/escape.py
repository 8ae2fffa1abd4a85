"""Text that comes from elsewhere, made safe for where it goes: a terminal, HTML, Markdown, Python source, a file name.

Names, captions, ids, settings and error messages are whatever somebody wrote. Characters that a reader would obey
without seeing them (terminal controls, bidirectional overrides, halves of surrogate pairs) become visible escapes.
"""

from __future__ import annotations

import hashlib
import html
import json
import re

_JOINERS = "\u200c\u200d"  # letters of Persian and of emoji are joined or kept apart by them: they hide nothing
_MARKDOWN_SIGNS = (
    re.compile(r"([\\`*~$])"),
    re.compile(r"(?<!\w)(_)|(_)(?!\w)"),  # between letters it is no emphasis
    re.compile(r"(\])(?=[\[(:])"),  # without it no bracket becomes a link
    re.compile(r"(\|)"),
)
_MARKDOWN_START = re.compile(r"^(?=#{1,6}(?:\s|$)|[-+]\s|>|[-=]{2,}$)|^\d+(?=[.)](?:\s|$))")
_NAME_BYTES = 80


def visible(value: object) -> str:
    r"""Text whose hidden characters are seen: U+202E as `\u202e`, ESC as `\x1b`. Line ends and tabs stay."""
    return "".join(sign if sign in "\n\t" else _shown(sign) for sign in str(value).replace("\r\n", "\n"))


def printable(value: object) -> str:
    """Do as `visible` does, on one line: for a terminal, a label, an error message, a comment in code."""
    return "".join(map(_shown, " ".join(str(value).split())))


def html_text(value: object) -> str:
    """Return text that HTML and SVG show as it is, also within quotes."""
    return html.escape(visible(value))


def markdown(value: object) -> str:
    """Return text that Markdown shows as it is, on one line: in a sentence, a heading, or a cell of a table."""
    text = printable(value).replace("&", "&amp;").replace("<", "&lt;")
    for signs in _MARKDOWN_SIGNS:
        text = signs.sub(r"\\\g<0>", text)
    text = re.sub(
        r"(?i)\b(https?|ftp)://", r"\1&#58;//", re.sub(r"(?i)\bwww\.", "www&#46;", text)
    )  # no links of theirs
    return _MARKDOWN_START.sub(lambda match: f"{match[0]}\\", text)


def markdown_code(value: object, *, cell: bool = False) -> str:
    """Return text as a span of code.

    Args:
        cell: it stands in a table, where a "|" would end the cell.
    """
    text = printable(value)
    text = text.replace("|", "\\|") if cell else text
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def python_string(value: object) -> str:
    """Return a string literal of Python, on one line, in ASCII."""
    text = str(value)
    return json.dumps(text) if text.isascii() and text.isprintable() else ascii(text)


def file_name(value: object) -> str:
    """Part of a file's name: letters, digits, "-", "_" and "." of the text, others as "_"; a long one is cut."""
    name = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in str(value)).lstrip(".")
    encoded = name.encode("utf-8", "replace")
    if len(encoded) <= _NAME_BYTES:
        return encoded.decode()
    whole = hashlib.sha256(str(value).encode("utf-8", "surrogatepass")).hexdigest()  # of two that begin alike
    return f"{encoded[: _NAME_BYTES - 9].decode('utf-8', 'ignore')}-{whole[:8]}"


def _shown(sign: str) -> str:
    if sign.isprintable() or sign in _JOINERS:
        return sign
    return sign.encode("unicode_escape", "surrogatepass").decode()
