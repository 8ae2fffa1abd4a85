"""gligen-xl check"""

from __future__ import annotations

from jsonargparse import Namespace

from .common import WITHOUT_BOXES, Parser, say, watched
from .values import check_folder

HELP = "Check every latent and every row of shards before training."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("folder", help="folder of shards: NAME.safetensors with NAME.arrow")
    parser.add_argument("--without_boxes", action="store_true", help=WITHOUT_BOXES)
    arguments = parser.parse_args(words)
    check_folder(arguments.folder, "a folder of shards")
    return (arguments,)


def run(arguments: Namespace) -> None:
    from ..data.check import check_shards

    report = check_shards(
        arguments.folder,
        without_boxes=arguments.without_boxes,
        progress=lambda stems: watched(stems, "check", len(stems), unit="shard"),
    )
    say(report)
    if report.problems:
        raise ValueError(f"{len(report.problems)} problems in {arguments.folder}")
