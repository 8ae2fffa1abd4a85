"""Counts the GPU memory of a forward and backward pass on tensors without data (torch's "meta" device).

    kernels = GPUKernels(torch.float16)
    with LiveBytes(unet.parameters()) as live:
        with kernels:
            loss = unet(...).sample.square().mean()
        kernels.leave_autocast()
        loss.backward()
    live.peak                        # bytes

Every operation runs, on shapes alone, and what is alive is summed as it comes and goes. So gradient checkpointing,
autocast's copies of weights, and whatever a layer keeps for its backward pass are counted as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint


class LiveBytes(TorchDispatchMode):
    """Inside the block, bytes of the tensors that operations have made and nobody has let go of yet.

    Args:
        standing: what was there before and is counted elsewhere, as parameters.

    Attributes:
        peak: the most there was at a time, without the gradients of what was standing.
        peak_with_gradients: the same with those that were there by then.
    """

    def __init__(self, standing: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = self.peak_with_gradients = 0
        self._gradients = 0
        self._known: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()  # by storage
        self._hooks = []
        for value in standing:
            self._known[value.untyped_storage()] = _Entry(0)
            if value.requires_grad:
                self._hooks.append(value.register_post_accumulate_grad_hook(self._set_gradient_apart))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known[storage] = entry = _Entry(storage.nbytes())
                self.now += entry.size
                weakref.finalize(storage, self._gone, entry)
        self.peak = max(self.peak, self.now)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self._gradients)
        return made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _gone(self, entry: _Entry) -> None:
        self.now -= entry.size

    def _set_gradient_apart(self, parameter: Tensor) -> None:
        if parameter.grad is not None and (entry := self._known.get(parameter.grad.untyped_storage())):
            self._gone(entry)
            self._gradients += entry.size
            entry.size = 0


class _Entry:
    def __init__(self, size: int):
        self.size = size


class GPUKernels(TorchFunctionMode):
    """Inside the block, operations on "meta" keep what those of a GPU keep: attention does not spread out its weights,
    and numbers have the types that `torch.autocast("cuda")` gives them.

    What gradient checkpointing runs again has to be run in the block again: see `checkpoint`.

    Args:
        dtype: of autocast; None is without.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype
        self._copies: dict[Tensor, Tensor] | None = {}

    def leave_autocast(self) -> None:
        """Release the copies of weights that autocast keeps for the length of its block."""
        self._copies = None

    def checkpoint(self, module: Callable[..., Any], *inputs: Any) -> Any:
        """For `unet.enable_gradient_checkpointing`."""
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: Any = (args, kwargs or {})
        if self.dtype is not None and func in _IN_HALF:
            given = tree_map_only(Tensor, self._half, given)
        elif self.dtype is not None and func in _IN_FLOAT32:
            given = tree_map_only(Tensor, _float32, given)
        positional, named = given
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*positional[:3])
        return func(*positional, **named)

    def _half(self, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad) or self._copies is None:
            return value.to(self.dtype)
        if value not in self._copies:
            self._copies[value] = value.to(self.dtype)
        return self._copies[value]


# The lists of torch's "CUDA Op-Specific Behavior", as far as a U-Net meets them.
_IN_HALF = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm}
_IN_HALF |= {F.scaled_dot_product_attention}
_IN_FLOAT32 = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss}


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: inputs, output, and a float32 number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, heads, L, D) each
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors[:3])
