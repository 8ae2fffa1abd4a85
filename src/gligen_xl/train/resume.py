"""The point from which a run resumes: its last checkpoint, and the checks that it is still the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import AdapterConfig
from .checkpoint import last_whole, load_checkpoint
from .config import TrainConfig
from .data import is_drawn
from .options import Validation
from .processes import Processes


@dataclass(frozen=True)
class ResumePoint:
    """The last checkpoint of a run: its folder, tensors by file, and state. A new run has none."""

    config: TrainConfig
    checkpoint: Path | None = None
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, config: TrainConfig, processes: Processes) -> ResumePoint:
        """Load the last undamaged checkpoint in `config.out`, which the main process chooses for all.

        Later, damaged ones are renamed to `damaged-checkpoint-SAMPLES`, with a warning.

        Raises:
            ValueError: the run there was begun with other settings; its only checkpoint is damaged; or a process has
                other settings, or sees another folder, than the main one.
        """
        settings = json.dumps(config.to_dict(), sort_keys=True)
        if processes.from_main(settings) != settings:
            raise ValueError(f"process {processes.rank} was started with other settings than the first")
        newest = last_whole(config.out, _check) if processes.is_main else None
        name = processes.from_main(newest[0].name if newest else "")
        if not name:
            return cls(config)
        checkpoint = Path(config.out) / name
        if not checkpoint.is_dir():
            raise ValueError(
                f"process {processes.rank} does not see {checkpoint}, from which the first goes on; all processes need "
                "the same folder out, under the same path"
            )
        tensors, state = newest[1:] if newest else load_checkpoint(checkpoint)
        check_same_run(state["config"], config)
        return cls(config, checkpoint, tensors, state)

    @property
    def samples_seen(self) -> int:
        """How many samples the run has seen."""
        return self.state.get("position", 0)

    @property
    def form(self) -> AdapterConfig | None:
        """The configuration of the adapter in the checkpoint."""
        return AdapterConfig.from_dict(self.state["adapter"]) if self.checkpoint else None

    def check_base(self, base: str) -> None:
        """Check that the base, by its fingerprint, is the one that the run was begun on."""
        if self.checkpoint and self.state["base"] != base:
            raise ValueError(
                f"the run in {self.config.out} was begun on another base than what {self.config.model} is now"
            )

    @property
    def held_out_share(self) -> float:
        """The share of the training's images that has been kept out of the training since the run began."""
        options = self.config.validation
        if not self.checkpoint:
            drawn = all(map(is_drawn, self.config.sources))
            return options.held_out if options.data is None and not drawn else 0.0
        return (self.state.get("held_out") or {"share": 0.0})["share"]

    def settled_config(self) -> TrainConfig:
        """Return the settings, with the validation that the run was begun with if they leave it open.

        A run that was begun without held-out images cannot hold images out later.

        Raises:
            ValueError: another share is to be held out than the run was begun with.
        """
        options, share = self.config.validation, self.held_out_share
        if not self.checkpoint or options.data is not None or not options.held_out:
            return self.config
        if all(map(is_drawn, self.config.sources)):
            return self.config
        if share and share != options.held_out:
            raise ValueError(
                f"the run in {self.config.out} was begun with validation.held_out {share:g}, now it is "
                f"{options.held_out:g}; continue it with its own settings, or choose another folder"
            )
        if share or not isinstance(former := self.state["config"].get("validation"), dict):
            return self.config
        data = former.get("data")
        settled = replace(options, held_out=0.0, data=data if isinstance(data, str) else None) if data else Validation()
        return replace(self.config, validation=settled)

    def check_held_out(self, digest: str) -> None:
        """Check that the same images are held out as when the run began."""
        former = self.state.get("held_out") if self.checkpoint else None
        if former and former["digest"] != digest:
            raise ValueError(
                f"the run in {self.config.out} was begun with other images held out for validation: {self.config.data} "
                "has changed; give back the former data, or begin another run with init_adapter "
                f"{self.checkpoint}"
            )

    def check_data(self, groups: list[int], weights: list[float]) -> None:
        """Checks, by numbers of samples and weights, that the data is what the run was begun with."""
        if not self.checkpoint:
            return
        if (former := self.state["groups"]) != groups:
            raise ValueError(
                f"the run in {self.config.out} was begun on {sum(former)} samples, {self.config.data} now holds "
                f"{sum(groups)}; give back the former data, or begin another run with init_adapter {self.checkpoint}"
            )
        if (former := self.state.get("weights", weights)) != weights:
            raise ValueError(f"the run in {self.config.out} was begun with data of the weights {former}, not {weights}")


