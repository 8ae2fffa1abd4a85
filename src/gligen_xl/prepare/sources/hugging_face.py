"""Detection sets of Hugging Face with the images inside: parquet files, or folders of `datasets.save_to_disk`.

A row has an image (its bytes, with or without a path) and objects: see `rows.read_objects`. Categories are texts, or
numbers whose names the file's own description holds (ClassLabel). Boxes are in pixels, xywh, where nothing else is
said. Rows are read one batch at a time, and converted one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...io import read_json
from ..item import Item, Skipped, unique
from .image_tables import ID_KEYS, Columns, columns_of, describe_table, image_column, table_rows
from .options import LEFT_OUT, SPLITS, SourceOptions, check_words, choose_split, class_phrases, warn_of_all_splits
from .paths import ImageFinder, refuse_leaving, stem
from .rows import (
    BOX_KEYS,
    CAPTION_KEYS,
    MISSING,
    WRONG,
    RowError,
    check_first,
    clean,
    first_value,
    item_or_skipped,
    read_annotation,
    read_objects,
    text_id,
)
from .tables import METADATA

NO_NAME = "a category of its has no name"  # why an image is left out
_SAVED, _SPLIT_FOLDERS = "state.json", "dataset_dict.json"  # beside what `save_to_disk` writes


@dataclass(frozen=True, kw_only=True)
class TableChunk:
    """Consecutive rows of a parquet or Arrow file.

    Args:
        prefix: of ids, where several splits are taken. place: the file as it is called in ids of rows without one.
        first: number of its first row, from 0. count: of rows.
        phrases: of classes, None for those that are left out.
        images: the folder of images that are only named.
    """

    name: str
    file: Path
    columns: Columns
    prefix: str
    place: str
    first: int
    count: int
    box_format: str | None
    phrases: Mapping[str, str | None] = field(default_factory=dict)
    images: Path

    @property
    def weight(self) -> int:
        return self.count

    def identity(self) -> dict[str, Any]:
        stat = self.file.stat()
        values = {"kind": "huggingface", "file": self.file.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        numbers = {"first": self.first, "count": self.count, "box_format": self.box_format}
        return values | numbers | {"classes": dict(self.phrases), "ids": self.prefix}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def readers(self) -> Iterator[tuple[str, partial[Item]]]:
        """Yield where each row is written, and what reads it."""
        finder = ImageFinder(self.images)
        for number, row in self._rows():
            yield self._where(number), partial(self._item, number, row, finder)

    def _items(self) -> Iterator[Item | Skipped]:
        finder = ImageFinder(self.images)
        for number, row in self._rows():
            read = partial(self._item, number, row, finder)
            yield item_or_skipped(read, self._id(number, row), number - self.first, self._where(number))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give rows with their number in the file, from 1."""
        with table_rows(self.file, self.columns.all, self.first, self.count) as rows:
            yield from enumerate(rows, start=self.first + 1)

    def _where(self, number: int) -> str:
        return f"{self.file}, row {number}"

    def _item(self, number: int, row: Mapping[str, Any], finder: ImageFinder) -> Item:
        image = _image(row[self.columns.image], finder)
        values = {key: row[key] for key in self.columns.others}
        left_out = 0
        if (objects := self._objects(row)) is not None:
            boxes, names, scores = objects
            if isinstance(names, list):
                names = [self._phrase(name) for name in names]
                used = [k for k, phrase in enumerate(names) if phrase is not None]
                left_out = len(names) - len(used)
                if left_out and isinstance(boxes, list) and len(boxes) == len(names):
                    boxes, names = [boxes[k] for k in used], [names[k] for k in used]
                    scores = [scores[k] for k in used] if isinstance(scores, list) else scores
            values["objects"] = {"bbox": boxes, "categories": [] if names is None else names, "scores": scores}
        for key in CAPTION_KEYS:
            if isinstance(values.get(key), list):  # of several captions the first
                values[key] = next((text for text in values[key] if text), None)
        annotation = read_annotation(values, image, self.box_format)
        if left_out:
            annotation = replace(annotation, dropped={**annotation.dropped, LEFT_OUT: left_out})
        done, where = number - self.first, self._where(number)
        return Item(image_id=self._id(number, row), image=image, done=done, where=where, **vars(annotation))

    def _objects(self, row: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
        """Return boxes, names and scores; None if the table has no objects."""
        columns = self.columns
        if not columns.objects and not columns.flat:
            return None
        objects = row[columns.objects] if columns.objects else {key: row[key] for key in columns.flat}
        if objects is None or (not columns.objects and first_value(objects, BOX_KEYS) is None):
            return [], [], None
        if (read := read_objects(objects)) is None:
            raise RowError(WRONG, f"objects is {objects!r:.80}; expected boxes and categories, a list each")
        return read

    def _phrase(self, name: Any) -> Any:
        """Return the phrase of a class; what is no name stays as it is, for the check of the row to refuse."""
        if isinstance(name, int) and not isinstance(name, bool):
            if self.columns.names:
                if not 0 <= name < len(self.columns.names):
                    raise RowError(NO_NAME, f"category {name}; expected 0 to {len(self.columns.names) - 1}")
                name = self.columns.names[name]
            elif str(name) in self.phrases:
                name = str(name)
        return self.phrases.get(name, name) if isinstance(name, str) else name

    def _id(self, number: int, row: Mapping[str, Any]) -> str:
        image = row[self.columns.image]
        path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
        own = next((row[key] for key in self.columns.others if key in ID_KEYS and row[key] is not None), None)
        if (name := text_id(own)) is None:
            name = f"{self.place}-{number}"
            if isinstance(path, str) and path.strip():
                name = stem(path.replace("\\", "/"))
        return clean(f"{self.prefix}{name}")


def _image(value: Any, finder: ImageFinder) -> bytes | Path:
    """Return the bytes of an image, or the file that it names.

    Raises:
        RowError: it is neither.
    """
    contents, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(contents, bytes):
        return contents
    if isinstance(contents, str):
        path = contents
    if not isinstance(path, str) or not path.strip():
        raise RowError(MISSING, "neither bytes nor a path; expected an image")
    if (found := finder.find(path)) is None:
        raise RowError(MISSING, f"{path!r:.200} is not below {finder.root}; name the folder of the images: --images")
    return finder.root / found


# Sets ---------------------------------------------------------------------------------------------------------------


def is_hugging_face(path: Path) -> bool:
    """Tell whether a path is a table with images inside, a folder of such, or one that `save_to_disk` wrote."""
    if path.is_dir() and (path.joinpath(_SPLIT_FOLDERS).is_file() or path.joinpath(_SAVED).is_file()):
        return True
    files = [path] if path.is_file() else _parquet_files(path)
    return any(file.suffix in (".parquet", ".arrow") and _has_images(file) for file in files[:1])


def open_hugging_face(options: SourceOptions) -> list[TableChunk]:
    """Cut a set of Hugging Face into units.

    Raises:
        ValueError: it has no images inside, no such split, or a file is damaged; or all rows have a fault.
    """
    files = _files_by_split(options.path)
    several = len(files) > 1
    root = options.path if options.path.is_dir() else options.path.parent
    name = Path(os.path.abspath(options.path)).stem  # noqa: PTH100, links stay as they are called
    name = f"{name}-{options.split}" if options.split else name
    chunks: list[TableChunk] = []
    counts: dict[str, int] = {}
    for split in choose_split(options.path, files, options.split):
        for file in files[split]:
            if options.path.is_dir():
                refuse_leaving(root, file)
            schema, total = describe_table(file)
            columns = columns_of(file, schema)
            names = set(columns.names) or None
            phrases = class_phrases(names, options.classes) if names or options.classes else {}
            check_words([phrases.get(word, word) for word in columns.names], str(file))
            counts[split] = counts.get(split, 0) + total
            place = file.relative_to(root).with_suffix("").as_posix()
            for first in range(0, total, options.unit_size):
                chunk = TableChunk(
                    name=f"{name}-{len(chunks):05d}",
                    file=file,
                    columns=columns,
                    prefix=f"{split}/" if several else "",
                    place=place.removeprefix(f"{split}/") if several else place,
                    first=first,
                    count=min(options.unit_size, total - first),
                    box_format=options.box_format,
                    phrases=phrases,
                    images=options.images or root,
                )
                chunks.append(chunk)
    if not chunks:
        raise ValueError(f"{options.path} holds no rows; expected an image each")
    if options.split is None:
        warn_of_all_splits(options.path, counts)
    check_first(reader for chunk in chunks for reader in chunk.readers())
    return chunks


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Find the tables by the name of their split, "" where there is none."""
    if path.is_file():
        return {"": [path]}
    if path.joinpath(_SPLIT_FOLDERS).is_file():
        content = read_json(path / _SPLIT_FOLDERS)
        names = content.get("splits") if isinstance(content, dict) else None
        if not isinstance(names, list) or not names or not all(map(_is_name, names)):
            raise ValueError(f'{path / _SPLIT_FOLDERS}: expected {{"splits": [...]}} as datasets writes it')
        return {name: _saved_files(path / name) for name in names}
    if path.joinpath(_SAVED).is_file():
        return {"": _saved_files(path)}
    files: dict[str, list[Path]] = {}
    for file in _parquet_files(path):
        files.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not files:
        raise ValueError(f"{path} holds no .parquet files, and nothing of datasets.save_to_disk")
    return files


def _saved_files(folder: Path) -> list[Path]:
    state = folder / _SAVED
    if not state.is_file():
        raise ValueError(f"{folder} has no {_SAVED}; expected a folder that datasets.save_to_disk wrote")
    content = read_json(state)
    entries = content.get("_data_files") if isinstance(content, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    if not names or not all(map(_is_name, names)):
        raise ValueError(f"{state}: expected _data_files, as datasets.save_to_disk writes them")
    if lacking := [name for name in names if not folder.joinpath(str(name)).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {lacking[0]}, one of its {len(names)} files; copy the whole folder")
    return [folder / str(name) for name in names]


def _is_name(name: Any) -> bool:
    """Tell whether it names a file of the folder itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _parquet_files(folder: Path) -> list[Path]:
    """Find parquet files here and in the folders below; no tables of metadata, and nothing that is hidden."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tables = (name for name in sorted(names) if name.endswith(".parquet") and not name.startswith("."))
        files += [Path(where, name) for name in tables if name not in METADATA]
    return files


def _split_of(file: Path) -> str:
    """ "train-00000-of-00002.parquet" and "train/0000.parquet" -> "train"."""
    for part in (file.stem.split("-")[0], *file.parent.parts[::-1]):
        if part.lower() in SPLITS:
            return part
    return ""


def _has_images(file: Path) -> bool:
    if not file.is_file():  # a pipe would be waited for
        return False
    try:
        return image_column(describe_table(file)[0]) is not None
    except (ValueError, OSError):
        return False
