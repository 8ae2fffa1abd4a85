"""Converts weights of other projects to adapters: gated U-Nets of diffusers, and GLIGEN's own files.

It reads folders of diffusers (a pipeline, or its U-Net) with safetensors, sharded or not, or pickled weights; single
files, safetensors or pickled, with diffusers' names or those of the original latent diffusion code, the adapter alone
or within a whole checkpoint; and adapter folders of this library, or of its training runs. Nothing of a pickle runs
(`pickles`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..hub import INDEX_NAME, check_variant, local_folder, pipeline_files
from ..io import open_tensors, read_json, tensor_names
from .config import AdapterConfig
from .io import CONFIG_NAME, only_weights, read_adapter, weights_name
from .layers import Fuser, InpaintConv, PositionNet
from .pickles import read_checkpoint
from .weights import check_finite, is_quantised, kind_of

LAYERS_PER_BLOCK = 2  # of SD 1.x, 2.x and SDXL; the original code numbers all blocks in one row
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PLACES = ("state_dict", "model_state_dict", "model", "module", "unet", "ema", "model_ema", "ema_state_dict")
_NEEDED = re.compile(
    r"(?!first_stage_model|cond_stage_model)(?:.*\.)?"
    r"(?:position_net\.|conv_in\.|input_blocks\.0\.0\.|\w+_blocks?\..*\.fuser\.)"
)
_UNET_PART = re.compile(
    r"(?:^|\.)((?:position_net|conv_in|down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\..*)"
)


def read_published(
    source: str | Path, *, slots: int | None = None, variant: str | None = None, **hub: Any
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Read configuration, weights with diffusers' names, and description of an adapter in any form.

    Args:
        source: a file, a folder, or a Hub repository.
        slots: grounding tokens per image; by default as the source says, else 30.
        variant: of the files to read, such as fp16.
        hub: revision, cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: it holds no adapter, or one that is damaged, incomplete, or of another kind.
    """
    path = Path(source)
    if not path.is_file():
        path = local_folder(
            source,
            "adapter",
            lambda files, _: _files_to_fetch(files, variant),
            check=lambda files: _check_variant(files, variant, source),
            **hub,
        )
        for folder in (path, path / "gligen_adapter", path / "adapter"):  # itself, of a pipeline, of a training run
            if (folder / CONFIG_NAME).is_file():
                config, state, about = read_adapter(folder, weights_name(variant) if variant else only_weights(folder))
                changed = {} if slots is None else {"slots": slots}
                return AdapterConfig.from_dict(config.to_dict() | changed), state, about
    state = _with_diffusers_names(_read(path, variant), source)
    index = _index(path)
    # The nine channels of an ordinary inpainting model have another meaning.
    ordinary = "Inpaint" in str(index.get("_class_name"))
    if ordinary or state.get("conv_in.weight", torch.empty(0, 0)).shape[1] != InpaintConv.CHANNELS:
        state = {name: value for name, value in state.items() if not name.startswith("conv_in.")}
    config = _configuration(state, source, index.get("gligen_slots", 30) if slots is None else slots)
    about = {
        "converted_from": path.name if Path(source).exists() else str(source),
        "base_family": FAMILIES.get(config.cross_attention_dim, "unknown"),
    }
    return config, state, about


def holds_adapter(file: Path) -> bool:
    """Tell whether a checkpoint in one file holds fusers; of a safetensors file only the header is read."""
    if file.suffix == ".safetensors":
        return _has_fusers(tensor_names(file))
    return _has_fusers(_weights_in(read_checkpoint(file, map_location="meta")))


# Which files --------------------------------------------------------------------------------------------------------


def _files_to_fetch(files: list[str], variant: str | None) -> list[str]:
    """Choose from a repository's files: an adapter, or else the U-Net, or else weights at the top."""
    adapter = [name for name in files if PurePosixPath(name).name.startswith("gligen_adapter")]
    unet = [name for name in pipeline_files(files, variant) if name.startswith("unet/")]
    alone = [name for name in files if "/" not in name and name.endswith(ENDINGS)]
    return [INDEX_NAME, *(adapter or unet or alone)]


def _check_variant(files: list[str], variant: str | None, source: str | Path) -> None:
    """Refuse a variant that neither the adapter nor the U-Net has. Without one, any variant that is alone will do."""
    if variant is None or any(PurePosixPath(name).name == weights_name(variant) for name in files):
        return
    check_variant(files, variant, source, ["unet"])


