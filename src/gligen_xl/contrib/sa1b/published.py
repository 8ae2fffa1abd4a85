"""Reads the published `.npy` files of latents and boxes, without running the pickles that they are.

`jiuntian/sa1b-sdxl-latents-{512,1024}` hold a dictionary of indices and latents, `longlian/sa-1b_boxes` and
`jiuntian/sa-1b_boxes_sdxl` a table of five or six columns, both as object arrays: `numpy.load` would want
`allow_pickle=True`, which runs whatever a file contains. `object_array` reads them instead, and this module says what
their contents mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...layout import xyxy_from_cxcywh
from .object_array import read_object_array

MAX_SIDE = 65_535  # pixels: no JPEG has more


@dataclass(frozen=True)
class PublishedLatents:
    """Latents of one SA-1B archive. indices (N,) of images, ascending; latents (N, 4, h, w) float16, scaled."""

    indices: np.ndarray
    latents: np.ndarray


@dataclass(frozen=True)
class PublishedRow:
    """Boxes of one image, xyxy, 0-1 in the square centre crop, as the file has them: not clipped, not filtered.

    original_size is (height, width) in pixels, or None where the table has five columns.
    """

    index: int
    caption: str
    boxes: np.ndarray  # (n, 4) float32
    scores: np.ndarray  # (n,) float32
    phrases: list[str]
    original_size: tuple[int, int] | None


def read_latents(path: str | Path) -> PublishedLatents:
    """Read the latents of `sa_000000.npy`.

    Raises:
        ValueError: not such a file, damaged, or asking for more than arrays.
    """
    content = read_object_array(path)
    if content.shape != () or not isinstance(content.item(), dict):
        raise ValueError(f"{path} holds an array {content.shape}; expected the dictionary of a latents file")
    entries = content.item()
    if missing := {"indices", "latents"} - set(entries):
        raise ValueError(f"{path} lacks {sorted(missing)}; it has {sorted(map(str, entries))[:8]}")
    latents, indices = entries["latents"], _numbers(entries["indices"])
    if not isinstance(latents, np.ndarray) or latents.ndim != 4 or latents.dtype.kind != "f" or latents.shape[1] != 4:
        raise ValueError(f"{path}: latents are {_kind(latents)}; expected float16 (N, 4, h, w)")
    if indices.dtype.kind not in "iu" or indices.shape != latents.shape[:1]:
        raise ValueError(f"{path}: {indices.shape} indices of {indices.dtype} for {len(latents)} latents")
    if len(np.unique(indices)) != len(indices):
        raise ValueError(f"{path}: an image stands in it twice")
    return PublishedLatents(indices.astype(np.int64), latents.astype(np.float16, copy=False))


def read_boxes(path: str | Path) -> list[PublishedRow]:
    """Read a table of boxes, of five columns (index, caption, boxes, scores, phrases) or six (and original size).

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
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return rows


def _row(columns: list[Any]) -> PublishedRow:
    index, caption, boxes, scores, phrases = columns[:5]
    if (index := _numbers(index)).dtype.kind not in "iu" or index.shape != () or not 0 <= index < 2**63:
        raise ValueError(f"the index is {_kind(index)}; expected a whole number")
    if not isinstance(caption, str):
        raise ValueError(f"the caption is {_kind(caption)}; expected text")
    boxes, scores, phrases = _numbers(boxes).reshape(-1, 4), _numbers(scores).reshape(-1), _texts(phrases)
    if not len(boxes) == len(scores) == len(phrases):
        raise ValueError(f"{len(boxes)} boxes, {len(scores)} scores, {len(phrases)} phrases")
    size = None
    if len(columns) == 6 and columns[5] is not None:
        height, width = (int(value) for value in _numbers(columns[5]))
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise ValueError(f"the original size is {width} x {height}; expected 1 to {MAX_SIDE} pixels")
        size = (height, width)
    corners = xyxy_from_cxcywh(boxes.astype(np.float32))
    return PublishedRow(int(index), str(caption), corners, scores.astype(np.float32), phrases, size)


def _numbers(values: Any) -> np.ndarray:
    """Convert a number, an array of them, or lists of them."""
    array = np.asarray(values) if _are_numbers(values) else None
    if array is None or (array.dtype.kind not in "iuf" and array.size):
        raise ValueError(f"{_kind(values)}; expected numbers")
    return array


def _are_numbers(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "iuf" or _are_numbers(values.tolist())
    if isinstance(values, list | tuple):
        return all(map(_are_numbers, values))
    return isinstance(values, int | float | np.number)


def _texts(values: Any) -> list[str]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"the phrases are {_kind(values)}; expected a list of texts")
    return [str(value) for value in values]


def _kind(value: Any) -> str:
    """Describe a value that may be of any size in a few words."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"{value!r:.60}"