# The same settings --------------------------------------------------------------------------------------------------


# Settings that a resumed run may change. The base is known by its fingerprint.
_MAY_CHANGE = {
    "out", "data", "model", "variant", "without_boxes", "init_adapter", "resolution", "micro_batch",
    "deterministic", "gradient_checkpointing",
    "compile", "compile_backend", "shard_optimizer", "offload_optimizer", "process_timeout", "skip_limit", "workers",
    "cache_gb", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "track", "validation",
}  # fmt: skip


def check_same_run(former: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to resume a run with settings that would have made it another one.

    A setting that `former` lacks, because the program did not have it then, counts as the default.
    """
    current, usual = config.to_dict(), TrainConfig(data=config.data, out=config.out).to_dict()
    for name in sorted(set(current) - _MAY_CHANGE):
        was, now = former.get(name, usual[name]), current[name]
        if isinstance(now, dict) and isinstance(was, dict):
            for key in now:
                if (before := was.get(key, usual[name][key])) != now[key]:
                    _refuse(f"{name}.{key}", before, now[key], config.out)
        elif was != now:
            _refuse(name, was, now, config.out)


def _refuse(name: str, was: Any, now: Any, out: str) -> None:
    raise ValueError(
        f"the run in {out} was begun with {name} {was!r}, now it is {now!r}; "
        "continue it with its own settings, or choose another folder"
    )


# The state of a checkpoint ------------------------------------------------------------------------------------------


_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # torch's own names
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "adapter": ("the form of an adapter", lambda value: isinstance(value, dict)),
    "base": ("a fingerprint", lambda value: isinstance(value, str)),
    "ema_steps": ("a number of steps", lambda value: type(value) is int and value >= 0),
    "groups": ("numbers of samples", lambda value: _are_counts(value)),
    "config": ("the settings of the run", lambda value: isinstance(value, dict)),
    "scaler": ("the state of a loss scaler", lambda value: value is None or _is_scaler(value)),
}
_OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "weights": (
        "a number for each source",
        lambda value: isinstance(value, list) and _are_numbers(dict(enumerate(value))),
    ),
    "windows": (
        "a number for each source",
        lambda value: isinstance(value, list) and _are_counts([n or 0 for n in value]),
    ),
    "log": ("numbers of skipped steps", lambda value: _are_numbers(value)),
    "held_out": ("what is held out", lambda value: value is None or _is_held_out(value)),
}


def check_state(path: Path, state: dict[str, Any]) -> None:
    """Check that the state of a checkpoint has what a run needs to resume.

    Raises:
        ValueError: a key is missing, or its value is of another kind.
    """
    for name, (expected, holds) in {**_KINDS, **_OPTIONAL}.items():
        if name not in state:
            if name in _KINDS:
                raise ValueError(f"{path / 'state.json'} is damaged: it has no {name}")
        elif not holds(state[name]):
            raise ValueError(f"{path / 'state.json'} is damaged: {name} is {state[name]!s:.60}; expected {expected}")
    try:
        AdapterConfig.from_dict(state["adapter"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'state.json'} is damaged: adapter: {error}") from error


def _check(path: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    check_state(path, state)
    if missing := sorted({"weights", "gligen_adapter", "optimizer"} - tensors.keys()):
        raise ValueError(f"{path} is damaged: it has no {missing[0]}.safetensors")
    if tensors["weights"].keys() != tensors["gligen_adapter"].keys():
        raise ValueError(f"{path} is damaged: its weights and their average have other names")
    if "log" in tensors and not {"losses", "quarters", "norms"} <= tensors["log"].keys():
        raise ValueError(f"{path} is damaged: log.safetensors is not that of a run")


def _is_held_out(value: Any) -> bool:
    """Tell whether this is {"share", "digest"}."""
    return isinstance(value, dict) and _are_numbers({"": value.get("share")}) and isinstance(value.get("digest"), str)


def _is_scaler(value: Any) -> bool:
    return _are_numbers(value) and (not value or value.keys() >= _SCALER)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())
