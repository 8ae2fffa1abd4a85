"""The command line, `gligen-xl COMMAND ...`: finds the command, runs it, and turns every error into one line.

Wrong input ends with exit code 2, an interrupt with 130, a closed pipe (`| head`) with 141 and no message.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import __version__
from ..escape import printable
from ..suggestions import did_you_mean
from ..train.signals import answering_signals
from . import (
    check,
    convert,
    download,
    evaluate,
    export,
    generate,
    import_,
    prepare,
    push,
    report,
    shapes,
    show,
    train,
    version,
)
from .common import Parser, UsageError
from .errors import one_line, shown

TRACEBACK = "GLIGEN_XL_TRACEBACK"  # environment variable that does what --traceback does
PIPE_CLOSED = 141  # 128 + SIGPIPE, as for other programs

COMMANDS = {
    "generate": generate,
    "train": train,
    "evaluate": evaluate,
    "convert": convert,
    "export": export,
    "prepare": prepare,
    "download": download,
    "import": import_,
    "check": check,
    "show": show,
    "report": report,
    "push": push,
    "shapes": shapes,
    "version": version,
}


@answering_signals
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 or the command's own, 2 for an error, 130 when interrupted, 141 when the pipe is closed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words or bool(os.environ.get(TRACEBACK))
    words = [word for word in words if word != "--traceback"]
    name = words[0].lstrip("-") if words else ""
    _print_anything()
    try:
        with _warnings_in_one_line(name):
            code = _run(words, name)
        sys.stdout.flush()  # a closed pipe raises here
        return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        _complain(f"gligen-xl {printable(name)}: error: {shown(ended.code)}")
        return 2
    except BaseException as error:  # panics of tokenizers are not Exceptions
        if isinstance(error, BrokenPipeError) and _pipe_is_closed():
            return PIPE_CLOSED
        if show_traceback:
            _complain("".join(traceback.format_exception(error)).rstrip())
        _complain(f"gligen-xl {printable(name)}: error: {one_line(error)}")
        return 2


def _run(words: list[str], name: str) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {words[0]!r}{hint}  (see gligen-xl --help)")
    command = COMMANDS[name]
    parser = Parser(prog=f"gligen-xl {name}", description=command.HELP, default_env=False)
    return command.run(*command.parse(parser, words[1:])) or 0


# What is printed ----------------------------------------------------------------------------------------------------


def _overview() -> str:
    lines = [f"gligen-xl {__version__}: put objects where you draw them", "", "commands:"]
    lines += [f"  {name:<10} {command.HELP}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "first steps:",
        '  gligen-xl generate --prompt "grass with a red circle" --phrase "a red circle" \\',
        "      --box 0.1 0.4 0.5 0.8 --beta 1",
        "  gligen-xl shapes draw --count 4 --out scenes",
        "  gligen-xl generate --layout scenes/layouts.jsonl --beta 1 --draw",
        "  gligen-xl COMMAND --help",
        "",
        f"--traceback, anywhere on the line, or {TRACEBACK}=1 shows where an error arose.",
    ]
    return "\n".join(lines)


def _print_anything() -> None:
    """Print escapes for letters that a terminal does not know, in place of failing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextmanager
def _warnings_in_one_line(name: str) -> Iterator[None]:
    """Print warnings on one line, without the line of code that they come from."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        if not set(Path(filename).parts) & _NOT_FOR_USERS:
            _complain(f"gligen-xl {name}: warning: {shown(str(message))}")

    with warnings.catch_warnings():
        if not sys.warnoptions:  # deprecations are for programmers
            warnings.filterwarnings("ignore", category=FutureWarning, append=True)
            warnings.filterwarnings("ignore", category=DeprecationWarning, append=True)
        warnings.showwarning = show
        yield


_NOT_FOR_USERS = {"torch", "torchao", "bitsandbytes", "transformers", "accelerate", "peft", "huggingface_hub"}


def _complain(text: str) -> None:
    with suppress(OSError, ValueError):  # the pipe is closed
        print(text, file=sys.stderr, flush=True)


def _pipe_is_closed() -> bool:
    """Tell whether nobody reads the standard output or error any more; then they are redirected to nowhere."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a stream without a file behind it
            waiting = select.poll()
            waiting.register(stream.fileno(), select.POLLOUT)
            if any(event & select.POLLERR for _, event in waiting.poll(0)):
                closed = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter flushes when it ends
    return closed
