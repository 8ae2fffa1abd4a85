"""Attach an adapter to a loaded U-Net, and detach it.

    config = AdapterConfig(cross_attention_dim=2048, phrase_dim=2048)
    attach(unet, config)          # a fuser on every transformer block, gates at 0
    detach(unet)                  # as it was before

The U-Net's class and weights are never touched: its forward pass calls `position_net` and `fuser` where it finds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from .config import AdapterConfig
from .layers import Fuser, InpaintConv, PassThrough, PositionNet


@dataclass
class _Attachment:
    config: AdapterConfig
    about: Mapping[str, Any]  # what its file says beside its form: base model, training
    former_config: dict[str, Any]  # the U-Net's own settings that are others while it is on
    former_conv: nn.Conv2d
    scale: float = 1.0


@dataclass(frozen=True)
class DetachedAdapter:
    """An adapter between `detach` and `reattach`."""

    attachment: _Attachment
    modules: dict[str, nn.Module]  # by their names in the U-Net


def _bare(unet: Any) -> Any:
    """The U-Net itself, where `torch.compile` has put a wrapper around it."""
    return getattr(unet, "_orig_mod", unet)


def is_attached(unet: nn.Module | None) -> bool:
    return "_gligen" in getattr(_bare(unet), "__dict__", {})


def _attachment(unet: nn.Module) -> _Attachment:
    if not is_attached(unet):
        raise ValueError("this U-Net carries no GLIGEN adapter; attach or load one first")
    return _bare(unet).__dict__["_gligen"]


def adapter_config(unet: nn.Module) -> AdapterConfig:
    """The configuration of the attached adapter."""
    return _attachment(unet).config


def adapter_about(unet: nn.Module) -> dict[str, Any]:
    """What the file of the attached adapter says beside its form: base model, training."""
    return dict(_attachment(unet).about)


def attach(
    unet: UNet2DConditionModel,
    config: AdapterConfig,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    source: str = "the adapter",
) -> None:
    """Put an adapter on `unet`, on its device. On any error the U-Net is left as it was.

    Args:
        dtype: of the adapter; the U-Net's by default. Training keeps it in float32 beside a half-precision base.
        about: what is known of it; saved with it.
        state: its weights, named as in the U-Net; taken over, not copied, where device and dtype allow. Without them
            the adapter is fresh: gates 0, so that nothing changes until it is trained.
        source: where the weights come from, for errors.
    """
    unet = _bare(unet)
    if is_attached(unet):
        raise ValueError("this U-Net already carries a GLIGEN adapter; detach it first")
    if hasattr(unet, "position_net"):
        raise ValueError("this U-Net was loaded with attention_type='gated'; take its adapter over with adopt_gated")
    width = unet.config["cross_attention_dim"]
    if width != config.cross_attention_dim:
        raise ValueError(
            f"{source} is for a cross-attention width of {config.cross_attention_dim}, the U-Net has {width} "
            "(position_net.linears.4.weight): it is for another base model (SDXL 2048, SD 1.x 768, SD 2.x 1024)"
        )
    # Where the base has bits to compute with, so has the adapter; a U-Net on "meta" gets an adapter on "meta".
    device, dtype = unet.device, dtype or unet.dtype
    # All of it is made before any of it is put on. What is given weights is made without any of its own.
    with torch.device("meta" if state is not None else device):
        made = _new_modules(unet, config)
    if state is not None:
        _check_fit({name: value for name, value, _ in _tensors(made)}, state, source)
        if device.type != "meta" and (empty := [name for name, value in state.items() if value.is_meta]):
            raise ValueError(f"{source} has no values for {len(empty)} tensors, as {empty[0]}: its files lack them")
        for name, value, assign in _tensors(made):
            assign(nn.Parameter(state[name].to(device, dtype), requires_grad=value.requires_grad))
    for module in made.values():
        if isinstance(module, Fuser):
            module.scale = torch.ones((), device=device, dtype=dtype)
        module.train(unet.training)
    for _, value, _ in _tensors(made):
        value.data = value.data.to(device, dtype)
    changed = _changed_settings(config)
    former = {name: unet.config[name] for name in changed}
    unet.__dict__["_gligen"] = _Attachment(config, dict(about or {}), former, unet.conv_in)
    _put(unet, made)
    _set_config(unet, changed)


def _changed_settings(config: AdapterConfig) -> dict[str, Any]:
    """Settings of the U-Net itself that are others while an adapter is on."""
    settings: dict[str, Any] = {}
    if config.published_form:
        settings["attention_type"] = "gated"  # so that unet.save_pretrained gives what diffusers loads whole
    if config.inpaint:
        settings["in_channels"] = 4  # what pipelines make latents of
    return settings


def _set_config(unet: UNet2DConditionModel, settings: Mapping[str, Any]) -> None:
    """Change settings of the U-Net. What is set beside them stays, as the sign that an IP-Adapter is loaded."""
    beside = {name: value for name, value in vars(unet.config).items() if name in unet.config}
    unet.register_to_config(**settings)
    for name, value in beside.items():
        if name not in settings:
            setattr(unet.config, name, value)


def _new_modules(unet: UNet2DConditionModel, config: AdapterConfig) -> dict[str, nn.Module]:
    blocks = transformer_blocks(unet)
    if not blocks:
        raise ValueError("this U-Net has no transformer blocks to put fusers on")
    chosen = _fuser_blocks(list(blocks), config)
    made: dict[str, nn.Module] = {
        f"{name}.fuser": Fuser(
            block.dim, block.num_attention_heads, config.cross_attention_dim, config.grounding_logit_bias
        )
        if name in chosen
        else PassThrough()
        for name, block in blocks.items()
    }
    made["position_net"] = PositionNet(config.phrase_dim, config.cross_attention_dim)
    if config.inpaint:
        if hasattr(unet.conv_in, "base_layer"):  # wrapped by peft
            raise ValueError(
                "a LoRA lies on the U-Net's first convolution, whose place an inpainting adapter takes; load the "
                "adapter without it"
            )
        made["conv_in"] = InpaintConv(unet.conv_in)
    return made


def _fuser_blocks(names: list[str], config: AdapterConfig) -> set[str]:
    """Which of the transformer blocks, by name in the U-Net's order, carry a fuser."""
    if config.blocks == "first":
        names = [name for name in names if name.endswith(".0")]  # a group numbers its own from 0
    return set(names[:: config.every])


