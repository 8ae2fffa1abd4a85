"""What several commands share: the parser, and the arguments that say which model, where, and how."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from ..escape import printable, visible
from ..io import first_line
from ..limits import MAX_BATCH, MAX_STEPS
from ..redact import redacted
from ..suggestions import did_you_mean
from ..worlds import NAMES, find_world
from .values import UsageError, check_source, count, device, dtype, given, seed, seed_or_random

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..pipelines import GroundingMixin

_SPELLED_NUMBER = re.compile(r"-[\d.][\d.,eE+-]*")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
WITHOUT_BOXES = "it is meant that no image has a box; else that is an error"


class Parser(ArgumentParser):
    """Options are spelled with _ or with -, as one likes, and whole. Errors name the option and what is expected."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        words = None if args is None else [self._spelled(word) for word in args]
        return super().parse_args(words, **settings)

    def _spelled(self, word: str) -> str:
        """ "--fast-jpeg" -> "--fast_jpeg"; what follows a =, and what is no option, is left alone.

        A number below 0, alone or with commas, is no option: it gets a space, as argparse looks at the first letter.
        """
        if _SPELLED_NUMBER.fullmatch(word):
            return f" {word}"
        if not word.startswith("--") or " " in word:
            return word
        name, equals, value = word.partition("=")
        known = "--" + name[2:].replace("-", "_")
        return known + equals + value if known in self._options() else word

    def _options(self) -> set[str]:
        """All there are, those of subcommands too."""
        options = {option for action in self._actions for option in action.option_strings}
        for action in self._actions:
            for inner in (getattr(action, "_name_parser_map", None) or {}).values():
                options |= inner._options()
        return options

    def format_help(self, *arguments: Any, **named: Any) -> str:
        return (
            super().format_help(*arguments, **named).rstrip()
            + "\n\n--traceback, anywhere on the line, shows where an error arose.\n"
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        told = " ".join(message.split())
        raise UsageError(f"{self._in_words(told)}  (see {self.prog} --help)") from ex

    def _in_words(self, message: str) -> str:
        """The parser's message as a person would say it; as it is where none of the known ones fits."""
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
            first = match[1].split()[0]
            if not first.startswith("-"):
                return f"{match[1]!r} belongs to no option; put quotes around words with spaces between them"
            name = first.partition("=")[0]
            return f"there is no option {name}{did_you_mean(name, self._options())}"
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{match[1]} {'have' if ',' in match[1] else 'has'} to be given"
        if match := re.fullmatch(r"argument (\S+): (.*)", message):
            name = match[1] if match[1].startswith("-") else match[1].upper()
            if choice := re.fullmatch(r"invalid choice: (.*?) \(choose from (.*)\)", match[2]):
                got, choices = choice[1].strip("'\""), re.sub(r"['\"]", "", choice[2])
                return f"{name} is {got!r}; expected one of {choices}{did_you_mean(got, choices.split(', '))}"
            if "{option}" in match[2]:
                return match[2].replace("{option}", name)
            if match[2].startswith("expected ") and "argument" in match[2]:
                return f"{name} lacks its value; {match[2].replace('argument', 'value')}"
        if match := re.fullmatch(r'Parser key "([^"]+)"(?: element \d+)?: Expected a (.+?)\. Got value: (.*)', message):
            wanted = match[2]
            if choice := re.fullmatch(r"typing\.Literal\[(.*)\]", wanted):
                choices = choice[1].replace("'", "").split(", ")
                return (
                    f"{match[1]} is {match[3]}; expected one of {', '.join(choices)}{did_you_mean(match[3], choices)}"
                )
            kind = re.sub(r"<class '(\w+)'>", r"\1", wanted)
            return f"{match[1]} is {match[3]}; expected {_KINDS.get(kind, kind)}"
        return message


# Arguments of a model -----------------------------------------------------------------------------------------------


def model_arguments(parser: Parser, *, random_seed: bool = False) -> None:
    """Args: random_seed: whether -1 asks for one."""
    parser.add_argument(
        "--model", default=NAMES[0], help="pipeline folder, checkpoint file, Hub repository, or shapes (embedded, tiny)"
    )
    parser.add_argument("--adapter", help="adapter folder or Hub repository, in place of the one of the model")
    parser.add_argument("--steps", type=count, default=30, help="denoising steps")
    parser.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance; 1 is none; by default 5, for shapes 2"
    )
    parser.add_argument(
        "--seed",
        type=seed_or_random if random_seed else seed,
        default=0,
        help="image k has seed + k, unless its layout has its own" + "; -1: a random one" * random_seed,
    )
    parser.add_argument("--batch_size", type=count, default=4, help="images made at once")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, mps, ...; by default the best there is")
    parser.add_argument("--dtype", type=dtype, help="float32, float16 (fp16), bfloat16 (bf16); default: fp16 on a GPU")
    parser.add_argument("--offload", choices=["model", "sequential"], help="parts wait in main memory: for small GPUs")
    parser.add_argument("--variant", help="of the model's files, as fp16")
    parser.add_argument("--config", help="beside a checkpoint file: a pipeline folder or repository of its kind")


