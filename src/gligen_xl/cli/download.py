"""gligen-xl download: the published sets of SA-1B from the Hub."""

from __future__ import annotations

from jsonargparse import Namespace

from .common import Parser, say, watched
from .values import check_out

HELP = "The published sets of SA-1B latents and boxes, whole or in part, checked."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("set", help="sa1b-sdxl-512, sa1b-sdxl-1024, boxes, boxes-five, or a dataset repository")
    parser.add_argument("--archives", help="numbers, as 0-9,17; by default all (368 MB each at 512, 1.47 GB at 1024)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--out", required=True, help="folder for the files; the same command goes on after a kill")
    arguments = parser.parse_args(words)
    check_out(arguments.out)
    return (arguments,)


def run(arguments: Namespace) -> None:
    from ..contrib.sa1b.download import download

    paths = download(
        arguments.set,
        arguments.out,
        archives=arguments.archives,
        revision=arguments.revision,
        progress=lambda files: watched(files, "download", len(files), unit="file"),
    )
    say(f"{len(paths)} files in {arguments.out}")
