"""Files of the Hugging Face Hub: which of a repository are fetched. Code never is."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from .files import read_json

INDEX, ADAPTER = "model_index.json", "gligen_adapter"  # of a pipeline: what names its parts, and one it does not name
OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
TEXTS = (".json", ".txt", ".model")
WEIGHTS = (".safetensors", ".bin")


def names_repository(source: str | Path) -> bool:
    """Whether `source` reads as a Hub repository, owner/name, and not as a path."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def local_folder(source: str | Path, what: str, wanted: list[str] | None = None, **hub: Any) -> Path:
    """The folder `source`, or a snapshot of the repository that it names.

    Args:
        what: for the error, as "pipeline".
        wanted: files or patterns to fetch; without them those of a pipeline, of `variant` where there is one.
        hub: variant, and those of `OPTIONS`.
    """
    variant = hub.pop("variant", None)
    if unknown := sorted(set(hub) - set(OPTIONS)):
        raise TypeError(f"unknown arguments {unknown}; a repository is fetched with {', '.join(OPTIONS)}")
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    if not names_repository(source):
        raise FileNotFoundError(f"no {what} folder {source}; expected a folder or a Hub repository (owner/name)")
    if wanted is None and not hub.get("local_files_only"):
        files = HfApi(token=hub.get("token")).list_repo_files(str(source), revision=hub.get("revision"))
        index = Path(snapshot_download(str(source), allow_patterns=[INDEX], **hub)) / INDEX
        parts = {*read_json(index), ADAPTER} if index.is_file() else set()  # there may be former versions beside them
        wanted = pipeline_files([name for name in files if name == INDEX or name.split("/")[0] in parts], variant)
    return Path(snapshot_download(str(source), allow_patterns=wanted, **hub))


def pipeline_files(files: list[str], variant: str | None) -> list[str]:
    """What of a repository's files a pipeline is made of.

    In each component's folder: settings and vocabularies; of the weights those of `variant` where there are any, else
    the plain ones, and safetensors rather than pickles.
    """
    chosen = [name for name in files if name == INDEX]
    folders: dict[str, list[PurePosixPath]] = {}
    for path in map(PurePosixPath, files):
        if len(path.parts) == 2 and not any(part.startswith(".") for part in path.parts):
            folders.setdefault(path.parts[0], []).append(path)
    for paths in folders.values():
        weights = [path for path in paths if _is_weights(path)]
        chosen += [str(path) for path in paths if path.suffix in TEXTS and path not in weights]
        for group in (
            [path for path in weights if variant and _variant(path) == variant],
            [path for path in weights if _variant(path) is None],
        ):
            safe = [path for path in group if ".safetensors" in path.suffixes]
            if group:
                chosen += [str(path) for path in safe or group]
                break
    return chosen


def _is_weights(path: PurePosixPath) -> bool:
    """Also the index of sharded weights, `x.safetensors.index.json`."""
    if path.name.startswith("openvino_"):  # .bin too, but another program's
        return False
    return path.suffix in WEIGHTS or any(f"{suffix}.index" in path.name for suffix in WEIGHTS)


def _variant(path: PurePosixPath) -> str | None:
    """fp16 of `x.fp16.safetensors`, `x.fp16-00001-of-00002.safetensors` and `x.safetensors.index.fp16.json`."""
    words = path.name.split(".")
    other = ("safetensors", "bin", "index", "json")
    names = [word.partition("-")[0] for word in words[1:] if word not in other]
    return names[0] if names else None
