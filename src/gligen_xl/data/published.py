"""The field's published `.npy` files of latents and boxes, read without running the pickles that they are.

`jiuntian/sa1b-sdxl-latents-{512,1024}` hold a dictionary of indices and latents, `longlian/sa-1b_boxes` and
`jiuntian/sa-1b_boxes_sdxl` a table of five or six columns, both as object arrays: `numpy.load` would want
`allow_pickle=True`, which runs whatever a file contains. The reader here knows the few names that such files need, each
bound to a function of its own that can build arrays and nothing else; a file that names anything else is refused.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..layout import xyxy_from_cxcywh

VAE, SCALING_FACTOR = "madebyollin/sdxl-vae-fp16-fix", "0.13025"  # of the published latents; safe in half precision


@dataclass(frozen=True)
class PublishedLatents:
    """Latents of one SA-1B archive. indices (N,) of pictures, ascending; latents (N, 4, h, w) float16, scaled."""

    indices: np.ndarray
    latents: np.ndarray


@dataclass(frozen=True)
class PublishedRow:
    """Boxes of one picture, xyxy, 0-1 in the square centre crop, as they stand there: not clipped, not filtered.

    original_size is (height, width) in pixels, or None where the table has five columns.
    """

    index: int
    caption: str
    boxes: np.ndarray  # (n, 4) float32
    scores: np.ndarray  # (n,) float32
    phrases: list[str]
    original_size: tuple[int, int] | None


def read_latents(path: str | Path) -> PublishedLatents:
    """The latents of `sa_000000.npy`.

    Raises:
        ValueError: not such a file, damaged, or asking for more than arrays.
    """
    content = read_object_array(path)
    if content.shape != () or not isinstance(content.item(), dict):
        raise ValueError(f"{path} holds an array {content.shape}; expected the dictionary of a latents file")
    entries = content.item()
    if missing := {"indices", "latents"} - set(entries):
        raise ValueError(f"{path} lacks {sorted(missing)}; it has {sorted(map(str, entries))[:8]}")
    latents, indices = _array(entries["latents"]), np.asarray(entries["indices"])
    if latents.ndim != 4 or latents.dtype.kind != "f" or latents.shape[1] != 4:
        raise ValueError(f"{path}: latents are {latents.dtype} {latents.shape}; expected float16 (N, 4, h, w)")
    if indices.dtype.kind not in "iu" or indices.shape != latents.shape[:1]:
        raise ValueError(f"{path}: {indices.shape} indices of {indices.dtype} for {len(latents)} latents")
    if len(np.unique(indices)) != len(indices):
        raise ValueError(f"{path}: a picture stands in it twice")
    return PublishedLatents(indices.astype(np.int64), latents.astype(np.float16, copy=False))


def read_boxes(path: str | Path) -> list[PublishedRow]:
    """The rows of a table of boxes, five columns (index, caption, boxes, scores, phrases) or six (and original size).

    Raises:
        ValueError: not such a table, damaged, or asking for more than arrays; it names the row.
    """
    table = read_object_array(path)
    if table.ndim != 2 or table.shape[1] not in (5, 6):
        raise ValueError(f"{path} holds an array {table.shape}; expected a table of five or six columns")
    rows = []
    for number, columns in enumerate(table.tolist()):
        try:
            rows.append(_row(columns))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return rows


def _row(columns: list[Any]) -> PublishedRow:
    index, caption, boxes, scores, phrases = columns[:5]
    boxes = _array(boxes).astype(np.float32).reshape(-1, 4)
    scores = _array(scores).astype(np.float32).reshape(-1)
    phrases = [str(phrase) for phrase in phrases]
    if not len(boxes) == len(scores) == len(phrases):
        raise ValueError(f"{len(boxes)} boxes, {len(scores)} scores, {len(phrases)} phrases")
    if not isinstance(caption, str):
        raise ValueError(f"the caption is {caption!r:.60}; expected text")
    size = None
    if len(columns) == 6 and columns[5] is not None:
        height, width = (int(value) for value in columns[5])
        if height < 1 or width < 1:
            raise ValueError(f"the original size is {height} x {width}")
        size = (height, width)
    return PublishedRow(int(index), caption, xyxy_from_cxcywh(boxes), scores, phrases, size)


def _array(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


class _Refused(Exception):
    """A pickle asks for more than arrays."""


_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError, RuntimeError,
)  # fmt: skip


# The reader ---------------------------------------------------------------------------------------------------------


def read_object_array(path: str | Path) -> np.ndarray:
    """The object array of a `.npy` file, its pickle read with an allow-list."""
    path = Path(path)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version[0]](file)
        except (ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is not a .npy file: {error}") from error
        if not dtype.hasobject:
            raise ValueError(f"{path} holds {dtype} {shape}; expected objects, as the published files have")
        try:
            content = _ArrayUnpickler(file).load()
        except _Refused as error:
            raise ValueError(f"{path} {error}; nothing of it was run") from error
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged, or not of this kind: {error}") from error
    if not isinstance(content, np.ndarray) or content.dtype != object:
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an array of objects")
    return content.reshape(shape)


_NDARRAY = "numpy.ndarray"  # stands for the class, which called itself would reserve any memory it is told to


def _reconstruct(kind: Any, shape: tuple, code: bytes) -> np.ndarray:
    """An empty array, whose contents come in the next steps: numpy writes it no other way."""
    if kind is not _NDARRAY:
        raise _Refused(f"asks for an array of the class {kind!r}")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    if dtype.hasobject:
        raise _Refused("asks for a scalar that is an object")
    return np.frombuffer(data, dtype)[0]


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise _Refused(f"asks for the encoding {encoding!r}")
    return codecs.encode(text, encoding)


def _no_bytes() -> bytes:
    return b""  # how the protocols of Python 2 spell it


def _storage(data: bytes) -> Any:
    """A tensor's storage, itself a pickle, through torch's restricted reader."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


ALLOWED: dict[tuple[str, str], Any] = {
    **{(f"{numpy}.multiarray", "_reconstruct"): _reconstruct for numpy in ("numpy.core", "numpy._core")},
    **{(f"{numpy}.multiarray", "scalar"): _scalar for numpy in ("numpy.core", "numpy._core")},
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"asks for {module}.{name}, which no file of arrays needs")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("asks for objects outside of itself")
