"""Adapters on disk and on the Hub: a folder with `gligen_adapter.safetensors` and `gligen_adapter.json`.

save_adapter(unet, "mine")
load_adapter(other_unet, "mine")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..hub import local_folder
from ..io import read_json, whole_file, write_json
from ..limits import check_safetensors
from ..manifest import check_listed
from ..redact import public
from .attach import adapter_about, adapter_config, adapter_state_dict, attach, is_quantised, kind_of
from .config import AdapterConfig

WEIGHTS_NAME, CONFIG_NAME = "gligen_adapter.safetensors", "gligen_adapter.json"
FORMAT, VERSION = "gligen-xl-adapter", 1


def save_adapter(
    unet: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the attached adapter; nothing of the base.

    Args:
        dtype: to save in; as it is by default.
        variant: put into the weights' name, as fp16: several can stand side by side.
        metadata: anything JSON about base model and training; by default what the adapter was loaded with.
        state: weights to save in place of the attached ones, as their average.
    """
    about = adapter_about(unet) if metadata is None else metadata
    write_adapter(folder, adapter_config(unet), state or adapter_state_dict(unet), about, dtype=dtype, variant=variant)


def write_adapter(
    folder: str | Path,
    config: AdapterConfig,
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> None:
    """Write weights and description as an adapter folder.

    Raises:
        ValueError: `dtype` cannot hold the weights (float16 ends at 65504); they are quantised, or not in memory.
    """
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; an adapter is saved in torch.float32, torch.bfloat16 or torch.float16")
    folder, tensors = Path(folder), {}
    others = {path.name for path in folder.glob("gligen_adapter*.safetensors")} - {weights_name(variant)}
    if (
        others
        and (folder / CONFIG_NAME).is_file()
        and AdapterConfig.from_dict(read_json(folder / CONFIG_NAME).get("config", {})) != config
    ):
        raise ValueError(f"{folder} holds {sorted(others)} of an adapter of another form; save into another folder")
    for name, value in state.items():
        if value.is_meta:
            raise ValueError(f"{name} is not in memory (sequential offload?); save the adapter before enabling it")
        if is_quantised(value):
            raise ValueError(f"{name} is {kind_of(value)}; an adapter is saved from floating-point weights")
        # One byte is how layerwise casting stores weights; bfloat16 holds the same values.
        own = torch.bfloat16 if value.itemsize == 1 else value.dtype
        tensors[name] = value.to("cpu", dtype or own).contiguous()
        if not tensors[name].isfinite().all() and value.double().isfinite().all():
            raise ValueError(
                f"{name} reaches {float(value.float().abs().max()):g}, too much for {dtype}; save in another dtype"
            )
    with whole_file(folder / weights_name(variant)) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, describe_adapter(config, about))


def weights_name(variant: str | None = None) -> str:
    if variant is None:
        return WEIGHTS_NAME
    stem, ending = WEIGHTS_NAME.split(".")
    return f"{stem}.{variant}.{ending}"


def describe_adapter(config: AdapterConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `gligen_adapter.json` holds. Adapters are shared: of paths on this machine their last names stay."""
    return {**public(about), "format": FORMAT, "version": VERSION, "config": config.to_dict()}


def read_adapter(
    folder: str | Path, weights: str = WEIGHTS_NAME
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration and weights of an adapter folder, and what else its description says.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or not of this format.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, weights):
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
            hint = f"; there are {', '.join(there[:8])}" if there else ""
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {name}{hint}")
    check_listed(folder, [CONFIG_NAME, weights])  # of a checkpoint
    description = read_json(folder / CONFIG_NAME)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG_NAME} does not describe an adapter (its format is not {FORMAT!r})")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{folder / CONFIG_NAME} is version {description.get('version')}; this program reads {VERSION}"
        )
    try:
        config = AdapterConfig.from_dict(description.get("config", {}))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    try:
        check_safetensors(folder / weights)
        state = load_file(folder / weights)
    except SafetensorError as error:
        raise ValueError(f"{folder / weights} is damaged or not a safetensors file: {error}") from error
    for name, value in state.items():
        if not (value.float() if value.itemsize == 1 else value).isfinite().all():
            raise ValueError(f"{folder / weights} holds values in {name} that are no finite numbers")
    about = {name: value for name, value in description.items() if name not in ("format", "version", "config")}
    return config, state, about


def load_adapter(
    unet: UNet2DConditionModel,
    source: str | Path,
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    variant: str | None = None,
    **hub: Any,
) -> AdapterConfig:
    """Attach the adapter of a folder or Hub repository. On any error the U-Net is left as it was.

    Args:
        subfolder: where in the folder or repository the adapter lies.
        weight_name: of the weights' file, where it is not `gligen_adapter.safetensors`.
        variant: as fp16, for `gligen_adapter.fp16.safetensors`.
        hub: revision, cache_dir, token, local_files_only, force_download, for repositories.
    """
    weights = weight_name or weights_name(variant)
    if weight_name is None and variant is None:
        weights = only_weights(Path(source) / (subfolder or ""))
    config, state, about = read_adapter(adapter_folder(source, subfolder=subfolder, weights=weights, **hub), weights)
    if unet.device.type == "meta":
        raise ValueError(
            "the U-Net's weights are not in memory (sequential offload?); load the adapter before enabling it"
        )
    attach(unet, config, about=about, state=state, source=str(source))
    _maybe_remove_and_reapply_group_offloading(unet)  # where it is on, it must learn of the new layers
    return config


def only_weights(folder: Path) -> str:
    """The plain weights; of a folder that has none but one variant, that one."""
    there = sorted(path.name for path in folder.glob("gligen_adapter*.safetensors"))
    return there[0] if len(there) == 1 else WEIGHTS_NAME


def adapter_folder(
    source: str | Path, *, subfolder: str | None = None, weights: str = WEIGHTS_NAME, **hub: Any
) -> Path:
    """The local folder of an adapter, fetched from the Hub where `source` names a repository there."""
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file; an adapter is a folder. One in another project's form becomes one by: "
            f"gligen-xl convert {source} --out FOLDER"
        )
    prefix = f"{subfolder}/" if subfolder else ""

    def check(files: list[str]) -> None:
        there = sorted(name for name in files if name.startswith(f"{prefix}gligen_adapter") and "." in name)
        if there and prefix + weights not in files:
            variants = [
                match[1] for name in there if (match := re.search(r"gligen_adapter\.(\w+)\.safetensors$", name))
            ]
            hint = f"; load it with variant={variants[0]!r}" if variants else ""
            raise FileNotFoundError(f"{source} has no {prefix + weights}; there are {', '.join(there[:8])}{hint}")

    root = local_folder(source, "adapter", [prefix + CONFIG_NAME, prefix + weights], check=check, **hub)
    return root / subfolder if subfolder else root
