"""gligen-xl export"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from .common import Parser, check_model, quiet_imports
from .values import UsageError, check_out, dtype

HELP = "A model with its adapter to a folder that plain diffusers loads, grounding included."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("--model", required=True, help="pipeline folder, checkpoint file, Hub repository, or shapes")
    parser.add_argument("--config", help="beside a checkpoint file: a pipeline folder or repository of its kind")
    parser.add_argument("--adapter", help="adapter folder or Hub repository, in place of the one of the model")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", type=dtype, default="float32", help="to write, as fp16")
    parser.add_argument("--variant", help="of the model's files, as fp16")
    parser.add_argument("--out_variant", help="put into the names of the files that are written, as fp16")
    parser.add_argument("--max_shard_size", default="10GB", help="of one file")
    arguments = parser.parse_args(words)
    check_model(arguments)
    check_out(arguments.out)
    if (out := Path(arguments.out)).is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty; choose a new folder")
    return (arguments,)


def run(arguments: Namespace) -> None:
    quiet_imports()
    import torch

    from ..adapter.io import adapter_folder
    from ..pipelines.auto import load_pipeline
    from ..pipelines.export import check_new, export_pipeline

    check_new(arguments.out)
    adapter = adapter_folder(arguments.adapter) if arguments.adapter else None
    loading = {"variant": arguments.variant} if arguments.variant else {}
    dtype = getattr(torch, arguments.dtype)
    pipeline = load_pipeline(arguments.model, config=arguments.config, dtype=dtype, **loading)
    if adapter is not None:
        pipeline.load_gligen_adapter(adapter)
    export_pipeline(pipeline, arguments.out, variant=arguments.out_variant, max_shard_size=arguments.max_shard_size)
    print(
        f"a pipeline for diffusers in {arguments.out}: DiffusionPipeline.from_pretrained(..., trust_remote_code=True)"
    )
