"""gligen-xl import: the published sets of SA-1B to shards."""

from __future__ import annotations

from jsonargparse import Namespace

from .common import WITHOUT_BOXES, Parser, say, watched
from .values import check_folder, check_out

HELP = "The published sets of SA-1B latents and boxes (.npy) to shards; nothing in them is run."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("latents", help="folder of sa1b-sdxl-latents-512 or -1024: sa_000000.npy, ...")
    parser.add_argument("boxes", help="folder of sa-1b_boxes or sa-1b_boxes_sdxl: sa_000000.npy, ...")
    parser.add_argument("--sizes", help="folder of tables of six columns, for the original sizes that others lack")
    parser.add_argument("--out", required=True, help="folder for the shards; those of the same files are kept")
    parser.add_argument("--without_boxes", action="store_true", help=WITHOUT_BOXES)
    arguments = parser.parse_args(words)
    for name in ("latents", "boxes", "sizes"):
        if arguments[name] is not None:
            check_folder(arguments[name], "a folder of .npy files")
    check_out(arguments.out)
    return (arguments,)


def run(arguments: Namespace) -> None:
    from ..contrib.sa1b.convert import import_published

    report = import_published(
        arguments.latents,
        arguments.boxes,
        arguments.out,
        sizes=arguments.sizes,
        progress=lambda names: watched(names, "import", len(names), unit="archive"),
    )
    say(f"{report}\nin {arguments.out}")
    if report.failed:
        raise ValueError("not every archive became a shard; the same command tries those again")
    if not arguments.without_boxes:
        report.statistics.check(arguments.boxes, "its tables hold none, or none with a phrase within the image")
