"""gligen-xl train"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .common import Parser, UsageError, quiet_imports

HELP = "Train an adapter, or continue the run that stands in its folder."


def parse(parser: Parser, words: list[str]) -> tuple[Any]:
    quiet_imports()
    from ..recipes import find_recipe, recipe_names
    from ..train.config import TrainConfig

    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--quick", action="store_true", help="the recipe's short form: learning begins, in minutes")
    parser.add_argument("--settings", action="config", help="another YAML file, over the recipe")
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
    return (TrainConfig(**{field.name: arguments[field.name] for field in fields(TrainConfig)}),)


def run(config: Any) -> None:
    import yaml

    from ..train.loop import train

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    print(f"\n{train(config)}")
