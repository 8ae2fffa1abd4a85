"""Where a recipe lies: `python -m gligen_xl.recipes NAME`; without a name, all names."""

from __future__ import annotations

import sys

from . import accelerate_names, find_recipe, recipe_names


def main(words: list[str]) -> int:
    if not words:
        print("\n".join([*recipe_names(), *accelerate_names()]))
        return 0
    try:
        print(find_recipe(words[0]))
    except (ValueError, FileNotFoundError) as error:
        print(f"gligen_xl.recipes: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
