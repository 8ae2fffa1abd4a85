"""Links that lead out of a folder: what is written beside images is taken from their own folder alone.

A folder that somebody else packed may hold `a.txt -> /home/me/notes.txt`; that would end up in captions, and with these
in what is published. Links to images are followed, as data sets are often made of them.
"""

from __future__ import annotations

from pathlib import Path


def leaves(folder: Path, file: Path) -> bool:
    """Whether `file`, below `folder`, is a link to somewhere else, or lies below one.

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
    """Raises ValueError where a file that was found in `folder`, and is to be read, is a link to somewhere else."""
    if leaves(folder, file):
        raise ValueError(f"{file} is a link to a file outside of {folder}; copy that file there, or give {file} itself")
