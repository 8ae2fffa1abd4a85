"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Maintains `average = decay * average + (1 - decay) * parameter`, in float32, for the parameters it was given.

    The decay is lowered at the start to (1 + steps) / (10 + steps), so that the first random values are forgotten.
    At a decay of 0 the average is the parameters themselves, and takes no memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self._parameters = dict(parameters)
        self._steps = torch.zeros((), device=next(iter(self._parameters.values())).device)
        self.average = {
            name: value.detach().to(torch.float32, copy=decay > 0) for name, value in self._parameters.items()
        }

    @property
    def steps(self) -> int:
        """The number of steps in the average. Waits for the device."""
        return int(self._steps)

    @torch.no_grad()
    def update(self, counts: Tensor | None = None) -> None:
        """Add the present parameters to the average.

        Args:
            counts: a boolean scalar; if false, as for a skipped step, nothing changes.
        """
        counted = torch.ones_like(self._steps) if counts is None else counts.to(self._steps)
        self._steps += counted
        if not self.decay:
            return
        # 1 - (1 + steps) / (10 + steps) = 9 / (10 + steps)
        weight = (9 / (10 + self._steps)).clamp(min=1 - self.decay) * counted
        for average, value in zip(self.average.values(), self._parameters.values(), strict=True):
            average.lerp_(value.detach().float(), weight)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor], steps: int) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])
        self._steps.fill_(steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let float32 parameters hold their averages in the block, and afterwards their own values, bit for bit.

        They are swapped one by one, so no second copy of all is made.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def copy_to_parameters(self) -> None:
        """Copie the averages to the parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)
