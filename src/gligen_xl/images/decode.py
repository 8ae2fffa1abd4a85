"""Images of any kind: their size without decoding, and their pixels, upright and in RGB.

    height, width = image_size(path)
    pixels = framed(decode(path), square_frame(height, width, 512))

Nothing of an image is trusted: what cannot be decoded whole is a `ImageError` with one of four reasons.
"""

from __future__ import annotations

import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin

from . import jpeg, truncation
from .crop import Frame
from .orientation import TRANSPOSED, UPRIGHT, orientation_of, stated_orientation
from .png import SIGNATURE, essential_png

# Pillow reads many more, some through other programs (EPS runs Ghostscript). GIF and PPM are always there.
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]
ENDINGS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "pbm", "avif")
if find_spec("PIL.AvifImagePlugin"):
    from PIL import AvifImagePlugin

    FORMATS.append(str(AvifImagePlugin.AvifImageFile.format))
assert {TiffImagePlugin.TiffImageFile.format, WebPImagePlugin.WebPImageFile.format} <= {*FORMATS}  # known to Pillow now

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses: 512 MiB of RGB
MAX_BYTES = 512 * 2**20  # encoded

EMPTY, NO_IMAGE, TOO_LARGE, DAMAGED = "empty file", "not an image", "too large", "truncated or damaged"

_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|II\*\x00|MM\x00\*|GIF8[79]a|P[1-6]\s|....ftypavi[fs]", re.DOTALL
)


class ImageError(ValueError):
    """An image that cannot be used.

    Args:
        reason: EMPTY, NO_IMAGE, TOO_LARGE or DAMAGED: the same words for all of their kind.
        detail: what is the matter with this one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def image_size(source: bytes | Path) -> tuple[int, int]:
    """(height, width) of the upright image, from its header; no pixel is decoded.

    Raises:
        ImageError: no image, or one above the limits. A damaged one is noticed only where its header is.
        OSError: the file cannot be read.
    """
    with _contents(source) as file, _strict():
        image, orientation = _open(file, pixels=False)
        width, height = image.size
        return (width, height) if orientation >= 5 else (height, width)


def decode(source: bytes | Path, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Return the upright image in RGB: the first frame of several, on white where it is transparent.

    Args:
        at_least: (height, width). A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is no smaller than
            this, both numbers positive. It is faster, and the pixels differ a little.

    Raises:
        ImageError: see its reasons.
        OSError: the file cannot be read.
    """
    with _contents(source) as file, _strict():
        image, orientation = _open(file)
        height, width = at_least or image.size[::-1]
        smallest = (height, width) if at_least and orientation >= 5 else (width, height)
        if _load(image, file, smallest):
            raise ImageError(DAMAGED, f"it ends before its {image.height} rows are filled")
        upright = _rgb(image)
    return upright.transpose(TRANSPOSED[orientation]) if orientation in TRANSPOSED else upright


def framed(image: Image.Image, frame: Frame) -> np.ndarray:
    """Return the image resized whole, by Pillow's bilinear filter, and cut out: (h, w, 3) uint8 of `frame.size`.

    The published latents were made so: torchvision resizes a PIL image with this very filter.
    """
    (height, width), (h, w) = frame.resized, frame.size
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((frame.left, frame.top, frame.left + w, frame.top + h)))


# Opening ------------------------------------------------------------------------------------------------------------


@contextmanager
def _contents(source: bytes | Path) -> Iterator[IO[bytes]]:
    if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # a pipe would be waited for
        raise FileNotFoundError(f"{source} is not a file")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        if size == 0:
            raise ImageError(EMPTY)
        if size > MAX_BYTES:
            raise ImageError(TOO_LARGE, f"{size} bytes; at most {MAX_BYTES} are read")
        yield file


