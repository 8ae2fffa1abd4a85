"""What is added to a frozen U-Net: a fuser on its transformer blocks and a position net (GLIGEN, arXiv 2301.07093)."""

from .config import AdapterConfig
from .model import (
    adapter_about,
    adapter_config,
    adapter_parameters,
    adapter_state_dict,
    adopt_gated,
    attach,
    detach,
    detached,
    fusers,
    gate_values,
    is_adapter_key,
    is_attached,
    load_adapter,
    load_adapter_state_dict,
    reattach,
    save_adapter,
    set_adapter_scale,
)

__all__ = [
    "AdapterConfig",
    "adapter_about",
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
    "load_adapter",
    "load_adapter_state_dict",
    "reattach",
    "save_adapter",
    "set_adapter_scale",
]
