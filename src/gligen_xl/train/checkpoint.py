"""Checkpoints: a folder of safetensors files and a `state.json`, there whole or not at all.

    runs/mine/checkpoint-00012000/
      gligen_adapter.safetensors  gligen_adapter.json     the average: an adapter folder, to be loaded as one
      weights.safetensors  optimizer.safetensors  log.safetensors  state.json
      manifest.json                                       checksums of all of them, and of itself

The number in the name is the run's position: samples seen. Nothing in it is a pickle. Checkpoints without a manifest,
of version 0.1, have the checksums of their safetensors files in `state.json`.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter.io import WEIGHTS_NAME, read_adapter
from ..io import read_json, whole_folder, write_json
from ..manifest import MANIFEST_NAME, check_file, check_listed, checksum, read_manifest, write_manifest

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d{8,})")
_STATE = "state.json"


def save_checkpoint(
    root: str | Path,
    position: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int | None = None,
    documents: Mapping[str, Any] | None = None,
) -> Path:
    """Write `root/checkpoint-{position}` and remove all but the newest `keep` and those that stay for good.

    Args:
        tensors: one safetensors file per entry, named by its key.
        state: what `state.json` holds beside the position; must be JSON.
        keep_every: the first checkpoint at or after every multiple of so many samples stays for good.
        documents: further JSON files, by name.

    Raises:
        OSError: it could not be written, as when the disk is full. Those that stood there stand.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint has to stay")
    for left in Path(root).glob(".checkpoint-*.partial"):  # of a run that was killed while it saved or removed
        shutil.rmtree(left, ignore_errors=True)  # what somebody reads from a network disk goes the next time
    target = Path(root) / f"checkpoint-{position:08d}"
    try:
        with whole_folder(target) as folder:
            for name, group in tensors.items():
                file = folder / f"{name}.safetensors"
                save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, file)
            for name, document in (documents or {}).items():
                write_json(folder / name, document)
            write_json(folder / _STATE, {**state, "position": position})
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
    """Those, of all there are, oldest first, that are neither among the newest nor the first of their span."""
    removed, former_span = [], 0
    for path in checkpoints[:-keep]:
        span = _position(path) // keep_every if keep_every else 0
        if span == former_span:
            removed.append(path)
        former_span = span
    return removed


def list_checkpoints(root: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    root = Path(root)
    found = [path for path in root.glob("checkpoint-*") if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_position)


def _position(path: Path) -> int:
    return int(path.name.split("-")[1])


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and the state of one checkpoint, every file compared with its recorded checksum.

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
    """The state of a checkpoint: `state.json` is compared with its checksum, of the other files the sizes alone.

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
    if _NAME.fullmatch(path.name) and state["position"] != _position(path):
        raise ValueError(f"{path / _STATE} is of position {state['position']}, not of this folder")
    return state


def _check_former(path: Path, checksums: dict[str, Any]) -> None:
    """The files of a checkpoint without a manifest, by the checksums in its `state.json`."""
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
    """The newest checkpoint that is not damaged, and what it holds; None where there is no checkpoint.

    Damaged ones after it are renamed to `damaged-checkpoint-POSITION`, with a warning.

    Args:
        check: raises a ValueError where a checkpoint (folder, tensors, state) lacks what its reader needs.

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
    """The newest checkpoint whose average, an adapter folder, is not damaged; nothing is moved. None where there is no
    checkpoint.

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


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of one of torch's optimizers or bitsandbytes' as flat named tensors: "<parameter number>.<name>".

    Args:
        parameters: what the numbers count, where the optimizer has only some of them; by default its own.
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
    """Put back what `optimizer_tensors` gave, for the same parameters in the same order, or for some of them."""
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
