"""What the steps of a run gave since the last line of its log.

The numbers stay on their device until someone looks, so that the computation need not wait for us. Every process then
knows those of all, and so all come to the same conclusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Skipped:
    """A step that was left out, as its loss or its gradients were not finite."""

    position: int  # samples seen before it
    samples: list[int]  # which of its batch have a loss that is not finite; none, if it was the gradients alone
    in_a_row: int  # steps that were left out up to this one


class Steps:
    """Losses (S, B), quarters of the timesteps (S, B) and gradient norms (S,) of S steps of B samples.

    Args:
        position: of the next step.
        batch_size: B, over all processes.
        tensors: what `tensors` gave for the checkpoint that is gone on from.
        state: what `state` gave.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        position: int,
        batch_size: int,
        tensors: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        self._accelerator, self._batch_size, self._position = accelerator, batch_size, position
        self._new: list[tuple[Tensor, Tensor, Tensor]] = []
        if tensors is None:
            self.clear()
        else:
            self.losses, self.quarters, self.norms = (tensors[name].numpy() for name in ("losses", "quarters", "norms"))
        self.skipped: int = (state or {}).get("skipped", 0)  # in the whole run
        self.in_a_row: int = (state or {}).get("in_a_row", 0)  # up to now

    def add(self, losses: Tensor, quarters: Tensor, norm: Tensor) -> None:
        """A step of this process: losses (b,), quarters 0-3 (b,); and the norm of the gradients of all processes."""
        self._new.append((losses.detach(), quarters, norm.detach()))

    def look(self) -> list[Skipped]:
        """Fetch what is new, from all processes; returns the steps in it that were left out."""
        if not self._new:
            return []
        losses, quarters, norms = (torch.stack(values) for values in zip(*self._new, strict=True))
        self._new.clear()
        of_samples: Any = self._accelerator.gather(
            torch.stack([losses, quarters.float()], dim=-1).transpose(0, 1).contiguous()
        )
        rows = of_samples.transpose(0, 1).cpu().numpy()  # (S, B, 2)
        found = []
        for norm, row in zip(norms.cpu().tolist(), rows[..., 0], strict=True):
            self.in_a_row = 0 if np.isfinite(norm) else self.in_a_row + 1
            if self.in_a_row:
                self.skipped += 1
                found.append(Skipped(self._position, np.flatnonzero(~np.isfinite(row)).tolist(), self.in_a_row))
            self._position += self._batch_size
        self.losses = np.concatenate([self.losses, rows[..., 0]])
        self.quarters = np.concatenate([self.quarters, rows[..., 1]])
        self.norms = np.concatenate([self.norms, norms.cpu().numpy()])
        return found

    def means(self) -> dict[str, float | None]:
        """Of the steps that were looked at and not left out: loss, loss by quarter of the timesteps, gradient norm.

        Those of which there is none are None.
        """
        taken = np.isfinite(self.norms)
        losses, quarters = self.losses[taken], self.quarters[taken]
        means = {"loss": _mean(losses)}
        means |= {f"loss_q{k + 1}": _mean(losses[quarters == k]) for k in range(4)}
        return means | {"grad_norm": _mean(self.norms[taken])}

    def clear(self) -> None:
        """Begin the next line."""
        self.losses = self.quarters = np.zeros((0, self._batch_size), np.float32)
        self.norms = np.zeros(0, np.float32)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of a line that is not written yet; look first."""
        arrays = {"losses": self.losses, "quarters": self.quarters, "norms": self.norms}
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if values.size else None
