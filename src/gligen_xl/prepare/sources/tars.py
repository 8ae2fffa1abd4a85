"""Reads archives of samples (webdataset, SA-1B) in one pass from front to back, plain or gzip, never unpacked.

    for sample in read_samples(path, {"jpg": 2**29, "json": 2**24}):
        sample.key, sample.files["jpg"]

Files of one sample stand next to each other and share their name up to the first dot. One sample is in memory at a
time, with one image. Names are text to tell samples apart by; nothing is written to a disk. An archive that was put
behind another one in the same file is read too.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

from ...images.decode import ENDINGS, TOO_LARGE

BLOCK = 512
GZIP = b"\x1f\x8b"  # how such a file begins
MAX_HEADER = 2**20  # bytes of a long name or of a pax header; real ones have some hundred
PIECE = 2**20  # how much is skipped at once
MOST_ENDINGS = 30  # that are told apart
BUFFER = 2**17  # how much is read at once

BAD_NAME, NO_FILE = "its name in the archive leads elsewhere", "not a regular file in the archive"
DOTS = "its name in the archive has several dots, expected NAME.jpg with NAME.txt, NAME.json"

_WITHOUT_DATA = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}


@dataclass(kw_only=True)
class TarSample:
    """Files of one name.

    Args:
        key: their path in the archive up to the first dot of the name.
        files: contents by ending, in small letters and without the dot.
        refused: why others were not read, by ending: BAD_NAME, NO_FILE, TOO_LARGE, or, of images, DOTS.
        unread: files of no use that stood among them or before them, by ending.
        done: how many bytes of the archive, as it lies on the disk, are behind.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    done: int = 0

    @property
    def image(self) -> str | None:
        """The ending of its image: of the one that was read, or of the first that was not."""
        return next((ending for ending in (*self.files, *self.refused) if ending in ENDINGS), None)


class Reading:
    """What is known of an archive once it is read to its end.

    Attributes:
        sha256: of the file as it lies on the disk.
        unread: files of no use, by ending, that no sample counts.
    """

    def __init__(self) -> None:
        self.sha256, self.unread = "", Counter[str]()


def read_samples(
    path: Path, limits: Mapping[str, int], *, dotted: bool = False, reading: Reading | None = None
) -> Iterator[TarSample]:
    """Give samples of an archive, in its order. Of several images of a sample only the first is read.

    Args:
        limits: endings of the files that are read, each with the bytes that such a file may have.
        dotted: an ending begins at the last dot of a name; in webdatasets it begins at the first.
        reading: is filled in at the end.

    Raises:
        ValueError: the archive is no tar, is cut short, or is damaged. All of it has been seen only at the end.
        OSError: it cannot be read.
    """
    count, sample, unread = 0, None, Counter[str]()
    digest = hashlib.sha256()
    try:
        with BufferedReader(_Digested(path, digest), BUFFER) as file:
            for member in _members(file):
                key, ending = _split(member.name, dotted)
                if ending not in limits and not _dotted_image(ending, limits):
                    if member.regular:
                        count_unread(unread if sample is None else sample.unread, {_shown(ending): 1})
                    member.skip()
                    continue
                if sample is not None and (key != sample.key or ending in sample.files or ending in sample.refused):
                    yield sample
                    count, sample = count + 1, None
                if sample is None:
                    sample, unread = TarSample(key=key, unread=unread), Counter[str]()
                if problem := _problem(member, limits.get(ending)):
                    member.skip()
                    sample.refused[ending] = problem
                elif ending in ENDINGS and sample.image in sample.files:
                    count_unread(sample.unread, {f".{ending} beside another image": 1})
                    member.skip()
                else:
                    sample.files[ending] = member.read()
                sample.done = file.tell()
            if reading is not None:
                reading.sha256, reading.unread = digest.hexdigest(), unread
            if sample is not None:
                yield sample
    except (_Damaged, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} {_describe(error)}, after {count} samples; fetch it again") from error


def returning_member(path: Path, limits: Mapping[str, int]) -> tuple[str, str] | None:
    """Return key and ending of the first file that belongs to a sample before the last one; only headers are read.

    None, too, for an archive that is packed or damaged: reading it will show that.
    """
    seen: set[str] = set()
    last = ""
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] == GZIP:
                return None
            for member in _members(file):
                key, ending = _split(member.name, dotted=False)
                file.seek(member.size + -member.size % BLOCK, 1)
                if ending not in limits:
                    continue
                if key != last and key in seen:
                    return key, ending
                seen.add(key)
                last = key
    except (_Damaged, EOFError, OSError, ValueError):
        pass
    return None


def count_unread(counts: Counter[str], more: Mapping[str, int]) -> None:
    """Add counts by ending; of a hostile archive or folder, which has thousands of endings, the last ones together."""
    for ending, number in more.items():
        counts[ending if ending in counts or len(counts) < MOST_ENDINGS else "others"] += number


def _shown(ending: str) -> str:
    return f".{ending}"[:40] if ending else "hidden, or without an ending"


