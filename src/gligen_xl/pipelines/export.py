"""Exports a pipeline and its adapter as a folder that plain diffusers loads: a gated U-Net, and one file of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..adapter import GligenAdapter
from ..hub import INDEX_NAME
from ..io import read_json, whole_folder, write_json
from ..redact import clean_model_folder
from .loading import SLOTS_SETTING, AdapterLoaderMixin
from .sd import StableDiffusionGLIGENPipeline
from .sdxl import StableDiffusionXLGLIGENPipeline

CODE_NAME = "pipeline_gligen"


def export_pipeline(pipeline: AdapterLoaderMixin, folder: str | Path, **saving: Any) -> None:
    """Write a text-to-image pipeline in the published form (that of `jiuntian/gligen-xl-1024`).

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it, grounding included, where gligen-xl is
    not installed; `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` loads its U-Net. An inpainting
    adapter becomes a folder for diffusers' own `StableDiffusionGLIGENPipeline`.

    Args:
        saving: of diffusers' `save_pretrained`, such as variant="fp16" or max_shard_size="5GB".

    Raises:
        ValueError: the folder is not empty; there is no adapter, or one that a gated U-Net of diffusers cannot hold.
    """
    kinds = (StableDiffusionXLGLIGENPipeline, StableDiffusionGLIGENPipeline)
    if not isinstance(pipeline, kinds):
        raise ValueError(
            f"only text-to-image pipelines are exported, not {type(pipeline).__name__}; use from_pipe first"
        )
    adapter = GligenAdapter.of(pipeline.unet)
    config = adapter.config
    if not config.published_form:
        raise ValueError(
            "diffusers' gated U-Net has a fuser on every block and no logit bias; this adapter has "
            f"every={config.every} and grounding_logit_bias={config.grounding_logit_bias:g} (blocks={config.blocks})"
        )
    if adapter.scale != 1:
        raise ValueError(
            f"the adapter's scale is {adapter.scale:g}, not 1, which no file can say; "
            "call set_gligen_adapter_scale(1) first"
        )
    for name, part in pipeline.components.items():
        if getattr(part, "peft_config", None):
            raise ValueError(
                f"a LoRA is loaded on the {name}; fuse_lora() and unload_lora_weights() first, or unload it"
            )
    if config.inpaint and (isinstance(pipeline, StableDiffusionXLGLIGENPipeline) or config.slots != 30):
        raise ValueError("diffusers has a class only for inpainting adapters of SD 1.x and 2.x with 30 slots")
    check_new(folder)
    with whole_folder(folder) as partial, _plain_conv(adapter):
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
    """Refuse to export into a folder that is not empty."""
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{folder} is not an empty folder; export into a new one")


@contextmanager
def _plain_conv(adapter: GligenAdapter) -> Iterator[None]:
    """Replace an inpainting adapter's first convolution by an ordinary one of nine channels, as diffusers has it."""
    if (conv := adapter.inpaint_conv) is None:
        yield
        return
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")  # type: ignore[arg-type]
    plain.weight, plain.bias = conv.weight, conv.bias
    adapter.unet.conv_in = plain
    adapter.unet.register_to_config(in_channels=conv.in_channels)
    try:
        yield
    finally:
        adapter.unet.conv_in = conv
        adapter.unet.register_to_config(in_channels=4)
