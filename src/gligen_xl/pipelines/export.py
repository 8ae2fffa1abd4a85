"""A pipeline with its adapter as a folder that plain diffusers loads: a gated U-Net, and one file of code beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..adapter import adapter_config, fusers, inpaint_conv
from ..io import read_json, whole_folder, write_json
from ..redact import clean_model_folder
from .loading import INDEX_NAME, SLOTS_SETTING, AdapterLoaderMixin
from .sd import StableDiffusionGLIGENPipeline
from .sdxl import StableDiffusionXLGLIGENPipeline

CODE_NAME = "pipeline_gligen"


def export_pipeline(pipeline: AdapterLoaderMixin, folder: str | Path, **saving: Any) -> None:
    """Write a text-to-image pipeline in the published form (as `jiuntian/gligen-xl-1024`).

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` gives it back, grounding included, where
    gligen-xl is not installed; `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` gives its U-Net. An
    inpainting adapter becomes a folder for diffusers' own `StableDiffusionGLIGENPipeline`.

    Args:
        saving: of diffusers' `save_pretrained`, as variant="fp16" or max_shard_size="5GB".

    Raises:
        ValueError: no adapter, or one that diffusers' gated U-Net cannot be.
    """
    kinds = (StableDiffusionXLGLIGENPipeline, StableDiffusionGLIGENPipeline)
    if not isinstance(pipeline, kinds):
        raise ValueError(
            f"only text-to-image pipelines are exported, not {type(pipeline).__name__}; use from_pipe first"
        )
    config = adapter_config(pipeline.unet)
    if not config.published_form:
        raise ValueError(
            "diffusers' gated U-Net has a fuser on every block and no logit bias; this adapter has "
            f"every={config.every} and grounding_logit_bias={config.grounding_logit_bias:g} (blocks={config.blocks})"
        )
    if any(fuser.scale != 1 for fuser in fusers(pipeline.unet).values()):
        raise ValueError("the adapter's scale is not 1, which no file can say; set_gligen_adapter_scale(1) first")
    for name, part in pipeline.components.items():
        if getattr(part, "peft_config", None):
            raise ValueError(f"a LoRA lies on the {name}; fuse_lora() and unload_lora_weights() first, or unload it")
    if config.inpaint and (isinstance(pipeline, StableDiffusionXLGLIGENPipeline) or config.slots != 30):
        raise ValueError("of inpainting adapters diffusers has a class for those of SD 1.x and 2.x with 30 slots alone")
    check_new(folder)
    with whole_folder(folder) as partial, _native(pipeline.unet):
        DiffusionPipeline.save_pretrained(pipeline, partial, **saving)
        index = read_json(partial / INDEX_NAME)
        if config.inpaint:
            index["_class_name"] = "StableDiffusionGLIGENPipeline"  # diffusers' own feeds the nine channels
        else:
            index |= {"_class_name": [CODE_NAME, type(pipeline).__name__], SLOTS_SETTING: config.slots}
            (partial / f"{CODE_NAME}.py").write_bytes(Path(__file__).with_name("standalone.py").read_bytes())
        write_json(partial / INDEX_NAME, index)
        clean_model_folder(partial)


def check_new(folder: str | Path) -> None:
    """An export takes the place of nothing."""
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{folder} is there and not empty; export into a new folder")


@contextmanager
def _native(unet: Any) -> Iterator[None]:
    """The U-Net as diffusers has it: an inpainting adapter's first convolution is an ordinary one of nine channels."""
    if (conv := inpaint_conv(unet)) is None:
        yield
        return
    ordinary = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")  # type: ignore[arg-type]
    ordinary.weight, ordinary.bias = conv.weight, conv.bias
    unet.conv_in = ordinary
    unet.register_to_config(in_channels=conv.in_channels)
    try:
        yield
    finally:
        unet.conv_in = conv
        unet.register_to_config(in_channels=4)