def _index(path: Path) -> dict[str, Any]:
    """Read the pipeline's index, if the folder or its parent has one."""
    for folder in (path, path.parent):
        if (file := folder / INDEX_NAME).is_file():
            return read_json(file)
    return {}


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """List the files that hold a U-Net's weights: safetensors rather than pickles, of one variant."""
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    files = [f"unet/{path.name}" for path in folder.iterdir()]
    _check_variant(files, variant, folder)
    chosen = [name.removeprefix("unet/") for name in pipeline_files(files, variant) if name.endswith(ENDINGS)]
    if not chosen:  # a variant alone, or a file of torch by another name
        chosen = [path.name for path in folder.iterdir() if path.name.endswith(ENDINGS)]
    if not chosen:
        raise FileNotFoundError(
            f"{folder} holds no weights; expected a pipeline folder with unet/, a U-Net folder, or an adapter folder"
        )
    return [folder / name for name in sorted(chosen)]


# Reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path, variant: str | None) -> dict[str, Tensor]:
    """Read every tensor that an adapter may need, by its name in the files."""
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else _weight_files(path, variant):
        if file.suffix == ".safetensors":
            with open_tensors(file) as opened:
                read = {name: opened.get_tensor(name) for name in opened.keys() if _NEEDED.match(name)}  # noqa: SIM118
        else:
            read = {
                name: value
                for name, value in _weights_in(read_checkpoint(file)).items()
                if isinstance(name, str) and isinstance(value, Tensor) and _NEEDED.match(name)
            }
        if twice := sorted(tensors.keys() & read.keys()):
            raise ValueError(f"{path} holds {twice[0]} in more than one file; name the variant, or the file itself")
        tensors |= read
    return tensors


def _weights_in(checkpoint: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the model's names and tensors, which trainers save one or two levels down, next to averages and the
    optimizer's state: GLIGEN saves {"model", "ema", "autoencoder", "opt", "config_dict", ...}."""
    if _has_fusers(checkpoint):
        return checkpoint
    for place in PLACES:
        if isinstance(inner := checkpoint.get(place), Mapping) and _has_fusers(weights := _weights_in(inner)):
            return weights
    return checkpoint


def _has_fusers(names: Iterable[Any]) -> bool:
    return any(isinstance(name, str) and ".fuser." in name for name in names)


def _with_diffusers_names(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = diffusers_name(name)
        if new in renamed:
            raise ValueError(f"{source} holds {new} twice, the second time as {name}; give the file of one model")
        renamed[new] = value
    return renamed


def diffusers_name(name: str) -> str:
    """`model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.linear.weight` ->
    `down_blocks.0.attentions.0.transformer_blocks.0.fuser.linear.weight`; diffusers' own names stay."""
    part = _UNET_PART.search(name)
    name = part[1] if part else name
    if name.startswith("input_blocks.0.0."):
        return name.replace("input_blocks.0.0", "conv_in")
    if name.startswith("middle_block.1."):
        return name.replace("middle_block.1", "mid_block.attentions.0")
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.1\.(.*)", name):
        number = int(match[2]) - (match[1] == "input")  # the input's first block is the convolution
        level, layer = divmod(number, LAYERS_PER_BLOCK + 1)
        return f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}.attentions.{layer}.{match[3]}"
    return name


def _configuration(state: Mapping[str, Tensor], source: object, slots: int) -> AdapterConfig:
    """Check that tensors are a whole adapter, and return its form."""
    blocks = sorted({name.split(".fuser.")[0] for name in state if ".fuser." in name})
    net = {name for name in state if name.startswith("position_net.")}
    if not blocks or not net:
        lacking = "fusers (names with .fuser.)" if not blocks else "position net (position_net.)"
        raise ValueError(f"{source} holds no GLIGEN adapter: it has no {lacking}")
    expected = {f"position_net.{name}" for name, _ in PositionNet(8, 8).named_parameters()}
    if net != expected:
        strange = sorted(net - expected)
        kind = f"; {strange[0]} is of another kind of grounding, and only text in boxes is supported" if strange else ""
        raise ValueError(f"{source} has another position net: it lacks {sorted(expected - net)[:3]}{kind}")
    width = state["position_net.linears.4.weight"].shape[0]
    fuser = [name for name, _ in Fuser(8, 2, 8).named_parameters()]
    for block in blocks:
        for name in fuser:
            if (full := f"{block}.fuser.{name}") not in state:
                raise ValueError(f"{source} is incomplete: it lacks {full}")
        if (got := state[f"{block}.fuser.linear.weight"].shape[1]) != width:
            raise ValueError(f"{source} contradicts itself: {block}.fuser reads tokens of width {got}, not {width}")
    for name, value in state.items():
        if is_quantised(value):
            raise ValueError(f"{source}: {name} is {kind_of(value)}; expected floating-point weights")
    check_finite(state, source)
    return AdapterConfig(
        cross_attention_dim=width,
        phrase_dim=len(state["position_net.null_positive_feature"]),
        slots=slots,
        inpaint="conv_in.weight" in state,
    )
