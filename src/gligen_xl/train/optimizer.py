"""AdamW over the adapter. A step whose gradients are not finite is skipped on the device itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from .options import Optimization

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which torch has a fused AdamW


class AdapterOptimizer:
    """AdamW with two groups: weights, and gates with their own rate and no decay.

    Where torch has a fused AdamW, one kernel clips, decays and steps, and leaves out what is not finite without asking
    the host. Otherwise, with 8-bit moments and in main memory, the host waits for the device once a step.

    Args:
        parameters: by name; all of them are trained.
        scaler: of the loss, in float16.
        own: what this process steps, by name, see `ZeroPartition`; by default all parameters themselves.
        in_buckets: the gradients are views of what the processes exchange: they are set to 0 rather than dropped, else
            new ones would be made beside those.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: Optimization,
        scaler: GradScaler | None = None,
        own: Mapping[str, nn.Parameter] | None = None,
        in_buckets: bool = False,
    ):
        if frozen := [name for name, value in parameters.items() if not value.requires_grad]:
            raise ValueError(f"{len(frozen)} parameters are frozen, as {frozen[0]}; the optimizer takes trained ones")
        self.options, self.scaler, self._in_buckets = options, scaler, in_buckets
        others = {name: value for name, value in parameters.items() if ".alpha_" not in name}
        gates = {name: value for name, value in parameters.items() if ".alpha_" in name}
        self.parameters = [*others.values(), *gates.values()]
        self.whole = torch.optim.SGD(self.parameters)  # has no state; for what is done to the gradients of all
        own = parameters if own is None else own
        self._stepped = [own.get(name, value) for name, value in [*others.items(), *gates.items()]]
        self._copies = [pair for pair in zip(self.parameters, self._stepped, strict=True) if pair[0] is not pair[1]]
        self._device = next(iter(own.values())).device
        self.fused = options.optimizer == "adamw" and self._device.type in FUSED
        gate_rate = options.learning_rate if options.gate_learning_rate is None else options.gate_learning_rate
        rates = ((others, options.learning_rate, options.weight_decay), (gates, gate_rate, 0.0))
        groups = [
            {"params": [own[name] for name in some if name in own], "lr": rate, "base_lr": rate, "weight_decay": decay}
            for some, rate, decay in rates
        ]
        betas = options.beta1, options.beta2
        if options.optimizer == "adamw8bit":
            self.inner = _eight_bit(groups, betas, self._device.type)
        else:
            self.inner = torch.optim.AdamW(groups, betas=betas, fused=self.fused)

    def set_rate(self, factor: float) -> None:
        """Set the learning rates to a factor of those of the options."""
        for group in self.inner.param_groups:
            group["lr"] = group["base_lr"] * factor

    def step(self) -> Tensor:
        """Clip the gradients, step, and clear them.

        Returns:
            Their norm before clipping, a scalar on the device. If it is not finite, weights and moments are as before.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.whole)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        for parameter, copy in self._copies:
            copy.grad = None if parameter.grad is None else _to(copy.grad, parameter.grad)
        if self.fused:
            skipped = (~norm.isfinite()).float().to(self._device)  # from a GPU this waits, also for the gradients
            self.inner.found_inf = skipped  # type: ignore[attr-defined] - torch's AMP protocol
            self.inner.step()
        elif norm.isfinite():
            self.inner.step()
        if self.scaler is not None:
            self.scaler.update()
        self.whole.zero_grad(set_to_none=not self._in_buckets)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the parameters that this process steps, numbered among all (see `optimizer_tensors`)."""
        return optimizer_tensors(self.inner, self._stepped)

    def load(self, tensors: Mapping[str, Tensor], scaler: dict[str, Any] | None) -> None:
        """Restore the result of `tensors`, of this process or gathered from all, and the state of the scaler."""
        load_optimizer_tensors(self.inner, tensors, self._stepped)
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(scaler)

    def scaler_state(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()


def _to(before: Tensor | None, gradient: Tensor) -> Tensor:
    """Copie a gradient to main memory, over the previous one; asynchronously from a GPU."""
    if before is None:
        before = torch.empty_like(gradient, device="cpu", pin_memory=gradient.is_cuda)
    return before.copy_(gradient, non_blocking=True)


def _eight_bit(groups: list[dict[str, Any]], betas: tuple[float, float], device: str) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with blockwise 8-bit moments (arXiv 2110.02861); tensors below 4,096 numbers keep float32."""
    if not find_spec("bitsandbytes"):
        raise ValueError("optimizer adamw8bit needs bitsandbytes; pip install 'gligen-xl[8bit]', or choose adamw")
    if device == "mps":
        raise ValueError("optimizer adamw8bit is not made for Apple's GPUs; choose adamw")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, betas=betas)


# The state as tensors ------------------------------------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the state of an optimizer of torch or bitsandbytes as flat named tensors: "<parameter number>.<name>".

    Args:
        parameters: what the numbers count, if the optimizer has only some of them; by default its own.
    """
    parameters = _parameters(optimizer) if parameters is None else parameters
    return {
        f"{number}.{name}": value.clone() if name.startswith("qmap") else torch.as_tensor(value)  # qmaps are shared
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor] | None = None
) -> None:
    """Restore what `optimizer_tensors` returned, for the same parameters in the same order, or for some of them."""
    own = {parameter: index for index, parameter in enumerate(_parameters(optimizer))}
    parameters = list(own) if parameters is None else parameters
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if (parameter := parameters[int(number)]) in own:
            counter = value.dim() == 0 and not value.is_floating_point()  # a number of steps, as bitsandbytes keeps it
            state.setdefault(own[parameter], {})[name] = int(value) if counter else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"]]