def _put(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        unet.get_submodule(parent).add_module(last, module)


def detach(unet: UNet2DConditionModel) -> DetachedAdapter:
    """Take the adapter off; the U-Net is what it was before. What is returned can be put back with `reattach`."""
    attachment = _attachment(unet)
    unet = _bare(unet)
    blocks = transformer_blocks(unet)
    modules: dict[str, nn.Module] = {f"{name}.fuser": block.fuser for name, block in blocks.items()}
    modules["position_net"] = unet.position_net
    for block in blocks.values():
        del block.fuser
    del unet.position_net
    if attachment.config.inpaint:
        modules["conv_in"] = unet.conv_in
        unet.conv_in = attachment.former_conv.to(unet.conv_in.weight)  # it may have been moved in the meantime
    del unet.__dict__["_gligen"]
    _set_config(unet, attachment.former_config)
    return DetachedAdapter(attachment, modules)


def reattach(unet: UNet2DConditionModel, carried: DetachedAdapter) -> None:
    """Put the very modules back that `detach` took off."""
    unet, attachment = _bare(unet), carried.attachment
    _put(unet, carried.modules)
    unet.__dict__["_gligen"] = attachment
    _set_config(unet, _changed_settings(attachment.config))


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


def inpaint_conv(unet: nn.Module) -> InpaintConv | None:
    """The first convolution of an attached inpainting adapter."""
    conv = _bare(unet).conv_in
    return conv if isinstance(conv, InpaintConv) else None


def lora_targets(unet: nn.Module, suffixes: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")) -> list[str]:
    """Full names of the base's layers that end so, for peft's `target_modules`: training leaves the adapter alone.

    >>> unet.add_adapter(LoraConfig(r=16, target_modules=lora_targets(unet)))

    The bare suffixes would put LoRAs on the fusers' attention too.
    """
    endings = tuple(f".{suffix}" for suffix in suffixes)
    names = (name for name, _ in _bare(unet).named_modules())
    return [name for name in names if name.endswith(endings) and not is_adapter_key(name)]


# State --------------------------------------------------------------------------------------------------------------


def is_adapter_key(name: str) -> bool:
    """Whether a tensor of a U-Net, by its name there, is one that every adapter has."""
    return name.startswith("position_net.") or ".fuser." in name


def adapter_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the U-Net. LoRAs that lie over them are not part of it."""
    conv = ("conv_in.weight", "conv_in.bias") if adapter_config(unet).inpaint else ()
    there = dict(_bare(unet).named_parameters())
    covered = tuple({name.split("base_layer.")[0] for name in there if ".base_layer." in name})  # by peft
    bare = {
        name.replace(".base_layer.", "."): value
        for name, value in there.items()
        if ".base_layer." in name or not name.startswith(covered)
    }
    return {name: value for name, value in bare.items() if is_adapter_key(name) or name in conv}


def adapter_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in adapter_parameters(unet).items()}


@torch.no_grad()
def load_adapter_state_dict(unet: nn.Module, state: Mapping[str, Tensor], *, source: str = "the adapter") -> None:
    """Copy weights into the attached adapter; nothing is changed unless every name and shape fits."""
    parameters = adapter_parameters(unet)
    _check_fit(parameters, state, source)
    for name, value in parameters.items():
        value.copy_(state[name])


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    for name in sorted(expected.keys() & state.keys()):
        if is_quantised(state[name]):
            raise ValueError(
                f"{source} holds {name} as {kind_of(state[name])}; expected floating-point weights, not quantised "
                "ones. A base is quantised without them by modules_to_not_convert=['fuser', 'position_net']"
            )
        if expected[name].shape != state[name].shape:
            raise ValueError(
                f"{source} does not fit this U-Net: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(expected[name].shape)}; it is for another base model"
            )
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors, as {missing[0]}"] if missing else []
        parts += [f"has {len(unknown)} that the U-Net does not, as {unknown[0]}"] if unknown else []
        why = "is for another base model" if unknown else "is not whole, or for another base model"
        raise ValueError(f"{source} does not fit this U-Net: it {' and '.join(parts)}; it {why}")


def is_quantised(value: Tensor) -> bool:
    """Whether a weight is no plain floating-point tensor: torchao and bitsandbytes have classes of their own."""
    return type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point()


def kind_of(value: Tensor) -> str:
    return f"{type(value).__name__} of {value.dtype}"


def gate_values(unet: nn.Module) -> dict[str, float]:
    """|tanh(alpha)| of every gate by name: how far each fuser is open, 0 to 1."""
    gates = {name: value for name, value in adapter_parameters(unet).items() if ".alpha_" in name}
    values = torch.stack([value.detach().float() for value in gates.values()]).tanh().abs().tolist()
    return dict(zip(gates, values, strict=True))


def set_adapter_scale(unet: nn.Module, scale: float) -> None:
    """Multiply every gate at run time: 1 as trained, 0 off. The weights stay as they are."""
    attachment = _attachment(unet)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale is {scale!r}; expected a number: 1 as trained, 0 off")
    attachment.scale = float(scale)
    fade_adapter(unet, 1.0)


def fade_adapter(unet: nn.Module, factor: float) -> None:
    """Multiply the scale that was set, for the while: 1 puts it back."""
    scale = _attachment(unet).scale * factor
    for fuser in fusers(unet).values():
        fuser.scale.fill_(scale)


# Diffusers' own form ------------------------------------------------------------------------------------------------


def is_gated(unet: nn.Module | None) -> bool:
    """Whether diffusers made this U-Net with an adapter in it, which has not been taken over."""
    return hasattr(_bare(unet), "position_net") and not is_attached(unet)


def adopt_gated(unet: UNet2DConditionModel, *, slots: int = 30, inpaint: bool = False) -> AdapterConfig:
    """Put our modules in place of those of a U-Net that diffusers loaded with `attention_type="gated"`.

    The weights are kept; afterwards the U-Net is as if `attach` had been called on the plain one.

    Args:
        inpaint: its first convolution, of 9 channels, is that of GLIGEN's inpainting models.
    """
    unet = _bare(unet)
    if not is_gated(unet):
        raise ValueError("this U-Net was not loaded with attention_type='gated'; there is nothing to take over")
    if unet.config["attention_type"] != "gated":
        raise ValueError("this U-Net is grounded by text and images; only text-and-box grounding is supported")
    extra = ("conv_in.weight", "conv_in.bias") if inpaint else ()
    state = {name: value for name, value in unet.state_dict().items() if is_adapter_key(name) or name in extra}
    config = AdapterConfig(
        cross_attention_dim=unet.config["cross_attention_dim"],
        phrase_dim=len(state["position_net.null_positive_feature"]),
        slots=slots,
        inpaint=inpaint,
    )
    blocks = transformer_blocks(unet).values()
    theirs = unet.position_net, [block.fuser for block in blocks]
    for block in blocks:
        del block.fuser
    del unet.position_net
    unet.register_to_config(attention_type="default")
    try:
        attach(unet, config, state=state, source="this gated U-Net")
    except BaseException:
        unet.register_to_config(attention_type="gated")
        _put(unet, {"position_net": theirs[0]})
        for block, fuser in zip(blocks, theirs[1], strict=True):
            block.add_module("fuser", fuser)
        raise
    return config


def set_slots(unet: nn.Module, slots: int) -> None:
    """Give the attached adapter another number of grounding tokens: a gated U-Net's file does not say it."""
    attachment = _attachment(unet)
    attachment.config = AdapterConfig.from_dict(attachment.config.to_dict() | {"slots": slots})


def set_grounding_logit_bias(unet: UNet2DConditionModel, bias: float) -> None:
    """Change the logit bias of the attached adapter, in its fusers and in what is saved with it."""
    unet, attachment = _bare(unet), _attachment(unet)
    if bias == attachment.config.grounding_logit_bias:
        return
    former = attachment.config
    attachment.config = replace(former, grounding_logit_bias=float(bias))
    for fuser in fusers(unet).values():
        fuser.attn.grounding_logit_bias = float(bias)
    if former.published_form != attachment.config.published_form:
        _set_config(unet, attachment.former_config)
        changed = _changed_settings(attachment.config)
        attachment.former_config = {name: unet.config[name] for name in changed}
        _set_config(unet, changed)


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Name in the U-Net, value and setter of every parameter of an adapter's own modules."""
    for prefix, module in modules.items():
        for name, value in module.named_parameters():
            if name.startswith("plain."):  # the first convolution of the base
                continue
            owner, _, last = name.rpartition(".")
            place = module.get_submodule(owner)
            yield f"{prefix}.{name}", value, lambda new, place=place, last=last: setattr(place, last, new)
