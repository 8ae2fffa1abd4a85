"""Detections in image files, kept on disk: a detector looks at the same image once.

A line of JSON for each image: its key, its checksum, a digest of what the detector was asked, and its answer. A line
that was cut short when the process was killed is skipped.
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

Detect = Callable[[Sequence[Image.Image], Sequence[Layout]], list[Any]]  # returns an answer for each image, as JSON


@dataclass(frozen=True)
class ImageFile:
    """An image file and the layout that it is compared with; `checksum` is that of its bytes."""

    key: str
    layout: Layout
    checksum: str


class DetectionCache:
    """The answers of one detector, or of another model, about the images of one folder.

    Args:
        path: the file that keeps them.
        settings: everything that an answer depends on besides the image and the layout.
        detect: computes the answers.
        check: raises an error for an answer of another form, whose image is then looked at again.
        reads_layouts: whether an answer depends on the layout, and not on the image alone.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        detect: Detect,
        check: Callable[[Any], object],
        *,
        reads_layouts: bool = True,
    ):
        self.path, self.detect, self.reads_layouts = path, detect, reads_layouts
        self._settings = json.dumps([__version__, settings], sort_keys=True, default=str)
        self._answers: dict[tuple[str, str], Any] = {}  # by the image's checksum and the digest
        self._checksums: dict[tuple[str, str], str] = {}  # of the latest image, by its key and the digest
        content = path.read_bytes() if path.is_file() else b""
        self._ends_cut = content[-1:] not in (b"", b"\n")
        skipped = 0
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # the line was cut short
                continue
            try:
                key, checksum, digest, answer = (entry[name] for name in ("key", "picture", "asked", "found"))
                check(answer)
                self._answers[checksum, digest], self._checksums[key, digest] = answer, checksum
            except (ValueError, TypeError, KeyError, AttributeError):
                skipped += 1
        if skipped:
            warnings.warn(
                f"{path}: {skipped} lines are of another form; their images are looked at again", stacklevel=2
            )

    def get(self, file: ImageFile) -> Any:
        """Return the answer about a file, or None if there is none yet."""
        return self._answers.get((file.checksum, self._digest(file.layout)))

    def latest(self, key: str, layout: Layout) -> Any:
        """Return the answer about the latest image of that key, or None if there is none."""
        digest = self._digest(layout)
        return self._answers.get((self._checksums.get((key, digest), ""), digest))

    def add(self, files: Sequence[ImageFile], images: Mapping[ImageFile, Image.Image]) -> None:
        """Compute the answers that are missing, and write those of all files.

        Args:
            images: the images of the files that have no answer yet, at least.
        """
        new = [file for file in files if self.get(file) is None]
        if new:
            answers = self.detect([images[file] for file in new], [file.layout for file in new])
            for file, answer in zip(new, answers, strict=True):
                self._answers[file.checksum, self._digest(file.layout)] = answer
        lines = []
        for file in files:
            digest = self._digest(file.layout)
            if self._checksums.get((file.key, digest)) != file.checksum:  # another key may have the same image
                self._checksums[file.key, digest] = file.checksum
                answer = self._answers[file.checksum, digest]
                entry = {"key": file.key, "picture": file.checksum, "asked": digest, "found": answer}
                lines.append(json.dumps(entry) + "\n")
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(("\n" * self._ends_cut + "".join(lines)).encode())
        self._ends_cut = False

    def _digest(self, layout: Layout) -> str:
        question = [layout.prompt, layout.phrases, layout.boxes] if self.reads_layouts else []
        return hashlib.sha256(json.dumps([self._settings, *question]).encode()).hexdigest()