@contextmanager
def _strict() -> Iterator[None]:
    """Whatever Pillow raises means a damaged image; what it only warns of is checked here, or does not matter."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it: half an image would pass for whole
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE, str(error)) from error
    except Exception as error:  # decoders of hostile bytes raise anything: SyntaxError, KeyError, struct.error ...
        raise ImageError(DAMAGED, str(error)) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open(file: IO[bytes], *, pixels: bool = True) -> tuple[ImageFile.ImageFile, int]:
    """Return the image, not decoded yet, and its EXIF orientation; 1 where Pillow turns it itself.

    Args:
        pixels: False where it will not be decoded.
    """
    file.seek(0)
    begin = file.read(16)
    file.seek(0)
    image: ImageFile.ImageFile
    orientation = None
    try:
        if begin[:3] == b"\xff\xd8\xff":  # not by `Image.open`, which would look for further images in it
            image, orientation = _open_jpeg(file)
        elif begin.startswith(SIGNATURE):
            essential, exif, xmp = essential_png(file, pixels=pixels)
            image, orientation = Image.open(essential, formats=["PNG"]), stated_orientation(exif, xmp)
        elif begin[4:12] in (b"ftypavif", b"ftypavis"):
            image = _open_avif(file)
        else:
            image = Image.open(file, formats=FORMATS)
    except (Image.UnidentifiedImageError, SyntaxError) as error:
        if _SIGNATURE.match(begin):
            raise ImageError(DAMAGED, "its header cannot be read") from error
        raise ImageError(NO_IMAGE, f"none of {', '.join(FORMATS)}") from error
    if min(image.size) < 1:
        raise ImageError(DAMAGED, f"it is {image.width} x {image.height}")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(TOO_LARGE, f"{image.width} x {image.height}; at most {MAX_PIXELS} pixels are decoded")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load_end = lambda: ImageOps.exif_transpose(image, in_place=True)  # nor the directories of its EXIF
        return image, UPRIGHT
    return image, orientation or orientation_of(image)


def _open_jpeg(file: IO[bytes]) -> tuple[ImageFile.ImageFile, int | None]:
    """Return a JPEG, and its orientation where Pillow cannot open it for what stands beside its pixels."""
    try:
        return JpegImagePlugin.JpegImageFile(file), None
    except SyntaxError:
        essential, exif = jpeg.essential_jpeg(_bytes(file))
        return JpegImagePlugin.JpegImageFile(BytesIO(essential)), stated_orientation(exif)


def _open_avif(file: IO[bytes]) -> ImageFile.ImageFile:
    """Return an AVIF; Pillow reads its EXIF when it opens it, so one whose EXIF is unreadable is opened without."""
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.UnidentifiedImageError, ValueError, KeyError, OSError):
        file.seek(0)
        encoded = file.read()
    meta, _, rest = encoded.partition(b"mdat")
    return Image.open(BytesIO(meta.replace(b"Exif", b"none") + b"mdat" + rest), formats=FORMATS)  # an item's type


def _load(image: ImageFile.ImageFile, file: IO[bytes], smallest: tuple[int, int]) -> bool:
    """Decode; whether the data end before the image does."""
    if image.format != "JPEG":
        if truncation.load(image, lambda: _open(file)[0]):
            return True
        strips = jpeg.strips(image, _bytes(file)) if isinstance(image, TiffImagePlugin.TiffImageFile) else []
        return any(_strip_ends_early(strip) for strip in strips)
    image.draft(None, smallest)
    image.load()
    return jpeg.ends_early(image, _bytes(file), smallest)


def _strip_ends_early(encoded: bytes) -> bool:
    try:
        image = JpegImagePlugin.JpegImageFile(BytesIO(encoded))
    except SyntaxError:  # grey and alpha: a JPEG within a TIFF may be of a kind that there is no file of
        return False
    image.load()
    return jpeg.ends_early(image, encoded)


def _bytes(file: IO[bytes]) -> bytes:
    if isinstance(file, BytesIO):
        return file.getvalue()
    file.seek(0)
    return file.read()


# Colours ------------------------------------------------------------------------------------------------------------


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8, never clipped.

    16 bits lose their low byte, as Pillow's 16-bit colours do. 32-bit integers and floats do not say what white is: it
    is the least of 1 (floats only), 255 and 65535 that none of them exceeds; others are stretched to the full range.
    """
    if image.mode != "I" and image.mode != "F":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    whites = (65535,) if image.format == "PPM" else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        values, white = values - low, high - low
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
