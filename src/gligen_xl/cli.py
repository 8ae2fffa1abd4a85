"""The command line, `gligen-xl COMMAND ...`. It finds the command, runs it, and turns errors into one line.

Wrong input ends with exit code 2, an interrupt with 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .train.signals import answering_signals, begin_program

if __name__ == "__main__" or Path(sys.argv[0]).stem == "gligen-xl":
    begin_program(sys.argv[1:])  # before whatever takes its time

from . import __version__
from .commands import (
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
from .commands.common import Parser, UsageError
from .public import redacted
from .text import printable

TRACEBACK = "GLIGEN_XL_TRACEBACK"  # environment variable: set, errors come with where they arose

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
    """Run a command; returns the exit code: 0 or what the command says, 2 for wrong input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = words[0].lstrip("-")
    try:
        if name not in COMMANDS:
            raise UsageError(f"there is no command {words[0]!r}; there are {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        parser = Parser(prog=f"gligen-xl {name}", description=command.HELP, default_env=False)
        return command.run(*command.parse(parser, words[1:])) or 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:  # the last is torch's, as for memory
        if os.environ.get(TRACEBACK):
            raise
        text = printable(redacted(str(error)))
        print(f"gligen-xl {printable(name)}: error: {text or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    lines = [f"gligen-xl {__version__}: put objects where you draw them", "", "commands:"]
    lines += [f"  {name:<10} {command.HELP}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "first steps:",
        '  gligen-xl generate --prompt "grass with a red circle" --phrase "a red circle" --box 0.1 0.5 0.5 0.9',
        "  gligen-xl generate --layout layouts.jsonl --draw",
        "  gligen-xl COMMAND --help",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
