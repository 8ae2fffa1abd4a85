"""LoRAs: where they lie, at what scale, and onto a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .values import UsageError, check_source, is_there, names_repository, numbers

_USUAL = "pytorch_lora_weights.safetensors"  # as diffusers writes it


def parse_lora(words: str) -> tuple[str, float]:
    """Path and scale of PATH or PATH=SCALE.

    Raises:
        UsageError: another scale than a number. FileNotFoundError: there is no such file or folder.
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


def _is_file_of_repository(path: str) -> bool:
    repository, _, name = path.rpartition("/")
    return not is_there(path) and names_repository(repository) and name.endswith((".safetensors", ".bin"))


def find_lora(path: str) -> Path:
    """The file of a LoRA: itself, the one in a folder, or that of a repository, which is fetched.

    Raises:
        FileNotFoundError: there is none. ValueError: several, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    from ..hub import local_folder

    file = Path(path).expanduser()
    if not file.is_file():
        wanted = ""
        if _is_file_of_repository(path):
            path, _, wanted = path.rpartition("/")
        folder = local_folder(path, "LoRA", [wanted] if wanted else ["*.safetensors", "*.bin"])
        files = [folder / wanted] if wanted else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        usual = [one for one in files if one.name == _USUAL]
        files = usual or [one for one in files if one.suffix == ".safetensors"] or files
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path} holds no LoRA (--lora); expected a file that ends in .safetensors")
        if len(files) > 1:
            named = ", ".join(one.name for one in files[:5])
            raise ValueError(f"{path} holds several LoRAs: {named}; name the file, as --lora {path}/{files[0].name}")
        file = files[0]
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    return file


def add_loras(pipeline: Any, files: Sequence[Path], scales: Sequence[float]) -> None:
    """Load LoRAs onto the pipeline, each at its scale.

    Raises:
        ValueError: one of them is none, or for another model; it names the file.
    """
    names = [f"lora{number}" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            loaded = {other for of_part in pipeline.get_list_adapters().values() for other in of_part}
        except Exception as error:  # diffusers, peft and torch have each their own
            text = " ".join(str(error).split())
            raise ValueError(
                f"{file} is no LoRA for this model: {type(error).__name__}: {text[:300] or 'no reason given'}"
            ) from error
        if name not in loaded:
            raise ValueError(f"{file} is no LoRA for this model: nothing in it belongs to one of its layers")
    if names:
        pipeline.set_adapters(names, list(scales))
