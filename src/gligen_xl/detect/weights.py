"""Which network it was: folders of other weights may have the same name, and what they find is not the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..hub import names_repository
from .networks import FILES


def title(name: str | Path, folder: Path) -> str:
    """Return the name of a network for reports: its repository, or the name of its folder, wherever that is."""
    return str(name) if names_repository(name) and not Path(name).is_dir() else folder.resolve().name


def check_tokenizer(folder: Path) -> None:
    """Check that a network that reads text has a tokenizer: without one, transformers makes one that knows no word.

    Raises:
        ValueError: there is none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json, vocab.txt, or vocab.json and merges.txt)")


def checksum(folder: Path) -> str:
    """Return a checksum of the weights, and of the files that say how they are used."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
