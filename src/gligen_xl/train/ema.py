"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Keeps `average = decay * average + (1 - decay) * parameter`, in float32, for the parameters it was given.

    The decay is lowered at the start to (1 + steps) / (10 + steps), so that the first random values are forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.steps = 0
        self._parameters = dict(parameters)
        self.average = {name: value.detach().float().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [value.detach().float() for value in self._parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor], steps: int) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])
        self.steps = steps

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold their averages; afterwards their own values again, bit for bit."""
        kept = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    def copy_to_parameters(self) -> None:
        """The parameters become their averages."""
        self._copy(self.average)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
