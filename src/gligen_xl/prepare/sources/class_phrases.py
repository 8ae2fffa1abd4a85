"""Which phrase stands for a class: its name, or what a file of the user says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...yaml_io import read_yaml
from ..item import text_fault

LEFT_OUT = "class left out by the mapping"  # why a box is dropped


def class_phrases(names: Collection[str] | None, mapping_file: Path | None) -> dict[str, str | None]:
    """The phrase of each class; None for those left out.

    Args:
        names: of all classes; None where they are not known beforehand, for the mapping alone.
        mapping_file: JSON or YAML of `name: phrase`; a class of phrase null is left out, one that does not stand there
            keeps its name.

    Raises:
        ValueError: the file is no such mapping or names a class that is not there, or a name cannot be a phrase.
    """
    mapping: Any = {}
    if mapping_file is not None:
        mapping = read_yaml(mapping_file)
        if isinstance(mapping, dict):  # names like 0 and yes are numbers and truths in YAML; as written they are text
            mapping = {str(name) if type(name) is int else name: phrase for name, phrase in mapping.items()}
        if not isinstance(mapping, dict) or not all(
            isinstance(name, str) and (phrase is None or (isinstance(phrase, str) and phrase.strip()))
            for name, phrase in mapping.items()
        ):
            raise ValueError(
                f"{mapping_file}: expected a mapping of category name to phrase or null, as person: a person"
            )
        if names is not None and (strange := sorted(set(mapping) - set(names))):
            known = ", ".join(sorted(names))
            raise ValueError(f"{mapping_file}: there is no category {', '.join(strange)}; there are {known}")
    phrases = {name: mapping.get(name, name) for name in (mapping if names is None else sorted(names))}
    for name, phrase in phrases.items():
        if phrase is not None and (fault := text_fault(phrase)):
            raise ValueError(f"the category {name!r:.40} cannot be a phrase: {fault}; give another by --classes")
    return phrases


def check_words(phrases: Collection[str | None], where: str) -> None:
    """Raises ValueError where all phrases are bare numbers: no model knows what class 0 is."""
    used = [phrase for phrase in phrases if phrase is not None]
    if used and all(phrase.strip().isdigit() for phrase in used):
        shown = ", ".join(used[:5])
        raise ValueError(
            f'{where}: the classes are called {shown}; phrases are words: give them by --classes, as {{"0": "a cat"}}'
        )
