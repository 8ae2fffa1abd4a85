"""Chooses the pipeline that fits: Stable Diffusion or SDXL, from noise or an image, with a ControlNet or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import SingleFileComponentError

from ..adapter.pickles import read_checkpoint
from ..adapter.weights import check_finite, missing_tensors
from ..hub import local_folder, model_files, reaching
from ..io import first_line, tensor_names
from .folder import pipeline_folder, read_index
from .grounding import GroundingMixin
from .sd import StableDiffusionGLIGENInpaintPipeline, StableDiffusionGLIGENPipeline
from .sdxl import (
    StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
    StableDiffusionXLGLIGENControlNetPipeline,
    StableDiffusionXLGLIGENImg2ImgPipeline,
    StableDiffusionXLGLIGENInpaintPipeline,
    StableDiffusionXLGLIGENPipeline,
)

CLASSES: dict[tuple[str, bool, str], type[GroundingMixin]] = {
    # family, with ControlNet, starting from
    ("xl", False, "noise"): StableDiffusionXLGLIGENPipeline,
    ("xl", False, "image"): StableDiffusionXLGLIGENImg2ImgPipeline,
    ("xl", False, "mask"): StableDiffusionXLGLIGENInpaintPipeline,
    ("xl", True, "noise"): StableDiffusionXLGLIGENControlNetPipeline,
    ("xl", True, "image"): StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
    ("sd", False, "noise"): StableDiffusionGLIGENPipeline,
    ("sd", False, "mask"): StableDiffusionGLIGENInpaintPipeline,
}
TASKS = {"noise": "text-to-image", "image": "image-to-image", "mask": "inpainting"}


def load_pipeline(
    model: str | Path,
    *,
    start: str = "noise",
    controlnets: Sequence[str] = (),
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
    **loading: Any,
) -> GroundingMixin:
    """Load a model of either family as the pipeline that fits.

    Args:
        model: pipeline folder, Hub repository, "shapes", or a checkpoint in one file.
        start: noise (text-to-image), image (image-to-image) or mask (inpainting under a mask).
        controlnets: folders or repositories of ControlNets.
        config: for a checkpoint in one file, a pipeline folder or repository with the same settings; without it
            diffusers downloads those of the base model.
        loading: of `from_pretrained`, such as variant.

    Raises:
        ValueError: there is no such pipeline.
    """
    single = Path(model).is_file()
    if config is not None and not single:
        raise ValueError(f"config is for a checkpoint in one file, but {model} is not a file")
    folder = Path(model) if single else pipeline_folder(model, loading)
    kind = ("xl" if _is_xl(folder) else "sd", bool(controlnets), start)
    if kind not in CLASSES:
        name = "SDXL" if kind[0] == "xl" else "Stable Diffusion 1.x / 2.x"
        task = TASKS[start] + " and a ControlNet" * bool(controlnets)
        raise ValueError(f"there is no pipeline for {name} with {task}")
    parts: dict[str, Any] = {}
    if controlnets:
        nets = [_controlnet(name, dtype) for name in controlnets]
        parts["controlnet"] = nets[0] if len(nets) == 1 else nets
    if not single:
        return CLASSES[kind].from_pretrained(folder, dtype=dtype, **parts, **loading)
    settings = {"config": config} if config else {}
    try:
        with reaching("the settings of its base", f"{model} needs the settings of its base (--config FOLDER)"):
            return CLASSES[kind].from_single_file(str(folder), torch_dtype=dtype, **settings, **parts, **loading)  # type: ignore[attr-defined]
    except SingleFileComponentError as error:
        raise ValueError(f"{model} is not a complete checkpoint: {first_line(error)}") from error


def _controlnet(source: str, dtype: torch.dtype) -> ControlNetModel:
    """Load the ControlNet of a folder or repository.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files lack a tensor, or are of another model than its settings.
    """
    folder, name = local_folder(source, "ControlNet", lambda files, _: model_files(files)), f"the ControlNet {source}"
    try:
        loaded: Any = ControlNetModel.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)
    except Exception as error:  # diffusers has a class of its own for each way of being wrong
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    net, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise missing_tensors(name, missing)
    check_finite(dict(net.named_parameters()), name)
    return net


def _is_xl(model: Path) -> bool:
    """SDXL has two text encoders; in a checkpoint in one file they are called conditioner."""
    if model.is_dir():
        kind = read_index(model).get("text_encoder_2")
        return isinstance(kind, list) and bool(kind) and kind[0] is not None
    if model.suffix == ".safetensors":
        names = tensor_names(model)
    else:
        loaded = read_checkpoint(model, map_location="meta")
        names = list(map(str, loaded.get("state_dict", loaded)))
    return any(name.startswith("conditioner.") for name in names)
