"""Checkpoints: a folder of safetensors files and a `state.json`, written whole or not at all.

    runs/mine/checkpoint-00012000/
      gligen_adapter.safetensors  gligen_adapter.json     the average, which loads as an adapter
      weights.safetensors  optimizer.safetensors  log.safetensors  state.json
      manifest.json                                       checksums of all of them, and of itself

The number in the name is how many samples the run has seen; `state.json` calls it "position". Nothing here is a
pickle. Checkpoints of version 0.1 have no manifest, and the checksums of their safetensors files in `state.json`.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter import AdapterConfig
from ..adapter.io import CONFIG_NAME, WEIGHTS_NAME, describe_adapter, read_adapter
from ..io import read_json, whole_folder, write_json
from ..manifest import MANIFEST_NAME, check_file, check_listed, checksum, read_manifest, write_manifest
from ..versions import versions

if TYPE_CHECKING:
    from torch import nn

    from .ema import EMA
    from .optimizer import AdapterOptimizer
    from .step_stats import StepStats
    from .zero import ZeroPartition

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d{8,})")
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint records of its run, to be compared when the run resumes.

    Attributes:
        base: fingerprint of the frozen U-Net.
        groups: numbers of samples of the data, by latent shape.
        held_out: share and digest of the images kept out of the training; None without any.
        weights: of the sources.
        windows: of each source, how many shards are mixed at a time.
        config: all settings.
    """

    base: str
    groups: list[int]
    held_out: dict[str, Any] | None
    weights: list[float]
    windows: list[int | None]
    config: dict[str, Any]

    def adapter_metadata(self, samples_seen: int) -> dict[str, Any]:
        """Return what an adapter folder says of how it was trained."""
        training = {"training": self.config, "versions": versions()}
        return {"base_model": self.config["model"], "samples": samples_seen, **training}


@dataclass(kw_only=True)
class TrainState:
    """What changes while an adapter trains, and what a checkpoint of it holds.

    Attributes:
        samples_seen: from which, with the seed, order, noise, dropouts and learning rate follow.
        parameters: all weights of the adapter, by name.
        partition: which of them this process steps and averages.
        stats: losses and gradient norms since the last line of the log.
    """

    samples_seen: int
    parameters: Mapping[str, nn.Parameter]
    partition: ZeroPartition
    optimizer: AdapterOptimizer
    ema: EMA
    stats: StepStats

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Restore the average and the optimizer; weights and statistics are restored as they are made."""
        self.ema.load(tensors["gligen_adapter"], state["ema_steps"])
        self.optimizer.load(tensors["optimizer"], state["scaler"])

    def save(
        self,
        root: Path,
        adapter: AdapterConfig,
        run: RunIdentity,
        *,
        is_main: bool,
        keep: int,
        keep_every: int | None,
    ) -> Path:
        """Write a checkpoint; every process has to call this, and the main one writes (see `save_checkpoint`).

        Returns:
            The checkpoint's folder; `root` on the other processes.
        """
        tensors = {
            "gligen_adapter": self.partition.gather(self.ema.average),
            "weights": self.parameters,
            "optimizer": self.partition.gather(self.optimizer.tensors()),
            "log": self.stats.tensors(),
        }
        if not is_main:
            return root
        state = {
            "adapter": adapter.to_dict(),
            "base": run.base,
            "ema_steps": self.ema.steps,
            "groups": run.groups,
            "held_out": run.held_out,
            "weights": run.weights,
            "windows": run.windows,
            "log": self.stats.state(),
            "scaler": self.optimizer.scaler_state(),
            "config": run.config,
            "versions": versions(),
        }
        description = describe_adapter(adapter, run.adapter_metadata(self.samples_seen))
        return save_checkpoint(
            root, self.samples_seen, tensors, state, keep=keep, keep_every=keep_every,
            documents={CONFIG_NAME: description},
        )  # fmt: skip


def save_checkpoint(
    root: str | Path,
    samples_seen: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None = None,
    documents: Mapping[str, Any] | None = None,
) -> Path:
    """Write `root/checkpoint-SAMPLES` and remove older ones, except the newest `keep` and those that stay for good.

    Args:
        tensors: one safetensors file per entry, named by its key.
        state: what `state.json` holds beside the samples seen; must be JSON.
        keep_every: the first checkpoint at or after every multiple of so many samples stays for good.
        documents: further JSON files, by name.

    Raises:
        OSError: it could not be written, as when the disk is full. Earlier checkpoints remain.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint has to stay")
    for left in Path(root).glob(".checkpoint-*.partial"):  # left by a kill while saving or removing
        shutil.rmtree(left, ignore_errors=True)  # a file in use on a network disk is removed next time
    target = Path(root) / f"checkpoint-{samples_seen:08d}"
    try:
        with whole_folder(target) as folder:
            for name, group in tensors.items():
                file = folder / f"{name}.safetensors"
                save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, file)
            for name, document in (documents or {}).items():
                write_json(folder / name, document)
            write_json(folder / _STATE, {**state, "position": samples_seen})
            write_manifest(folder)
    except (OSError, SafetensorError) as error:
        there = list_checkpoints(root)
        stands = f"{there[-1]} is whole, and the same command continues from it" if there else "there is none yet"
        raise OSError(f"{target} could not be written: {error}; {stands}. Make room on the disk first") from error
    for old in _to_remove(list_checkpoints(root), keep, keep_every):
        hidden = old.rename(old.with_name(f".{old.name}.partial"))  # a kill leaves no half of a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def _to_remove(checkpoints: list[Path], keep: int, keep_every: int | None) -> list[Path]:
    """Return the checkpoints, of all oldest first, that are neither among the newest nor the first of their span."""
    removed, former_span = [], 0
    for path in checkpoints[:-keep]:
        span = _samples_of(path) // keep_every if keep_every else 0
        if span == former_span:
            removed.append(path)
        former_span = span
    return removed


