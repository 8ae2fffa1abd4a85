"""The files that captions come in: a source is one of them, or a folder of one kind (the first that it holds).

    .parquet              columns of ids and of texts (IDS and TEXTS below, or named)
    .tar, .tar.gz, .tgz   members ID.txt, in any folder: SAM-LLaVA-Captions10M as published, or a webdataset
    .jsonl                an object a line, with keys as the columns above
    .txt                  one caption, of the picture that the file is named for
    .json                 COCO captions (the caption of the lowest annotation id is taken), or one object {id: caption}

All but .json are read in bounded memory. A `__key__`, of a webdataset, may be a path: its last part is the id.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IDS = ("__key__", "image_id", "id", "key")
TEXTS = ("txt", "caption", "text", "prompt")
LONGEST = 1 << 20  # bytes of a text that may be a caption

# Parts of a tar that are the next member's long name.
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)

Pair = tuple[str, str | None]  # id and caption; None where the text is too long to be one
Columns = tuple[str | None, str | None]  # of ids and texts; None where they are called as usual
Reader = Callable[[Path, Columns], Iterator[Pair]]


def survey(source: Path, columns: Columns) -> tuple[Reader, str]:
    """The reader of a source's files, and a fingerprint of them. No list of them is made: they may be millions."""
    if not source.exists():
        raise FileNotFoundError(f"no captions {source}; expected a file or a folder ({', '.join(_READERS)})")
    sums: dict[Reader, int] = {}
    for file in _files(source):
        if reader := _reader(file):
            facts = file.stat()
            name = os.fsencode(file.relative_to(source) if file != source else file.name)
            digest = hashlib.sha256(b"%s\0%d\0%d" % (name, facts.st_size, facts.st_mtime_ns)).digest()
            sums[reader] = sums.get(reader, 0) + int.from_bytes(digest, "big")  # the same in whatever order
    for reader in _READERS.values():
        if reader in sums:
            whole = (columns, reader.__name__, sums[reader])
            return reader, hashlib.sha256(repr(whole).encode()).hexdigest()[:24]
    raise ValueError(f"{source} holds no captions; expected files that end in {', '.join(_READERS)}")


def pairs_of(source: Path, reader: Reader, columns: Columns) -> Iterator[Pair]:
    """Every caption that `reader` finds in a source, in an order that is the same every time where ids repeat.

    Raises:
        ValueError: names the file that is cut short, damaged, not text, or without what is expected in it.
    """
    for file in _files(source):
        if _reader(file) is not reader:
            continue
        for image_id, caption in reader(file, columns):
            try:
                (image_id + (caption or "")).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{file}: the caption of {image_id!r} is not Unicode text: {error}") from error
            yield image_id, caption


def _files(source: Path) -> Iterator[Path]:
    """The file, or those of the folder and the folders in it, by name; texts as they come, since they may be millions
    and their order matters to none."""
    if not source.is_dir():
        yield source
        return
    later = []
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(".txt"):
                yield Path(entry.path)
            else:
                later.append((entry.name, entry.is_dir(follow_symlinks=False)))
    for name, is_folder in sorted(later):
        if is_folder:
            yield from _files(source / name)
        else:
            yield source / name


def _reader(file: Path) -> Reader | None:
    return next((reader for ending, reader in _READERS.items() if file.name.lower().endswith(ending)), None)


# Readers: the pairs of one file -------------------------------------------------------------------------------------


def _read_parquet(path: Path, columns: Columns) -> Iterator[Pair]:
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # else it holds whole row groups
            chosen = _choose(path, file.schema_arrow.names, columns)
            row = 0
            for batch in file.iter_batches(batch_size=4096, columns=list(chosen)):
                for values in zip(*(batch[name].to_pylist() for name in chosen), strict=True):
                    yield _pair(f"{path}, row {row}", chosen, values)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {error}") from error


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Pair]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {str(entry)[:80]!r}; expected an object with an id and a caption")
            chosen = _choose(where, list(entry), columns)
            yield _pair(where, chosen, [entry[name] for name in chosen])


def _choose(where: str | Path, names: list[str], columns: Columns) -> tuple[str, str]:
    """The names of the id and of the text."""
    chosen = []
    for what, option, named, usual in zip(("ids", "texts"), ("id", "text"), columns, (IDS, TEXTS), strict=True):
        expected = (named,) if named else usual
        if not (found := [name for name in expected if name in names]):
            raise ValueError(
                f"{where} has {', '.join(names) or 'nothing'}; expected {what} in {' or '.join(expected)}"
                + ("" if named else f"; name yours with {option}_column")
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _pair(where: str, names: tuple[str, str], values: Iterable[Any]) -> Pair:
    image_id, caption = values
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        image_id = str(image_id)
    if not isinstance(image_id, str) or not image_id:
        raise ValueError(f"{where}: {names[0]} is {image_id!r}; expected the id of a picture")
    if not isinstance(caption, str | None):
        raise ValueError(f"{where}: {names[1]} is {str(caption)[:80]!r}; expected a caption")
    if names[0] == "__key__":  # of a webdataset: may be a path
        image_id = PurePosixPath(image_id).name
    return image_id, caption or ""


def _read_json(path: Path, columns: Columns) -> Iterator[Pair]:
    """The only kind of file that is read whole."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
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
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            if entry["caption"].strip():
                first.setdefault(str(entry["image_id"]), entry["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected COCO captions, annotations with id, image_id and caption") from error
    yield from first.items()


def _read_text(path: Path, columns: Columns) -> Iterator[Pair]:
    with path.open("rb") as file:
        yield path.stem, _decode(path, file.read(LONGEST + 1))


def _read_tar(path: Path, columns: Columns) -> Iterator[Pair]:
    """Members are only read, one by one. An archive that does not come to its end is refused: the library takes one
    that was cut between two members for whole."""
    ended = False

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
            nonlocal ended
            ended = buf == bytes(tarfile.BLOCKSIZE)
            header = super().frombuf(buf, encoding, errors)
            if header.type in _NAMES and header.size > LONGEST:  # the library would read all of it
                raise tarfile.ReadError(f"a name of {header.size} bytes")
            return header

    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every one
                name = PurePosixPath(member.name).name
                if not member.isreg() or not name.endswith(".txt") or name.startswith("."):
                    continue
                if member.size > LONGEST:
                    yield name.removesuffix(".txt"), None
                elif (file := tar.extractfile(member)) is not None:
                    yield name.removesuffix(".txt"), _decode(f"{path}, {member.name}", file.read())
            while ended and stream.read(1 << 20):  # the checksum of a packed one comes last
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error
    if not ended:
        raise ValueError(f"{path} is cut short or damaged: it has no end mark")


def _unpacked(path: Path) -> Any:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")


def _decode(where: str | Path, text: bytes) -> str | None:
    if len(text) > LONGEST:
        return None
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
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
