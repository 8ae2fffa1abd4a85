""" "Did you mean ...?": names that are spelled nearly as one that is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

CLOSE = 0.6  # of two spellings, from which on one is taken for the other


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for an error about `name`, or nothing where no known name is near it.

    Case, spaces, - and _ do not matter; nor does it that a long name is cut short.
    """
    plain = {_plain(other): other for other in known}
    wanted = _plain(name)[:100]
    close = get_close_matches(wanted, plain, n=3, cutoff=CLOSE)
    if not close and len(wanted) > 2:
        close = [other for other in plain if other.startswith(wanted) or (wanted.startswith(other) and len(other) > 2)][
            :3
        ]
    if not close:
        return ""
    best = SequenceMatcher(None, wanted, close[0]).ratio()
    close = [other for other in close if SequenceMatcher(None, wanted, other).ratio() > best - 0.1]
    return f"; did you mean {' or '.join(plain[other] for other in close)}?"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")
