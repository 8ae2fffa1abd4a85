"""gligen-xl push"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import Namespace

from .common import Parser, quiet_imports
from .values import UsageError, check_folder, check_out, dtype

HELP = "Upload an adapter to the Hub, with a model card written from its run."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("source", help="folder of a run, one of its checkpoints, or an adapter folder")
    parser.add_argument("--repository", required=True, help="OWNER/NAME on the Hub; it is made where there is none")
    parser.add_argument("--license", required=True, help="of the adapter, as the Hub names it: apache-2.0, openrail++")
    parser.add_argument("--base_model", help="OWNER/NAME of the base, where the run had it from a folder")
    parser.add_argument("--dtype", type=dtype, help="to save in, as fp16; as it is by default")
    parser.add_argument("--private", action="store_true", help="where the repository is made")
    parser.add_argument("--token_file", help="a file that holds the token; by default HF_TOKEN or hf auth login")
    parser.add_argument("--token", help="the token itself, which other users of the machine can read; better a file")
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
    token = _token(arguments)
    private = True if arguments.private else None
    print(publish_adapter(arguments.source, private=private, token=token, **about))


def _token(arguments: Namespace) -> str | None:
    """Return the token that is given; None for the one of HF_TOKEN or of hf auth login."""
    if arguments.token and arguments.token_file:
        raise UsageError("--token and --token_file both give the token; leave --token out")
    if arguments.token:
        print(
            "--token stands in the list of processes, where other users of this machine can read it; set HF_TOKEN, or "
            "give --token_file",
            file=sys.stderr,
        )
    if not arguments.token_file:
        return arguments.token or None
    path = Path(arguments.token_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with a token (--token_file)")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split()
    if len(lines) != 1:
        raise ValueError(f"{path} holds {len(lines)} words; expected the token alone (--token_file)")
    return lines[0]
