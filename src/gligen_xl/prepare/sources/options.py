"""What is said of a source beside its path: options, the phrases of its classes, its splits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...yaml_io import read_yaml
from ..item import Unit, text_fault

LEFT_OUT = "class left out by the mapping"  # why a box is dropped

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """A source and how it is to be read.

    Args:
        box_format: one of `BOX_FORMATS`, of rows that do not name their own.
        instances: COCO's annotations of the images in `path`.
        classes: file of category name to phrase.
        images: folder of the images, where they do not lie with their annotations.
        split: the part of a source that is taken, as "train"; all of it where none is named.
        unit_size: images in a unit; an archive is always one.
    """

    path: Path
    box_format: str | None = None
    instances: Path | None = None
    classes: Path | None = None
    images: Path | None = None
    split: str | None = None
    unit_size: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of source.

    Args:
        description: what a path of it looks like, in words.
        recognises: whether a path is of this kind.
        open: gives its units.
        takes: the names of the options that it uses, beside `unit_size`.
    """

    description: str
    recognises: Callable[[Path], bool]
    open: Callable[[SourceOptions], Sequence[Unit]]
    takes: tuple[str, ...] = ()


# Phrases of classes -------------------------------------------------------------------------------------------------


def class_phrases(names: Collection[str] | None, mapping_file: Path | None) -> dict[str, str | None]:
    """Return the phrase of each class; None for those that are left out.

    Args:
        names: of all classes; None where they are not known beforehand, for the mapping alone.
        mapping_file: JSON or YAML of `name: phrase`; a class of phrase null is left out, one that it lacks keeps its
            name.

    Raises:
        ValueError: the file is no such mapping or names a class that is not there, or a name cannot be a phrase.
    """
    mapping = _read_mapping(mapping_file) if mapping_file is not None else {}
    if names is not None and (strange := sorted(set(mapping) - set(names))):
        known = ", ".join(sorted(names))
        raise ValueError(f"{mapping_file}: there is no category {', '.join(strange)}; there are {known}")
    phrases = {name: mapping.get(name, name) for name in (mapping if names is None else sorted(names))}
    for name, phrase in phrases.items():
        if phrase is not None and (fault := text_fault(phrase)):
            raise ValueError(f"the category {name!r:.40} cannot be a phrase: {fault}; give another by --classes")
    return phrases


def _read_mapping(file: Path) -> dict[str, str | None]:
    mapping: Any = read_yaml(file)
    if isinstance(mapping, dict):  # names like 0 and yes are numbers and truths in YAML; as written they are text
        mapping = {str(name) if type(name) is int else name: phrase for name, phrase in mapping.items()}
    if not isinstance(mapping, dict) or not all(
        isinstance(name, str) and (phrase is None or (isinstance(phrase, str) and phrase.strip()))
        for name, phrase in mapping.items()
    ):
        raise ValueError(f"{file}: expected a mapping of category name to phrase or null, as person: a person")
    return mapping


def check_words(phrases: Collection[str | None], where: str) -> None:
    """Raise ValueError if all phrases are bare numbers: no model knows what class 0 is."""
    used = [phrase for phrase in phrases if phrase is not None]
    if used and all(phrase.strip().isdigit() for phrase in used):
        shown = ", ".join(used[:5])
        raise ValueError(
            f'{where}: the classes are called {shown}; phrases are words: give them by --classes, as {{"0": "a cat"}}'
        )


# Splits -------------------------------------------------------------------------------------------------------------

SPLITS = {
    "train": "train", "training": "train", "train2017": "train", "train2014": "train", "obj_train_data": "train",
    "val": "val", "valid": "val", "validation": "val", "val2017": "val", "val2014": "val", "obj_valid_data": "val",
    "obj_validation_data": "val",
    "test": "test", "testing": "test", "test2017": "test", "obj_test_data": "test",
}  # fmt: skip


def split_name(name: str) -> str:
    """Return the usual name of a split, "val" for "valid"; one that is not known stays as it is."""
    return SPLITS.get(name.lower(), name)


def splits_by_folder(paths: Sequence[str]) -> dict[str, str]:
    """Return the split of each path that has a folder called like one."""
    return {path: SPLITS[part] for path in paths for part in path.lower().split("/")[:-1] if part in SPLITS}


def choose_split(source: Path, by_split: Mapping[str, Any], split: str | None) -> list[str]:
    """Return the names of the splits that `split` chooses, all of them where it is None.

    Args:
        by_split: by name; "" stands for what is of no split.

    Raises:
        ValueError: there is no such split.
    """
    if split is None:
        return list(by_split)
    chosen = [name for name in by_split if split == name or (name and split_name(split) == split_name(name))]
    if not chosen:
        known = ", ".join(filter(None, by_split)) or "none"
        raise ValueError(f"{source} has no split {split}; it has {known}")
    return chosen


def warn_of_all_splits(source: Path, counts: Mapping[str, int]) -> None:
    """Say which splits are taken together, if there are several and none was chosen."""
    if len(counts) > 1:
        names = ", ".join(f"{name} ({number})" for name, number in counts.items())
        _LOGGER.warning("%s: all splits are taken: %s; --split takes one of them", source, names)
