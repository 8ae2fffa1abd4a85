"""gligen-xl train"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from .common import Parser, UsageError, quiet_imports

HELP = "Train an adapter, or continue the run that stands in its folder."
STOPPED = 75  # EX_TEMPFAIL of sysexits.h

ENDINGS = f"""The same command continues a run that did not end. Exit codes: 0 finished; {STOPPED} stopped by SIGTERM or
Ctrl-C after a step, with a checkpoint; 130 at once, by a second Ctrl-C or one before the first step; 2 an error: wrong
input, a full disk, losses that are not finite, another process that is gone. The last checkpoint stands in any case."""


def parse(parser: Parser, words: list[str]) -> tuple[Any, int | None]:
    parser.epilog = ENDINGS
    quiet_imports()
    from ..recipes import find_recipe, recipe_names
    from ..train.config import TrainConfig

    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--quick", action="store_true", help="the recipe's short form: learning begins, in minutes")
    parser.add_argument("--settings", action="config", help="another YAML file, over the recipe")
    parser.add_argument("--dry_run", action="store_true", help="say what the run takes, memory first, and stop")
    parser.add_argument("--processes", type=int, help="of the dry run: that share the batch; by default as launched")
    parser.add_class_arguments(TrainConfig)
    if not words or words[0].startswith("-"):
        parser.parse_args(words)  # --help, or the error that the recipe is missing
        raise UsageError("name the recipe first: gligen-xl train RECIPE ...")
    recipe = find_recipe(words[0], quick="--quick" in words)
    parsed = parser.parse_args(["--settings", str(recipe), *words])
    try:
        arguments = parser.instantiate(parsed)
    except TypeError as error:
        raise ValueError(f"{words[0]} holds a setting of the wrong kind: {error}") from error
    if arguments.processes is not None and not arguments.dry_run:
        raise UsageError("--processes is of --dry-run; a run takes those that torchrun or accelerate launch starts")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    processes = launched if arguments.processes is None else arguments.processes
    config = TrainConfig(**{field.name: arguments[field.name] for field in fields(TrainConfig)})
    return config, processes if arguments.dry_run else None


def run(config: Any, dry_run: int | None) -> int:
    """Args: dry_run: the processes to describe the run for, in place of running it."""
    import yaml

    settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
    if dry_run is not None:
        from ..train.estimate import describe, estimate

        if os.environ.get("RANK", "0") == "0":
            print(settings)
            print(describe(estimate(config, dry_run)))
        return 0

    from ..train.loop import FINISHED, train

    print(settings, end="")
    reached = train(config)
    print(f"\n{reached}")
    return 0 if reached.name == FINISHED else STOPPED
