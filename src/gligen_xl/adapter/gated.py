"""diffusers' own form of an adapter: a U-Net that it loaded with `attention_type="gated"`."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn

from .attach import GligenAdapter
from .config import AdapterConfig
from .unet import bare, is_adapter_key, transformer_blocks


def is_gated(unet: nn.Module | None) -> bool:
    """Tell whether diffusers made this U-Net with an adapter in it, which is not yet ours."""
    return hasattr(bare(unet), "position_net") and GligenAdapter.find(unet) is None


def adopt_gated(unet: UNet2DConditionModel, *, slots: int = 30, inpaint: bool = False) -> GligenAdapter:
    """Replace the adapter modules of a gated U-Net by ours, with their weights.

    Afterwards the U-Net is as if an adapter had been attached to the plain one. On any error it is left as it was.

    Args:
        inpaint: its first convolution, of 9 channels, is that of GLIGEN's inpainting models.

    Raises:
        ValueError: it is not gated, or is grounded by something else than text and boxes.
    """
    unet = bare(unet)
    if not is_gated(unet):
        raise ValueError("this U-Net was not loaded with attention_type='gated'; it has no adapter to convert")
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
    position_net, fusers = unet.position_net, [block.fuser for block in blocks]
    for block in blocks:
        del block.fuser
    del unet.position_net
    unet.register_to_config(attention_type="default")
    try:
        return GligenAdapter.attach(unet, config, state=state, source="this gated U-Net")
    except BaseException:
        unet.register_to_config(attention_type="gated")
        unet.add_module("position_net", position_net)
        for block, fuser in zip(blocks, fusers, strict=True):
            block.add_module("fuser", fuser)
        raise
