"""Checks that the weights of a pipeline's parts are complete: nothing may be drawn at random for what a file lacks.

diffusers leaves a tensor that its files lack without values, and transformers draws it at random; both say so in a log
that is often off. Checks of single tensors are in `adapter/weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..adapter.pickles import read_checkpoint
from ..adapter.weights import check_finite, missing_tensors
from ..hub import pipeline_files
from ..io import open_tensors, read_json

Shape = tuple[int, ...]


def check_shards(folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Check that every file is there that an index of sharded weights names.

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
                        raise FileNotFoundError(f"{file} names {name}, which is missing; download the folder again")


def check_loaded(pipeline: Any, folder: Path, parts: Iterable[str], variant: str | None) -> None:
    """Check that the files gave every tensor of the loaded parts a value, and a finite one.

    Raises:
        ValueError: names the part's folder and the tensor.
    """
    for name in parts:
        part = getattr(pipeline, name, None)
        if not isinstance(part, nn.Module) or getattr(part, "hf_quantizer", None) is not None:
            continue
        if missing := _missing(part, folder / name, shapes_in_files(folder, name, variant), variant):
            raise missing_tensors(folder / name, missing)
        check_finite(dict(part.named_parameters()), folder / name)


def check_values(pipeline: Any, source: object) -> None:
    """Check that every part of a pipeline has values: for a checkpoint in one file, whose tensors have other names."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not hasattr(part, "hf_device_map"):
            if missing := [key for key, value in part.named_parameters() if value.is_meta]:
                raise missing_tensors(source, missing, f" of the {name}")
            check_finite(dict(part.named_parameters()), source)


def without_values(error: BaseException) -> list[str]:
    """Return the tensors without values of the model that could not be moved. torch's error names none, but the model
    is in the frames that it came through."""
    trace = error.__traceback__
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            model = value if isinstance(value, diffusers.ModelMixin | transformers.PreTrainedModel) else nn.Module()
            if missing := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
                return missing
        trace = trace.tb_next
    return []


def misfit(folder: Path, index: Mapping[str, Any], parts: Iterable[str], variant: str | None) -> str | None:
    """Find a tensor whose shape in the files is not that of the settings, and return the message of an error."""
    for name in parts:
        if (expected := _expected_shapes(folder / name, index.get(name))) is None:
            continue
        for tensor, shape in sorted(shapes_in_files(folder, name, variant).items()):
            if tensor in expected and expected[tensor] != shape:
                return (
                    f"{folder / name}: {tensor} is {shape} in its files, {expected[tensor]} by its config.json; the "
                    "two are of different models"
                )
    return None


def shapes_in_files(folder: Path, part: str, variant: str | None) -> dict[str, Shape]:
    """Read names and shapes of the tensors in a part's files, from their headers.

    Raises:
        ValueError: a file is damaged.
    """
    shapes: dict[str, Shape] = {}
    for file in _files(folder, part, variant):
        if file.suffix == ".safetensors":
            with open_tensors(file) as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        elif file.suffix == ".bin":
            loaded = read_checkpoint(file, map_location="meta")
            shapes |= {name: tuple(value.shape) for name, value in loaded.items() if isinstance(value, Tensor)}
    return shapes


def _missing(part: nn.Module, folder: Path, shapes: Mapping[str, Shape], variant: str | None) -> list[str]:
    """Return the tensors that got no value. Names may differ between files and model, so a difference in names only
    raises the suspicion; the library itself then says what is missing."""
    names = {_plain(name) for name in shapes}
    if not names or {_plain(name) for name, _ in part.named_parameters()} <= names:
        return []
    settings = {"variant": variant} if variant and any(f".{variant}" in file.name for file in folder.iterdir()) else {}
    _, report = type(part).from_pretrained(folder, output_loading_info=True, **settings)  # type: ignore[attr-defined]
    return sorted(report["missing_keys"])


def _plain(name: str) -> str:
    """Remove the prefix that transformers uses in some versions and not in others."""
    return name.removeprefix("text_model.").removeprefix("vision_model.")


def _files(folder: Path, part: str, variant: str | None) -> list[Path]:
    if not (folder / part).is_dir():
        return []
    names = [f"{part}/{path.name}" for path in (folder / part).iterdir()]
    return [folder / name for name in pipeline_files(names, variant)]


def _expected_shapes(folder: Path, named: Any) -> dict[str, Shape] | None:
    """Return the shapes of a part by its settings; None if it is not a model, or cannot be made."""
    try:
        library, name = named
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        with init_empty_weights():
            if library == "diffusers":
                model = kind.from_config(read_json(folder / "config.json"))
            else:
                model = kind(kind.config_class.from_pretrained(folder))
    except Exception:  # another check says what is wrong with the settings
        return None
    if not isinstance(model, nn.Module):
        return None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return shapes | {_plain(name): shape for name, shape in shapes.items()}