def _split(name: str, dotted: bool) -> tuple[str, str]:
    """Split a name into key and ending. Hidden files, as macOS adds them (`._a.jpg`), have no ending.

    Characters that would disturb a table or a terminal are shown as question marks.
    """
    name = name.removeprefix("./")
    if not name.isprintable():
        name = "".join(c if c.isprintable() else "?" for c in name)
    folder, slash, base = name.rpartition("/")
    if base.startswith(".") or "." not in base:
        return name, ""
    stem, _, ending = base.rpartition(".") if dotted else base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _dotted_image(ending: str, limits: Mapping[str, int]) -> bool:
    """Tell whether this is the ending of an image whose name has several dots, as `2020.0.png` of `a.2020.0.png`."""
    last = ending.rpartition(".")[2]
    return last in ENDINGS and last in limits


def _problem(member: _Member, limit: int | None) -> str | None:
    if limit is None:
        return DOTS
    if not member.regular:
        return NO_FILE
    if member.name.startswith("/") or ".." in member.name.split("/") or not member.name.isprintable():
        return BAD_NAME
    return TOO_LARGE if member.size > limit else None


# The format ---------------------------------------------------------------------------------------------------------


class _Digested(FileIO):
    """A file whose bytes pass through a digest, each once and in their order."""

    def __init__(self, path: Path, digest: Any):
        super().__init__(path)
        self.digest = digest

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self.digest.update(memoryview(buffer)[: count or 0])
        return count


class _Damaged(Exception):
    """What is wrong with an archive, as the end of "the archive ..."."""


def _describe(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "is cut short"
    return str(error) if isinstance(error, _Damaged) else f"is damaged ({error})"


@dataclass
class _Member:
    name: str
    size: int
    regular: bool
    stream: IO[bytes]

    def read(self) -> bytes:
        """Read its contents; either this or `skip` is called, once."""
        contents = _exactly(self.stream, self.size)
        _skip(self.stream, -self.size % BLOCK)
        return contents

    def skip(self) -> None:
        _skip(self.stream, self.size + -self.size % BLOCK)


def _members(file: BufferedReader[Any]) -> Iterator[_Member]:
    """Give members with their contents still to be read. tarfile's own streams take a cut archive for a whole one.

    Raises:
        _Damaged, EOFError, zlib.error, gzip.BadGzipFile: the archive is not whole.
    """
    magic = file.peek(2)[:2]
    if not magic:
        raise _Damaged("is empty")
    stream: IO[bytes] = gzip.GzipFile(fileobj=file) if magic == GZIP else file  # type: ignore[assignment]
    first, extended = True, {}
    zeros = 0  # blocks of them in a row: two end an archive
    while True:
        block = stream.read(BLOCK)
        if len(block) < BLOCK and zeros < 2:
            raise EOFError
        if not any(block):
            zeros += 1
            if len(block) < BLOCK:
                return
            continue
        if zeros == 1:
            raise _Damaged("is damaged (one block of zeros where two end an archive)")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            if zeros:
                raise _Damaged("holds data behind its end that is no further archive") from error
            raise _Damaged("is not a tar archive" if first else f"is damaged ({error})") from error
        first, zeros = False, 0
        if info.size < 0:
            raise _Damaged(f"is damaged (a member of {info.size} bytes)")
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):  # of the next member
            extended |= _read_header(info, stream)
            continue
        yield _member(info, extended, block, stream)
        extended = {}


def _member(info: tarfile.TarInfo, extended: dict[str, str], block: bytes, stream: IO[bytes]) -> _Member:
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in extended)
    if info.type == tarfile.GNUTYPE_SPARSE:  # its map goes on in further blocks
        more = block[482]
        while more:
            more = _exactly(stream, BLOCK)[504]
    try:
        size = int(extended.get("size", info.size)) if info.type not in _WITHOUT_DATA else 0
    except ValueError as error:
        raise _Damaged(f"is damaged (a member of {extended['size'][:40]!r} bytes)") from error
    if size < 0:
        raise _Damaged(f"is damaged (a member of {size} bytes)")
    return _Member(extended.get("path", info.name), size, info.type in tarfile.REGULAR_TYPES and not sparse, stream)


def _read_header(info: tarfile.TarInfo, stream: IO[bytes]) -> dict[str, str]:
    """Read what a pax header or a long name says of the member after it."""
    if info.size > MAX_HEADER:
        raise _Damaged(f"is damaged (a header of {info.size} bytes)")
    contents = _exactly(stream, info.size)
    _skip(stream, -info.size % BLOCK)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": contents.rstrip(b"\0").decode("utf-8", "replace")}
    extended, place = {}, 0
    while place < len(contents) and contents[place]:
        length, space, _ = contents[place : place + 20].partition(b" ")  # "LENGTH KEY=VALUE\n", all of it counted
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            raise _Damaged("is damaged (a pax header that cannot be read)")
        key, _, value = contents[place + len(length) + 1 : place + int(length) - 1].partition(b"=")
        extended[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        place += int(length)
    return extended


def _exactly(stream: IO[bytes], size: int) -> bytes:
    contents = stream.read(size)
    if len(contents) < size:
        raise EOFError
    return contents


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        size -= len(_exactly(stream, min(size, PIECE)))
