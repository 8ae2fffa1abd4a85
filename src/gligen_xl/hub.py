"""Files of the Hugging Face Hub: downloads what is needed of a repository (never code), and uploads folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, create_repo, snapshot_download, upload_folder
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .io import first_line, names_repository
from .limits import check_safetensors
from .model_settings import check_model_settings

INDEX_NAME = "model_index.json"  # of a pipeline: names its parts
OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
TEXTS = (".json", ".txt", ".model")
WEIGHTS = (".safetensors", ".bin")


def local_folder(
    source: str | Path,
    what: str,
    choose: Callable[[list[str], Path], list[str]] | list[str],
    *,
    check: Callable[[list[str]], None] | None = None,
    **hub: Any,
) -> Path:
    """Return the folder `source`, or a snapshot of the repository that it names; without a network, the cached one.

    Args:
        what: for the error, such as "pipeline".
        choose: the files to download, as names or patterns; or a function that returns them, given the names of all
            files and the snapshot's folder, which then holds the pipeline's index alone.
        check: is given the names of all files before anything is downloaded; it raises to refuse the repository.
        hub: those of `OPTIONS`.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a model in it has absurd settings, or a file of weights an absurd header.
    """
    if unknown := sorted(set(hub) - set(OPTIONS)):
        raise TypeError(f"unknown arguments {unknown}; a repository is downloaded with {', '.join(OPTIONS)}")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not names_repository(source):
            raise FileNotFoundError(f"no {what} folder {source}; expected a folder or a Hub repository (owner/name)")
        folder = _download(str(source), what, choose, check, hub)
    check_model_settings(folder)
    check_safetensors(*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))
    return folder


def _download(
    repository: str,
    what: str,
    choose: Callable[[list[str], Path], list[str]] | list[str],
    check: Callable[[list[str]], None] | None,
    hub: dict[str, Any],
) -> Path:
    """Download what `choose` says, and return the snapshot's folder."""

    def snapshot(patterns: list[str]) -> Path:
        with reaching(repository, f"no {what} folder {repository}"):
            return Path(snapshot_download(repository, allow_patterns=patterns, **hub))

    listing_helps = check is not None or callable(choose)
    files = _list_files(repository, hub) if listing_helps and not hub.get("local_files_only") else None
    if check is not None and files is not None:
        check(files)
    if not callable(choose):
        return snapshot(choose)
    folder = snapshot([INDEX_NAME])
    return folder if files is None else snapshot(choose(files, folder))


def _list_files(repository: str, hub: dict[str, Any]) -> list[str] | None:
    """List a repository's files; None if the Hub does not answer, since the files may be in the cache."""
    try:
        # Not list_repo_files, which tries an unreachable Hub again for 23 seconds and prints a line each time.
        info = HfApi(token=hub.get("token")).model_info(repository, revision=hub.get("revision"))
    except Exception:  # the download gives the reason, if it fails too
        return None
    return [sibling.rfilename for sibling in info.siblings or []]


def upload(folder: str | Path, repo_id: str, message: str, *, private: bool | None = None, **options: Any) -> Any:
    """Upload the contents of a folder into a repository, which is created if needed.

    Args:
        message: of the commit, unless commit_message is given.
        options: token, commit_message, create_pr, revision, allow_patterns.
    """
    token = options.pop("token", None)
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    message = options.pop("commit_message", None) or message
    return upload_folder(repo_id=repo_id, folder_path=str(folder), token=token, commit_message=message, **options)


# Errors -------------------------------------------------------------------------------------------------------------

_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "ssl", "socket")
_ELSEWHERE = "or give a folder that is on this machine"


@contextmanager
def reaching(repository: str | Path, lacking: str = "") -> Iterator[None]:
    """Turn whatever the Hub, the network or the cache raises into one line: which repository, why, and what to do.

    Each of the libraries under huggingface_hub has its own errors, and those of the newer ones are not OSErrors.

    Args:
        lacking: what is missing on this machine too, for the error, such as "no pipeline folder owner/name".

    Raises:
        FileNotFoundError: there is no such repository, or it cannot be reached. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if (reason := _reason(error, str(repository))) is None:
            raise
        start = f"{lacking}, and no such repository was reached" if lacking else f"{repository} cannot be downloaded"
        raise FileNotFoundError(f"{start}: {reason}") from error


def _reason(error: Exception, name: str) -> str | None:
    """Say why a repository could not be downloaded, and what to do; None if the error is not about the Hub."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(GatedRepoError):
        return f"agree to its conditions at https://huggingface.co/{name} first, then run hf auth login"
    if any_is(RevisionNotFoundError):
        return "it has no such revision"
    if any_is(RepositoryNotFoundError):
        return "the Hub has none of that name that you may read; check the name, or run hf auth login"
    if any_is(HFValidationError):
        return "that cannot be the name of one, owner/name"
    if any_is(OfflineModeIsEnabled) or (any_is(LocalEntryNotFoundError) and HF_HUB_OFFLINE):
        return f"HF_HUB_OFFLINE is set, and it is not in the cache; unset that, {_ELSEWHERE}"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused it ({first_line(error):.200}); try again later, {_ELSEWHERE}"
    network = any(type(cause).__module__.partition(".")[0] in _NETWORK for cause in causes)
    if network or any_is(LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return f"the Hub cannot be reached ({first_line(causes[-1]):.200}); check the network, {_ELSEWHERE}"
    return None


# Which files --------------------------------------------------------------------------------------------------------


def model_files(files: list[str], variant: str | None = None) -> list[str]:
    """Choose from the files of a repository that is one model: settings, and one copy of the weights."""
    inner = pipeline_files([f"model/{name}" for name in files if "/" not in name], variant)
    return [name.removeprefix("model/") for name in inner]


def pipeline_files(files: list[str], variant: str | None) -> list[str]:
    """Choose from a repository's files those that a pipeline is made of.

    From each component's folder these are settings and vocabularies, and the weights of `variant` if it has any, else
    the plain ones; safetensors rather than pickles.
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
    """Check that a pipeline has the requested weights, before any of its files is downloaded or read.

    Args:
        files: of the folder or repository, with / between folders.
        variant: such as fp16; None for the plain weights.
        parts: the folders that will be loaded; without them, every one that holds weights.

    Raises:
        ValueError: no part has files of `variant`; or none is requested and a part has only variants. The error names
            the variants there are.
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
    """Tell whether a file holds weights, or is the index of sharded ones, `x.safetensors.index.json`."""
    if path.name.startswith("openvino_"):  # .bin files of another program
        return False
    return path.suffix in WEIGHTS or any(f"{suffix}.index" in path.name for suffix in WEIGHTS)


def _variant(path: PurePosixPath) -> str | None:
    """Return fp16 for `x.fp16.safetensors`, `x.fp16-00001-of-00002.safetensors`, `x.safetensors.index.fp16.json`."""
    words = path.name.split(".")
    other = ("safetensors", "bin", "index", "json")
    names = [word.partition("-")[0] for word in words[1:] if word not in other]
    return names[0] if names else None
