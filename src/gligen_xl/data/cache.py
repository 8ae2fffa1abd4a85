"""The user's cache: files that can be made or fetched again, each with its checksum beside it.

Any number of processes may share it. `keep` writes a file once; `BoundedCache` fetches files into a folder of bounded
size, from which the least recently used are removed. A file that is removed while somebody reads it stays readable for
that reader.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..io import checksum, settle, whole_file

_LOGGER = logging.getLogger(__name__)
TOUCH_EVERY = 1.0  # seconds between updates of a file's time of use
UNUSED = 30  # days after which a file is removed


def cache_folder(name: str) -> Path:
    """Return a folder of the cache: below GLIGEN_XL_CACHE, or the user's own cache folder."""
    if root := os.environ.get("GLIGEN_XL_CACHE"):
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gligen-xl" / name


def keep(path: Path, write: Callable[[Path], None], size: int | None = None) -> None:
    """Write a file of the cache, unless it is there undamaged. The caller holds a lock.

    Args:
        write: writes the file to the path that it is given.
        size: bytes of the file, where they are known.
    """
    if not is_kept(path, size):
        with whole_file(path) as partial:
            write(partial)
            checksum_file(path).write_text(checksum(partial))


def is_kept(path: Path, size: int | None = None) -> bool:
    """Tell whether a file of the cache is there undamaged; if so, note that it is used."""
    if not path.exists() or size not in (None, path.stat().st_size) or not is_undamaged(path):
        return False
    with suppress(OSError):  # the folder may be read-only
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return True


def remove_unused(folder: Path, *patterns: str) -> None:
    """Remove files that were not used for `UNUSED` days, their checksums, and partial files of killed processes."""
    oldest = time.time() - UNUSED * 24 * 3600
    for file in [file for pattern in (*patterns, ".*.partial") for file in folder.glob(pattern)]:
        with suppress(OSError):
            status = file.stat()
            if max(status.st_atime, status.st_mtime) < oldest:
                file.unlink()
                checksum_file(file).unlink(missing_ok=True)


def checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def is_undamaged(path: Path) -> bool:
    """Tell whether a file has the checksum that was noted when it was written. Version 0.1 noted none: such a file
    counts as undamaged."""
    try:
        return checksum_file(path).read_text().strip() == checksum(path)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


class BoundedCache:
    """A folder of fetched files.

    Args:
        limit: bytes of all its files together, including those that are being fetched.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._touched: dict[Path, float] = {}
        self._verified: set[Path] = set()  # by this process, which reads a file once for that

    def open(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int:
        """Return a descriptor of a file of the folder, open for reading; fetch the file if it is not there.

        Args:
            size: bytes of the whole file.
            fetch: writes the whole file to the path that it is given, or raises.

        Raises:
            OSError: what `fetch` raises; or the disk is full.
        """
        try:
            file = self._open_whole(path, size)
        except FileNotFoundError:
            return self._fetch(path, size, fetch)
        now = time.monotonic()
        if now - self._touched.get(path, 0.0) > TOUCH_EVERY:
            with suppress(OSError):  # another process may just have removed it
                os.utime(path)
            self._touched[path] = now
        return file

    def _open_whole(self, path: Path, size: int) -> int:
        """Open a file if it has its size and its checksum; a damaged file is removed.

        Raises:
            FileNotFoundError: there is no such file, or it was damaged.
        """
        file = os.open(path, os.O_RDONLY)
        same_size = os.fstat(file).st_size == size
        if same_size and path in self._verified:
            return file
        if not same_size or not is_undamaged(path):
            os.close(file)
            _LOGGER.warning("%s of the cache is damaged; it is fetched again", path)
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        self._verified.add(path)
        return file

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock_of(path):
            with suppress(FileNotFoundError):  # another process may have fetched it meanwhile
                return self._open_whole(path, size)
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)  # a killed process may have left it
            self._reserve(partial, size)
            try:
                fetch(partial)
                file = os.open(partial, os.O_RDONLY)  # before another process can remove it
                checksum_file(path).write_text(checksum(partial))
                self._verified.add(path)
                settle(partial, path)
                return file
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room, and holds it by a temporary file of the final size."""
        while True:
            with FileLock(self.folder / ".room.lock"):
                if self._make_room(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.05)  # files that others are fetching take all the room

    def _make_room(self, size: int) -> bool:
        """Remove files until `size` more bytes fit; return whether they do."""
        sizes, removable = {}, []
        for partial in self.folder.rglob(".*.safetensors.partial"):  # before the files, which they may become meanwhile
            path = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
            if _is_abandoned(path):
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
            self._verified.discard(path)
            total -= sizes[path]
        return total + size <= self.limit


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _is_abandoned(path: Path) -> bool:
    """Tell whether no process fetches the file any more, so that its partial file was left by a killed one."""
    try:
        with _lock_of(path).acquire(timeout=0):
            return True
    except Timeout:
        return False
