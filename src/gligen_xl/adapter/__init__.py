"""What is added to a frozen U-Net: a fuser on its transformer blocks and a position net (GLIGEN, arXiv 2301.07093)."""

from .attach import GligenAdapter, detached
from .config import AdapterConfig
from .functions import (
    adapter_config,
    adapter_parameters,
    adapter_state_dict,
    attach,
    detach,
    fusers,
    gate_values,
    is_attached,
    load_adapter,
    load_adapter_state_dict,
    reattach,
    save_adapter,
    set_adapter_scale,
    set_grounding_logit_bias,
)
from .gated import adopt_gated, is_gated
from .io import read_adapter, write_adapter
from .unet import is_adapter_key, lora_targets

__all__ = [
    "AdapterConfig",
    "GligenAdapter",
    "adapter_config",
    "adapter_parameters",
    "adapter_state_dict",
    "adopt_gated",
    "attach",
    "detach",
    "detached",
    "fusers",
    "gate_values",
    "is_adapter_key",
    "is_attached",
    "is_gated",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_targets",
    "read_adapter",
    "reattach",
    "save_adapter",
    "set_adapter_scale",
    "set_grounding_logit_bias",
    "write_adapter",
]
