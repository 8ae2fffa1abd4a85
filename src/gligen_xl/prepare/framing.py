"""Turns encoded images into what the VAE sees: decoded once, framed for every resolution, in processes of its own.

Nothing here needs torch: a decoding process starts in a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ..images.crop import Frame, bucket_frame, square_frame
from ..images.decode import MAX_PIXELS, ImageError, decode, framed, image_size


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How images are framed.

    Args:
        resolutions: one frame for each, pixels.
        buckets: SDXL's aspect-ratio buckets in place of squares.
        fast_jpeg: JPEGs are decoded at a half, a quarter or an eighth of their size where that is enough.
        min_side: images whose short side has fewer pixels are left out.
    """

    resolutions: tuple[int, ...]
    buckets: bool = False
    fast_jpeg: bool = False
    min_side: int = 0

    def frames(self, height: int, width: int) -> list[Frame]:
        make = bucket_frame if self.buckets else square_frame
        return [make(height, width, resolution) for resolution in self.resolutions]


@dataclass(frozen=True)
class Framed:
    """An image in each of its frames: (h, w, 3) uint8 each; and the seconds it took."""

    frames: list[Frame]
    pixels: list[np.ndarray]
    seconds: float


class Reason(str):
    """Why an image cannot be framed, in words that are the same for all of its kind.

    Attributes:
        detail: what was got of this one, and what was expected.
    """

    detail: str

    def __new__(cls, reason: str, detail: str = "") -> Reason:
        self = super().__new__(cls, reason)
        self.detail = detail
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Reason, (str(self), self.detail)


def frame_image(source: bytes | Path, stated: tuple[int, int] | None, framing: Framing) -> Framed | Reason:
    """Decode an image and frame it, or return the reason why that cannot be done.

    Args:
        stated: (height, width) that its annotations are made for, None for any.
    """
    begin = time.perf_counter()
    try:
        size = image_size(source)
        if stated is not None and size != stated:
            detail = f"it is {size[1]} x {size[0]} (width x height), its annotation states {stated[1]} x {stated[0]}"
            return Reason("its size is not what its annotation states", detail)
        if min(size) < framing.min_side:
            detail = f"it is {size[1]} x {size[0]}; expected at least {framing.min_side} pixels a side"
            return Reason("too small", detail)
        frames = framing.frames(*size)
        if max(height * width for height, width in (frame.resized for frame in frames)) > MAX_PIXELS:
            # It is resized before it is cut: a line of pixels would fill the memory.
            detail = f"it is {size[1]} x {size[0]}; expected at most {MAX_PIXELS} pixels once it is resized"
            return Reason("too long and narrow", detail)
        least = tuple(max(frame.resized[axis] for frame in frames) for axis in range(2))
        image = decode(source, at_least=least if framing.fast_jpeg else None)  # type: ignore[arg-type]
        pixels = [framed(image, frame) for frame in frames]
    except ImageError as error:
        return Reason(error.reason, str(error).removeprefix(error.reason).removeprefix(": "))
    except FileNotFoundError:
        return Reason("file is missing", f"there is no such file {source if isinstance(source, Path) else ''}")
    except OSError as error:
        return Reason(f"file cannot be read ({error.strerror or type(error).__name__})", str(error.filename or ""))
    return Framed(frames, pixels, time.perf_counter() - begin)


def begin_process() -> None:
    """Prepare a decoding process: it ignores Ctrl-C, which is for its parent, and ends when its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
