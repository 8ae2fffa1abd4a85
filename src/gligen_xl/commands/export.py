"""gligen-xl export"""

from __future__ import annotations

from jsonargparse import Namespace

from .common import DTYPES, Parser, quiet_imports

HELP = "A model with its adapter to a folder that plain diffusers loads, grounding included."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("--model", required=True, help="pipeline folder, checkpoint file, Hub repository, or shapes")
    parser.add_argument("--config", help="beside a checkpoint file: a pipeline folder or repository of its kind")
    parser.add_argument("--adapter", help="adapter folder or Hub repository, in place of the one of the model")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to write")
    parser.add_argument("--variant", help="of the model's files, as fp16")
    parser.add_argument("--out_variant", help="put into the names of the files that are written, as fp16")
    parser.add_argument("--max_shard_size", default="10GB", help="of one file")
    return (parser.parse_args(words),)


def run(arguments: Namespace) -> None:
    quiet_imports()
    import torch

    from ..pipelines.auto import load_pipeline
    from ..pipelines.export import check_new, export_pipeline

    check_new(arguments.out)
    loading = {"variant": arguments.variant} if arguments.variant else {}
    dtype = getattr(torch, arguments.dtype)
    pipeline = load_pipeline(arguments.model, config=arguments.config, dtype=dtype, **loading)
    if arguments.adapter:
        pipeline.load_gligen_adapter(arguments.adapter)
    export_pipeline(pipeline, arguments.out, variant=arguments.out_variant, max_shard_size=arguments.max_shard_size)
    print(
        f"a pipeline for diffusers in {arguments.out}: DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
    )
