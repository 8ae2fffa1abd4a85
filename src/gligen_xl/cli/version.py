"""gligen-xl version"""

from __future__ import annotations

from .common import Parser

HELP = "Versions of this program and of what it rests on."


def parse(parser: Parser, words: list[str]) -> tuple[()]:
    parser.parse_args(words)
    return ()


def run() -> None:
    from ..versions import versions

    print("\n".join(f"{name} {number}" for name, number in versions().items()))
