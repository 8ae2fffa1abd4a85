"""gligen-xl export"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from .common import Parser, check_model, load_source, source_arguments
from .values import UsageError, check_out, dtype

HELP = "Write a model and its adapter as a folder that plain diffusers loads, grounding included."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    source_arguments(parser, required=True)
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", type=dtype, default="float32", help="number format of the files, such as fp16")
    parser.add_argument("--out_variant", help="variant in the names of the files, such as fp16")
    parser.add_argument("--max_shard_size", default="10GB", help="largest size of one file")
    arguments = parser.parse_args(words)
    check_model(arguments)
    check_out(arguments.out)
    if (out := Path(arguments.out)).is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty; choose a new folder")
    return (arguments,)


def run(arguments: Namespace) -> None:
    pipeline = load_source(arguments, arguments.dtype)

    from ..pipelines.export import export_pipeline

    export_pipeline(pipeline, arguments.out, variant=arguments.out_variant, max_shard_size=arguments.max_shard_size)
    print(
        f"a pipeline for diffusers in {arguments.out}: DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
    )
