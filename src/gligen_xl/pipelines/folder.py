"""The folder of a pipeline: found or downloaded, and checked before diffusers and transformers load its parts, because
their errors name no file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..hub import INDEX_NAME, OPTIONS, check_variant, local_folder, pipeline_files
from ..io import read_json, read_object, tensor_names
from ..worlds import find_world
from .weights import misfit

ADAPTER_SUBFOLDER = "gligen_adapter"
MOST_TOKENS = 10**6
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"}
_SETTINGS = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}


def pipeline_folder(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """Return a pipeline's folder on this machine; of a Hub repository everything but code is downloaded.

    Args:
        name: a folder, a Hub repository, or an embedded world.
        kwargs: of `from_pretrained`; the options of the Hub are taken out, and given parts are not downloaded.

    Raises:
        FileNotFoundError: there is no such pipeline.
        ValueError: `name` is a file; or the variant in `kwargs` is missing.
    """
    if world := find_world(name):
        return world.model_folder()
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; a checkpoint in one file is loaded with from_single_file")
    hub = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}
    variant = kwargs.get("variant")

    def choose(files: list[str], root: Path) -> list[str]:
        # The repository may hold older versions next to the parts that its index names.
        index = read_json(root / INDEX_NAME) if (root / INDEX_NAME).is_file() else {}
        parts = {ADAPTER_SUBFOLDER, *index} - set(kwargs)
        own = [file for file in files if file == INDEX_NAME or file.split("/")[0] in parts]
        check_variant(own, variant, name, parts - {ADAPTER_SUBFOLDER})
        chosen, adapter = pipeline_files(own, variant), f"{ADAPTER_SUBFOLDER}/gligen_adapter"
        if not any(file.startswith(adapter) and file.endswith(".safetensors") for file in chosen):
            chosen += [file for file in own if file.startswith(adapter)]  # it has one variant alone
        return chosen

    def check(files: list[str]) -> None:
        if variant is not None:
            check_variant([file for file in files if file.split("/")[0] not in kwargs], variant, name)

    folder = local_folder(name, "pipeline", choose, check=check, **hub)
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no {INDEX_NAME}")
    index = read_index(folder)
    files = [f"{part}/{path.name}" for part in index if (folder / part).is_dir() for path in (folder / part).iterdir()]
    check_variant(files, variant, name, set(index) - set(kwargs) - {ADAPTER_SUBFOLDER})
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """Read which parts a pipeline has.

    Raises:
        ValueError: the file is not the index of a pipeline.
    """
    index = read_object(folder / INDEX_NAME, "the index of a pipeline")
    if "_class_name" not in index:
        raise ValueError(f"{folder / INDEX_NAME} does not name a pipeline: it has no _class_name")
    return index


def is_gligen_inpainting(folder: Path, index: Mapping[str, Any]) -> bool:
    """Tell whether its U-Net is gated and has nine channels, but is not that of an ordinary inpainting model."""
    file = folder / "unet" / "config.json"
    config = read_json(file) if file.is_file() else {}
    gated = config.get("attention_type") == "gated" and config.get("in_channels") == 9
    return gated and "Inpaint" not in str(index.get("_class_name"))


def check_parts(folder: Path, index: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Check that each part of the index has its folder, settings and files.

    Args:
        given: parts that come from elsewhere.

    Raises:
        FileNotFoundError: a part lacks its folder, settings, vocabulary or weights.
        ValueError: settings are not JSON objects.
    """
    for name, kind in index.items():
        if name.startswith("_") or name in given or not isinstance(kind, list) or None in kind:
            continue
        part = folder / name
        if not part.is_dir():
            raise FileNotFoundError(f"{folder} has no folder {name}, which its {INDEX_NAME} names")
        settings = part / _SETTINGS.get(name, "config.json")
        if "tokenizer" not in name and not settings.exists():
            raise FileNotFoundError(f"{part} has no {settings.name}")
        for file in sorted(part.glob("*.json")):
            read_object(file, "settings")
        files = {file.name for file in part.iterdir() if file.is_file()}
        if "tokenizer" in name:
            if not files & _VOCABULARIES:  # transformers would make a tokenizer that knows no word
                raise FileNotFoundError(f"{part} has no vocabulary ({', '.join(sorted(_VOCABULARIES))})")
        elif name not in _SETTINGS and not any(file.endswith((".safetensors", ".bin")) for file in files):
            raise FileNotFoundError(f"{part} has no weights; expected a file that ends in .safetensors")


def check_tokenizers(folder: Path, tokenizers: Mapping[str, Any]) -> None:
    """Check that each tokenizer has a maximal length; one without would pad to a number without end.

    Raises:
        ValueError: it has none.
    """
    for name, tokenizer in tokenizers.items():
        if tokenizer is not None and tokenizer.model_max_length > MOST_TOKENS:
            raise ValueError(f"{folder / name}: tokenizer_config.json lacks model_max_length, such as 77")


@contextmanager
def naming_errors(folder: Path, index: Mapping[str, Any], parts: Sequence[str], variant: str | None) -> Iterator[None]:
    """Turn errors of loading into one line that names the folder, the part and, where it is known, the tensor or file.

    Raises:
        ValueError: instead of all errors that are not written for users.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, TypeError):
        raise
    except SafetensorError as error:  # transformers does not say of which file
        damaged = ", ".join(str(file) for file in sorted(folder.rglob("*.safetensors")) if _is_damaged(file))
        raise ValueError(f"{damaged or folder} is damaged or not a safetensors file: {error}") from error
    except BaseException as error:  # panics of tokenizers are not Exceptions
        if isinstance(error, RuntimeError | ValueError) and (reason := misfit(folder, index, parts, variant)):
            raise ValueError(reason) from error
        text = " ".join(str(error).split())
        if "this gated U-Net" in text:
            raise ValueError(text.replace("this gated U-Net", str(folder / "unet"))) from error
        if isinstance(error, ValueError | OSError) and str(folder) in text:
            raise
        part = _part_of(error)
        what = f"{folder / part} cannot be loaded" if part else f"{folder} cannot be loaded as a pipeline"
        raise ValueError(f"{what}: {type(error).__name__}: {text[:1000]}") from error


def _is_damaged(file: Path) -> bool:
    try:
        tensor_names(file)
    except ValueError:
        return True
    return False


def _part_of(error: BaseException) -> str:
    """Return the part that diffusers was loading: its errors do not say, but the arguments of its function do."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_name == "load_sub_model":
            return str(step.tb_frame.f_locals.get("name", ""))
        step = step.tb_next
    return ""
