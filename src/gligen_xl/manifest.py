"""The manifest of a folder: checksums of all its files, and one of the manifest itself.

    manifest.json   {"format": "gligen-xl-manifest", "version": 1, "files": {NAME: {"size", "sha256"}}, "sha256": ...}

Its own checksum is that of the rest of it. Its bytes must be those that `write_manifest` writes, to the last blank, so
that not one byte of the folder can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .io import checksum, read_json, whole_file

MANIFEST_NAME = "manifest.json"
FORMAT, VERSION = "gligen-xl-manifest", 1


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in a folder."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_NAME
    }
    with whole_file(folder / MANIFEST_NAME) as partial:
        partial.write_bytes(_rendered(files))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read size and checksum of each file by its name; None if the folder has no manifest.

    Raises:
        ValueError: the manifest is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    files = manifest.get("files") if isinstance(manifest := read_json(path), dict) else None
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ValueError(f"{path} is damaged: it does not list the sizes and checksums of the files")
    if path.read_bytes() != _rendered(files):
        raise ValueError(f"{path} is damaged (its checksum differs, or it is not of version {VERSION})")
    return files


def check_listed(folder: Path, names: Iterable[str] | None = None, *, sizes_only: bool = False) -> None:
    """Compare files of a folder with its manifest, if it has one.

    Args:
        names: of the files to compare, of which unlisted ones pass; by default all that are listed.
        sizes_only: compare only sizes, which is fast however large the files are.

    Raises:
        FileNotFoundError: a listed file is missing.
        ValueError: a file, or the manifest, is damaged.
    """
    files = read_manifest(folder) or {}
    for name in files if names is None else [name for name in names if name in files]:
        check_file(folder / name, files[name], sizes_only=sizes_only)


def check_file(path: Path, entry: dict[str, Any], *, sizes_only: bool = False) -> None:
    """Compare one file with its entry in the manifest."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} lacks {path.name}, which its {MANIFEST_NAME} lists")
    if (size := path.stat().st_size) != entry["size"]:
        raise ValueError(f"{path} is damaged ({size} bytes, expected {entry['size']})")
    if not sizes_only and checksum(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged (its checksum differs)")


def _is_entry(name: str, entry: Any) -> bool:
    """Tell whether this describes a file of the folder itself."""
    return (
        name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        and isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
    )


def _rendered(files: dict[str, dict[str, Any]]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=2) + "\n").encode()
