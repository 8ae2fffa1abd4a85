"""Reads object arrays of `.npy` files without running the pickles that they are.

A pickle is a program, and `numpy.load` would run it; numpy's own unpickling even trusts pointers and sizes that a file
states. Here each name that such a file may call stands for a function of this module, which records what is asked for:
no class of numpy or torch can be reached while a file is read. The arrays are made at the end, of what was recorded,
and only if type, shape and number of bytes agree.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .plain_pickle import Names, Placeholder, Refused, read_pickle

TEXT_EXPANSION = 16  # bytes of text that a byte of a file may stand for: a phrase that comes again takes two or three
TEXT_ALWAYS = 2**24  # bytes of text that any file may stand for
DEPTH = 16  # of lists within lists; the published files have four


def read_object_array(path: str | Path) -> np.ndarray:
    """Read the object array of a `.npy` file, of numbers, texts, lists, dictionaries and arrays of such.

    Raises:
        ValueError: not such a file, damaged, or asking for more than arrays.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
        except Exception as error:  # of damage, numpy's reading raises what its tokenizer does
            raise ValueError(f"{path} is not a .npy file: {error}") from error
        if dtype.kind != "O":
            raise ValueError(f"{path} holds {dtype} {shape}; expected objects, as the published files have")
        try:
            size = path.stat().st_size
            content = _Resolver(size).resolve(read_pickle(file, size, _ALLOWED))
        except Refused as error:
            raise ValueError(f"{path} {error}; nothing of it was run") from error
        except Exception as error:  # of damage: a value of another type, no key, or whatever torch raises
            raise ValueError(f"{path} is damaged, or not of this kind: {error or type(error).__name__}") from error
    if not isinstance(content, np.ndarray) or content.dtype != object:
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an array of objects")
    if content.shape != shape:
        raise ValueError(f"{path} holds objects {content.shape}; its header says {shape}")
    return content


# What a file may call -----------------------------------------------------------------------------------------------

_NDARRAY = "numpy.ndarray"  # stands for the class
_TYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|O8?|[SU]\d{1,6})")  # of numpy's types, those that files need


@dataclass(eq=False)
class _Dtype(Placeholder):
    """A type that a file asks for: its name, then its byte order."""

    name: str
    order: str = "|"  # as the name says

    def set(self, state: Any) -> None:
        """Read (3, order, subarray, names, fields, size, alignment, flags), as numpy writes it; the last three follow
        from the name, and are not trusted."""
        if type(state) is not tuple or len(state) != 8 or state[0] != 3 or state[1] not in ("<", ">", "|", "="):
            raise Refused(f"asks for the array type {self.name} in a way that is not known")
        if state[2:5] != (None, None, None):
            raise Refused(f"asks for the array type {self.name} with fields")
        self.order = state[1]

    def to_numpy(self) -> np.dtype:
        return np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass(eq=False)
class _Array(Placeholder):
    """An array that a file asks for: (1, shape, type, Fortran order, bytes or list), as numpy writes it."""

    state: tuple | None = None

    def set(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[2]) is not _Dtype:
            raise Refused("asks for an array in a way that is not known")
        self.state = state


