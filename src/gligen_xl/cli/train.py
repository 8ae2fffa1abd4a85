"""gligen-xl train"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..train.signals import STOPPED, before_the_end
from ..worlds import DATA_FORM, NAMES, drawn_count
from .common import Parser, quiet_imports, say
from .values import UsageError, check_out, check_source, is_there

HELP = "Train an adapter, or continue the run that stands in its folder."

ENDINGS = f"""The same command continues a run that did not end. Exit codes: 0 finished; {STOPPED} stopped by SIGTERM or
Ctrl-C, after a step with a checkpoint or before the first one; 130 at once, by a second Ctrl-C; 2 an error: wrong
input, a full disk, losses that are not finite, another process that is gone. The last checkpoint stands in any case."""


def parse(parser: Parser, words: list[str]) -> tuple[Any, int | None]:
    with _telling_others(begins="--dry-run" not in words and "--dry_run" not in words):
        return _parse(parser, words)


def _parse(parser: Parser, words: list[str]) -> tuple[Any, int | None]:
    parser.epilog = ENDINGS
    parser.usage = "gligen-xl train RECIPE [--data DATA] [--out OUT] [--SETTING VALUE ...]"
    from ..recipes import find_recipe, read_settings, recipe_names

    recipe = find_recipe(words[0], quick="--quick" in words) if words and not words[0].startswith("-") else None
    from ..train.config import TrainConfig, check_names

    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--quick", action="store_true", help="the recipe's short form: learning begins, in minutes")
    parser.add_argument("--settings", action="config", help="another YAML file, over the recipe")
    parser.add_argument("--dry_run", action="store_true", help="print what the run takes, memory first, and stop")
    parser.add_argument(
        "--processes",
        type=int,
        help="number of processes of a dry run; by default as launched",
    )
    parser.add_class_arguments(TrainConfig)
    _common_first(parser)
    if recipe is None:
        parser.parse_args(words)  # --help, or the error that the recipe is missing
        raise UsageError("name the recipe first: gligen-xl train RECIPE ...")
    words = _spelled_out(words)
    for file in (recipe, *_settings_files(words)):
        check_names(read_settings(file), str(file))
    try:
        parsed = parser.parse_args(["--settings", str(recipe), *words])
    except UsageError as error:
        if "to be given" in str(error):
            raise UsageError(f"{words[0]} and the options together do not make a run: {error}") from error
        raise
    try:
        arguments = parser.instantiate(parsed)
    except TypeError as error:
        raise ValueError(f"{words[0]} holds a setting of the wrong kind: {error}") from error
    if arguments.processes is not None and not arguments.dry_run:
        raise UsageError(
            "--processes belongs to --dry-run; torchrun or accelerate launch starts the processes of a run"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    processes = launched if arguments.processes is None else arguments.processes
    config = TrainConfig(**{field.name: arguments[field.name] for field in fields(TrainConfig)})
    return config, processes if arguments.dry_run else None


COMMON = (
    "data", "out", "model", "resolution", "batch_size", "micro_batch", "samples", "optimization.learning_rate",
    "precision", "init_adapter", "gradient_checkpointing", "augmentation.min_score", "validation.every",
    "validation.held_out", "workers", "checkpoint_every", "seed",
)  # fmt: skip


def _common_first(parser: Parser) -> None:
    """Show the settings that most runs set before the others."""
    common = parser.add_argument_group("the settings that most runs set")
    rest = parser.add_argument_group("further settings of the run")
    groups: Any = parser._action_groups
    by_name = {action.dest: (group, action) for group in groups for action in group._group_actions}
    for name in COMMON:
        group, action = by_name[name]
        group._group_actions.remove(action)
        common._group_actions.append(action)
    whole = next(group for group in groups if any(action.dest == "window" for action in group._group_actions))
    rest._group_actions += whole._group_actions
    whole._group_actions.clear()
    for group in (rest, common):
        groups.remove(group)
        groups.insert(2, group)  # after the recipe and the options of the command


def _spelled_out(words: Sequence[str]) -> list[str]:
    """Completes boolean settings that are named alone: "--without-boxes" is "--without_boxes true"."""
    from ..train.config import TrainConfig

    alone = {field.name for field in fields(TrainConfig) if field.type in (bool, "bool")}
    following = [*words[1:], "--"]
    return [
        f"{word}=true" if word[:2] == "--" and word[2:].replace("-", "_") in alone and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def _settings_files(words: Sequence[str]) -> list[str]:
    """Return the files that --settings names."""
    following = [*words[1:], ""]
    return [
        word.partition("=")[2] or after
        for word, after in zip(words, following, strict=True)
        if word.partition("=")[0] == "--settings"
    ]


def _check_paths(config: Any) -> None:
    """Refuses, before anything is loaded, missing folders and those that cannot be written. A finished run does not
    need its data."""
    check_source("model", config.model, "pipeline", file=True, known=NAMES)
    finished = Path(config.out, "adapter").is_dir()
    for source in config.sources if not finished else ():
        if drawn_count(source) is None and "://" not in source and not is_there(source):
            raise FileNotFoundError(f"data {source} is not there; expected a folder of shards, a URL, or {DATA_FORM}")
    check_out(config.out)


def run(config: Any, dry_run: int | None) -> int:
    """Run the training; with `dry_run`, a number of processes, describe the run instead."""
    import yaml

    settings = yaml.safe_dump(config.to_dict(), sort_keys=False)
    main = os.environ.get("RANK", "0") == "0"
    if dry_run is not None:
        quiet_imports()
        from ..train.estimate import describe, estimate

        described = describe(estimate(config, dry_run))
        if main:
            say(f"{settings}\n{described}")
        return 0

    with _telling_others(begins=True):
        _check_paths(config)
        quiet_imports()
        from ..train.loop import FINISHED, train
        from ..train.precheck import check_before, samples_seen_by_run

        check_before(config)  # before the settings are printed, which would hide its error
        samples_seen = samples_seen_by_run(config) or 0
        over = samples_seen >= config.samples // config.batch_size * config.batch_size
        if main and not over:
            say(settings.rstrip())
        folder = train(config)
    if main:
        with suppress(OSError):  # nobody reads it any more; the run is what it is
            say(
                f"the run in {config.out} is finished, {samples_seen:,} samples seen\n\n{folder}"
                if over
                else f"\n{folder}"
            )
    return 0 if folder == Path(config.out) / FINISHED else STOPPED


@contextmanager
def _telling_others(*, begins: bool) -> Iterator[None]:
    """Tell the other processes of the run of an error in the block, as they would wait for this one."""
    several = begins and int(os.environ.get("WORLD_SIZE") or 1) > 1
    try:
        if several:
            before_the_end(lambda: _tell("it was asked to stop", STOPPED))
        yield
    except Exception as error:
        if several:
            _tell(" ".join(str(error).split()) or type(error).__name__, 2)
        raise


def _tell(reason: str, code: int) -> None:
    from ..train.peers import tell_failure

    tell_failure(reason, code)
