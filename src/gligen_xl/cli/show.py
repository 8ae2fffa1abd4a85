"""gligen-xl show: samples of shards as an image."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ..io import whole_file
from ..worlds import NAMES
from .common import Parser, quiet_imports, refuse_beside, say
from .values import UsageError, check_folder, check_out_file, check_source, count

MAX_GRID = 1024  # samples that one image can show; 1024 of 1024 pixels are 3 GiB

HELP = "Images of shards, decoded, with boxes, phrases and captions: whether boxes are right is seen at once."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("folder", help="folder of shards")
    parser.add_argument("--index", type=int, help="number of one sample; by default a grid of several")
    parser.add_argument("--grid", type=count, default=16, help="samples in the grid, spread evenly over all")
    parser.add_argument("--vae", help="folder or repository of the VAE; by default the one that the shards name")
    parser.add_argument("--min_score", type=float, default=0.0, help="leave out boxes of lower confidence")
    parser.add_argument("--out", default="samples.png", help="the image to write")
    arguments = parser.parse_args(words)
    if arguments.index is not None:
        refuse_beside(arguments, parser, ["grid"], "is of several samples, --index of one; give one of the two")
    if arguments.grid > MAX_GRID:
        raise UsageError(f"--grid is {arguments.grid}; expected 1 to {MAX_GRID}")
    check_folder(arguments.folder, "a folder of shards")
    if arguments.vae is not None:
        check_source("vae", arguments.vae, "VAE", file=True, known=NAMES)
    check_out_file(arguments.out)
    return (arguments,)


def run(arguments: Namespace) -> None:
    quiet_imports()
    from ..prepare.preview import show_samples

    image, lines = show_samples(
        arguments.folder,
        index=arguments.index,
        count=arguments.grid,
        vae=arguments.vae,
        min_score=arguments.min_score,
    )
    with whole_file(Path(arguments.out)) as partial:
        image.save(partial, format="PNG")
    say("\n".join([*lines, f"in {arguments.out}"]))
