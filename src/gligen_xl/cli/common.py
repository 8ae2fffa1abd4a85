"""What several commands share: the parser, the options of a model, its loading, and what is printed."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ..escape import printable, visible
from ..io import first_line
from ..limits import MAX_BATCH, MAX_STEPS
from ..redact import redacted
from ..suggestions import did_you_mean
from ..worlds import NAMES, find_world
from .values import UsageError, check_source, count, device, dtype, given, is_file, seed, seed_or_random

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..pipelines import GroundingMixin

WITHOUT_BOXES = "accept data in which no image has a box, which is an error otherwise"
_NEGATIVE_NUMBERS = re.compile(r"-[\d.][\d.,eE+-]*")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


# The parser ---------------------------------------------------------------------------------------------------------


class _HelpFormatter(DefaultHelpFormatter):
    """Help that leaves out the types that are functions of ours: their help texts say what is accepted."""

    def _get_type_str(self, action: Any) -> str | None:
        return None if inspect.isfunction(action.type) else super()._get_type_str(action)


class Parser(ArgumentParser):
    """A parser whose options may be spelled with _ or with -, and whose errors say in words what is wrong."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _HelpFormatter, **settings})

    def parse_args(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        words = None if args is None else [self._spelled(word) for word in args]
        return super().parse_args(words, **settings)

    def _spelled(self, word: str) -> str:
        """Spell options as they are declared: "--fast-jpeg=1-2" -> "--fast_jpeg=1-2".

        Numbers below 0, alone or with commas, get a space in front, because argparse takes their "-" for an option's.
        """
        if _NEGATIVE_NUMBERS.fullmatch(word):
            return f" {word}"
        if not word.startswith("--") or " " in word:
            return word
        name, equals, value = word.partition("=")
        declared = "--" + name[2:].replace("-", "_")
        return declared + equals + value if declared in self._options() else word

    def _options(self) -> set[str]:
        """Return all options, also those of subcommands."""
        options = {option for action in self._actions for option in action.option_strings}
        for action in self._actions:
            for inner in (getattr(action, "_name_parser_map", None) or {}).values():
                options |= inner._options()
        return options

    def format_help(self, *arguments: Any, **named: Any) -> str:
        text = super().format_help(*arguments, **named).rstrip()
        return f"{text}\n\n--traceback, anywhere on the line, shows where an error arose.\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        for pattern, sentence in _SENTENCES:
            if match := re.fullmatch(pattern, message, re.IGNORECASE):
                message = sentence(self, match)
                break
        raise UsageError(f"{message}  (see {self.prog} --help)") from ex


def _unknown_option(parser: Parser, match: re.Match) -> str:
    name = match[1].split()[0].partition("=")[0]
    if not name.startswith("-"):
        return f"{match[1]!r} belongs to no option; put quotes around words with spaces between them"
    return f"there is no option {name}{did_you_mean(name, parser._options())}"


def _invalid_choice(_: Parser, match: re.Match) -> str:
    got, choices = match[2].strip("'\""), re.sub(r"['\"]", "", match[3])
    return f"{_option(match)} is {got!r}; expected one of {choices}{did_you_mean(got, choices.split(', '))}"


def _invalid_setting(_: Parser, match: re.Match) -> str:
    name, wanted, got = match[1], match[2], match[3]
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", wanted):
        choices = literal[1].replace("'", "").split(", ")
        return f"{name} is {got}; expected one of {', '.join(choices)}{did_you_mean(got, choices)}"
    kind = re.sub(r"<class '(\w+)'>", r"\1", wanted)
    return f"{name} is {got}; expected {_KINDS.get(kind, kind)}"


def _option(match: re.Match) -> str:
    return match[1] if match[1].startswith("-") else match[1].upper()


# Messages of argparse and jsonargparse, and how a person would say them; the first that fits is used.
_SENTENCES: list[tuple[str, Callable[[Parser, re.Match], str]]] = [
    (r"unrecognized arguments: (.*)", _unknown_option),
    (
        r"the following arguments are required: (.*)",
        lambda _, match: f"{match[1]} {'have' if ',' in match[1] else 'has'} to be given",
    ),
    (r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)", _invalid_choice),
    (r"argument (\S+): (.*{option}.*)", lambda _, match: match[2].replace("{option}", _option(match))),
    (
        r"argument (\S+): (expected .*argument.*)",
        lambda _, match: f"{_option(match)} lacks its value; {match[2].replace('argument', 'value')}",
    ),
    (r'Parser key "([^"]+)"(?: element \d+)?: Expected a (.+?)\. Got value: (.*)', _invalid_setting),
]


def refuse_beside(arguments: Namespace, parser: Parser, names: Iterable[str], why: str) -> None:
    """Refuse options that would be ignored together with others.

    Raises:
        UsageError: names the first that is given.
    """
    for name in given(arguments, parser, *names):
        raise UsageError(f"--{name} {why}")


# Options of a model -------------------------------------------------------------------------------------------------


def source_arguments(parser: Parser, **model: Any) -> None:
    """Declare the options that say which model.

    Args:
        model: settings of --model, such as its default.
    """
    add = parser.add_argument
    add("--model", help="pipeline folder, checkpoint file, Hub repository, or shapes (embedded, tiny)", **model)
    add("--adapter", help="adapter folder or Hub repository, to use instead of the model's own")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--config", help="with a checkpoint file: a pipeline folder or repository of its kind")


def model_arguments(parser: Parser, *, random_seed: bool = False) -> None:
    """Declare the options that say which model, and how it generates.

    Args:
        random_seed: whether --seed -1 draws a seed at random.
    """
    source_arguments(parser, default=NAMES[0])
    add = parser.add_argument
    add("--steps", type=count, default=30, help="denoising steps")
    add("--guidance_scale", type=float, help="classifier-free guidance; 1 is none; by default 5, for shapes 2")
    random = "; -1 draws one at random" if random_seed else ""
    add(
        "--seed",
        type=seed_or_random if random_seed else seed,
        default=0,
        help=f"image k has seed + k, unless its layout has its own{random}",
    )
    add("--batch_size", type=count, default=4, help="images made at once")
    add("--device", type=device, help="cpu, cuda, cuda:1, mps, ...; by default a GPU if there is one")
    add("--dtype", type=dtype, help="float32, float16 (fp16), bfloat16 (bf16); by default fp16 on a GPU")
    add("--offload", choices=["model", "sequential"], help="keep parts in main memory, for small GPUs")


def check_model(arguments: Namespace) -> None:
    """Refuse, before anything is loaded, a model or adapter that does not exist, and options that it would ignore."""
    model, single = arguments.model, is_file(arguments.model)
    check_source("model", model, "pipeline", file=True, known=NAMES)
    if arguments.config is not None:
        if not single:
            raise UsageError(f"--config is for a checkpoint in one file, and --model {model} is not one; leave it out")
        check_source("config", arguments.config, "pipeline")
    if arguments.variant and (single or model in NAMES):
        raise UsageError(f"--variant chooses among the files of a folder or repository; --model {model} is neither")
    if arguments.adapter is not None:
        if is_file(arguments.adapter):
            raise UsageError(
                f"--adapter {arguments.adapter} is a file; expected an adapter folder. Convert a file of another "
                f"project by: gligen-xl convert {arguments.adapter} --out FOLDER"
            )
        check_source("adapter", arguments.adapter, "adapter")


def check_generation(arguments: Namespace) -> None:
    """Check the options of `model_arguments` as `check_model` does."""
    check_model(arguments)
    if arguments.guidance_scale is not None and not 0 <= arguments.guidance_scale < float("inf"):
        raise UsageError(f"--guidance_scale is {arguments.guidance_scale}; expected a number of at least 0")
    for name, limit in (("steps", MAX_STEPS), ("batch_size", MAX_BATCH)):
        if arguments[name] > limit:
            raise UsageError(f"--{name} is {arguments[name]}; expected 1 to {limit}")
    if arguments.offload and arguments.device == "cpu":
        raise UsageError("--offload keeps parts in main memory, where --device cpu has all of them; leave one out")


def settle_guidance(arguments: Namespace) -> None:
    """Fill in the guidance scale that suits the model, unless one is given."""
    if arguments.guidance_scale is None:
        world = find_world(arguments.model)
        arguments.guidance_scale = world.GUIDANCE_SCALE if world else 5.0


def parse_part(text: str) -> tuple[int, int]:
    """Parse the part of the work that a command does: "3/16", the third of sixteen, -> (3, 16)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part is {text!r}; expected k/n with k from 1 to n, as 3/16")
    return int(match[1]), int(match[2])


# Loading ------------------------------------------------------------------------------------------------------------


def load_source(arguments: Namespace, dtype: str, **kind: Any) -> GroundingMixin:
    """Load the pipeline that the options of `source_arguments` say; its adapter is found before the model is loaded.

    Args:
        dtype: as torch names it.
        kind: further arguments of `load_pipeline`.
    """
    quiet_imports()
    import torch

    from ..adapter.io import adapter_folder
    from ..pipelines.auto import load_pipeline

    adapter = adapter_folder(arguments.adapter) if arguments.adapter else None
    if arguments.variant:
        kind["variant"] = arguments.variant
    pipeline = load_pipeline(arguments.model, config=arguments.config, dtype=getattr(torch, dtype), **kind)
    if adapter is not None:
        pipeline.load_gligen_adapter(adapter)
    return pipeline


def load(arguments: Namespace, **kind: Any) -> GroundingMixin:
    """Load the pipeline that the options of `model_arguments` say, onto its device."""
    settle_guidance(arguments)
    quiet_imports()
    device = usable_device(arguments.device)
    if arguments.offload and device == "cpu":
        raise UsageError("--offload is for a GPU, and this machine has none; leave it out")
    default = "float16" if device.startswith("cuda") else "float32"
    pipeline = load_source(arguments, arguments.dtype or default, **kind)
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


def usable_device(name: str | None) -> str:
    """Return a device after a first use of it; by default the best one.

    Raises:
        ValueError: this machine does not have it.
    """
    import torch

    name = name or best_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {name!r}: {first_line(error)}") from error
    return name


def best_device() -> str:
    """Return a GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def quiet_imports() -> None:
    """Import what is heavy, and keep its notes and short progress bars off the terminal; errors and warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        transformers.utils.logging.set_verbosity_error()  # it may have been imported before
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


# What is printed ----------------------------------------------------------------------------------------------------


def watched(items: Iterable[Any], name: str, total: int, unit: str = "image") -> tqdm[Any]:
    """Show a progress bar, on a terminal only."""
    from tqdm import tqdm

    return tqdm(items, desc=printable(name), total=total, unit=unit, disable=None)


def say(text: object) -> None:
    """Print a report of several lines, with terminal controls escaped and keys in addresses left out."""
    print(visible(redacted(str(text))), flush=True)
