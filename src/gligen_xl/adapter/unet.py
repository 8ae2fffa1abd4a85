"""The U-Net's side of an adapter: its transformer blocks, its settings, and the modules that are put on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from .config import AdapterConfig
from .layers import Fuser, InpaintConv, PassThrough, PositionNet


def bare(unet: Any) -> Any:
    """Return the U-Net itself if `torch.compile` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def transformer_blocks(unet: nn.Module) -> dict[str, BasicTransformerBlock]:
    """Return the transformer blocks of a U-Net by name, in its order."""
    return {name: module for name, module in bare(unet).named_modules() if isinstance(module, BasicTransformerBlock)}


def is_adapter_key(name: str) -> bool:
    """Tell whether a tensor of a U-Net, by its name there, belongs to the adapter (of every kind: fusers, position
    net)."""
    return name.startswith("position_net.") or ".fuser." in name


def lora_targets(unet: nn.Module, suffixes: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")) -> list[str]:
    """Return the full names of the base's layers that end so, for peft's `target_modules`.

    >>> unet.add_adapter(LoraConfig(r=16, target_modules=lora_targets(unet)))

    The bare suffixes would put LoRAs on the fusers' attention too.
    """
    endings = tuple(f".{suffix}" for suffix in suffixes)
    names = (name for name, _ in bare(unet).named_modules())
    return [name for name in names if name.endswith(endings) and not is_adapter_key(name)]


def new_modules(unet: UNet2DConditionModel, config: AdapterConfig) -> dict[str, nn.Module]:
    """Make the modules of an adapter by their names in the U-Net, in the order of its parameters."""
    blocks = transformer_blocks(unet)
    if not blocks:
        raise ValueError("this U-Net has no transformer blocks to put fusers on")
    names = [name for name in blocks if config.blocks == "all" or name.endswith(".0")]  # each group counts from 0
    chosen = set(names[:: config.every])
    modules: dict[str, nn.Module] = {}
    if config.inpaint:
        if hasattr(unet.conv_in, "base_layer"):  # wrapped by peft
            raise ValueError(
                "a LoRA is on the U-Net's first convolution, which an inpainting adapter replaces; load the adapter "
                "without the LoRA"
            )
        modules["conv_in"] = InpaintConv(unet.conv_in)
    for name, block in blocks.items():
        width, heads, bias = block.dim, block.num_attention_heads, config.grounding_logit_bias
        fuser = Fuser(width, heads, config.cross_attention_dim, bias) if name in chosen else PassThrough()
        modules[f"{name}.fuser"] = fuser
    modules["position_net"] = PositionNet(config.phrase_dim, config.cross_attention_dim)
    return modules


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": value for prefix, module in modules.items() for name, value in own_parameters(module)}


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters by name, without the base's convolution and without peft's layers over it."""
    parameters = dict(module.named_parameters())
    wrapped = tuple({name.split("base_layer.")[0] for name in parameters if "base_layer." in name})
    for name, value in parameters.items():
        own = name.replace("base_layer.", "")
        if (own != name or not name.startswith(wrapped)) and not own.startswith("plain."):
            yield own, value


def changed_settings(config: AdapterConfig) -> dict[str, Any]:
    """Return the settings of the U-Net itself that change while an adapter is on."""
    settings: dict[str, Any] = {}
    if config.published_form:
        settings["attention_type"] = "gated"  # so that unet.save_pretrained gives what diffusers loads whole
    if config.inpaint:
        settings["in_channels"] = 4  # what pipelines make latents of
    return settings


def set_config(unet: UNet2DConditionModel, settings: Mapping[str, Any]) -> None:
    """Change settings of the U-Net, and keep the attributes that others set on its config, as IP-Adapters do."""
    others = {name: value for name, value in vars(unet.config).items() if name in unet.config and name not in settings}
    unet.register_to_config(**settings)
    for name, value in others.items():
        setattr(unet.config, name, value)
