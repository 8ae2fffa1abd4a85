"""Adapters on disk and on the Hub: a folder with `gligen_adapter.safetensors` and `gligen_adapter.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..hub import local_folder
from ..io import read_object, read_tensors, whole_file, write_json
from ..manifest import check_listed
from ..redact import public
from .config import AdapterConfig
from .weights import check_finite, is_quantised, kind_of

WEIGHTS_NAME, CONFIG_NAME = "gligen_adapter.safetensors", "gligen_adapter.json"
FORMAT, VERSION = "gligen-xl-adapter", 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_name(variant: str | None = None) -> str:
    return f"gligen_adapter.{variant}.safetensors" if variant else WEIGHTS_NAME


def only_weights(folder: Path) -> str:
    """Return the name of a folder's weights: the plain ones, or the variant if there is exactly one file."""
    names = sorted(path.name for path in folder.glob("gligen_adapter*.safetensors"))
    return names[0] if len(names) == 1 else WEIGHTS_NAME


# Writing ------------------------------------------------------------------------------------------------------------


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
        ValueError: `dtype` cannot hold the weights (float16 ends at 65504); they are quantised or not in memory; or the
            folder holds a variant of another adapter.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype}; an adapter is saved in torch.float32, torch.bfloat16 or torch.float16")
    folder, description = Path(folder), Path(folder) / CONFIG_NAME
    others = {path.name for path in folder.glob("gligen_adapter*.safetensors")} - {weights_name(variant)}
    former = read_object(description, "an adapter").get("config") if others and description.is_file() else None
    if former is not None and AdapterConfig.from_dict(former) != config:
        raise ValueError(f"{folder} holds {sorted(others)} of an adapter of another form; save into another folder")
    tensors = {name: _to_save(name, value, dtype) for name, value in state.items()}
    with whole_file(folder / weights_name(variant)) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(description, describe_adapter(config, about))


def _to_save(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if value.is_meta:
        raise ValueError(f"{name} is not in memory (sequential offload?); save the adapter before enabling it")
    if is_quantised(value):
        raise ValueError(f"{name} is {kind_of(value)}; an adapter is saved from floating-point weights")
    # Layerwise casting stores weights in one byte; bfloat16 holds the same values.
    own = torch.bfloat16 if value.itemsize == 1 else value.dtype
    saved = value.to("cpu", dtype or own).contiguous()
    if not saved.isfinite().all() and value.double().isfinite().all():
        largest = float(value.float().abs().max())
        raise ValueError(f"{name} reaches {largest:g}, too much for {dtype}; save in another dtype")
    return saved


def describe_adapter(config: AdapterConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of `gligen_adapter.json`. Adapters are shared, so paths are reduced to their last names."""
    return {**public(about), "format": FORMAT, "version": VERSION, "config": config.to_dict()}


# Reading ------------------------------------------------------------------------------------------------------------


def read_adapter(
    folder: str | Path, weights: str = WEIGHTS_NAME
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Read the configuration and weights of an adapter folder, and the rest of its description.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or not of this format.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, weights):
        if not (folder / name).is_file():
            names = sorted(path.name for path in folder.glob("*"))
            hint = f"; it has {', '.join(names[:8])}" if names else ""
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {name}{hint}")
    check_listed(folder, [CONFIG_NAME, weights])  # in a checkpoint
    file = folder / CONFIG_NAME
    description = read_object(file, "the description of an adapter")
    if (form := description.pop("format", None)) != FORMAT:
        raise ValueError(f"{file} does not describe an adapter: its format is {form!r}, expected {FORMAT!r}")
    if (version := description.pop("version", None)) != VERSION:
        raise ValueError(f"{file} is version {version}; this program reads {VERSION}")
    try:
        config = AdapterConfig.from_dict(description.pop("config", {}))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    state = read_tensors(folder / weights)
    check_finite(state, folder / weights)
    return config, state, description


def adapter_folder(
    source: str | Path, *, subfolder: str | None = None, weights: str = WEIGHTS_NAME, **hub: Any
) -> Path:
    """Return the local folder of an adapter, downloaded if `source` names a Hub repository.

    Raises:
        FileNotFoundError: there is none, or it lacks the file `weights`; the error names the variants it has.
        ValueError: `source` is a file.
    """
    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file; expected an adapter folder. Convert a file of another project by: "
            f"gligen-xl convert {source} --out FOLDER"
        )
    prefix = f"{subfolder}/" if subfolder else ""

    def check(files: list[str]) -> None:
        own = sorted(name for name in files if name.startswith(f"{prefix}gligen_adapter") and "." in name)
        if own and prefix + weights not in files:
            variants = re.findall(r"gligen_adapter\.(\w+)\.safetensors", " ".join(own))
            hint = f"; load it with variant={variants[0]!r}" if variants else ""
            raise FileNotFoundError(f"{source} has no {prefix + weights}; it has {', '.join(own[:8])}{hint}")

    root = local_folder(source, "adapter", [prefix + CONFIG_NAME, prefix + weights], check=check, **hub)
    return root / subfolder if subfolder else root
