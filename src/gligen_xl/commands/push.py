"""gligen-xl push"""

from __future__ import annotations

from jsonargparse import Namespace

from .common import Parser, quiet_imports
from .values import check_folder, check_out, dtype

HELP = "Upload an adapter to the Hub, with a model card written from its run."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("source", help="folder of a run, one of its checkpoints, or an adapter folder")
    parser.add_argument("--repository", required=True, help="OWNER/NAME on the Hub; it is made where there is none")
    parser.add_argument("--license", required=True, help="of the adapter, as the Hub names it: apache-2.0, openrail++")
    parser.add_argument("--base_model", help="OWNER/NAME of the base, where the run had it from a folder")
    parser.add_argument("--dtype", type=dtype, help="to save in, as fp16; as it is by default")
    parser.add_argument("--private", action="store_true", help="where the repository is made")
    parser.add_argument("--token", help="by default that of HF_TOKEN or of hf auth login")
    parser.add_argument("--dry_run", metavar="FOLDER", help="write what would be uploaded there, and upload nothing")
    arguments = parser.parse_args(words)
    check_folder(arguments.source, "the folder of a run, of a checkpoint or of an adapter")
    if arguments.dry_run is not None:
        check_out(arguments.dry_run, "dry_run")
    return (arguments,)


def run(arguments: Namespace) -> None:
    quiet_imports()
    import torch

    from ..train.publish import publish_adapter, stage_adapter

    about = {
        "repository": arguments.repository,
        "license": arguments.license,
        "base_model": arguments.base_model,
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
    }
    if arguments.dry_run:
        folder = stage_adapter(arguments.source, arguments.dry_run, **about)
        print(f"what would be uploaded to {arguments.repository} is in {folder}")
        return
    private = True if arguments.private else None
    print(publish_adapter(arguments.source, private=private, token=arguments.token, **about))
