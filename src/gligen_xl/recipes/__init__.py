"""Recipes: short YAML files of training settings, named for what they reproduce; and how accelerate launches them."""

from __future__ import annotations

from pathlib import Path

import yaml

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Recipes that come with the library."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def accelerate_names() -> list[str]:
    """Configurations of `accelerate launch`, which `find_recipe` finds too."""
    return sorted(f"accelerate/{path.stem}" for path in (_FOLDER / "accelerate").glob("*.yaml"))


def find_recipe(name: str, *, quick: bool = False) -> Path:
    """The file of a recipe by name, or a YAML file by path; its settings are read to see that they are some.

    Args:
        quick: the short form, the recipe NAME-quick.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        wanted = f"{name}-quick" if quick else name
        path = _FOLDER / f"{wanted}.yaml"
        if not path.is_file():
            short = f"; {name} has no short form" if quick and name in recipe_names() else ""
            raise ValueError(
                f"there is no recipe {wanted!r}{short}; there are {', '.join(recipe_names())}, or a YAML file"
            )
    elif quick:
        raise ValueError(f"--quick is for recipes by name; {name} is a file, its own samples decide")
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}; expected settings, one NAME: VALUE a line")
    return path
