"""How far a run has come: what its last checkpoint holds, and whether it may go on from there."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import AdapterConfig
from .agreement import check_same_run
from .checkpoint import list_checkpoints, load_checkpoint
from .config import TrainConfig
from .processes import Processes

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reached:
    """The last checkpoint of a run: its folder, tensors by file, and state. A new run has none."""

    config: TrainConfig
    checkpoint: Path | None = None
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: TrainConfig, processes: Processes) -> Reached:
        """What stands in `config.out`: the last whole checkpoint, which the main process finds for all.

        Damaged ones after it are put aside, with a warning, as `damaged-checkpoint-POSITION`.

        Raises:
            ValueError: the run there was begun with other settings; its only checkpoint is damaged; or a process has
                other settings, or sees another folder, than the main one.
        """
        settings = json.dumps(config.to_dict(), sort_keys=True)
        if processes.from_main(settings) != settings:
            raise ValueError(f"process {processes.rank} was started with other settings than the first")
        found = _last_whole(config.out) if processes.is_main else None
        name = processes.from_main(found[0].name if found else "")
        if not name:
            return cls(config)
        checkpoint = Path(config.out) / name
        if not checkpoint.is_dir():
            raise ValueError(
                f"process {processes.rank} does not see {checkpoint}, from which the first goes on; all processes need "
                "the same folder out, under the same path"
            )
        tensors, state = found[1:] if found else load_checkpoint(checkpoint)
        check_same_run(state["config"], config)
        return cls(config, checkpoint, tensors, state)

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


def _last_whole(out: str) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint that is not damaged, what it holds; those after it are moved out of the way."""
    damaged: list[tuple[Path, Exception]] = []
    for path in reversed(list_checkpoints(out)):
        try:
            tensors, state = load_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:
            damaged.append((path, error))
            continue
        for other, why in damaged:
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            _LOGGER.warning("%s; it was moved to %s, and the run goes on from %s", why, aside, path)
        return path, tensors, state
    if damaged:
        raise ValueError(f"{damaged[-1][1]}; there is no whole checkpoint before it")
    return None
