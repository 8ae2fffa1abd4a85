"""Files of the Hugging Face Hub: which of a repository are fetched (code never is), and a folder uploaded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, create_repo, snapshot_download, upload_folder

from .limits import check_model_settings, check_safetensors

INDEX_NAME = "model_index.json"  # of a pipeline: names its parts
OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
TEXTS = (".json", ".txt", ".model")
WEIGHTS = (".safetensors", ".bin")


def names_repository(source: str | Path) -> bool:
    """Whether `source` reads as a Hub repository, owner/name, and not as a path."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def local_folder(
    source: str | Path,
    what: str,
    choose: Callable[[list[str], Path], list[str]] | list[str],
    *,
    check: Callable[[list[str]], None] | None = None,
    **hub: Any,
) -> Path:
    """The folder `source`, or a snapshot of the repository that it names. Without a network, what was fetched before.

    Args:
        what: for the error, as "pipeline".
        choose: the files to fetch; or a function of the repository's files, and of the folder where its index lies by
            then, that gives them.
        check: is shown the repository's files before anything is fetched; what it raises ends the matter.
        hub: those of `OPTIONS`.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the settings of a model in it are absurd, or a file of weights is.
    """
    if unknown := sorted(set(hub) - set(OPTIONS)):
        raise TypeError(f"unknown arguments {unknown}; a repository is fetched with {', '.join(OPTIONS)}")
    folder = _local_folder(source, what, choose, check, **hub)
    check_model_settings(folder)
    check_safetensors(*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))
    return folder


def _local_folder(
    source: str | Path,
    what: str,
    choose: Callable[[list[str], Path], list[str]] | list[str],
    check: Callable[[list[str]], None] | None,
    **hub: Any,
) -> Path:
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    if not names_repository(source):
        raise FileNotFoundError(f"no {what} folder {source}; expected a folder or a Hub repository (owner/name)")
    files = None
    if not hub.get("local_files_only") and (check is not None or not isinstance(choose, list)):
        try:
            files = HfApi(token=hub.get("token")).list_repo_files(str(source), revision=hub.get("revision"))
        except Exception:  # no network: then all comes from the cache, or the next lines say why not
            files = None
    if files is not None and check is not None:
        check(files)
    first = choose if isinstance(choose, list) else [INDEX_NAME]
    try:
        root = Path(snapshot_download(str(source), allow_patterns=first, **hub))
    except Exception as error:  # of the network, of the Hub, of the cache: each library has its own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no {what} folder {source}, and no such repository was reached: {reason}") from error
    if isinstance(choose, list) or files is None:
        return root
    return Path(snapshot_download(str(source), allow_patterns=choose(files, root), **hub))


def upload(folder: str | Path, repo_id: str, message: str, *, private: bool | None = None, **options: Any) -> Any:
    """The contents of a folder into a repository, which is made where there is none.

    Args:
        message: of the commit, where there is no commit_message.
        options: token, commit_message, create_pr, revision, allow_patterns.
    """
    token = options.pop("token", None)
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    message = options.pop("commit_message", None) or message
    return upload_folder(repo_id=repo_id, folder_path=str(folder), token=token, commit_message=message, **options)


def pipeline_files(files: list[str], variant: str | None) -> list[str]:
    """What of a repository's files a pipeline is made of.

    In each component's folder: settings and vocabularies; of the weights those of `variant` where there are any, else
    the plain ones, and safetensors rather than pickles.
    """
    chosen = [name for name in files if name == INDEX_NAME]
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


def check_variant(files: list[str], variant: str | None, source: str | Path, parts: Collection[str] = ()) -> None:
    """Say whether a pipeline's files hold the weights that are asked for, before any of them is fetched or read.

    Args:
        files: of the folder or repository, with / between folders.
        variant: as fp16; None for the plain weights.
        parts: the folders that will be loaded; without them, every one that holds weights.

    Raises:
        ValueError: no part has files of `variant`; or a part has none but those of variants, and none is asked for.
            The error names the variants there are.
    """
    there: dict[str, set[str | None]] = {}
    for path in map(PurePosixPath, files):
        if len(path.parts) == 2 and _is_weights(path) and not path.parts[0].startswith("."):
            there.setdefault(path.parts[0], set()).add(_variant(path))
    there = {part: kinds for part, kinds in there.items() if not parts or part in parts}
    variants = sorted({kind for kinds in there.values() for kind in kinds if kind is not None})
    if variant is not None and there and variant not in variants:
        others = f"there are {', '.join(variants)}" if variants else "its files are of no variant, so name none"
        raise ValueError(f"{source} has no files of the variant {variant!r}; {others}")
    for part, kinds in sorted(there.items()):
        if not kinds & {variant, None}:
            names = sorted(map(str, kinds))
            raise ValueError(
                f"{source} holds the weights of {part} as {', '.join(names)} only; load it with variant={names[0]!r} "
                f"(--variant {names[0]})"
            )


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
