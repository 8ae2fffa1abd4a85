"""gligen-xl report"""

from __future__ import annotations

from jsonargparse import Namespace

from .common import Parser, quiet_imports

HELP = "Write the report of a training run anew: curves and pictures on one page."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("run", help="folder of a run")
    return (parser.parse_args(words),)


def run(arguments: Namespace) -> None:
    quiet_imports()
    from ..train.report import write_report

    print(write_report(arguments.run))
