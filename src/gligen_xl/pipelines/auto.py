"""Which of the pipelines fits: Stable Diffusion or SDXL, from noise or an image, with a ControlNet or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from ..adapter.pickles import read_checkpoint
from ..hub import local_folder, model_files, reaching
from ..io import first_line
from ..limits import check_safetensors
from .grounding import GroundingMixin
from .loading import pipeline_folder
from .parts import read_index
from .sd import StableDiffusionGLIGENInpaintPipeline, StableDiffusionGLIGENPipeline
from .sdxl import (
    StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
    StableDiffusionXLGLIGENControlNetPipeline,
    StableDiffusionXLGLIGENImg2ImgPipeline,
    StableDiffusionXLGLIGENInpaintPipeline,
    StableDiffusionXLGLIGENPipeline,
)
from .weights import check_finite

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
            diffusers fetches those of the base model.
        loading: of `from_pretrained`, as variant.

    Raises:
        ValueError: there is no such pipeline.
    """
    single = Path(model).is_file()
    if config is not None and not single:
        raise ValueError(f"config is for a checkpoint in one file, and {model} is none")
    folder = Path(model) if single else pipeline_folder(model, loading)
    kind = ("xl" if _is_xl(folder) else "sd", bool(controlnets), start)
    if kind not in CLASSES:
        wish = {"noise": "text-to-image", "image": "image-to-image", "mask": "inpainting"}[start]
        name = "SDXL" if kind[0] == "xl" else "Stable Diffusion 1.x / 2.x"
        raise ValueError(f"there is no pipeline for {name} with {wish}{' and a ControlNet' if controlnets else ''}")
    parts: dict[str, Any] = {}
    if controlnets:
        nets = [_controlnet(name, dtype) for name in controlnets]
        parts["controlnet"] = nets[0] if len(nets) == 1 else nets
    if single:
        settings = {"config": config} if config else {}
        try:
            with reaching("the settings of its base", f"{model} needs the settings of its base (--config FOLDER)"):
                return CLASSES[kind].from_single_file(str(folder), torch_dtype=dtype, **settings, **parts, **loading)  # type: ignore[attr-defined]
        except SingleFileComponentError as error:
            raise ValueError(f"{model} is no whole checkpoint: {first_line(error)}") from error
    return CLASSES[kind].from_pretrained(folder, dtype=dtype, **parts, **loading)


def _controlnet(source: str, dtype: torch.dtype) -> ControlNetModel:
    """A ControlNet of a folder or repository.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files lack a tensor, or are of another model than its settings.
    """
    folder = local_folder(source, "ControlNet", lambda files, _: model_files(files))
    try:
        loaded: Any = ControlNetModel.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)
    except Exception as error:  # diffusers has its own kinds for each way of being wrong
        raise ValueError(f"the ControlNet {source} cannot be loaded: {first_line(error)}") from error
    net, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the ControlNet {source} is not whole: it lacks {len(missing)} tensors, as {missing[0]}")
    check_finite(net, f"the ControlNet {source}")
    return net


def _is_xl(model: Path) -> bool:
    """SDXL has two text encoders; in a checkpoint in one file they are called conditioner."""
    if model.is_dir():
        kind = read_index(model).get("text_encoder_2")
        return isinstance(kind, list) and bool(kind) and kind[0] is not None
    try:
        if model.suffix == ".safetensors":
            check_safetensors(model)
            with safe_open(model, "pt") as opened:
                names = list(opened.keys())
        else:
            loaded = read_checkpoint(model, map_location="meta")
            names = list(map(str, loaded.get("state_dict", loaded)))
    except SafetensorError as error:
        raise ValueError(f"{model} is damaged or not a checkpoint: {first_line(error):.100}") from error
    return any(name.startswith("conditioner.") for name in names)
