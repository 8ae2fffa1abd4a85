"""Whether the weights of a pipeline's parts are whole: nothing may be drawn at random in place of what a file lacks.

diffusers leaves a tensor that its files lack without values, and transformers draws it at random; both say so in a log
that is often off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapter.pickles import read_checkpoint
from ..hub import pipeline_files
from ..io import read_json

Shape = tuple[int, ...]


def check_shards(folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Whether every file is there that an index of sharded weights names.

    Raises:
        FileNotFoundError: names the index, and the file that it names.
    """
    for part in parts:
        for file in _files(folder, part, variant):
            if file.suffix == ".json" and ".index." in file.name:
                index = read_json(file)
                names = index.get("weight_map", {}) if isinstance(index, dict) else {}
                for name in sorted(set(map(str, names.values()))):
                    if not (file.parent / name).is_file():
                        raise FileNotFoundError(f"{file} names {name}, which is not there; fetch the folder again")


def check_loaded(pipeline: Any, folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Whether the files gave every tensor of the loaded parts a value, and a finite one.

    Raises:
        ValueError: names the part's folder and the tensor.
    """
    for name in parts:
        part = getattr(pipeline, name, None)
        if not isinstance(part, nn.Module) or getattr(part, "hf_quantizer", None) is not None:
            continue
        if missing := _missing(part, folder / name, shapes_in_files(folder, name, variant), variant):
            raise ValueError(lacks(folder / name, missing))
        check_finite(part, folder / name)


def check_finite(part: nn.Module, source: Any) -> None:
    """Refuse weights of which one is NaN or infinite."""
    for name, value in part.named_parameters():
        if value.is_meta or not value.is_floating_point() or value.itemsize == 1 or not value.numel():
            continue
        if not torch.linalg.vector_norm(value.detach(), ord=torch.inf).isfinite():
            raise ValueError(f"{source} holds values in {name} that are no finite numbers; fetch or make it again")


def check_values(pipeline: Any, source: Any) -> None:
    """Whether every part of a pipeline has values; of a checkpoint in one file, which is read by other names."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not hasattr(part, "hf_device_map"):
            if missing := [key for key, value in part.named_parameters() if value.is_meta]:
                raise ValueError(lacks(source, missing, f" of the {name}"))
            check_finite(part, source)


def without_values(error: BaseException) -> list[str]:
    """Tensors without values of the model that could not be moved: torch's error names none, but the model is in the
    frames that it came through."""
    trace = error.__traceback__
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            model = value if isinstance(value, diffusers.ModelMixin | transformers.PreTrainedModel) else nn.Module()
            if missing := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
                return missing
        trace = trace.tb_next
    return []


def misfit(folder: Path, index: dict[str, Any], parts: Iterable[str], variant: str | None) -> str | None:
    """What does not fit between the files of a folder and the settings beside them, for an error in loading."""
    for name in parts:
        if (expected := _expected_shapes(folder / name, index.get(name))) is None:
            continue
        there = shapes_in_files(folder, name, variant)
        for tensor, shape in sorted(there.items()):
            if tensor in expected and expected[tensor] != shape:
                return (
                    f"{folder / name}: {tensor} is {shape} in its files, {expected[tensor]} by its config.json; the "
                    "two are of different models"
                )
    return None


def _missing(part: nn.Module, folder: Path, there: dict[str, Shape], variant: str | None) -> list[str]:
    """Tensors that got no value. Names may differ between files and model, so a first look only raises suspicion, and
    the library itself is asked when it does."""
    names = {_plain(name) for name in there}
    if not there or {_plain(name) for name, _ in part.named_parameters()} <= names:
        return []
    settings = {"variant": variant} if variant and any(f".{variant}" in file.name for file in folder.iterdir()) else {}
    _, report = type(part).from_pretrained(folder, output_loading_info=True, **settings)  # type: ignore[attr-defined]
    return sorted(report["missing_keys"])


def lacks(source: Any, missing: list[str], where: str = "") -> str:
    number = f"{len(missing)} tensors, as {missing[0]}" if len(missing) > 1 else missing[0]
    return f"{source} is not whole: it lacks {number}{where}; fetch or make it again"


def _plain(name: str) -> str:
    """A tensor's name without what transformers has put before it in some versions and not in others."""
    return name.removeprefix("text_model.").removeprefix("vision_model.")


def shapes_in_files(folder: Path, part: str, variant: str | None) -> dict[str, Shape]:
    """Names and shapes of the tensors in a part's files; only their headers are read.

    Raises:
        ValueError: a file is damaged.
    """
    shapes: dict[str, Shape] = {}
    for file in _files(folder, part, variant):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
        elif file.suffix == ".bin":
            loaded = read_checkpoint(file, map_location="meta")
            shapes |= {name: tuple(value.shape) for name, value in loaded.items() if isinstance(value, Tensor)}
    return shapes


def _files(folder: Path, part: str, variant: str | None) -> list[Path]:
    if not (folder / part).is_dir():
        return []
    there = [f"{part}/{path.name}" for path in (folder / part).iterdir()]
    return [folder / name for name in pipeline_files(there, variant)]


def _expected_shapes(folder: Path, named: Any) -> dict[str, Shape] | None:
    """Shapes of a part by its settings; None where it is no model, or cannot be made."""
    try:
        library, name = named
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        with init_empty_weights():
            if library == "diffusers":
                model = kind.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            else:
                model = kind(kind.config_class.from_pretrained(folder))
    except Exception:  # whatever is wrong with the settings is another error's to say
        return None
    if not isinstance(model, nn.Module):
        return None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return shapes | {_plain(name): shape for name, shape in shapes.items()}
