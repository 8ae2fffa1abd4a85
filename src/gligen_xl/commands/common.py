"""What several commands share: the parser, and the arguments that say which model, where, and how."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from ..limits import MAX_BATCH, MAX_STEPS
from ..public import redacted
from ..text import printable, visible

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..pipelines import GroundingMixin

WITHOUT_BOXES = "it is meant that no picture has a box; else that is an error"
DTYPES = ("float32", "float16", "bfloat16")


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(ArgumentParser):
    """Options are spelled with _ or with -, as one likes, and whole."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        words = None if args is None else [_underscored(word) for word in args]
        return super().parse_args(words, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{message.strip()}  (see {self.prog} --help)") from ex


def _underscored(word: str) -> str:
    """ "--fast-jpeg" -> "--fast_jpeg"; what follows a = is left alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def model_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", default="shapes", help="pipeline folder, checkpoint file, Hub repository, or shapes (embedded, tiny)"
    )
    parser.add_argument("--config", help="beside a checkpoint file: a pipeline folder or repository of its kind")
    parser.add_argument("--variant", help="of the model's files, as fp16")
    parser.add_argument("--adapter", help="adapter folder or Hub repository, in place of the one of the model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; by default the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU")
    parser.add_argument("--offload", choices=["model", "sequential"], help="parts wait in main memory: for small GPUs")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance; 1 is none; by default 5, for shapes 2"
    )
    parser.add_argument("--seed", type=int, default=0, help="picture k has seed + k, unless its layout has its own")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures made at once")


def load(arguments: Namespace, **kind: Any) -> GroundingMixin:
    """The pipeline that the arguments ask for, on its device.

    Args:
        kind: further arguments of `load_pipeline`.
    """
    if arguments.guidance_scale is None:
        arguments.guidance_scale = 2.0 if arguments.model == "shapes" else 5.0
    for name in ("steps", "batch_size"):
        limit = MAX_STEPS if name == "steps" else MAX_BATCH
        if not 1 <= arguments[name] <= limit:
            raise UsageError(f"--{name} is {arguments[name]}; expected 1 to {limit}")
    if not 0 <= arguments.seed < 2**62:
        raise UsageError(f"--seed is {arguments.seed}; expected 0 to 2**62 - 1")
    quiet_imports()
    import torch

    from ..pipelines.auto import load_pipeline

    device = arguments.device or best_device()
    dtype = arguments.dtype or ("float16" if device.startswith("cuda") else "float32")
    loading = {"variant": arguments.variant} if arguments.variant else {}
    pipeline = load_pipeline(arguments.model, config=arguments.config, dtype=getattr(torch, dtype), **kind, **loading)
    if arguments.adapter:
        pipeline.load_gligen_adapter(arguments.adapter)
    try:
        if arguments.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif arguments.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        what = f"offload to the device {device!r}" if arguments.offload else f"use the device {device!r}"
        raise ValueError(f"cannot {what}: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parse_part(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16): the third of sixteen."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part is {text!r}; expected k/n with k from 1 to n, as 3/16")
    return int(match[1]), int(match[2])


def usable_device(name: str | None) -> str:
    """That device; by default the best there is.

    Raises:
        ValueError: it is none, or not there.
    """
    import torch

    name = name or best_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def best_device() -> str:
    """The GPU, where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def quiet_imports() -> None:
    """Keep the libraries' notes about what is not installed off the terminal; warnings and errors still come."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Where torchao is installed, it reports each kernel that it has not got.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def watched(items: Iterable[Any], name: str, total: int) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=printable(name), total=total, unit="picture")


def say(text: object) -> None:
    """Print a report of several lines: controls that a terminal would obey are escaped, keys in addresses left out."""
    print(visible(redacted(str(text))), flush=True)
