"""gligen-xl version"""

from __future__ import annotations

from .common import Parser

HELP = "Print the versions of this program and of the libraries it uses."


def parse(parser: Parser, words: list[str]) -> tuple[()]:
    parser.parse_args(words)
    return ()


def run() -> None:
    from ..versions import versions

    print("\n".join(f"{name} {number}" for name, number in versions().items()))
