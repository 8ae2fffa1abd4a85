"""How an image lies: its EXIF orientation, read also from blocks that are damaged elsewhere.

Pillow reads a whole EXIF block, or raises; an image is whole whatever its EXIF is. Only the one entry of the first
directory that says how the image lies is looked for here, so no other offset, loop or maker's note can matter.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import Image

TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UPRIGHT = 1

_TAG = 0x0112
_PREFIX = b"Exif\0\0"
_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f"}  # of TIFF 6.0, those that fit in an entry
_LONG_TYPES = {5: "II", 10: "ii", 12: "d"}  # the entry says where they stand
_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image that Pillow opened, 1 to 8; 1 where nothing readable says otherwise."""
    exif, xmp = image.info.get("exif"), image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    return stated_orientation(exif, xmp)


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF says; its EXIF may be unreadable."""
    try:
        orientation = image.getexif().get(_TAG)  # also what was set on it since it was opened
    except Exception:  # Pillow's readers of hostile bytes raise anything
        orientation = orientation_of(image)
    orientation = _whole(orientation)
    return image.transpose(TRANSPOSED[orientation]) if orientation in TRANSPOSED else image


def stated_orientation(exif: bytes | None, xmp: bytes | str | None = None) -> int:
    """Return what an EXIF block says, or else an XMP packet: 1 to 8, or 1 if neither says it."""
    orientation = _from_exif(exif) if isinstance(exif, bytes) else None
    if orientation is None and xmp and isinstance(xmp, bytes | str):
        match = _XMP.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp)
        orientation = int(match[1]) if match else None
    return orientation or UPRIGHT


def _tiff(exif: bytes) -> bytes:
    while exif.startswith(_PREFIX):  # JPEG's prefix, which some programs also write elsewhere, even twice
        exif = exif[len(_PREFIX) :]
    return exif


def _directory(tiff: bytes) -> tuple[str, int, int] | None:
    """Byte order, place of the first entry, and number of entries of the first directory."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (begin,) = struct.unpack_from(order + "I", tiff, 4)
    if not 8 <= begin <= len(tiff) - 2:
        return None
    (count,) = struct.unpack_from(order + "H", tiff, begin)
    return order, begin + 2, count


def _from_exif(exif: bytes) -> int | None:
    """1 to 8, or None where the block does not say it."""
    tiff = _tiff(exif)
    if (directory := _directory(tiff)) is None:
        return None
    order, begin, count = directory
    for place in range(begin, min(begin + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, place)
        if tag == _TAG:
            return _whole(_value(tiff, place + 8, order, kind, number))
    return None


def _value(tiff: bytes, place: int, order: str, kind: int, number: int) -> Any:
    if kind in (2, 7):  # text, or bytes of no stated kind
        return tiff[place : place + min(number, 4)]
    if kind in _TYPES:
        return struct.unpack_from(order + _TYPES[kind], tiff, place)[0]
    if kind in _LONG_TYPES:
        (place,) = struct.unpack_from(order + "I", tiff, place)
        if place + 8 > len(tiff):
            return None
        values = struct.unpack_from(order + _LONG_TYPES[kind], tiff, place)
        if len(values) == 1:
            return values[0]
        return values[0] / values[1] if values[1] else None
    return None


def _whole(value: Any) -> int | None:
    """Return a number from 1 to 8, however it is written; None for all else."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value[0] if value[:1] and value[0] < 9 else value.decode("latin-1")
    if isinstance(value, str):
        value = value.strip("\0 ")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return int(number) if number in range(1, 9) else None