def check_model(arguments: Namespace) -> None:
    """Refuse, before anything is loaded, a model or an adapter that is not there, and what they would ignore."""
    model, single = arguments.model, is_file(arguments.model)
    check_source("model", model, "pipeline", file=True, known=NAMES)
    if arguments.config is not None:
        if not single:
            raise UsageError(f"--config is for a checkpoint in one file, and --model {model} is none; leave it out")
        check_source("config", arguments.config, "pipeline")
    if arguments.variant and (single or model in NAMES):
        raise UsageError(f"--variant chooses among the files of a folder or repository; --model {model} is none")
    if arguments.adapter is not None:
        if is_file(arguments.adapter):
            raise UsageError(
                f"--adapter {arguments.adapter} is a file; an adapter is a folder. One in another project's form "
                f"becomes one by: gligen-xl convert {arguments.adapter} --out FOLDER"
            )
        check_source("adapter", arguments.adapter, "adapter")


def check_generation(arguments: Namespace) -> None:
    """As `check_model`, with the settings of generating."""
    check_model(arguments)
    if arguments.guidance_scale is not None and not 0 <= arguments.guidance_scale < float("inf"):
        raise UsageError(f"--guidance_scale is {arguments.guidance_scale}; expected a number of at least 0")
    for name, limit in (("steps", MAX_STEPS), ("batch_size", MAX_BATCH)):
        if arguments[name] > limit:
            raise UsageError(f"--{name} is {arguments[name]}; expected 1 to {limit}")
    if arguments.offload and arguments.device == "cpu":
        raise UsageError("--offload lets parts wait in main memory, where --device cpu has all of them; leave one out")


def is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def settle_guidance(arguments: Namespace) -> None:
    """The guidance scale that the model is best at, where none is given."""
    if arguments.guidance_scale is None:
        world = find_world(arguments.model)
        arguments.guidance_scale = world.GUIDANCE_SCALE if world else 5.0


def load(arguments: Namespace, **kind: Any) -> GroundingMixin:
    """The pipeline that the arguments ask for, on its device. What it needs is looked for before anything is loaded.

    Args:
        kind: further arguments of `load_pipeline`.
    """
    settle_guidance(arguments)
    quiet_imports()
    import torch

    from ..adapter.io import adapter_folder
    from ..pipelines.auto import load_pipeline

    device = usable_device(arguments.device)
    if arguments.offload and device == "cpu":
        raise UsageError("--offload is for a GPU, and there is none on this machine; leave it out")
    adapter = adapter_folder(arguments.adapter) if arguments.adapter else None
    dtype = arguments.dtype or ("float16" if device.startswith("cuda") else "float32")
    loading = {"variant": arguments.variant} if arguments.variant else {}
    pipeline = load_pipeline(arguments.model, config=arguments.config, dtype=getattr(torch, dtype), **kind, **loading)
    if adapter is not None:
        pipeline.load_gligen_adapter(adapter)
    try:
        if arguments.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif arguments.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        what = f"offload to the device {device!r}" if arguments.offload else f"use the device {device!r}"
        raise ValueError(f"cannot {what}: {first_line(error)}") from error
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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {name!r}: {first_line(error)}") from error
    return name


def best_device() -> str:
    """The GPU, where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def quiet_imports() -> None:
    """Import what is heavy, and keep its notes and its bars of a second's length off the terminal.

    Errors and warnings still come.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        transformers.utils.logging.set_verbosity_error()  # also where it was imported before
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def watched(items: Iterable[Any], name: str, total: int, unit: str = "image") -> tqdm[Any]:
    """A progress bar, on a terminal; in a file each writing would stay."""
    from tqdm import tqdm

    return tqdm(items, desc=printable(name), total=total, unit=unit, disable=None)


def say(text: object) -> None:
    """Print a report of several lines: controls that a terminal would obey are escaped, keys in addresses left out."""
    print(visible(redacted(str(text))), flush=True)


def refuse_beside(arguments: Namespace, parser: Parser, names: Iterable[str], why: str) -> None:
    """Refuse options that would be ignored beside others.

    Raises:
        UsageError: names the first that is given.
    """
    for name in given(arguments, parser, *names):
        raise UsageError(f"--{name} {why}")
