"""gligen-xl convert"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from .common import Parser, is_file, quiet_imports, say
from .values import UsageError, check_out, check_source, count, dtype

HELP = "An adapter in another project's form (gated folder, GLIGEN file) to an adapter folder."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("source", help="pipeline or U-Net folder, .safetensors or .bin file, Hub repository")
    parser.add_argument("--out", required=True, help="folder for gligen_adapter.safetensors and .json")
    parser.add_argument("--dtype", type=dtype, help="to write, as fp16; as it is by default")
    parser.add_argument("--slots", type=count, help="grounding tokens an image; as the source says by default, else 30")
    parser.add_argument("--variant", help="which of the source's files to read, as fp16")
    parser.add_argument("--revision", help="of a Hub repository")
    arguments = parser.parse_args(words)
    _check(arguments)
    return (arguments,)


def _check(arguments: Namespace) -> None:
    """Refuse, before anything is loaded, what is not there, would be ignored, or cannot be written."""
    source = arguments.source
    check_source("source", source, "adapter", file=True)
    if arguments.variant and is_file(source):
        raise UsageError(f"--variant chooses among the files of a folder or repository; {source} is a file")
    if arguments.revision and Path(source).exists():
        raise UsageError(f"--revision is of a Hub repository; {source} is on this machine")
    check_out(arguments.out)
    if (Path(arguments.out) / "gligen_adapter.json").exists():
        raise UsageError(f"--out {arguments.out} holds an adapter already; choose another folder")


def run(arguments: Namespace) -> None:
    quiet_imports()
    import torch

    from ..adapter import write_adapter
    from ..adapter.convert import read_published

    hub = {"revision": arguments.revision} if arguments.revision else {}
    config, state, about = read_published(arguments.source, slots=arguments.slots, variant=arguments.variant, **hub)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    write_adapter(arguments.out, config, state, about, dtype=dtype)
    fusers = len({name.split(".fuser.")[0] for name in state if ".fuser." in name})
    size = sum(value.numel() for value in state.values())
    kind = about.get("base_family", "its base") + (", inpainting" if config.inpaint else "")
    say(f"adapter for {kind}: {fusers} fusers, {size:,} parameters, {config.slots} slots, in {arguments.out}")
