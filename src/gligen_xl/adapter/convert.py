"""Other projects' weights become adapters: gated U-Nets of diffusers, and GLIGEN's own files.

Understood are folders of diffusers (a pipeline, or its U-Net) with safetensors, sharded or not, or pickled weights;
single files, safetensors or pickled, with diffusers' names or those of the original latent diffusion code, the adapter
alone or among everything else; and adapter folders of this library, or of its training runs. Nothing of a pickle runs
(`pickles`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..hub import INDEX_NAME, check_variant, local_folder, pipeline_files
from ..io import read_json
from ..limits import check_safetensors
from .config import AdapterConfig
from .io import CONFIG_NAME, only_weights, read_adapter, weights_name
from .layers import Fuser, InpaintConv, PositionNet
from .pickles import read_checkpoint

LAYERS_PER_BLOCK = 2  # of SD 1.x, 2.x and SDXL; the original code numbers its blocks through
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WANTED = re.compile(
    r"(?!first_stage_model|cond_stage_model)(?:.*\.)?"
    r"(?:position_net\.|conv_in\.|input_blocks\.0\.0\.|\w+_blocks?\..*\.fuser\.)"
)
PLACES = ("state_dict", "model_state_dict", "model", "module", "unet", "ema", "model_ema", "ema_state_dict")
STARTS = re.compile(
    r"(?:^|\.)((?:position_net|conv_in|down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\..*)"
)


def read_published(
    source: str | Path, *, slots: int | None = None, variant: str | None = None, **hub: Any
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, weights with diffusers' names, and what is known of an adapter in any form.

    Args:
        source: a file, a folder, or a Hub repository.
        slots: grounding tokens an image; by default as the source says, else 30.
        variant: as fp16, of the files to read.
        hub: revision, cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no adapter in it, or one that is damaged, incomplete, or of another kind.
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
    found = _renamed(_read(path, variant), str(source))
    index = _index(path)
    ordinary = "Inpaint" in str(index.get("_class_name"))  # its first convolution is that of another kind of inpainting
    if ordinary or found.get("conv_in.weight", torch.empty(0, 0)).shape[1] != InpaintConv.CHANNELS:
        found = {name: value for name, value in found.items() if not name.startswith("conv_in.")}
    config = _configuration(found, str(source), index.get("gligen_slots", 30) if slots is None else slots)
    about = {"converted_from": path.name if Path(source).exists() else str(source)}
    about["base_family"] = FAMILIES.get(config.cross_attention_dim, "unknown")
    return config, found, about


def holds_adapter(file: Path) -> bool:
    """Whether a checkpoint in one file holds fusers; of a safetensors file only the header is read."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                return any(".fuser." in name for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    return any(".fuser." in str(name) for name in _weights_in(read_checkpoint(file, map_location="meta")))


# Which files --------------------------------------------------------------------------------------------------------


def _files_to_fetch(files: list[str], variant: str | None) -> list[str]:
    """Of a repository: an adapter, or else the U-Net, or else the weights that lie there alone."""
    adapter = [name for name in files if PurePosixPath(name).name.startswith("gligen_adapter")]
    unet = [name for name in pipeline_files(files, variant) if name.startswith("unet/")]
    alone = [name for name in files if "/" not in name and name.endswith(ENDINGS)]
    return [INDEX_NAME, *(adapter or unet or alone)]


def _check_variant(files: list[str], variant: str | None, source: str | Path) -> None:
    """Refuse a variant that neither the adapter nor the U-Net has. Without one, any that stands alone will do."""
    if variant is None or any(PurePosixPath(name).name == weights_name(variant) for name in files):
        return
    check_variant(files, variant, source, ["unet"])


