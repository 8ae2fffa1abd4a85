"""gligen-xl train"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .common import Parser, UsageError, quiet_imports, say

HELP = "Train an adapter, or continue the run that stands in its folder."
STOPPED = 75  # EX_TEMPFAIL of sysexits.h

ENDINGS = f"""The same command continues a run that did not end. Exit codes: 0 finished; {STOPPED} stopped by SIGTERM or
Ctrl-C, after a step with a checkpoint or before the first one; 130 at once, by a second Ctrl-C; 2 an error: wrong
input, a full disk, losses that are not finite, another process that is gone. The last checkpoint stands in any case."""


def parse(parser: Parser, words: list[str]) -> tuple[Any, int | None]:
    parser.epilog = ENDINGS
    quiet_imports()
    from ..recipes import find_recipe, read_settings, recipe_names
    from ..train.config import TrainConfig, check_names

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
    for file in (recipe, *_settings_files(words)):
        check_names(read_settings(file), str(file))
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


def _settings_files(words: Sequence[str]) -> list[str]:
    """The files that --settings names."""
    following = [*words[1:], ""]
    return [
        word.partition("=")[2] or after
        for word, after in zip(words, following, strict=True)
        if word.partition("=")[0] == "--settings"
    ]


def run(config: Any, dry_run: int | None) -> int:
    """Args: dry_run: the processes to describe the run for, in place of running it."""
    import yaml

    settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
    main = os.environ.get("RANK", "0") == "0"
    if dry_run is not None:
        from ..train.estimate import describe, estimate

        described = describe(estimate(config, dry_run))
        if main:
            say(f"{settings}\n{described}")
        return 0

    from ..train.loop import FINISHED, train
    from ..train.precheck import check_before, reached_position

    check_before(config)  # what it refuses is not to be looked for under the settings
    if main:
        reached = reached_position(config) or 0
        over = reached >= config.samples // config.batch_size * config.batch_size
        say(f"the run in {config.out} is finished, {reached:,} samples seen" if over else settings.rstrip())
    folder = train(config)
    if main:
        say(f"\n{folder}")
    return 0 if folder == Path(config.out) / FINISHED else STOPPED
