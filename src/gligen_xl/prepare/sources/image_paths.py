"""Images as annotation programs name them: with folders of another machine, backslashes, URLs, prefixes of an upload.

    finder = ImageFinder(Path("photos"))
    finder.find("images\\\\a.jpg")                             # "a.jpg", or "images/a.jpg", whichever is there
    finder.find("/data/local-files/?d=photos%2Fa.jpg")       # Label Studio
    finder.find("/data/upload/1/0f3a9c1d-a.jpg")             # "0f3a9c1d-a.jpg", or "a.jpg"

Whatever a name says, nothing outside of the folder is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio's, before the name of a file that was uploaded
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MOST_FOLDERS = 50  # directly in the root, in which a name is looked for as well


class ImageFinder:
    """Looks for images below a folder, by the ends of their names: "x/y/a.jpg" is that file, or "y/a.jpg", or "a.jpg".

    A longer end comes before a shorter one, the folder itself before the folders in it; what two of these have is not
    taken.
    """

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self._folders = folders[:MOST_FOLDERS]
        self._last: tuple[str, int, bool] | None = None  # what served before: folder, parts left out, prefix left out

    def find(self, name: str) -> str | None:
        """The path of an image below the root, with slashes; None where there is none, or more than one."""
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


def _ends(name: str) -> Iterator[tuple[str, int, bool]]:
    """Paths that a name may mean, the longest first; how many parts each lacks, and whether an upload's prefix."""
    for text in dict.fromkeys((name, _path_of_url(name))):
        parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
        if ".." in parts:
            parts = parts[len(parts) - parts[::-1].index("..") :]
        if parts and re.fullmatch(r"[A-Za-z]:", parts[0]):
            parts = parts[1:]
        for bare in (False, True):
            if bare and (not parts or not _UPLOAD.match(parts[-1])):
                continue
            for k in range(len(parts)):
                last = _UPLOAD.sub("", parts[-1], count=1) if bare else parts[-1]
                yield "/".join([*parts[k:-1], last]), k, bare


def _path_of_url(name: str) -> str:
    """The path within a URL, decoded; of a name that is none, its decoded form."""
    try:
        url = urlsplit(name)
        within = parse_qs(url.query).get("d")  # Label Studio's local files
    except ValueError:
        return unquote(name)
    if within:
        return within[0]
    return unquote(url.path) if _URL.match(name) else unquote(name)
