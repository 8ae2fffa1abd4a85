"""Captions by image id, ten millions of them: read once into a file of SQLite, looked up there.

    with CaptionTable.open("SAM-LLaVA-Captions10M.tar.gz", cache) as captions:
        captions.get("sa_123")

`captions.files` says what may be a source. Captions have ids as their source names them, images as theirs, and either
may have folders that the other lacks. One rule joins them: the parts of one id end with those of the other.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...io import whole_file
from ...workdir import FOREVER, exclusive
from .files import LONGEST, Pair, pairs_of, survey

_VERSION = 3  # of the tables: one of another version is built anew
_REPORT_EVERY = 10_000


@dataclass
class Counts:
    """What became of the captions of a source.

    Args:
        captions: images that have one.
        duplicates: other texts for an image that had one already: the first is kept.
        empty: left out. refused: left out too, as they are too long, have control characters, or are in an archive no
            file or of a name that leads elsewhere.
        example: the id of one that was refused.
    """

    captions: int = 0
    duplicates: int = 0
    empty: int = 0
    refused: int = 0
    example: str = ""


class CaptionTable:
    """A table that is built, open for reading; in another thread or process too (it can be pickled).

    Raises:
        ValueError: the file is no such table.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        try:
            self.counts = Counts(**dict(self._query("SELECT name, value FROM counts", ())))
        except (sqlite3.Error, TypeError) as error:
            raise ValueError(f"{self.path} is no table of captions, or damaged ({error}); delete it") from error

    @classmethod
    def open(
        cls,
        source: str | Path,
        cache: str | Path,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> CaptionTable:
        """Open the table of `source`, and build it in the folder `cache` first if it is missing.

        It is built anew when a file of the source is another (name, size, time). Of several processes that open it at
        once one builds, the others wait.

        Args:
            progress: called now and then with the number of captions that were read.

        Raises:
            FileNotFoundError: no such source.
            ValueError: it holds no captions, is cut short or damaged, or lacks the columns; or the cache cannot be
                written.
            OSError: the disk is full.
        """
        source, cache = Path(source).expanduser(), Path(cache).expanduser()
        reader, fingerprint = survey(source)
        path = cache / f"captions-{_VERSION}-{fingerprint}.sqlite"
        if not path.is_file():
            with exclusive(path.with_name(path.name + ".lock"), "", FOREVER):
                for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
                    left.unlink()
                if not path.is_file():  # else another process has built it meanwhile
                    _build(path, source, pairs_of(source, reader), progress or (lambda number: None))
        return cls(path)

    def get(self, image_id: str) -> str | None:
        """Return the caption of one image, if it has one.

        For `a/0` it is that of `a/0`; else that of `x/a/0`, whatever x is, if there is only one; else that of `0`.
        """
        key = _backwards(image_id)
        found = self._query("SELECT caption FROM captions WHERE id = ?", [key])
        if not found:
            deeper = (f"{key}/", f"{key}0")  # "0" comes next to "/"
            found = self._query("SELECT caption FROM captions WHERE id > ? AND id < ? LIMIT 2", deeper)
            if len(found) > 1:
                return None
        while not found and "/" in key:
            key = key.rpartition("/")[0]
            found = self._query("SELECT caption FROM captions WHERE id = ?", [key])
        return found[0][0] if found else None

    def __len__(self) -> int:
        return self.counts.captions

    @property
    def duplicates(self) -> int:
        return self.counts.duplicates

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> CaptionTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTable, (self.path,)

    def _query(self, words: str, values: Iterable[str]) -> list[tuple[Any, ...]]:
        with self._lock:
            if self._closed:
                raise ValueError(f"the table of captions {self.path} was closed")
            if self._connection is None or self._process != os.getpid():  # a connection must not cross a fork
                # The file never changes: no locks are needed, which read-only and network disks may lack.
                where = f"file:{quote(str(self.path.resolve()))}?mode=ro&immutable=1"
                self._connection = sqlite3.connect(where, uri=True, check_same_thread=False)
                self._process = os.getpid()
            return self._connection.execute(words, list(values)).fetchall()


# Building -----------------------------------------------------------------------------------------------------------


def _build(path: Path, source: Path, pairs: Iterable[Pair], progress: Callable[[int], None]) -> None:
    try:
        with whole_file(path) as partial, closing(sqlite3.connect(partial, isolation_level=None)) as table:
            _fill(table, source, pairs, progress)
    except sqlite3.Error as error:
        raise OSError(f"the table of captions cannot be written in {path.parent} (full?): {error}") from error


def _fill(table: sqlite3.Connection, source: Path, pairs: Iterable[Pair], progress: Callable[[int], None]) -> None:
    """Append captions as they come, and index their ids at the end, sorted on the disk.

    A table ordered by id (WITHOUT ROWID) is written all over when ids come unordered: measured 60,000 captions a second
    against 200,000 at two million, falling as it grows.
    """
    counts = Counts()
    # What is not whole is thrown away: nothing is journaled, nothing flushed before its end.
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -8192"):
        table.execute(f"PRAGMA {pragma}")
    table.execute("CREATE TABLE captions (number INTEGER PRIMARY KEY, id TEXT NOT NULL, caption TEXT NOT NULL)")
    table.execute("BEGIN")
    table.executemany("INSERT INTO captions (id, caption) VALUES (?, ?)", _stored(pairs, counts, progress))
    table.execute("CREATE INDEX by_id ON captions (id)")
    _keep_first(table, counts)
    if not counts.captions:
        raise ValueError(
            f"{source} holds no captions: {counts.empty} empty, {counts.refused} over {LONGEST} bytes, "
            "rows of YOLO labels, with control characters, no files, or of names that lead elsewhere"
        )
    table.execute("CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER)")
    table.executemany("INSERT INTO counts VALUES (?, ?)", asdict(counts).items())
    table.execute("COMMIT")


def _stored(pairs: Iterable[Pair], counts: Counts, progress: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    """Give ids, backwards, and captions to store, in one line each, and count the others."""
    number = 0
    for number, (image_id, caption) in enumerate(pairs, start=1):
        if number % _REPORT_EVERY == 0:
            progress(number)
        if caption is None:
            counts.refused += 1
            counts.example = counts.example or image_id
        elif text := " ".join(part for line in caption.splitlines() if (part := line.strip())):
            yield _backwards(image_id), text
        else:
            counts.empty += 1
    progress(number)


def _backwards(image_id: str) -> str:
    """Put the last part of an id first, without the "." of "./a": ids with the same end are then next to each other."""
    return "/".join(part for part in reversed(image_id.split("/")) if part not in ("", "."))


def _keep_first(table: sqlite3.Connection, counts: Counts) -> None:
    """Keep the first of several captions of an image, and count those that say something else."""
    table.execute(
        "CREATE TEMP TABLE repeated AS SELECT captions.number, captions.caption <> kept.caption AS other FROM "
        "(SELECT id, min(number) AS first FROM captions GROUP BY id HAVING count(*) > 1) AS twice "
        "JOIN captions ON captions.id = twice.id AND captions.number > twice.first "
        "JOIN captions AS kept ON kept.number = twice.first"
    )
    table.execute("DELETE FROM captions WHERE number IN (SELECT number FROM repeated)")
    counts.duplicates = table.execute("SELECT coalesce(sum(other), 0) FROM repeated").fetchone()[0]
    counts.captions = table.execute("SELECT count(*) FROM captions").fetchone()[0]
