"""Reads a big JSON object member by member: no more than one of them is built at a time.

COCO's annotations take 450 MB of text and ten times that as Python objects; SA-1B's carry 100 kB of masks an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def members(text: str) -> Iterator[tuple[str, Any]]:
    """Give (key, value) of each member in its order; a member that is a list gives (key, item) for each of its items.

    Raises:
        ValueError: at the place where the text is not JSON; what stands before it has been given by then.
    """
    place = _after(text, 0, "{")
    if text[place : place + 1] == "}":
        return
    while True:
        key, place = _value(text, place)
        if not isinstance(key, str):
            raise ValueError(f"not JSON: a key is {key!r:.40}, expected a string (character {place})")
        place = _after(text, place, ":")
        if text[place : place + 1] != "[":
            value, place = _value(text, place)
            yield key, value
        else:
            place = _after(text, place, "[")
            more = text[place : place + 1] != "]"
            while more:
                value, place = _value(text, place)
                yield key, value
                more = text[place : place + 1] == ","
                place = _after(text, place, ",") if more else place
            place = _after(text, place, "]")
        if text[place : place + 1] != ",":
            _after(text, place, "}")
            return
        place = _after(text, place, ",")


def _value(text: str, place: int) -> tuple[Any, int]:
    try:
        value, place = _decode(text, place)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read: too deep (character {place})") from error
    return value, _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _after(text: str, place: int, mark: str) -> int:
    """Return the place of the next token after `mark`."""
    place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
    if text[place : place + 1] != mark:
        raise ValueError(f"not JSON: {text[place : place + 20]!r} where {mark} is expected (character {place})")
    return _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
