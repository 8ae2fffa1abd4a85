"""YAML files of settings, read with bounds: an alias can make a file of a kilobyte into billions of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .io import read_text
from .limits import MAX_SETTINGS

MAX_VALUES = 200_000  # of a file, each alias counted as what it stands for
MAX_DEPTH = 64


def read_yaml(path: Path, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """What a YAML file holds (JSON is YAML).

    Args:
        loader: PyYAML's BaseLoader makes texts of all scalars.

    Raises:
        ValueError: it is not YAML, or too large; it names the file.
    """
    size = path.stat().st_size
    if size > MAX_SETTINGS:
        raise ValueError(f"{path} has {size} bytes; expected at most {MAX_SETTINGS} of YAML")
    try:
        text = read_text(path)
        node = yaml.compose(text, loader)
        _Count(path).values(node)
        return yaml.load(text, loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error


class _Count:
    """How many values a node stands for; each node is looked at once."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[int, int] = {}
        self.within: set[int] = set()

    def values(self, node: Any) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        key = id(node)
        if key not in self.done:
            if key in self.within:
                raise ValueError(f"{self.path} has a value that holds itself (line {node.start_mark.line + 1})")
            if len(self.within) >= MAX_DEPTH:
                raise ValueError(f"{self.path} is more than {MAX_DEPTH} values deep")
            self.within.add(key)
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            self.done[key] = 1 + sum(map(self.values, parts))
            self.within.discard(key)
        if self.done[key] > MAX_VALUES:
            raise ValueError(
                f"{self.path} stands for more than {MAX_VALUES} values (line {node.start_mark.line + 1}); "
                "expected settings, without aliases of aliases"
            )
        return self.done[key]
