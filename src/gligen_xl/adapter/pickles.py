"""Reads the tensors of torch's checkpoints, and nothing of the settings, optimizers and callbacks saved with them.

torch's restricted reader builds tensors and refuses every other class by name. Trainers save other objects along with
the weights; those that are known to be settings and the like are read as stand-ins that ignore their state. No class
of a file is imported, and nothing of it runs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..io import first_line
from ..limits import check_torch_file


class _Ignored:
    """Replaces an object that is not a tensor."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _IgnoredDict:
    """Replaces a class of dictionaries: torch's reader puts items into plain ones only."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _IgnoredList:
    def __new__(cls, *_: Any) -> list[Any]:  # type: ignore[misc]
        return []


_DICTIONARIES = re.compile(
    r"builtins\.dict|collections\.defaultdict|easydict\.EasyDict|addict\.addict\.Dict|munch\.Munch|"
    r"yacs\.config\.CfgNode|box\.box\.Box|diffusers\.configuration_utils\.FrozenDict"
)
_LISTS = re.compile(r"builtins\.list|collections\.deque")
_SETTINGS = re.compile(
    r"builtins\.(?:int|float|complex|bool|str|bytes|bytearray|tuple|set|frozenset|range|slice|object)|"
    r"(?:omegaconf|typing|pathlib|datetime|numpy|yacs|ml_collections|hydra|enum|decimal|fractions|uuid)\.[\w.]+|"
    r"argparse\.Namespace|types\.SimpleNamespace|functools\.partial|copyreg\._reconstructor|"
    r"(?:pytorch_lightning|lightning|lightning_fabric|lightning_utilities|accelerate|transformers|diffusers)\.[\w.]+|"
    r"torch\.(?:optim|amp|cuda\.amp)\.[\w.]+"
)


def _stand_in(name: str) -> Any:
    """Return the stand-in for a class of this name; None if it is not known to be harmless to leave out."""
    for names, stand_in in ((_DICTIONARIES, _IgnoredDict), (_LISTS, _IgnoredList), (_SETTINGS, _Ignored)):
        if names.fullmatch(name):
            return stand_in
    return None


def read_checkpoint(file: Path, map_location: str = "cpu") -> Mapping[Any, Any]:
    """Read a file of `torch.save`, in the zip format or the one before it.

    Raises:
        ValueError: it is damaged, not a mapping, or needs a class that is neither a tensor nor known to be settings.
    """
    check_torch_file(file)
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
            with torch.serialization.safe_globals(allowed):
                loaded = torch.load(
                    file, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(file) or None
                )
            break
        except pickle.UnpicklingError as error:
            asked = _asked_for(error)
            if asked is not None and asked not in stand_ins and (stand_in := _stand_in(asked)) is not None:
                stand_ins[asked] = stand_in  # and read again, because torch names one class at a time
                continue
            # torch's own message advises loading it all the same
            what = f"asks for {asked}, and not only" if asked else "is damaged, or asks not only"
            raise ValueError(f"{file} {what} for tensors; nothing of it ran") from error
        except Exception as error:  # a broken pickle fails anywhere
            if "legacy .tar format" in str(error):
                raise ValueError(
                    f"{file} is in torch's first format, a tar, which is not read; load it once with an old torch and "
                    "save its weights as safetensors"
                ) from error
            raise ValueError(f"{file} is damaged or not a checkpoint of torch: {first_line(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} holds a {type(loaded).__name__}; expected names and tensors")
    return loaded


@contextmanager
def settings_ignored(file: Path) -> Iterator[None]:
    """Let diffusers, within the block, read a checkpoint by itself and leave out what `read_checkpoint` would."""
    names: list[str] = []
    if zipfile.is_zipfile(file) and file.suffix != ".safetensors":
        check_torch_file(file)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    known: list[Any] = [(stand_in, name) for name in names if (stand_in := _stand_in(name)) is not None]
    with torch.serialization.safe_globals(known):
        yield


def _asked_for(error: Exception) -> str | None:
    """Return the full name of the refused class, which torch writes without `builtins.`"""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if match is None:
        return None
    return match[1] if "." in match[1] else f"builtins.{match[1]}"
