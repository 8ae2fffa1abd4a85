"""gligen-xl convert"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from .common import Parser, quiet_imports, say
from .values import UsageError, check_out, check_source, count, dtype, is_file

HELP = "Convert an adapter of another project (gated folder, GLIGEN file) to an adapter folder."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("source", help="pipeline or U-Net folder, .safetensors or .bin file, Hub repository")
    parser.add_argument("--out", required=True, help="folder for gligen_adapter.safetensors and .json")
    parser.add_argument("--dtype", type=dtype, help="number format to write, such as fp16; by default the source's")
    parser.add_argument("--slots", type=count, help="grounding tokens per image; by default as the source says, or 30")
    parser.add_argument("--variant", help="variant of the source's files, such as fp16")
    parser.add_argument("--revision", help="of a Hub repository")
    arguments = parser.parse_args(words)
    source, out = arguments.source, arguments.out
    check_source("source", source, "adapter", file=True)
    if arguments.variant and is_file(source):
        raise UsageError(f"--variant chooses among the files of a folder or repository; {source} is a file")
    if arguments.revision and Path(source).exists():
        raise UsageError(f"--revision is of a Hub repository; {source} is on this machine")
    check_out(out)
    if (Path(out) / "gligen_adapter.json").exists():
        raise UsageError(f"--out {out} holds an adapter already; choose another folder")
    return (arguments,)


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
