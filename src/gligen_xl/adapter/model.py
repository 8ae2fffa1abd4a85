"""Attach an adapter to a loaded U-Net, detach it, save it, load it.

    config = AdapterConfig(cross_attention_dim=2048, phrase_dim=2048)
    attach(unet, config)          # a fuser on every transformer block, gates at 0
    save_adapter(unet, "mine")    # gligen_adapter.safetensors, gligen_adapter.json
    detach(unet)                  # as it was before

The U-Net's class and weights are never touched: its forward pass calls `position_net` and `fuser` where it finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import read_json, whole_file, write_json
from .config import AdapterConfig
from .layers import Fuser, PassThrough, PositionNet

WEIGHTS_NAME, CONFIG_NAME = "gligen_adapter.safetensors", "gligen_adapter.json"
FORMAT, VERSION = "gligen-xl-adapter", 1


@dataclass(frozen=True)
class _Attachment:
    config: AdapterConfig
    former_attention_type: str
    about: Mapping[str, Any]  # what its file says beside its form: base model, training


@dataclass(frozen=True)
class DetachedAdapter:
    """An adapter between `detach` and `reattach`."""

    attachment: _Attachment
    position_net: nn.Module
    fusers: dict[str, nn.Module]


def _bare(unet: Any) -> Any:
    """The U-Net itself, where `torch.compile` has put a wrapper around it."""
    return getattr(unet, "_orig_mod", unet)


def is_attached(unet: nn.Module) -> bool:
    return "_gligen" in _bare(unet).__dict__


def adapter_config(unet: nn.Module) -> AdapterConfig:
    """The configuration of the attached adapter."""
    if not is_attached(unet):
        raise ValueError("this U-Net carries no GLIGEN adapter; attach or load one first")
    return _bare(unet).__dict__["_gligen"].config


def adapter_about(unet: nn.Module) -> dict[str, Any]:
    """What the file of the attached adapter says beside its form: base model, training."""
    adapter_config(unet)
    return dict(_bare(unet).__dict__["_gligen"].about)


def attach(
    unet: UNet2DConditionModel,
    config: AdapterConfig,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Put a fresh adapter on `unet`, on its device: gates 0, so that nothing changes until it is trained or loaded.

    Args:
        dtype: of the adapter; the U-Net's by default. Training keeps it in float32 beside a half-precision base.
        about: what is known of it; saved with it.
    """
    unet = _bare(unet)
    if is_attached(unet):
        raise ValueError("this U-Net already carries a GLIGEN adapter; detach it first")
    if hasattr(unet, "position_net"):
        raise ValueError("this U-Net was loaded with attention_type='gated'; take its adapter over with adopt_gated")
    width = unet.config["cross_attention_dim"]
    if width != config.cross_attention_dim:
        raise ValueError(
            f"the adapter is for a cross-attention width of {config.cross_attention_dim}, the U-Net has {width}: "
            "it is for another base model (SDXL 2048, SD 1.x 768, SD 2.x 1024)"
        )
    blocks = transformer_blocks(unet)
    if not blocks:
        raise ValueError("this U-Net has no transformer blocks to put fusers on")
    # Where the base has bits to compute with, so has the adapter; a U-Net on "meta" gets an adapter on "meta".
    options = {"device": unet.device, "dtype": dtype or unet.dtype}
    with torch.device(unet.device):
        made: list[nn.Module] = [
            PassThrough()
            if k % config.every
            else Fuser(block.dim, block.num_attention_heads, config.cross_attention_dim, config.grounding_logit_bias)
            for k, block in enumerate(blocks.values())
        ]
        position_net = PositionNet(config.phrase_dim, config.cross_attention_dim)
    # All of it is made before any of it is put on: where memory runs out, the U-Net stays as it was.
    made = [fuser.to(**options) for fuser in made]
    position_net.to(**options)
    for block, fuser in zip(blocks.values(), made, strict=True):
        block.add_module("fuser", fuser.train(block.training))
    unet.add_module("position_net", position_net.train(unet.training))
    unet.__dict__["_gligen"] = _Attachment(config, unet.config["attention_type"], dict(about or {}))
    if config.published_form:  # so that unet.save_pretrained gives a gated U-Net that diffusers loads whole
        unet.register_to_config(attention_type="gated")