def _index(path: Path) -> dict[str, Any]:
    """The pipeline's index, of its folder or of one in it."""
    for folder in (path, path.parent):
        if (file := folder / INDEX_NAME).is_file():
            return read_json(file)
    return {}


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a U-Net folder that hold its weights; safetensors rather than pickles, one variant."""
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    files = [f"unet/{path.name}" for path in folder.iterdir()]
    _check_variant(files, variant, folder)
    chosen = [name.removeprefix("unet/") for name in pipeline_files(files, variant)]
    chosen = [name for name in chosen if name.endswith(ENDINGS)]
    if not chosen:  # no plain one: a variant will do, or a file of torch by another name
        chosen = sorted(path.name for path in folder.iterdir() if path.name.endswith(ENDINGS))
    if not chosen:
        raise FileNotFoundError(
            f"{folder} holds no weights; expected a pipeline folder with unet/, a U-Net folder, or an adapter folder"
        )
    return [folder / name for name in sorted(chosen)]


# Reading ------------------------------------------------------------------------------------------------------------


def _read(path: Path, variant: str | None) -> dict[str, Tensor]:
    """Every tensor that an adapter may want, by its name in the files."""
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else _weight_files(path, variant):
        read = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        if twice := sorted(tensors.keys() & read.keys()):
            raise ValueError(f"{path} holds {twice[0]} in more than one file; name the variant, or the file itself")
        tensors |= read
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    check_safetensors(file)
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if WANTED.match(name)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in _weights_in(read_checkpoint(file)).items()
        if isinstance(name, str) and isinstance(value, Tensor) and WANTED.match(name)
    }


def _weights_in(checkpoint: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The names and tensors of the model, which trainers put one or two levels down, beside their averages and the
    optimizer's state: GLIGEN's saves {"model", "ema", "autoencoder", "opt", "config_dict", ...}."""
    if any(isinstance(name, str) and ".fuser." in name for name in checkpoint):
        return checkpoint
    for inner in PLACES:
        if isinstance(place := checkpoint.get(inner), Mapping):
            found = _weights_in(place)
            if any(isinstance(name, str) and ".fuser." in name for name in found):
                return found
    return checkpoint


# Names --------------------------------------------------------------------------------------------------------------


def _renamed(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """By diffusers' names, without what stands before them."""
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
    found = STARTS.search(name)
    name = found[1] if found else name
    if match := re.fullmatch(r"input_blocks\.0\.0\.(weight|bias)", name):
        return f"conv_in.{match[1]}"
    if match := re.fullmatch(r"middle_block\.1\.(.*)", name):
        return f"mid_block.attentions.0.{match[1]}"
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.1\.(.*)", name):
        number = int(match[2]) - (match[1] == "input")  # the input's first block is the convolution
        level, layer = divmod(number, LAYERS_PER_BLOCK + 1)
        return f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}.attentions.{layer}.{match[3]}"
    return name


# What it is ---------------------------------------------------------------------------------------------------------


def _configuration(state: Mapping[str, Tensor], source: str, slots: int) -> AdapterConfig:
    """The form that the tensors have, once they are known to be whole."""
    blocks = sorted({name.split(".fuser.")[0] for name in state if ".fuser." in name})
    net = {name for name in state if name.startswith("position_net.")}
    if not blocks or not net:
        lacking = "fusers (names with .fuser.)" if not blocks else "position net (position_net.)"
        raise ValueError(f"{source} holds no GLIGEN adapter: it has no {lacking}")
    expected = {f"position_net.{name}" for name in _names(PositionNet(8, 8))}
    if net != expected:
        strange = sorted(net - expected)
        kind = f"; {strange[0]} is of another kind of grounding, and only text in boxes is supported" if strange else ""
        raise ValueError(f"{source} has another position net: it lacks {sorted(expected - net)[:3]}{kind}")
    width = state["position_net.linears.4.weight"].shape[0]
    for block in blocks:
        for name in _names(Fuser(8, 2, 8)):
            if (full := f"{block}.fuser.{name}") not in state:
                raise ValueError(f"{source} is not whole: {full} is missing")
        if (got := state[f"{block}.fuser.linear.weight"].shape[1]) != width:
            raise ValueError(f"{source} does not fit itself: {block}.fuser reads tokens of width {got}, not {width}")
    for name, value in state.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are no finite numbers ({value.dtype})")
    return AdapterConfig(
        cross_attention_dim=width,
        phrase_dim=len(state["position_net.null_positive_feature"]),
        slots=slots,
        inpaint="conv_in.weight" in state,
    )


def _names(module: nn.Module) -> Iterable[str]:
    return [name for name, _ in module.named_parameters()]
