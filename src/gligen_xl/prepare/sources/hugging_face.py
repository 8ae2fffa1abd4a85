"""Detection sets of Hugging Face with the images inside: parquet files, or folders of `datasets.save_to_disk`.

A row has an image (its bytes, with or without a path) and objects: see `objects`. Categories are texts, or numbers
whose names the file's own description holds (ClassLabel). Boxes are in pixels, xywh, where nothing else is said.
Rows are read one batch at a time, and converted one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...io import read_json
from ..item import Item, Skipped, unique
from .class_phrases import LEFT_OUT, check_words, class_phrases
from .image_columns import ID_KEYS, Columns, columns_of, image_column
from .image_paths import ImageFinder
from .image_tables import describe_table, table_rows
from .label_files import SPLITS, split_name, tell_splits
from .links import refuse_leaving
from .objects import BOX_KEYS, read_objects
from .options import SourceOptions
from .row_chunks import METADATA
from .rows import CAPTION_KEYS, MISSING, WRONG, RowError, check_first, clean, item_or_why_not, read_annotation, text_id

NO_NAME = "a category of its has no name"  # why an image is left out
_SAVED, _SPLIT_FOLDERS = "state.json", "dataset_dict.json"  # beside what `save_to_disk` writes


@dataclass(frozen=True, kw_only=True)
class TableChunk:
    """Consecutive rows of a parquet or Arrow file.

    Args:
        prefix: of ids, where several splits are taken. place: the file as it is called in ids of rows without one.
        first: number of its first row, from 0. count: of rows.
        phrases: of classes, None for those that are left out.
        images: where images lie that are only named.
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
        facts = self.file.stat()
        said = {"kind": "huggingface", "file": self.file.name, "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        numbers = {"first": self.first, "count": self.count, "box_format": self.box_format}
        return said | numbers | {"classes": dict(self.phrases), "ids": self.prefix}

    def items(self) -> Iterator[Item | Skipped]:
        return unique(self._items())

    def readers(self) -> Iterator[tuple[str, partial[Item]]]:
        finder = ImageFinder(self.images)
        for number, row in self._rows():
            yield self._where(number), partial(self._item, number, row, finder)

    def _items(self) -> Iterator[Item | Skipped]:
        finder = ImageFinder(self.images)
        for number, row in self._rows():
            read = partial(self._item, number, row, finder)
            yield item_or_why_not(read, self._image_id(number, row), number - self.first, self._where(number))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows with their number in the file, from 1."""
        with table_rows(self.file, self.columns.all, self.first, self.count) as rows:
            yield from enumerate(rows, start=self.first + 1)

    def _where(self, number: int) -> str:
        return f"{self.file}, row {number}"

    def _item(self, number: int, row: Mapping[str, Any], finder: ImageFinder) -> Item:
        image = _image(row[self.columns.image], finder)
        said = {key: row[key] for key in self.columns.others}
        left_out = 0
        if (given := self._objects(row)) is not None:
            boxes, names, scores = given
            phrases = self._phrases(names if names is not None else [])
            used = [k for k, phrase in enumerate(phrases) if phrase is not None]
            left_out = len(phrases) - len(used)
            if left_out and isinstance(boxes, list) and len(boxes) == len(phrases):
                boxes, phrases = [boxes[k] for k in used], [phrases[k] for k in used]
                scores = [scores[k] for k in used] if isinstance(scores, list) else scores
            said["objects"] = {"bbox": boxes, "categories": phrases} | ({} if scores is None else {"scores": scores})
        for key in CAPTION_KEYS:
            if isinstance(said.get(key), list):  # of several captions the first
                said[key] = next((text for text in said[key] if text), None)
        known = read_annotation(said, image, self.box_format)
        if left_out:
            known = replace(known, dropped={**known.dropped, LEFT_OUT: left_out})
        done = number - self.first
        return Item(
            image_id=self._image_id(number, row), image=image, done=done, where=self._where(number), **vars(known)
        )

    def _objects(self, row: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
        """Boxes, names and scores; None where the row has no objects."""
        objects = row[self.columns.objects] if self.columns.objects else {key: row[key] for key in self.columns.flat}
        if not self.columns.objects and not self.columns.flat:
            return None
        if objects is None:
            return [], [], None
        if not self.columns.objects and _keyed(objects, BOX_KEYS) is None:
            return [], [], None
        if (read := read_objects(objects)) is None:
            raise RowError(WRONG, f"objects is {objects!r:.80}; expected boxes and categories, a list each")
        return read

    def _phrases(self, names: Any) -> list[Any]:
        """Of each object; what is no name stays as it is, for the check of the row to tell."""
        if not isinstance(names, list):
            return names
        return [self._phrase(name) for name in names]

    def _phrase(self, name: Any) -> Any:
        if isinstance(name, int) and not isinstance(name, bool):
            if self.columns.names:
                if not 0 <= name < len(self.columns.names):
                    raise RowError(NO_NAME, f"category {name}; expected 0 to {len(self.columns.names) - 1}")
                name = self.columns.names[name]
            elif str(name) in self.phrases:
                name = str(name)
        return self.phrases.get(name, name) if isinstance(name, str) else name

    def _image_id(self, number: int, row: Mapping[str, Any]) -> str:
        given = next((row[key] for key in self.columns.others if key in ID_KEYS and row[key] is not None), None)
        image = row[self.columns.image]
        path = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
        if (said := text_id(given)) is not None:
            name = said
        elif isinstance(path, str) and path.strip():
            name = os.path.splitext(path.replace("\\", "/").rpartition("/")[2])[0]  # noqa: PTH122
        else:
            name = f"{self.place}-{number}"
        return clean(f"{self.prefix}{name}")


def is_hugging_face(path: Path) -> bool:
    """Whether a path is a table with images inside, a folder of such, or one that `save_to_disk` wrote."""
    if path.is_dir() and (path.joinpath(_SPLIT_FOLDERS).is_file() or path.joinpath(_SAVED).is_file()):
        return True
    files = [path] if path.is_file() else _parquet_files(path)
    return any(file.suffix in (".parquet", ".arrow") and _has_images(file) for file in files[:1])


def open_hugging_face(options: SourceOptions) -> list[TableChunk]:
    """Units of a set of Hugging Face.

    Raises:
        ValueError: it has no images inside, no such split, or a file is damaged; or all rows have a fault.
    """
    files = _files_by_split(options.path)
    several = len(files) > 1
    if options.split is not None:
        wanted = [name for name in files if options.split == name or split_name(options.split) == split_name(name)]
        if not wanted:
            raise ValueError(f"{options.path} has no split {options.split}; it has {', '.join(filter(None, files))}")
        files = {name: files[name] for name in wanted}
    root = options.path if options.path.is_dir() else options.path.parent
    name = Path(os.path.abspath(options.path)).stem  # noqa: PTH100, links stay as they are called
    name = f"{name}-{options.split}" if options.split else name
    chunks: list[TableChunk] = []
    counts: dict[str, int] = {}
    for split, paths in files.items():
        for file in paths:
            if options.path.is_dir():
                refuse_leaving(root, file)
            schema, total = describe_table(file)
            columns = columns_of(file, schema)
            names = set(columns.names) or None
            mapped = class_phrases(names, options.classes) if names or options.classes else {}
            check_words([mapped.get(word, word) for word in columns.names], str(file))
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
                    phrases=mapped,
                    images=options.images or root,
                )
                chunks.append(chunk)
    if not chunks:
        raise ValueError(f"{options.path} holds no rows; expected an image each")
    if options.split is None:
        tell_splits(options.path, counts)
    check_first(reader for chunk in chunks for reader in chunk.readers())
    return chunks


# Files --------------------------------------------------------------------------------------------------------------


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Tables by the name of their split, "" where there is none."""
    if path.is_file():
        return {"": [path]}
    if path.joinpath(_SPLIT_FOLDERS).is_file():
        names = read_json(path / _SPLIT_FOLDERS)
        names = names.get("splits") if isinstance(names, dict) else None
        if not isinstance(names, list) or not names or not all(_is_name(name) for name in names):
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
    """Whether it names a file of the folder itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _parquet_files(folder: Path) -> list[Path]:
    """Parquet files here and in the folders below, but tables of metadata and what is hidden."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(where, name)
            for name in sorted(names)
            if name.endswith(".parquet") and name not in METADATA and not name.startswith(".")
        ]
    return found


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


# Values of a row ----------------------------------------------------------------------------------------------------


def _keyed(columns: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((columns[key] for key in keys if columns.get(key) is not None), None)


def _image(value: Any, finder: ImageFinder) -> bytes | Path:
    """The bytes of an image, or the file that it names.

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
