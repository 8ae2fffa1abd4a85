"""Files of the Hugging Face Hub: which of a repository are fetched (code never is), and a folder uploaded."""

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
            # Not list_repo_files, which tries an unreachable Hub again for 23 seconds, and says so each time.
            info = HfApi(token=hub.get("token")).model_info(str(source), revision=hub.get("revision"))
            files = [sibling.rfilename for sibling in info.siblings or []]
        except Exception:  # no network: then all comes from the cache, or the next lines say why not
            files = None
    if files is not None and check is not None:
        check(files)
    first = choose if isinstance(choose, list) else [INDEX_NAME]
    with reaching(source, f"no {what} folder {source}"):
        root = Path(snapshot_download(str(source), allow_patterns=first, **hub))
    if isinstance(choose, list) or files is None:
        return root
    with reaching(source, f"no {what} folder {source}"):
        return Path(snapshot_download(str(source), allow_patterns=choose(files, root), **hub))


@contextmanager
def reaching(repository: str | Path, lacking: str = "") -> Iterator[None]:
    """Whatever the Hub, the network or the cache raises becomes one line: which repository, why, and what to do.

    Each of the libraries under huggingface_hub has its own kinds, and those of its newer ones are no OSErrors.

    Args:
        lacking: what is not on this machine either, for the error, as "no pipeline folder owner/name".

    Raises:
        FileNotFoundError: there is no such repository, or it cannot be had. Other errors: as they came.
    """
    try:
        yield
    except Exception as error:
        if (reason := _reason(error, str(repository))) is None:
            raise
        start = f"{lacking}, and no such repository was reached" if lacking else f"{repository} cannot be had"
        raise FileNotFoundError(f"{start}: {reason}") from error


_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "ssl", "socket")
_ELSEWHERE = "or give a folder that is on this machine"


def _reason(error: Exception, name: str) -> str | None:
    """Why a repository could not be had, and what to do; None where it is no matter of the Hub."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def came(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if came(GatedRepoError):
        return f"agree to its conditions at https://huggingface.co/{name} first, then run hf auth login"
    if came(RevisionNotFoundError):
        return "it has no such revision"
    if came(RepositoryNotFoundError):
        return "the Hub has none of that name that you may read; look at the name, or run hf auth login"
    if came(HFValidationError):
        return "that cannot be the name of one, owner/name"
    if came(OfflineModeIsEnabled) or (came(LocalEntryNotFoundError) and HF_HUB_OFFLINE):
        return f"HF_HUB_OFFLINE is set, and it was not fetched before; unset that, {_ELSEWHERE}"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused it ({_first_line(error)}); try again later, {_ELSEWHERE}"
    if came(LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        type(cause).__module__.partition(".")[0] in _NETWORK for cause in causes
    ):
        return f"the Hub cannot be reached ({_first_line(causes[-1])}); look at the network, {_ELSEWHERE}"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def model_files(files: list[str], variant: str | None = None) -> list[str]:
    """Of a repository that is one model: its settings, and one copy of its weights (see `pipeline_files`)."""
    inner = pipeline_files([f"model/{name}" for name in files if "/" not in name], variant)
    return [name.removeprefix("model/") for name in inner]


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
