"""Scheduled sampling (GLIGEN, section 3.3): grounding is on for the first steps, where the layout is decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GroundingSchedule:
    """The shares of the denoising steps with grounding fully on, and fading linearly; the rest have none."""

    on: float
    decay: float = 0.0

    @classmethod
    def parse(cls, beta: float | Sequence[float]) -> GroundingSchedule:
        """Parse `gligen_scheduled_sampling_beta`: the share that is on, or the triple (on, decay, off) of GLIGEN."""
        numbers: list[Any] = list(beta) if isinstance(beta, Sequence) and not isinstance(beta, str) else [beta]
        if len(numbers) not in (1, 3) or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise ValueError(
                f"gligen_scheduled_sampling_beta is {beta!r}; expected a number or a triple (on, decay, off)"
            )
        if not all(0 <= x <= 1 for x in numbers):
            raise ValueError(f"gligen_scheduled_sampling_beta is {beta!r}; expected shares of the steps, 0 to 1")
        if len(numbers) == 1:
            return cls(float(numbers[0]))
        if abs(sum(numbers) - 1) > 1e-6:
            raise ValueError(f"gligen_scheduled_sampling_beta is {beta!r}; its three shares must sum to 1")
        return cls(float(numbers[0]), float(numbers[1]))

    def scale(self, step: int, num_steps: int) -> float:
        """Return the factor of the gates at `step` of `num_steps`: 1 on, 0 off."""
        num_on = max(int(self.on * num_steps + 1e-6), self.on > 0)  # of few steps, the first decides the layout
        num_decay = int(self.decay * num_steps + 1e-6)
        if step < num_on:
            return 1.0
        if step < num_on + num_decay:
            return 1 - (step - num_on + 1) / num_decay
        return 0.0


def step_of(scheduler: Any, evaluation: int) -> int:
    """Return the denoising step that the U-Net's `evaluation` (from 0) belongs to.

    Some schedulers run it several times a step: Heun's and the two KDPM2 twice, but once in the last; PNDM twice in its
    first step, or, if it begins with Runge-Kutta steps, four times in each of the first three.
    """
    from diffusers import PNDMScheduler  # here, so that shares are checked without this import

    if isinstance(scheduler, PNDMScheduler):
        if scheduler.config["skip_prk_steps"]:
            return max(evaluation - 1, 0)
        return evaluation // 4 if evaluation < 12 else evaluation - 9
    return evaluation // getattr(scheduler, "order", 1)