def list_checkpoints(root: str | Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    root = Path(root)
    checkpoints = [path for path in root.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(checkpoints, key=_samples_of)


def _samples_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the tensors, by file, and the state of a checkpoint, and compares every file with its recorded checksum.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    path = Path(path)
    state = read_state(path)
    check_listed(path)
    files = read_manifest(path)
    if files is None:
        _check_former(path, state["sha256"])
        files = state["sha256"]
    tensors = {}
    for file in (path / name for name in files if name.endswith(".safetensors")):
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    return tensors, state


def read_state(path: str | Path) -> dict[str, Any]:
    """Read the state of a checkpoint; compare `state.json` with its checksum, and other files with their sizes alone.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the manifest or `state.json` is damaged, or another file has another size.
    """
    path = Path(path)
    if not (path / _STATE).is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no {_STATE}")
    files = read_manifest(path)
    if files is not None:
        if _STATE not in files:
            raise ValueError(f"{path / MANIFEST_NAME} is damaged: it does not list {_STATE}")
        check_file(path / _STATE, files[_STATE])
        check_listed(path, sizes_only=True)
    state = read_json(path / _STATE)
    if not isinstance(state, dict) or type(state.get("position")) is not int:
        raise ValueError(f"{path / _STATE} is damaged: it has no position")
    if files is None and not isinstance(state.get("sha256"), dict):
        raise FileNotFoundError(f"{path} lacks {MANIFEST_NAME}, and so the checksums of its files")
    if _NAME.fullmatch(path.name) and state["position"] != _samples_of(path):
        raise ValueError(f"{path / _STATE} is of position {state['position']}, not of this folder")
    return state


def _check_former(path: Path, checksums: dict[str, Any]) -> None:
    """Compare the files of a checkpoint without a manifest with the checksums in its `state.json`."""
    for name, expected in checksums.items():
        if Path(name).name != name:
            raise ValueError(f"{path / _STATE} is damaged: {name!r} is not a file of its folder")
        if not (path / name).is_file():
            raise FileNotFoundError(f"checkpoint {path} lacks {name}")
        if checksum(path / name) != expected:
            raise ValueError(f"{path / name} is damaged (its checksum differs)")


def last_whole(
    root: str | Path, check: Callable[[Path, dict[str, dict[str, Tensor]], dict[str, Any]], None]
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Return the newest checkpoint that is not damaged, with its tensors and state; None if there is no checkpoint.

    Later, damaged ones are renamed to `damaged-checkpoint-POSITION`, with a warning.

    Args:
        check: raises a ValueError if a checkpoint (folder, tensors, state) lacks what its reader needs.

    Raises:
        ValueError: all are damaged. They stay where they are.
    """
    damaged: list[tuple[Path, Exception]] = []
    for path in reversed(list_checkpoints(root)):
        try:
            tensors, state = load_checkpoint(path)
            check(path, tensors, state)
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


def last_whole_adapter(root: str | Path) -> Path | None:
    """Return the newest checkpoint whose average is not damaged, and moves nothing; None if there is no checkpoint.

    Raises:
        ValueError: all are damaged.
    """
    damaged: list[Exception] = []
    for path in reversed(list_checkpoints(root)):
        try:
            state = read_state(path)
            if read_manifest(path) is None:
                _check_former(path, {name: value for name, value in state["sha256"].items() if name == WEIGHTS_NAME})
            read_adapter(path)
        except (ValueError, FileNotFoundError) as error:
            _LOGGER.warning("%s; %s is passed over", error, path)
            damaged.append(error)
            continue
        return path
    if damaged:
        raise ValueError(f"{damaged[-1]}; there is no whole checkpoint before it")
    return None
