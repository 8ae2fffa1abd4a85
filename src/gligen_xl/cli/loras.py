"""LoRAs: finds their files, and loads them onto a pipeline at their scales."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..io import names_repository, tensor_names
from .values import UsageError, check_source, is_there, numbers

_USUAL = "pytorch_lora_weights.safetensors"  # the name that diffusers gives
_ENDINGS = (".safetensors", ".bin")


def parse_lora(words: str) -> tuple[str, float]:
    """Parse PATH or PATH=SCALE.

    Raises:
        UsageError: the scale is not a number. FileNotFoundError: there is no such file or folder.
    """
    path, equals, scale = words.rpartition("=")
    if not equals or is_there(words):
        path, scale = words, ""
    values = numbers(scale, "the scale of --lora") if scale else [1.0]
    if len(values) != 1 or not path:
        raise UsageError(f"--lora is {words!r}; expected PATH or PATH=SCALE")
    if not _is_file_of_repository(path):
        check_source("lora", path, "LoRA", file=True)
    if not find_spec("peft"):
        raise UsageError("LoRAs need peft; pip install 'gligen-xl[lora]'")
    return path, values[0]


def find_lora(path: str) -> Path:
    """Return the file of a LoRA: `path` itself, the one in a folder, or that of a repository, downloaded.

    Args:
        path: a file, a folder, owner/name, or owner/name/FILE.

    Raises:
        FileNotFoundError: there is none. ValueError: there are several, or it is damaged.
    """
    from ..hub import local_folder

    file = Path(path).expanduser()
    if not file.is_file():
        name = ""
        if _is_file_of_repository(path):
            path, _, name = path.rpartition("/")
        folder = local_folder(path, "LoRA", [name] if name else [f"*{ending}" for ending in _ENDINGS])
        file = folder / name if name else _only_lora(path, folder)
        if not file.is_file():
            raise FileNotFoundError(f"{path} has no {name} (--lora)")
    if file.suffix == ".safetensors":
        tensor_names(file)  # raises if it is damaged
    return file


def _only_lora(path: str, folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    usual = [file for file in files if file.name == _USUAL]
    files = usual or [file for file in files if file.suffix == ".safetensors"] or files
    if not files:
        raise FileNotFoundError(f"{path} holds no LoRA (--lora); expected a file that ends in .safetensors")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{path} holds several LoRAs: {names}; name the file, as --lora {path}/{files[0].name}")
    return files[0]


def _is_file_of_repository(path: str) -> bool:
    repository, _, name = path.rpartition("/")
    return not is_there(path) and names_repository(repository) and name.endswith(_ENDINGS)


def add_loras(pipeline: Any, files: Sequence[Path], scales: Sequence[float]) -> None:
    """Load LoRAs onto the pipeline, each at its scale.

    Raises:
        ValueError: one of them is not a LoRA, or for another model; it names the file.
    """
    names = [f"lora{number}" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            loaded = {other for of_part in pipeline.get_list_adapters().values() for other in of_part}
        except Exception as error:  # diffusers, peft and torch have their own classes
            text = " ".join(str(error).split())
            raise ValueError(
                f"{file} is not a LoRA for this model: {type(error).__name__}: {text[:300] or 'no reason given'}"
            ) from error
        if name not in loaded:
            raise ValueError(f"{file} is not a LoRA for this model: nothing in it belongs to one of its layers")
    if names:
        pipeline.set_adapters(names, list(scales))
