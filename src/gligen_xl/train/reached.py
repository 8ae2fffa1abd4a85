"""How far a run has come: what its last checkpoint holds, and whether it may go on from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import AdapterConfig
from .checkpoint import list_checkpoints, load_checkpoint
from .config import TrainConfig, check_same_run


@dataclass(frozen=True)
class Reached:
    """The last checkpoint of a run: its folder, tensors by file, and state. A new run has none."""

    config: TrainConfig
    checkpoint: Path | None = None
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig) -> Reached:
        """What stands in `config.out`.

        Raises:
            ValueError: the run there was begun with other settings, or its last checkpoint is damaged.
        """
        checkpoints = list_checkpoints(config.out)
        if not checkpoints:
            return cls(config)
        tensors, state = load_checkpoint(checkpoints[-1])
        check_same_run(state["config"], config)
        return cls(config, checkpoints[-1], tensors, state)

    @property
    def position(self) -> int:
        """Samples seen."""
        return self.state.get("position", 0)

    @property
    def form(self) -> AdapterConfig | None:
        """Of the adapter in the checkpoint."""
        return AdapterConfig.from_dict(self.state["adapter"]) if self.checkpoint else None

    def check_base(self, base: str) -> None:
        """Whether it is the base, by its fingerprint, that the run was begun on."""
        if self.checkpoint and self.state["base"] != base:
            raise ValueError(
                f"the run in {self.config.out} was begun on another base than what {self.config.model} is now"
            )

    def check_data(self, groups: list[int], weights: list[float]) -> None:
        """Whether it is the data, by numbers of samples and weights, that the run was begun with."""
        if not self.checkpoint:
            return
        if (former := self.state["groups"]) != groups:
            raise ValueError(
                f"the run in {self.config.out} was begun on {sum(former)} samples, {self.config.data} now holds "
                f"{sum(groups)}; give back the former data, or begin another run with init_adapter {self.checkpoint}"
            )
        if (former := self.state.get("weights", weights)) != weights:
            raise ValueError(f"the run in {self.config.out} was begun with data of the weights {former}, not {weights}")
