"""An adapter on a loaded U-Net.

    adapter = GligenAdapter.attach(unet, AdapterConfig(cross_attention_dim=2048, phrase_dim=2048))
    adapter.set_scale(0.8)
    adapter.save("mine")
    adapter.detach()              # the U-Net is what it was before

The U-Net's class and weights are never changed: its forward pass calls `position_net` and `fuser` wherever it finds
them, and the adapter puts them there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor, nn

from .config import AdapterConfig
from .io import adapter_folder, only_weights, read_adapter, weights_name, write_adapter
from .layers import Fuser, InpaintConv
from .unet import bare, changed_settings, named_parameters, new_modules, own_parameters, set_config
from .weights import check_fit


@dataclass
class _Attachment:
    """What a U-Net carries in its `__dict__` while an adapter is on. It holds no reference to the U-Net, so that a
    U-Net without users is freed at once."""

    config: AdapterConfig
    about: dict[str, Any]
    modules: dict[str, nn.Module]  # by their names in the U-Net
    plain_settings: dict[str, Any]  # the U-Net's own settings that differ while the adapter is on
    plain_conv: nn.Conv2d
    scale: float = 1.0


class GligenAdapter:
    """The adapter of one U-Net: a fuser on its transformer blocks, a position net, and what is known of them.

    Make one with `attach`, `load` or, for a U-Net that already carries one, `of`.
    """

    def __init__(self, unet: Any, attachment: _Attachment):
        self.unet = unet
        self._attachment = attachment

    # On and off a U-Net ---------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, unet: nn.Module | None) -> GligenAdapter | None:
        """Return the adapter that a U-Net carries, or None."""
        unet = bare(unet)
        attachment = getattr(unet, "__dict__", {}).get("_gligen")
        return None if attachment is None else cls(unet, attachment)

    @classmethod
    def of(cls, unet: nn.Module) -> GligenAdapter:
        """Return the adapter that a U-Net carries.

        Raises:
            ValueError: it carries none.
        """
        if (adapter := cls.find(unet)) is None:
            raise ValueError("this U-Net carries no GLIGEN adapter; attach or load one first")
        return adapter

    @classmethod
    def attach(
        cls,
        unet: UNet2DConditionModel,
        config: AdapterConfig,
        *,
        dtype: torch.dtype | None = None,
        about: Mapping[str, Any] | None = None,
        state: Mapping[str, Tensor] | None = None,
        source: str = "the adapter",
    ) -> GligenAdapter:
        """Put an adapter on `unet`, on its device. On any error the U-Net is left as it was.

        Args:
            dtype: of the adapter; the U-Net's by default. Training keeps it in float32 on a half-precision base.
            about: base model and training, as JSON values; saved with the adapter.
            state: its weights, named as in the U-Net; used without a copy where device and dtype allow. Without them
                the adapter is fresh: its gates are 0, so nothing changes until it is trained.
            source: where the weights come from, for errors.

        Raises:
            ValueError: the U-Net has an adapter already, or config or weights are for another base model.
        """
        unet = bare(unet)
        if cls.find(unet) is not None:
            raise ValueError("this U-Net already carries a GLIGEN adapter; detach it first")
        if hasattr(unet, "position_net"):
            raise ValueError("this U-Net was loaded with attention_type='gated'; convert its adapter with adopt_gated")
        width = unet.config["cross_attention_dim"]
        if width != config.cross_attention_dim:
            raise ValueError(
                f"{source} is for a cross-attention width of {config.cross_attention_dim}, the U-Net has {width} "
                "(position_net.linears.4.weight): it is for another base model (SDXL 2048, SD 1.x 768, SD 2.x 1024)"
            )
        # A U-Net on "meta" gets an adapter on "meta". Modules that are given weights are made without their own.
        device, dtype = unet.device, dtype or unet.dtype
        with torch.device("meta" if state is not None else device):
            modules = new_modules(unet, config)
        fresh = named_parameters(modules)
        if state is not None:
            check_fit(fresh, state, source)
            if device.type != "meta" and (empty := [name for name, value in state.items() if value.is_meta]):
                raise ValueError(
                    f"{source} has no values for {len(empty)} tensors, such as {empty[0]}; its files lack them"
                )
        for prefix, module in modules.items():
            own = {name: (state or fresh)[f"{prefix}.{name}"] for name, _ in own_parameters(module)}
            own = {name: value.detach().to(device, dtype) for name, value in own.items()}
            module.load_state_dict(own, strict=False, assign=True)
            if isinstance(module, Fuser):
                module.scale = torch.ones((), device=device, dtype=dtype)
            module.train(unet.training)
        changed = changed_settings(config)
        plain = {name: unet.config[name] for name in changed}
        adapter = cls(unet, _Attachment(config, dict(about or {}), modules, plain, unet.conv_in))
        adapter.reattach()
        return adapter

    @classmethod
    def load(
        cls,
        unet: UNet2DConditionModel,
        source: str | Path,
        *,
        subfolder: str | None = None,
        weight_name: str | None = None,
        variant: str | None = None,
        **hub: Any,
    ) -> GligenAdapter:
        """Attach the adapter of a folder or Hub repository. On any error the U-Net is left as it was.

        Args:
            subfolder: where in the folder or repository the adapter is.
            weight_name: of the weights' file, if it is not `gligen_adapter.safetensors`.
            variant: such as fp16, for `gligen_adapter.fp16.safetensors`.
            hub: revision, cache_dir, token, local_files_only, force_download, for repositories.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: its files are damaged, or it is for another base model.
        """
        weights = weight_name or weights_name(variant)
        if weight_name is None and variant is None:
            weights = only_weights(Path(source) / (subfolder or ""))
        config, state, about = read_adapter(
            adapter_folder(source, subfolder=subfolder, weights=weights, **hub), weights
        )
        if unet.device.type == "meta":
            raise ValueError(
                "the U-Net's weights are not in memory (sequential offload?); load the adapter before enabling it"
            )
        adapter = cls.attach(unet, config, about=about, state=state, source=str(source))
        _maybe_remove_and_reapply_group_offloading(unet)  # group offloading has to learn of the new layers
        return adapter

    def detach(self) -> None:
        """Take the adapter off; the U-Net is what it was before. `reattach` puts the same modules back."""
        modules = self._installed()
        for name in modules:
            parent, _, last = name.rpartition(".")
            if name == "conv_in":  # the plain one did not move when the U-Net did
                self.unet.conv_in = self._attachment.plain_conv.to(self.unet.conv_in.weight)
            else:
                delattr(self.unet.get_submodule(parent), last)
        self._attachment.modules = modules
        del self.unet.__dict__["_gligen"]
        set_config(self.unet, self._attachment.plain_settings)

    def reattach(self) -> None:
        """Put back the modules that `detach` took off."""
        for name, module in self._attachment.modules.items():
            parent, _, last = name.rpartition(".")
            self.unet.get_submodule(parent).add_module(last, module)
        self.unet.__dict__["_gligen"] = self._attachment
        set_config(self.unet, changed_settings(self.config))

    def _installed(self) -> dict[str, nn.Module]:
        """Return the adapter's modules as they are in the U-Net now: peft may have wrapped the first convolution."""
        return {name: self.unet.get_submodule(name) for name in self._attachment.modules}

    # What it is -----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> AdapterConfig:
        return self._attachment.config

    @property
    def about(self) -> dict[str, Any]:
        """Base model and training, as its file says."""
        return dict(self._attachment.about)

    @property
    def fusers(self) -> dict[str, Fuser]:
        return {name: module for name, module in self._installed().items() if isinstance(module, Fuser)}

    @property
    def inpaint_conv(self) -> InpaintConv | None:
        """The first convolution of an inpainting adapter."""
        return conv if isinstance(conv := self.unet.conv_in, InpaintConv) else None

    # Weights --------------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by their names in the U-Net, without LoRAs that were loaded onto it."""
        return named_parameters(self._installed())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *, source: str = "the adapter") -> None:
        """Copy weights into the adapter; nothing is changed unless every name and shape fits."""
        parameters = self.parameters()
        check_fit(parameters, state, source)
        for name, value in parameters.items():
            value.copy_(state[name])

    def save(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapter; nothing of the base.

        Args:
            dtype: to save in; by default that of the weights.
            variant: part of the weights' file name, such as fp16, so that several can be in one folder.
            metadata: JSON values about base model and training; by default those it was loaded with.
            state: weights to save instead of the current ones, such as their average.
        """
        about = self.about if metadata is None else metadata
        write_adapter(folder, self.config, state or self.state_dict(), about, dtype=dtype, variant=variant)

    def gate_values(self) -> dict[str, float]:
        """|tanh(alpha)| of every gate by name: how far each fuser is open, 0 to 1."""
        gates = {name: value for name, value in self.parameters().items() if ".alpha_" in name}
        values = torch.stack([value.detach().float() for value in gates.values()]).tanh().abs().tolist()
        return dict(zip(gates, values, strict=True))

    # Run-time settings ----------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        return self._attachment.scale

    def set_scale(self, scale: float) -> None:
        """Multiply every gate at run time: 1 as trained, 0 off. The weights stay as they are."""
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}; expected a number: 1 as trained, 0 off")
        self._attachment.scale = float(scale)
        self.fade(1.0)

    def fade(self, factor: float) -> None:
        """Multiply the scale that was set, until the next call: 1 restores it."""
        for fuser in self.fusers.values():
            fuser.scale.fill_(self.scale * factor)

    def set_slots(self, slots: int) -> None:
        """Change the number of grounding tokens, which a gated U-Net's file does not say."""
        self._attachment.config = replace(self.config, slots=slots)

    def set_logit_bias(self, bias: float) -> None:
        """Change the grounding logit bias, in the fusers and in what is saved."""
        if bias == self.config.grounding_logit_bias:
            return
        former, config = self.config, replace(self.config, grounding_logit_bias=float(bias))
        self._attachment.config = config
        for fuser in self.fusers.values():
            fuser.attn.grounding_logit_bias = float(bias)
        if former.published_form != config.published_form:  # only without a bias may the U-Net call itself gated
            set_config(self.unet, self._attachment.plain_settings)
            changed = changed_settings(config)
            self._attachment.plain_settings = {name: self.unet.config[name] for name in changed}
            set_config(self.unet, changed)


@contextmanager
def detached(unet: UNet2DConditionModel) -> Iterator[None]:
    """Take the adapter off `unet` within the block, if it carries one."""
    adapter = GligenAdapter.find(unet)
    if adapter is not None:
        adapter.detach()
    try:
        yield
    finally:
        if adapter is not None:
            adapter.reattach()
