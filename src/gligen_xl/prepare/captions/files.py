"""Reads the files that captions come in: a source is one of them, or a folder of one kind (the first that it holds).

    .parquet              columns of ids and of texts (IDS and TEXTS below)
    .tar, .tar.gz, .tgz   members ID.txt: SAM-LLaVA-Captions10M as published, or a webdataset
    .jsonl                an object a line, with keys as the columns above
    .txt                  one caption; its path below the source, without the ending, is the id
    .json                 COCO captions (the caption of the lowest annotation id is taken), or one object {id: caption}

All but .json are read in bounded memory. Ids are kept as they are: they may be paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...io import decode_text
from ..item import text_fault
from ..sources.paths import leaves
from ..sources.rows import clean, looks_like_labels, text_id
from ..sources.tars import read_samples

IDS = ("__key__", "image_id", "id", "key")
TEXTS = ("txt", "caption", "text", "prompt")
LONGEST = 1 << 20  # bytes of a text that may be a caption

Pair = tuple[str, str | None]  # id and caption; None where it cannot be one, as a text that is too long
Reader = Callable[[Path, Path], Iterator[Pair]]  # of a file, in the folder that is the source


def survey(source: Path) -> tuple[Reader, str]:
    """Return the reader of a source's files, and their fingerprint. No list is made of them: they may be millions."""
    if not source.exists():
        raise FileNotFoundError(f"no captions {source}; expected a file or a folder ({', '.join(_READERS)})")
    sums: dict[Reader, int] = {}
    for file in _files(source):
        if reader := _reader(file):
            stat = file.stat()
            name = os.fsencode(file.relative_to(source) if file != source else file.name)
            digest = hashlib.sha256(b"%s\0%d\0%d" % (name, stat.st_size, stat.st_mtime_ns)).digest()
            sums[reader] = sums.get(reader, 0) + int.from_bytes(digest, "big")  # the same in whatever order
    for reader in _READERS.values():
        if reader in sums:
            whole = (reader.__name__, sums[reader])
            return reader, hashlib.sha256(repr(whole).encode()).hexdigest()
    raise ValueError(f"{source} holds no captions; expected files that end in {', '.join(_READERS)}")


def pairs_of(source: Path, reader: Reader) -> Iterator[Pair]:
    """Give every caption that `reader` finds in a source, in an order that is the same every time where ids repeat.

    Raises:
        ValueError: names the file that is cut short, damaged, not text, or without what is expected in it.
    """
    folder = source if source.is_dir() else source.parent
    for file in _files(source):
        if _reader(file) is not reader:
            continue
        for image_id, caption in reader(file, folder):
            try:
                length = len((caption or "").encode())
                image_id.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{file}: the caption of {image_id!r} is not Unicode text: {error}") from error
            no_caption = length > LONGEST or text_fault(caption or "") or looks_like_labels(caption or "")
            yield image_id, None if no_caption else caption


def _files(source: Path) -> Iterator[Path]:
    """Give the file, or those of the folder and the folders in it, by name; texts in any order, as they may be
    millions."""
    yield from _files_below(source, source) if source.is_dir() else [source]


def _files_below(folder: Path, source: Path) -> Iterator[Path]:
    later = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and _reader(Path(entry.path)) and leaves(source, Path(entry.path)):
                what = f"{entry.path} is a link to a file outside of {source}, and left out; copy that file there"
                warnings.warn(what, stacklevel=2)
                continue
            if entry.name.endswith(".txt"):
                yield Path(entry.path)
            else:
                later.append((entry.name, entry.is_dir(follow_symlinks=False)))
    for name, is_folder in sorted(later):
        if is_folder:
            yield from _files_below(folder / name, source)
        else:
            yield folder / name


def _reader(file: Path) -> Reader | None:
    return next((reader for ending, reader in _READERS.items() if file.name.lower().endswith(ending)), None)


# Readers: the pairs of one file -------------------------------------------------------------------------------------


def _read_parquet(path: Path, folder: Path) -> Iterator[Pair]:
    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # else it holds whole row groups
            chosen = _choose(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=4096, columns=list(chosen)):
                for values in zip(*(batch[name].to_pylist() for name in chosen), strict=True):
                    yield _pair(f"{path}, row {row}", chosen, values)
                    row += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} has a text that is not UTF-8, behind row {row}: {error.object[:40]!r}") from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {error}") from error


def _read_jsonl(path: Path, folder: Path) -> Iterator[Pair]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                entry = json.loads(decode_text(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {str(entry)[:80]!r}; expected an object with an id and a caption")
            chosen = _choose(where, list(entry))
            yield _pair(where, chosen, [entry[name] for name in chosen])


def _choose(where: str | Path, names: list[str]) -> tuple[str, str]:
    """Return the names of the id and of the text."""
    image_id, text = (next((name for name in expected if name in names), None) for expected in (IDS, TEXTS))
    if image_id is None or text is None:
        raise ValueError(
            f"{where} has {', '.join(names) or 'nothing'}; expected ids in {' or '.join(IDS)}, "
            f"and texts in {' or '.join(TEXTS)}"
        )
    return image_id, text


def _pair(where: str, names: tuple[str, str], values: Iterable[Any]) -> Pair:
    value, caption = values
    image_id = value if isinstance(value, str) else text_id(value)
    if not image_id:
        raise ValueError(f"{where}: {names[0]} is {value!r:.80}; expected the id of an image")
    if not isinstance(caption, str | None):
        raise ValueError(f"{where}: {names[1]} is {str(caption)[:80]!r}; expected a caption")
    return image_id, caption or ""


def _read_json(path: Path, folder: Path) -> Iterator[Pair]:
    """Read JSON, the only kind of file that is read whole."""
    try:
        content = json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected COCO captions or an object {{id: caption}}"
        )
    if not isinstance(content.get("annotations"), list):
        for image_id, caption in content.items():
            yield _pair(str(path), ("an id", f"the caption of {image_id}"), (image_id, caption))
        return
    try:
        first: dict[str, str] = {}
        for entry in sorted(content["annotations"], key=lambda entry: _in_order(entry["id"])):
            if entry["caption"].strip() and (image_id := text_id(entry["image_id"])):
                first.setdefault(image_id, entry["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected COCO captions, annotations with id, image_id and caption") from error
    yield from first.items()


def _in_order(number: int | str) -> tuple[int, str]:
    """Sort ids that are numbers, as such or as text, in their order, and words after them."""
    text = str(number)
    return (int(text), "") if text.isdecimal() and len(text) < 20 else (2**64, text)


def _read_text(path: Path, folder: Path) -> Iterator[Pair]:
    image_id = clean(path.relative_to(folder).with_suffix("").as_posix())
    with path.open("rb") as file:
        yield image_id, _decode(path, file.read(LONGEST + 1))


def _read_tar(path: Path, folder: Path) -> Iterator[Pair]:
    for sample in read_samples(path, {"txt": LONGEST}, dotted=True):
        text = sample.files.get("txt")
        yield sample.key, None if text is None else _decode(f"{path}, {sample.key}.txt", text)


def _decode(where: str | Path, text: bytes) -> str | None:
    if len(text) > LONGEST:
        return None
    try:
        return decode_text(text)
    except ValueError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error


_READERS: dict[str, Reader] = {
    ".parquet": _read_parquet,
    ".tar": _read_tar,
    ".tar.gz": _read_tar,
    ".tgz": _read_tar,
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".json": _read_json,
}
