"""Files from elsewhere in a folder of bounded size: fetched when they are opened, the least recently used go.

Any number of processes may share the folder. One fetches a file, the others wait for it. A file that goes while
somebody reads it stays readable for him.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..io import settle
from ..manifest import checksum

_LOGGER = logging.getLogger(__name__)
TOUCH_EVERY = 1.0  # seconds


class BoundedCache:
    """The folder.

    Args:
        limit: bytes of all its files together, those that are being fetched included.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._touched: dict[Path, float] = {}
        self._checked: set[Path] = set()  # by this process, which reads them once more for it

    def open(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor of a file of the folder, open for reading.

        Args:
            size: bytes that it has.
            fetch: writes it to the path that it is given, whole, or fails.

        Raises:
            OSError: what `fetch` raises; or the disk is full.
        """
        try:
            file = self._whole(path, size)
        except FileNotFoundError:
            return self._fetched(path, size, fetch)
        now = time.monotonic()
        if now - self._touched.get(path, 0.0) > TOUCH_EVERY:
            with suppress(OSError):  # it may just have gone
                os.utime(path)
            self._touched[path] = now
        return file

    def _whole(self, path: Path, size: int) -> int:
        """A descriptor of a file that is there, as long as it should be and, where it was fetched since there are
        checksums, as it was fetched. One that is not is removed.

        Raises:
            FileNotFoundError: it is not there, or no more.
        """
        file = os.open(path, os.O_RDONLY)
        if path in self._checked and os.fstat(file).st_size == size:
            return file
        if os.fstat(file).st_size != size or not is_as_fetched(path):
            os.close(file)
            _LOGGER.warning("%s of the cache is damaged; it is fetched again", path)
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        self._checked.add(path)
        return file

    def _fetched(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock_of(path):
            with suppress(FileNotFoundError):  # somebody else fetched it meanwhile
                return self._whole(path, size)
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)  # of a process that was killed
            self._reserve(partial, size)
            try:
                fetch(partial)
                file = os.open(partial, os.O_RDONLY)  # before it can go again
                checksum_file(path).write_text(checksum(partial))
                self._checked.add(path)
                settle(partial, path)
                return file
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room; a temporary file, as long as the file will be, holds it."""
        while True:
            with FileLock(self.folder / ".room.lock"):
                if self._make_room(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.05)  # all the room is taken by files that others are fetching

    def _make_room(self, size: int) -> bool:
        """Remove files until `size` more bytes fit; whether they do."""
        sizes, removable = {}, []
        for partial in self.folder.rglob(".*.safetensors.partial"):  # before the files that they may become meanwhile
            path = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
            if _is_left_behind(path):
                partial.unlink(missing_ok=True)
                continue
            for place in (partial, path):
                with suppress(FileNotFoundError):
                    sizes[path] = place.stat().st_size
                    break
        for path in self.folder.rglob("*.safetensors"):
            with suppress(FileNotFoundError):
                status = path.stat()
                sizes[path] = status.st_size
                removable.append((status.st_mtime_ns, path))
        total = sum(sizes.values())
        for _, path in sorted(removable):
            if total + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            checksum_file(path).unlink(missing_ok=True)
            self._checked.discard(path)
            total -= sizes[path]
        return total + size <= self.limit


def checksum_file(path: Path) -> Path:
    """Where the checksum of a fetched file is written down."""
    return path.with_name(f"{path.name}.sha256")


def is_as_fetched(path: Path) -> bool:
    """Whether a file has the checksum that was written down when it came; also where there is none, as of version
    0.1."""
    try:
        return checksum_file(path).read_text().strip() == checksum(path)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _is_left_behind(path: Path) -> bool:
    """Whether nobody fetches the file any more, so that its rest is that of a killed process."""
    try:
        with _lock_of(path).acquire(timeout=0):
            return True
    except Timeout:
        return False
