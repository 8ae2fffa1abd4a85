"""Images whose data end early, but so neatly that their decoders say nothing.

A decoder leaves the pixels that it is given no data for as they were. What was there before is chosen here: where
another choice makes another image, data are missing. A whole image depends on no choice. JPEG is in `jpeg`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile

# What stands in the memory of an image before it is decoded. Few images have such a colour; none depends on it.
_BEFORE, _OTHERWISE = (253, 2, 251, 6), (0, 253, 6, 251)
_DECODED_WHOLE = ("WEBP", "AVIF")  # by decoders that refuse data that end early


def load(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile]) -> bool:
    """Decode all formats but JPEG; whether pixels are missing.

    Args:
        reopen: opens the same image once more; called where its pixels could be missing.
    """
    if image.format in _DECODED_WHOLE:
        image.load()
        return False
    interlaced = bool(image.info.get("interlace")) or image.format in ("GIF", "TIFF")
    _fill_before(image, _BEFORE)
    image.load()
    if not _could_be_missing(image, last_row=not interlaced):
        return False
    other = reopen()
    _fill_before(other, _OTHERWISE)
    other.load()
    return image.im.mode != other.im.mode or image.tobytes() != other.tobytes()


def _fill_before(image: ImageFile.ImageFile, colour: tuple[int, ...]) -> None:
    """Let the image's memory hold this colour where it is decoded to."""
    prepare, tiles = image.load_prepare, list(image.tile)

    def filled() -> None:
        prepare()
        box = (0, 0, *image.im.size)
        if isinstance(image, GifImagePlugin.GifImageFile):  # a frame need not fill the image
            x0, y0, x1, y1 = tiles[0][1] or box
            box = (x0, y0, min(x1, box[2]), min(y1, box[3]))
        image.im.paste(_ink(colour, image.im.mode), box)

    image.load_prepare = filled  # type: ignore[method-assign]


def _could_be_missing(image: Image.Image, *, last_row: bool) -> bool:
    """Tell whether a pixel has the colour that was there before: anywhere, or all of the last row."""
    if image.mode == "1":  # both of its colours are common
        return True
    one = Image.new(image.mode, (1, 1))
    one.im.paste(_ink(_BEFORE, image.mode), (0, 0, 1, 1))
    same = np.asarray(image.crop((0, image.height - 1, *image.size)) if last_row else image) == np.asarray(one)
    same = same.all(axis=-1) if same.ndim == 3 else same
    return bool(same.all() if last_row else same.any())


def _ink(colour: tuple[int, ...], mode: str) -> int | tuple[int, ...]:
    bands = Image.getmodebands(mode)
    return colour[0] if bands == 1 else colour[:bands]
