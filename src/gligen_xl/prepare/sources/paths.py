"""Finds files below a folder: images, labels, and images under the names that annotation programs give them.

    finder = ImageFinder(Path("photos"))
    finder.find("images\\\\a.jpg")                             # "a.jpg", or "images/a.jpg", whichever is there
    finder.find("/data/local-files/?d=photos%2Fa.jpg")       # Label Studio
    finder.find("/data/upload/1/0f3a9c1d-a.jpg")             # "0f3a9c1d-a.jpg", or "a.jpg"

Whatever a name says, nothing outside of the folder is looked at. Links to images are followed, as data sets are often
made of them; a text or a table that is a link to somewhere else is not read. A folder that somebody else packed may
hold `a.txt -> /home/me/notes.txt`, which would end up in captions, and with these in what is published.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ...images.decode import ENDINGS
from .tars import count_unread

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio's, before the name of a file that was uploaded
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MOST_FOLDERS = 50  # directly in the root, in which a name is looked for as well


def find_images(folder: Path, begin: tuple[str, ...] = (), *, others: Counter[str] | None = None) -> Iterator[Path]:
    """Give files with the ending of an image, here and in the folders below, in the order of the parts of their paths.

    Hidden ones are left out. Links to files are followed, links to folders are not: they may lead round in a circle.

    Args:
        begin: parts of a path below the folder; what comes before it is left out, without a look at its folders.
        others: counts files that are neither images nor the `.txt` of one, by ending, as they are met.
    """
    entries = _sorted_entries(folder)
    if others is not None:
        _count_others(entries, others)
    for entry in entries:
        if entry.name.startswith(".") or (begin and entry.name < begin[0]):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_images(Path(entry.path), begin[1:] if begin[:1] == (entry.name,) else (), others=others)
        elif _ending(entry.name) in ENDINGS and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def find_files(folder: Path, ending: str) -> Iterator[Path]:
    """Give files with this ending, in small or large letters, here and in the folders below, by name; no hidden ones.

    Links to files are among them, wherever they lead; pipes and the like are not.
    """
    for entry in _sorted_entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from find_files(Path(entry.path), ending)
        elif entry.name.lower().endswith(ending) and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def _sorted_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _count_others(entries: list[os.DirEntry[str]], others: Counter[str]) -> None:
    images = {entry.name.rpartition(".")[0] for entry in entries if _ending(entry.name) in ENDINGS}
    for entry in entries:
        stem, _, ending = entry.name.rpartition(".")
        known = ending.lower() in ENDINGS or (ending == "txt" and stem in images)
        if stem and not known and not entry.name.startswith(".") and entry.is_file():
            count_unread(others, {f".{ending}"[:40]: 1})


def relative(path: Path, root: Path) -> str:
    """Return a path as it is reached from the root, with slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def without_ending(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122, a Path would change what it does not know


def stem(path: str) -> str:
    """Return the name of a file without folders and ending."""
    return without_ending(path).rpartition("/")[2]


def folder_name(path: Path) -> str:
    """Return the name of a folder as it is called, links included."""
    return os.path.basename(os.path.abspath(path))  # noqa: PTH100, PTH119


def read_head(file: Path, size: int) -> bytes:
    """Read the first bytes of a file; nothing of one that is no plain file, or cannot be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            return b""
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError:
        return b""


# Links --------------------------------------------------------------------------------------------------------------


def leaves(folder: Path, file: Path) -> bool:
    """Tell whether `file`, below `folder`, is a link to somewhere else, or lies below one.

    The Hub's cache keeps every file as a link from `snapshots` to `blobs`; these lead nowhere else.
    """
    try:
        target, root = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a circle of links: whoever opens it says so
        return False
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.joinpath("blobs").is_dir():
            root = parent.parent.parent
    return not target.is_relative_to(root)


def refuse_leaving(folder: Path, file: Path) -> None:
    """Raise ValueError if a file that was found in `folder`, and is to be read, is a link to somewhere else."""
    if leaves(folder, file):
        raise ValueError(f"{file} is a link to a file outside of {folder}; copy that file there, or give {file} itself")


# Images by the names that programs give them --------------------------------------------------------------------------


class ImageFinder:
    """Looks for images below a folder, by the ends of their names: "x/y/a.jpg" is that file, or "y/a.jpg", or "a.jpg".

    A longer end comes before a shorter one, the folder itself before the folders in it; what two of these have is not
    taken.
    """

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self._folders = folders[:MOST_FOLDERS]
        self._last: tuple[str, int, bool] | None = None  # what matched before: folder, parts left out, prefix left out

    def find(self, name: str) -> str | None:
        """Return the path of an image below the root, with slashes; None if there is none, or more than one."""
        ends = list(_ends(name))
        if self._last is not None:
            folder, *rest = self._last
            for end, *how in ends:
                if how == rest and (path := self._path(folder, end)):
                    return path
        for end, left_out, bare in ends:
            if path := self._path("", end):
                self._last = "", left_out, bare
                return path
        for end, left_out, bare in ends:
            paths = {folder: path for folder in self._folders if (path := self._path(folder, end))}
            if len(paths) > 1:
                return None
            for folder, path in paths.items():
                self._last = folder, left_out, bare
                return path
        return None

    def _path(self, folder: str, end: str) -> str | None:
        path = f"{folder}/{end}" if folder else end
        try:
            return path if self.root.joinpath(path).is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None


def path_parts(name: str) -> list[str]:
    """Return the parts of a path with slashes or backslashes, after the last ".." of it."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts


def _ends(name: str) -> Iterator[tuple[str, int, bool]]:
    """Give paths that a name may mean, the longest first; how many parts each lacks, and whether an upload's prefix."""
    for text in dict.fromkeys((name, _path_of_url(name))):
        parts = path_parts(text)
        if parts and re.fullmatch(r"[A-Za-z]:", parts[0]):
            parts = parts[1:]
        for bare in (False, True):
            if bare and (not parts or not _UPLOAD.match(parts[-1])):
                continue
            for k in range(len(parts)):
                last = _UPLOAD.sub("", parts[-1], count=1) if bare else parts[-1]
                yield "/".join([*parts[k:-1], last]), k, bare


def _path_of_url(name: str) -> str:
    """Return the decoded path within a URL; a name that is no URL is decoded."""
    try:
        url = urlsplit(name)
        within = parse_qs(url.query).get("d")  # Label Studio's local files
    except ValueError:
        return unquote(name)
    if within:
        return within[0]
    return unquote(url.path) if _URL.match(name) else unquote(name)
