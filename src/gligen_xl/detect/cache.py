"""What was found in images, kept in a file: looking at the same image again costs nothing.

A line of JSON for each image: its key, its checksum, a digest of what it was looked at for, and what was found. A
line that a kill cut short is passed over.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .. import __version__
from ..layout import Layout

Look = Callable[[Sequence[Image.Image], Sequence[Layout]], list[Any]]  # what is found in each image, as JSON


@dataclass(frozen=True)
class Seen:
    """An image file that is looked at for a layout. `checksum` is of its bytes."""

    key: str
    layout: Layout
    checksum: str


class DetectionCache:
    """What one detector found in the images of one folder.

    Args:
        settings: all that what is found depends on, beside image and layout.
        look: finds it.
        read: of what is found; raises an error where it is none, and then the image is looked at anew.
        reads_layouts: what is found depends on the layout; else on the image alone.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        look: Look,
        read: Callable[[Any], object],
        *,
        reads_layouts: bool = True,
    ):
        self.path, self.look, self.reads_layouts = path, look, reads_layouts
        self._settings = json.dumps([__version__, settings], sort_keys=True, default=str)
        self._found: dict[tuple[str, str], Any] = {}  # by the image's checksum and the digest
        self._last: dict[tuple[str, str], str] = {}  # the image's checksum, by key and digest
        kept = path.read_bytes() if path.is_file() else b""
        self._cut = kept[-1:] not in (b"", b"\n")
        strange = 0
        for line in kept.split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # cut short
                continue
            try:
                key, image, asked, found = (entry[name] for name in ("key", "picture", "asked", "found"))
                read(found)
                self._found[image, asked], self._last[key, asked] = found, image
            except (ValueError, TypeError, KeyError, AttributeError):
                strange += 1
        if strange:
            warnings.warn(f"{path}: {strange} lines are of another form; their images are looked at anew", stacklevel=2)

    def find(self, seen: Seen) -> Any:
        """What was found in it before, or None."""
        return self._found.get((seen.checksum, self._digest(seen.layout)))

    def last(self, key: str, layout: Layout) -> Any:
        """What was found in the image of that key when it was last looked at, or None."""
        asked = self._digest(layout)
        return self._found.get((self._last.get((key, asked), ""), asked))

    def add(self, every: Sequence[Seen], images: Mapping[Seen, Image.Image]) -> None:
        """Keep what is found in each; those in which nothing was found before are looked at.

        Args:
            images: of those, at least.
        """
        new = [seen for seen in every if self.find(seen) is None]
        if new:
            found = self.look([images[seen] for seen in new], [seen.layout for seen in new])
            for seen, of_one in zip(new, found, strict=True):
                self._found[seen.checksum, self._digest(seen.layout)] = of_one
        lines = []
        for seen in every:
            asked = self._digest(seen.layout)
            if self._last.get((seen.key, asked)) != seen.checksum:  # also of an image that another key has as well
                self._last[seen.key, asked] = seen.checksum
                found = self._found[seen.checksum, asked]
                lines.append(json.dumps({"key": seen.key, "picture": seen.checksum, "asked": asked, "found": found}))
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(("\n" * self._cut + "".join(f"{line}\n" for line in lines)).encode())
        self._cut = False

    def _digest(self, layout: Layout) -> str:
        asked = [layout.prompt, layout.phrases, layout.boxes] if self.reads_layouts else []
        said = json.dumps([self._settings, *asked])
        return hashlib.sha256(said.encode()).hexdigest()
