"""gligen-xl report"""

from __future__ import annotations

from jsonargparse import Namespace

from .common import Parser
from .values import check_folder

HELP = "Write the report of a training run anew: curves and images on one page."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("run", help="folder of a run")
    arguments = parser.parse_args(words)
    check_folder(arguments.run, "the folder of a run")
    return (arguments,)


def run(arguments: Namespace) -> None:
    from ..io import reading
    from ..train.report import write_report

    with reading(arguments.run, "the folder of a run that can be reported"):
        print(write_report(arguments.run))
