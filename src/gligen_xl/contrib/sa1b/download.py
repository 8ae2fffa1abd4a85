"""Downloads the published sets of SA-1B from the Hub, and checks that they fit on the disk and came whole."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from ...hub import reaching
from ...io import checksum, read_json, write_json
from ...suggestions import did_you_mean

SETS = {
    "sa1b-sdxl-512": "jiuntian/sa1b-sdxl-latents-512",
    "sa1b-sdxl-1024": "jiuntian/sa1b-sdxl-latents-1024",
    "boxes": "jiuntian/sa-1b_boxes_sdxl",  # with original sizes
    "boxes-five": "longlian/sa-1b_boxes",  # without
}
MANIFEST_NAME = "download.json"  # files that came whole: name -> checksum
MARGIN = 1 << 30  # bytes that are left free


@dataclass(frozen=True)
class RemoteFile:
    name: str
    size: int
    sha256: str | None  # of one that is kept in large-file storage; of others git's own
    blob: str | None = None


def download(
    which: str,
    out: str | Path,
    *,
    archives: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: Callable[[list[RemoteFile]], Iterable[RemoteFile]] = list,
) -> list[Path]:
    """Fetch a set, or some of its archives, into `out`. A file that came whole is not fetched again, one that came in
    part is continued.

    Args:
        which: a name of `SETS`, or a dataset repository of files of the same names.
        archives: numbers and ranges, as "0-9,17".

    Raises:
        ValueError: no such set or archives, too little space on the disk, or a file that is not what the Hub says.
    """
    if which not in SETS and "/" not in which:
        raise ValueError(
            f"there is no set {which!r}; there are {', '.join(SETS)}, and repositories (owner/name)"
            f"{did_you_mean(which, SETS)}"
        )
    repository, out = SETS.get(which, which), Path(out)
    files = _chosen(_files(repository, revision, token), archives, repository)
    out.mkdir(parents=True, exist_ok=True)
    manifest = read_json(out / MANIFEST_NAME) if (out / MANIFEST_NAME).is_file() else {}
    missing = [file for file in files if not _is_there(file, out, manifest)]
    needed, free = sum(file.size for file in missing) + MARGIN, shutil.disk_usage(out).free
    if missing and needed > free:
        raise ValueError(
            f"{len(missing)} files need {needed / 2**30:.1f} GiB, 1 GiB left free included; {out} has "
            f"{free / 2**30:.1f}. Name fewer archives, or another folder"
        )
    for file in progress(missing):
        with reaching(repository):
            fetched = hf_hub_download(
                repository, file.name, repo_type="dataset", revision=revision, token=token, local_dir=str(out)
            )
        path = Path(fetched)
        sha256 = checksum(path)
        if path.stat().st_size != file.size or sha256 != (file.sha256 or sha256) or not _is_blob(path, file):
            path.unlink()
            raise ValueError(f"{file.name} did not come as the Hub has it, and was removed; run the same command again")
        manifest[file.name] = sha256
        write_json(out / MANIFEST_NAME, manifest)
    return [out / file.name for file in files]


def archive_numbers(text: str) -> set[int]:
    """Read numbers and ranges: "0-2,7" -> {0, 1, 2, 7}."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None:
            raise ValueError(f"archives are {text!r}; expected numbers and ranges, as 0-9,17")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"archives are {text!r}; the range {part.strip()} is reversed")
        numbers |= set(range(first, last + 1))
    return numbers


def _files(repository: str, revision: str | None, token: str | None) -> list[RemoteFile]:
    with reaching(repository):
        info = HfApi(token=token).dataset_info(repository, revision=revision, files_metadata=True)
    found = []
    for entry in info.siblings or []:
        if re.fullmatch(r"sa_\d+\.npy", entry.rfilename):
            sha256, blob = (entry.lfs.sha256, None) if entry.lfs else (None, getattr(entry, "blob_id", None))
            found.append(RemoteFile(entry.rfilename, entry.size or 0, sha256, blob))
    if not found:
        raise ValueError(f"{repository} holds no files sa_NUMBER.npy")
    return sorted(found, key=lambda file: _number(file.name))


def _number(name: str) -> int:
    return int(name.removeprefix("sa_").removesuffix(".npy"))


def _chosen(files: list[RemoteFile], archives: str | None, repository: str) -> list[RemoteFile]:
    if archives is None:
        return files
    wanted = archive_numbers(archives)
    chosen = [file for file in files if _number(file.name) in wanted]
    if absent := sorted(wanted - {_number(file.name) for file in chosen}):
        raise ValueError(f"{repository} has no archives {absent[:10]}; it has {len(files)}, to {files[-1].name}")
    return chosen


def _is_there(file: RemoteFile, out: Path, manifest: dict[str, str]) -> bool:
    path = out / file.name
    whole = path.is_file() and path.stat().st_size == file.size
    if not whole or file.name not in manifest:
        return False
    return manifest[file.name] == file.sha256 if file.sha256 else _is_blob(path, file)


def _is_blob(path: Path, file: RemoteFile) -> bool:
    """Tell whether a file that is not in large-file storage is the one of the repository, by git's checksum."""
    if file.blob is None:
        return True
    contents = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest() == file.blob