def detach(unet: UNet2DConditionModel) -> DetachedAdapter:
    """Take the adapter off; the U-Net is what it was before. What is returned can be put back with `reattach`."""
    adapter_config(unet)
    unet = _bare(unet)
    blocks = transformer_blocks(unet)
    carried = DetachedAdapter(
        unet.__dict__.pop("_gligen"), unet.position_net, {name: block.fuser for name, block in blocks.items()}
    )
    for block in blocks.values():
        del block.fuser
    del unet.position_net
    unet.register_to_config(attention_type=carried.attachment.former_attention_type)
    return carried


def reattach(unet: UNet2DConditionModel, carried: DetachedAdapter) -> None:
    """Put the very modules back that `detach` took off."""
    unet = _bare(unet)
    for name, block in transformer_blocks(unet).items():
        block.add_module("fuser", carried.fusers[name])
    unet.add_module("position_net", carried.position_net)
    unet.__dict__["_gligen"] = carried.attachment
    if carried.attachment.config.published_form:
        unet.register_to_config(attention_type="gated")


@contextmanager
def detached(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside the block the U-Net carries no adapter, afterwards the same one again. Without one: nothing happens."""
    carried = detach(unet) if is_attached(unet) else None
    try:
        yield
    finally:
        if carried is not None:
            reattach(unet, carried)


def transformer_blocks(unet: nn.Module) -> dict[str, BasicTransformerBlock]:
    """The transformer blocks of a U-Net by name, in the order in which it holds them."""
    return {name: module for name, module in _bare(unet).named_modules() if isinstance(module, BasicTransformerBlock)}


def fusers(unet: nn.Module) -> dict[str, Fuser]:
    return {name: module for name, module in _bare(unet).named_modules() if isinstance(module, Fuser)}


# State --------------------------------------------------------------------------------------------------------------


def is_adapter_key(name: str) -> bool:
    return name.startswith("position_net.") or ".fuser." in name


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the U-Net."""
    adapter_config(unet)
    return {name: value for name, value in _bare(unet).named_parameters() if is_adapter_key(name)}


def adapter_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in adapter_parameters(unet).items()}


@torch.no_grad()
def load_adapter_state_dict(unet: nn.Module, state: Mapping[str, Tensor], *, source: str = "the adapter") -> None:
    """Copy weights into the attached adapter; nothing is changed unless every name and shape fits."""
    parameters = adapter_parameters(unet)
    missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors, as {missing[0]}"] if missing else []
        parts += [f"has {len(unknown)} that the U-Net does not, as {unknown[0]}"] if unknown else []
        raise ValueError(f"{source} does not fit this U-Net: it {' and '.join(parts)}; it is for another base model")
    for name, value in parameters.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{source} does not fit this U-Net: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(value.shape)}; it is for another base model"
            )
    for name, value in parameters.items():
        value.copy_(state[name])


def gate_values(unet: nn.Module) -> dict[str, float]:
    """|tanh(alpha)| of every gate by name: how far each fuser is open, 0 to 1."""
    gates = {name: value for name, value in adapter_parameters(unet).items() if ".alpha_" in name}
    values = torch.stack([value.detach().float() for value in gates.values()]).tanh().abs().tolist()
    return dict(zip(gates, values, strict=True))


def set_adapter_scale(unet: nn.Module, scale: float) -> None:
    """Multiply every gate at run time: 1 as trained, 0 off. The weights stay as they are."""
    adapter_config(unet)
    for fuser in fusers(unet).values():
        fuser.scale.fill_(scale)