def _dtype(name: str, align: Any = False, copy: Any = True) -> _Dtype:
    if not isinstance(name, str) or not _TYPE.fullmatch(name):
        raise Refused("asks for an array of another type than numbers, texts and objects")
    return _Dtype(name)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Begin an array, whose contents come in the next step: numpy writes it no other way."""
    if kind is not _NDARRAY:
        raise Refused("asks for an array of another class")
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    kind = dtype.to_numpy()
    if kind.hasobject:
        raise Refused("asks for a scalar that is an object")
    if type(data) is not bytes or len(data) != kind.itemsize:
        raise ValueError(f"a {kind} of another number of bytes")
    return np.ndarray((), kind, data)[()]


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise Refused("asks for a text's bytes in a way that is not known")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    return b""  # how the protocols of Python 2 spell it


def _no_hooks() -> None:
    """Stand for the gradient hooks of a tensor; one in a file has none."""


def _storage(data: bytes) -> np.ndarray:
    """Read a tensor's numbers, pickles within the pickle: tried here first, then read by torch's restricted reader."""
    import torch  # takes seconds, and few files need it

    stream = io.BytesIO(data)
    # magic number, version, system, storage, keys; then the numbers
    _, _, _, described, _ = (read_pickle(stream, len(data), _STORAGES) for _ in range(5))
    if not 0 <= described[4] <= len(data):
        raise ValueError("a tensor of more numbers than there are bytes")
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("a tensor without its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage).numpy()  # type: ignore[arg-type]


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """Make a view of the storage. Torch would let a storage grow to what a view asks for; here it has to lie within."""
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and _are_sides((offset,))):
        raise ValueError("a tensor without its storage")
    if not (_are_sides(size) and _are_sides(stride) and len(size) == len(stride)):
        raise ValueError("a tensor whose size is not whole numbers")
    if 0 in size:
        return np.empty(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise ValueError(f"a tensor that ends at {last} of {len(storage)} numbers")
    width = storage.dtype.itemsize
    return np.ndarray(size, storage.dtype, storage, offset * width, [step * width for step in stride])


def _are_sides(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in values)


_STORAGES: Names = {
    ("torch", f"{kind}Storage"): kind
    for kind in ("Half", "Float", "Double", "Byte", "Char", "Short", "Int", "Long", "Bool")
}
_ALLOWED: Names = {
    **{(f"{numpy}.multiarray", "_reconstruct"): _reconstruct for numpy in ("numpy.core", "numpy._core")},
    **{(f"{numpy}.multiarray", "scalar"): _scalar for numpy in ("numpy.core", "numpy._core")},
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): _no_hooks,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


# Arrays of what was read --------------------------------------------------------------------------------------------


class _Resolver:
    """Makes the arrays that a pickle describes.

    Args:
        size: of the file, bytes. Numbers, texts and containers may come to as many: each costs a byte at least, but for
            what is named over and over. Lists of the same list can come to any number, and so can rows of the same
            text: that is one object here, but it will be written as often as it is named.
    """

    def __init__(self, size: int):
        self.budget = size
        self.text_budget = TEXT_ALWAYS + TEXT_EXPANSION * size

    def resolve(self, value: Any, depth: int = 0) -> Any:
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} lists within each other")
        self._spend(1)
        if isinstance(value, str | bytes):
            self._spend_text(len(value))
            return value
        if value is None or isinstance(value, bool | int | float | np.generic):
            return value
        if type(value) in (list, tuple):
            return type(value)(self.resolve(item, depth + 1) for item in value)
        if type(value) is dict:
            return {key: self.resolve(item, depth + 1) for key, item in value.items()}
        if isinstance(value, np.ndarray):  # of a tensor
            self._spend(value.size)
            return value
        if type(value) is _Array and value.state is not None:
            return self._array(*value.state[1:], depth=depth)
        raise ValueError(f"a {type(value).__name__.strip('_')} where a value should be")

    def _array(self, shape: Any, dtype: _Dtype, fortran: Any, data: Any, *, depth: int) -> np.ndarray:
        if not _are_sides(shape):
            raise ValueError("an array whose shape is not whole numbers")
        count, kind = math.prod(shape), dtype.to_numpy()
        if kind.hasobject:
            if type(data) is not list or len(data) != count:
                raise ValueError(f"an array {shape} of another number of objects")
            items = np.empty(count, object)
            for k, item in enumerate(data):  # in C order, whatever the array's
                items[k] = self.resolve(item, depth + 1)
            return items.reshape(shape)
        if type(data) is not bytes or len(data) != count * kind.itemsize or not kind.itemsize:
            raise ValueError(f"an array {shape} of {kind} with another number of bytes")
        self._spend(count)
        if kind.kind in "SU":
            self._spend_text(len(data))
        return np.ndarray(shape, kind, data, order="F" if fortran else "C")

    def _spend_text(self, length: int) -> None:
        self.text_budget -= length
        if self.text_budget < 0:
            raise ValueError("its texts come to more than its bytes can hold: the same ones are named over and over")

    def _spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise ValueError("it comes to more than its bytes can hold")
