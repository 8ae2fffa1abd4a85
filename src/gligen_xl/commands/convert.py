"""gligen-xl convert"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from .common import DTYPES, Parser, UsageError, quiet_imports, say

HELP = "An adapter in another project's form (gated folder, GLIGEN file) to an adapter folder."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("source", help="pipeline or U-Net folder, .safetensors or .bin file, Hub repository")
    parser.add_argument("--out", required=True, help="folder for gligen_adapter.safetensors and .json")
    parser.add_argument("--dtype", choices=DTYPES, help="to write; as it is by default")
    parser.add_argument("--slots", type=int, help="grounding tokens a picture; as the source says by default, else 30")
    parser.add_argument("--variant", help="which of the source's files to read, as fp16")
    parser.add_argument("--revision", help="of a Hub repository")
    return (parser.parse_args(words),)


def run(arguments: Namespace) -> None:
    if (Path(arguments.out) / "gligen_adapter.json").exists():
        raise UsageError(f"--out {arguments.out} holds an adapter already; choose another folder")
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
