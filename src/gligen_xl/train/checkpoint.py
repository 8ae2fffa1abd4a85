"""Checkpoints: a folder of safetensors files and a `state.json`, there whole or not at all.

    runs/mine/checkpoint-00012000/
      gligen_adapter.safetensors  gligen_adapter.json     the average: an adapter folder, to be loaded as one
      weights.safetensors  optimizer.safetensors  state.json

The number in the name is the run's position: samples seen. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import read_json, whole_folder, write_json

_NAME = re.compile(r"checkpoint-(\d{8,})")


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
        state: what `state.json` holds beside the position and the files' checksums; must be JSON.
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
            checksums = {}
            for name, group in tensors.items():
                file = folder / f"{name}.safetensors"
                save_file({key: value.detach().contiguous().cpu() for key, value in group.items()}, file)
                checksums[file.name] = _checksum(file)
            for name, document in (documents or {}).items():
                write_json(folder / name, document)
            write_json(folder / "state.json", {**state, "position": position, "sha256": checksums})
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
    """Tensors by file and the state of one checkpoint, every file checked against its recorded checksum.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no state.json")
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or not isinstance(state.get("sha256"), dict) or state.get("position") is None:
        raise ValueError(f"{path / 'state.json'} is damaged: it lacks the position or the checksums")
    if _NAME.fullmatch(path.name) and state["position"] != _position(path):
        raise ValueError(f"{path / 'state.json'} is of position {state['position']}, not of this folder")
    tensors = {}
    for name, expected in state["sha256"].items():
        file = path / name
        if not file.is_file():
            raise FileNotFoundError(f"checkpoint {path} lacks {name}")
        if _checksum(file) != expected:
            raise ValueError(f"{file} is damaged (its checksum differs)")
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    return tensors, state


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


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