# Files --------------------------------------------------------------------------------------------------------------


def save_adapter(
    unet: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the attached adapter as `gligen_adapter.safetensors` and `gligen_adapter.json`; nothing of the base.

    Args:
        dtype: to save in; as it is by default.
        metadata: anything JSON about base model and training; by default what the adapter was loaded with.
        state: weights to save in place of the attached ones, as their average.
    """
    folder = Path(folder)
    config = adapter_config(unet)
    tensors = {
        name: value.to("cpu", dtype or value.dtype).contiguous()
        for name, value in (state or adapter_state_dict(unet)).items()
    }
    with whole_file(folder / WEIGHTS_NAME) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    about = adapter_about(unet) if metadata is None else metadata
    write_json(folder / CONFIG_NAME, describe_adapter(config, about))


def describe_adapter(config: AdapterConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `gligen_adapter.json` holds."""
    return {**about, "format": FORMAT, "version": VERSION, "config": config.to_dict()}


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration and weights of an adapter folder, and what else its description says.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or not of this format.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {name}")
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
        weights = load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is damaged or not a safetensors file: {error}") from error
    about = {name: value for name, value in description.items() if name not in ("format", "version", "config")}
    return config, weights, about


def load_adapter(
    unet: UNet2DConditionModel, source: str | Path, *, subfolder: str | None = None, **hub: Any
) -> AdapterConfig:
    """Attach the adapter of a folder or Hub repository. On any error the U-Net is left as it was.

    Args:
        subfolder: where in the folder or repository the adapter lies.
        hub: revision, cache_dir, token, local_files_only, for repositories.
    """
    folder = adapter_folder(source, subfolder=subfolder, **hub)
    config, state, about = read_adapter(folder)
    if unet.device.type == "meta":
        raise ValueError(
            "the U-Net's weights are not in memory (sequential offload?); load the adapter before enabling it"
        )
    attach(unet, config, about=about)
    try:
        load_adapter_state_dict(unet, state, source=str(source))
    except BaseException:
        detach(unet)
        raise
    return config


def names_repository(source: str | Path) -> bool:
    """Whether `source` reads as a Hub repository, owner/name, and not as a path."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def adapter_folder(source: str | Path, *, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of an adapter, fetched from the Hub where `source` names a repository there."""
    root = Path(source)
    if not root.is_dir():
        if not names_repository(source):
            raise FileNotFoundError(f"no adapter folder {source}; expected a folder or a Hub repository (owner/name)")
        prefix = f"{subfolder}/" if subfolder else ""
        root = Path(snapshot_download(str(source), allow_patterns=[prefix + CONFIG_NAME, prefix + WEIGHTS_NAME], **hub))
    return root / subfolder if subfolder else root


# Diffusers' own form ------------------------------------------------------------------------------------------------


def adopt_gated(unet: UNet2DConditionModel, *, slots: int = 30) -> AdapterConfig:
    """Put our modules in place of those of a U-Net that diffusers loaded with `attention_type="gated"`.

    The weights are kept; afterwards the U-Net is as if `attach` had been called on the plain one.
    """
    if is_attached(unet) or not hasattr(unet, "position_net"):
        raise ValueError("this U-Net was not loaded with attention_type='gated'; there is nothing to take over")
    state = {name: value for name, value in unet.state_dict().items() if is_adapter_key(name)}
    phrase_dim = state.get("position_net.null_positive_feature")
    if phrase_dim is None:
        raise ValueError("this U-Net is grounded by text and images; only text-and-box grounding is supported")
    config = AdapterConfig(
        cross_attention_dim=unet.config["cross_attention_dim"], phrase_dim=len(phrase_dim), slots=slots
    )
    for block in transformer_blocks(unet).values():
        del block.fuser
    del unet.position_net
    unet.register_to_config(attention_type="default")
    attach(unet, config)
    load_adapter_state_dict(unet, state)
    return config
