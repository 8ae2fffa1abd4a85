"""Recipes: short YAML files of training settings, named for what they reproduce; and how accelerate launches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..suggestions import did_you_mean
from ..yaml_io import read_yaml

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Recipes that come with the library."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def accelerate_names() -> list[str]:
    """Configurations of `accelerate launch`, which `find_recipe` finds too."""
    return sorted(f"accelerate/{path.stem}" for path in (_FOLDER / "accelerate").glob("*.yaml"))


def find_recipe(name: str, *, quick: bool = False) -> Path:
    """Find the file of a recipe by name, or a YAML file (which JSON is too) by path.

    Args:
        quick: the short form, the recipe NAME-quick.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not (path.suffix and path.is_file()):
        wanted = f"{name}-quick" if quick else name
        path = _FOLDER / f"{wanted}.yaml"
        if not path.is_file():
            short = f"; {name} has no short form" if quick and name in recipe_names() else ""
            raise ValueError(
                f"there is no recipe {wanted!r}{short}; there are {', '.join(recipe_names())}, or a YAML file"
                f"{did_you_mean(wanted, recipe_names())}"
            )
    elif quick:
        raise ValueError(f"--quick is for recipes by name; {name} is a file, its own samples decide")
    read_settings(path)
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, holds no settings, or one of them twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}")
    try:
        settings = read_yaml(path, _NothingTwice)
    except _Twice as error:
        raise ValueError(f"{path} has {error} twice; leave one of them out") from error
    except ValueError as error:  # also numbers and dates that Python cannot hold
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}; expected settings, one NAME: VALUE a line")
    return settings


class _Twice(Exception):
    """A name stands twice in a group."""


class _NothingTwice(yaml.SafeLoader):
    """YAML takes the last of two values of a name; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for number, name in enumerate(names):
            if isinstance(name, str) and name in names[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise _Twice(f"{name} (line {line})")
        return super().construct_mapping(node, deep)
