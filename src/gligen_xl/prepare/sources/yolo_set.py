"""What a data.yaml of Ultralytics or an obj.data of darknet says: names of classes, and where the images are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ...io import read_text
from ...yaml_io import read_yaml
from .paths import path_parts, refuse_leaving

MAX_NAMES = 2**22  # bytes of a list of names
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # keys of data.yaml


@dataclass(frozen=True, kw_only=True)
class YoloSet:
    """The description of a set.

    Args:
        file: None if there is none.
        base: that its paths begin at. names: of classes by number. lists: what it names for each split.
        keypoints: numbers behind each box.
    """

    file: Path | None = None
    base: Path = field(default_factory=Path)
    names: Mapping[int, str] = field(default_factory=dict)
    lists: Mapping[str, list[str]] = field(default_factory=dict)
    keypoints: int = 0

    @classmethod
    def find(cls, path: Path) -> YoloSet:
        """Read the file itself, or the one that a folder holds.

        Raises:
            ValueError: it is broken, or there are several.
        """
        files = [path] if path.is_file() else [file for file in descriptions_in(path) if is_description(file)]
        if len(files) > 1:
            usual = [file for file in files if file.stem in ("data", "dataset", "obj")]
            files = usual[:1] if len({file.suffix for file in files}) > 1 or len(usual) == 1 else files
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} has several descriptions of its set, {names}; name one of them as the source")
        if not files:
            return cls()
        if path.is_dir():
            refuse_leaving(path, files[0])
        return cls._from_darknet(files[0]) if files[0].suffix == ".data" else cls._from_yaml(files[0])

    @classmethod
    def _from_yaml(cls, file: Path) -> YoloSet:
        content = _read_yaml(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: expected names, and train, val, test, as data.yaml of YOLO has them")
        names = _names(file, content.get("names"))
        count = content.get("nc")
        if isinstance(count, str) and count.isdigit() and names and max(names) >= int(count):
            raise ValueError(f"{file}: nc is {count}, but names has {len(names)}; expected as many")
        lists: dict[str, list[str]] = {}
        for key, split in _SPLITS.items():
            entries = value if isinstance(value := content.get(key), list) else [value]
            if paths := [entry for entry in entries if isinstance(entry, str) and entry.strip()]:
                lists.setdefault(split, []).extend(paths)
        path = content.get("path")
        base = _base(file.parent, path) if isinstance(path, str) and path.strip() else file.parent
        return cls(file=file, base=base, names=names, lists=lists, keypoints=_keypoints(file, content.get("kpt_shape")))

    @classmethod
    def _from_darknet(cls, file: Path) -> YoloSet:
        values = {
            key.strip(): value.strip()
            for key, equals, value in (line.partition("=") for line in read_text(file).splitlines())
            if equals
        }
        lists = {split: [values[key]] for key, split in _SPLITS.items() if values.get(key)}
        description = cls(file=file, base=file.parent, lists=lists)
        if "names" not in values:
            return description
        path = next((path for path in description.candidates(file.parent, values["names"]) if path.is_file()), None)
        return replace(description, names=lines_of_names(path) if path is not None else {})

    def candidates(self, folder: Path, path: str) -> Iterator[Path]:
        """Give what a path in the description may mean, the likeliest first; the ends of one of another machine last.

        Args:
            folder: the source.
        """
        path = path.replace("\\", "/")
        yield self.base / path
        yield folder / path
        yield from ends_in(self.base, path)


def _keypoints(file: Path, shape: Any) -> int:
    if shape is None:
        return 0
    if not isinstance(shape, list) or not shape or not all(isinstance(n, str) and n.isdigit() for n in shape):
        shown = shape[:40] if isinstance(shape, str) else f"a {type(shape).__name__}"
        raise ValueError(f"{file}: kpt_shape is {shown}; expected two numbers, as [17, 3]")
    return int(shape[0]) * (int(shape[1]) if len(shape) > 1 else 3)


def _read_yaml(file: Path) -> Any:
    """Read YAML whose scalars stay texts: a class may be called `no` or `1`."""
    return read_yaml(file, yaml.BaseLoader)


def _names(file: Path, value: Any) -> dict[int, str]:
    if value is None or value in ("", [], {}):
        return {}
    pairs = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    names = {}
    for number, name in pairs:
        if not str(number).isdigit() or not isinstance(name, str) or not name.strip():
            shown = repr(name)[:40] if isinstance(name, str) else f"a {type(name).__name__}"
            raise ValueError(f"{file}: names has {str(number)[:40]!r}: {shown}; expected a number and a name")
        names[int(number)] = name.strip()
    if not names:
        raise ValueError(f"{file}: names is {value!r:.80}; expected a list of names, or a mapping of number to name")
    return names


def lines_of_names(file: Path) -> dict[int, str]:
    """Read a name a line, that of class 0 first; blank lines are classes without a name."""
    if file.stat().st_size > MAX_NAMES:
        raise ValueError(f"{file} has more than {MAX_NAMES} bytes; expected a name a line")
    return {number: line.strip() for number, line in enumerate(read_text(file).splitlines()) if line.strip()}


def is_description(file: Path) -> bool:
    try:
        if file.suffix == ".data" and file.is_file():
            with file.open("rb") as opened:
                return b"names" in (head := opened.read(4096)) and b"=" in head
        if file.suffix not in (".yaml", ".yml") or not file.is_file():
            return False
        content = _read_yaml(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("names"), list | dict)


def descriptions_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml", ".data"))


def _base(folder: Path, path: str) -> Path:
    """Return the folder that `path` of a data.yaml means: as it is written, from the file, or from the folder around.

    One of another machine is taken to be that of the file.
    """
    path = path.replace("\\", "/")
    places = (folder / Path(path).expanduser(), folder.parent / path)
    return next((place for place in places if place.is_dir()), folder)


def ends_in(base: Path | None, path: str) -> Iterator[Path]:
    """Give the ends of a path, the longest first, below a folder; Roboflow's ../train/images lie beside data.yaml."""
    parts = path_parts(path)
    for k in range(len(parts) if base is not None else 0):
        yield Path(base or "", *parts[k:])
