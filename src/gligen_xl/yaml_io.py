"""Reads YAML files of settings, with bounds: aliases can turn a file of a kilobyte into billions of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .io import read_text
from .limits import MAX_SETTINGS

MAX_VALUES = 200_000  # in a file, with each alias counted as what it stands for
MAX_DEPTH = 64


def read_yaml(path: Path, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """Parse a YAML file (JSON is YAML).

    Args:
        loader: PyYAML's BaseLoader reads all scalars as text.

    Raises:
        ValueError: it is not YAML, or too large; the error names the file.
    """
    size = path.stat().st_size
    if size > MAX_SETTINGS:
        raise ValueError(f"{path} has {size} bytes; expected at most {MAX_SETTINGS} of YAML")
    try:
        text = read_text(path)
        _count_values(path, yaml.compose(text, loader), {}, set())
        return yaml.load(text, loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error


def _count_values(path: Path, node: Any, counted: dict[int, int], parents: set[int]) -> int:
    """Count the values that a node stands for.

    Args:
        counted: the counts of nodes that were visited, so that each is visited once.
        parents: the nodes that this one is inside.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    key, line = id(node), node.start_mark.line + 1
    if key not in counted:
        if key in parents:
            raise ValueError(f"{path} has a value that holds itself (line {line})")
        if len(parents) >= MAX_DEPTH:
            raise ValueError(f"{path} is more than {MAX_DEPTH} values deep")
        parents.add(key)
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        counted[key] = 1 + sum(_count_values(path, part, counted, parents) for part in parts)
        parents.discard(key)
    if counted[key] > MAX_VALUES:
        raise ValueError(
            f"{path} stands for more than {MAX_VALUES} values (line {line}); expected settings, without aliases of "
            "aliases"
        )
    return counted[key]
