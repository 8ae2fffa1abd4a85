"""The parts of a pipeline folder, looked at before diffusers and transformers load them, whose errors name no file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..hub import INDEX_NAME
from ..io import read_object

_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"}
MOST_TOKENS = 10**6
_SETTINGS = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}


def read_index(folder: Path) -> dict[str, Any]:
    """What parts a pipeline has.

    Raises:
        ValueError: it is no index of a pipeline; it names the file.
    """
    index = read_object(folder / INDEX_NAME, "the index of a pipeline")
    if "_class_name" not in index:
        raise ValueError(f"{folder / INDEX_NAME} does not name a pipeline: it has no _class_name")
    return index


def check_parts(folder: Path, index: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Whether each part of the index has its folder, and its settings are JSON objects.

    Args:
        given: parts that come from elsewhere.

    Raises:
        FileNotFoundError: a part lacks its folder or its settings. ValueError: these are something else.
    """
    for name, kind in index.items():
        if name.startswith("_") or name in given or not isinstance(kind, list) or None in kind:
            continue
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name}, which its {INDEX_NAME} names")
        settings = folder / name / _SETTINGS.get(name, "config.json")
        if "tokenizer" not in name and not settings.exists():
            raise FileNotFoundError(f"{folder / name} has no {settings.name}")
        for file in sorted((folder / name).glob("*.json")):
            read_object(file, "settings")
        files = {file.name for file in (folder / name).iterdir() if file.is_file()}
        if "tokenizer" in name:
            if not files & _VOCABULARIES:  # transformers would make one that knows no word
                raise FileNotFoundError(f"{folder / name} has no vocabulary ({', '.join(sorted(_VOCABULARIES))})")
        elif name not in _SETTINGS and not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise FileNotFoundError(
                f"there are no weights in {folder / name}; expected a file that ends in .safetensors"
            )


def check_tokenizers(folder: Path, tokenizers: Mapping[str, Any]) -> None:
    """Whether each says how much it reads; without, one that has no end is asked to pad to it.

    Raises:
        ValueError: one does not.
    """
    for name, tokenizer in tokenizers.items():
        if tokenizer is not None and tokenizer.model_max_length > MOST_TOKENS:
            raise ValueError(f"{folder / name}: tokenizer_config.json does not say model_max_length, as 77")


@contextmanager
def naming_part(folder: Path) -> Iterator[None]:
    """Errors of loading become one that names the folder, and the part that could not be loaded.

    Raises:
        ValueError: in place of all that is not for people; those that name the folder as they came.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, SafetensorError, TypeError):
        raise
    except BaseException as error:  # panics of tokenizers are no Exceptions
        text = " ".join(str(error).split())
        if isinstance(error, ValueError | OSError) and str(folder) in text:
            raise
        part = _part_of(error)
        what = f"{folder / part} cannot be loaded" if part else f"{folder} cannot be loaded as a pipeline"
        raise ValueError(f"{what}: {type(error).__name__}: {text[:1000]}") from error


def _part_of(error: BaseException) -> str:
    """The part that diffusers was loading: its errors do not say, the arguments of its function do."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_name == "load_sub_model":
            return str(step.tb_frame.f_locals.get("name", ""))
        step = step.tb_next
    return ""
