"""JPEG files: what in them is the image, and whether its data end early.

libjpeg makes grey what it is given no data for, or leaves it coarse, and Pillow does not pass on its warnings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise

from PIL import Image, ImageChops, JpegImagePlugin, TiffImagePlugin

# Bytes put where missing data would be read, each stretch with a restart marker.
_NOISE = b"".join(bytes(range(64)) + bytes((0xFF, 0xD0 + k)) for k in range(8))
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # that ends a scan: no stuffed byte, no restart
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # starts of frames, by kind
_PROGRESSIVE = (0xC2, 0xCA)
_ARITHMETIC = range(0xC9, 0xD0)  # these decoders read zeros behind a scan that is whole
_SCAN, _END, _APP0, _APP1, _APP14, _COMMENT = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE, 0xFE


@dataclass
class _Scans:
    """The scans of the first image of a JPEG file.

    Args:
        ends: where the entropy-coded data of each ends.
        left: bits that are still to come of each coefficient (64) of each component; empty before the frame's header.
    """

    frame: int = 0  # which kind of start of frame
    ends: list[int] = field(default_factory=list)
    left: dict[int, list[int]] = field(default_factory=dict)

    @property
    def are_complete(self) -> bool:
        """Tell whether all coefficients were sent to their last bit."""
        return not any(any(bits) for bits in self.left.values())


def ends_early(image: Image.Image, encoded: bytes, draft: tuple[int, int] | None = None) -> bool:
    """Tell whether parts of a JPEG that was decoded are missing although the end-of-image marker is there.

    Scans that never came are known by the headers of those that did. Where a scan could be cut, the image is decoded
    again with noise behind every scan: one that is complete does not get to read it.

    Args:
        image: decoded.
        draft: its size was chosen so.
    """
    scans = _scans(encoded)
    if not scans.ends or not scans.are_complete:
        return True
    if scans.frame in _ARITHMETIC or (len(scans.ends) == 1 and not _ends_grey(image)):
        return False
    ends = [0, *scans.ends]
    parts = [encoded[begin:end] + _NOISE for begin, end in pairwise(ends)]
    with JpegImagePlugin.JpegImageFile(BytesIO(b"".join(parts) + encoded[ends[-1] :])) as noisy:
        if draft is not None:
            noisy.draft(None, draft)
        noisy.load()
        difference = ImageChops.difference(image, noisy).getbbox(alpha_only=False)
    return difference is not None and not _within_last_block(difference, image.size)


def _within_last_block(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    """Some encoders leave out the last bits of a scan: no more than its last block depends on them."""
    return max(size) > 64 and size[0] - box[0] <= 16 and size[1] - box[1] <= 16


def _ends_grey(image: Image.Image) -> bool:
    last = image.getpixel((image.width - 1, image.height - 1))
    return all(value in (127, 128) for value in (last if isinstance(last, tuple) else (last,)))  # CMYK is inverted


def _scans(encoded: bytes) -> _Scans:
    """Read the headers of all scans, up to the end of the first image."""
    scans = _Scans()
    for marker, begin, end in _segments(encoded):
        segment = encoded[begin + 4 : end]
        if marker in _FRAMES:
            scans.frame = marker
            scans.left = {segment[6 + 3 * k]: [64] * 64 for k in range(segment[5])}
        elif marker == _SCAN:
            number = segment[0]
            first, last, bits = segment[1 + 2 * number], segment[2 + 2 * number], segment[3 + 2 * number] & 15
            if scans.frame not in _PROGRESSIVE:
                first, last, bits = 0, 63, 0
            for component in segment[1 : 1 + 2 * number : 2]:
                if left := scans.left.get(component):
                    left[first : last + 1] = [min(before, bits) for before in left[first : last + 1]]
            scans.ends.append(_data_end(encoded, end))
    return scans


def _segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment that has a length, up to the end of the first image."""
    place = 2
    while (place := encoded.find(b"\xff", place)) >= 0 and place + 4 <= len(encoded):
        marker = encoded[place + 1]
        if marker == _END:
            return
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without a length
            place += 2
        else:
            end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
            yield marker, place, end
            place = _data_end(encoded, end) if marker == _SCAN else end


def _data_end(encoded: bytes, begin: int) -> int:
    """Return where the entropy-coded data of a scan end."""
    marker = _MARKER.search(encoded, begin)
    return marker.start() if marker else len(encoded)


def essential_jpeg(encoded: bytes) -> tuple[bytes, bytes | None]:
    """Return the file without the segments that no pixel depends on, and its EXIF block; None where there is none.

    Pillow reads many of them, and stops at some that are damaged.
    """
    parts, exif, rest = [encoded[:2]], None, 2
    for marker, begin, end in _segments(encoded):
        if marker == _SCAN:
            rest = begin
            break
        content, rest = encoded[begin + 4 : end], end
        if marker == _APP1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        colours = {_APP0: content[:5] == b"JFIF\0" and len(content) >= 14, _APP14: content[:5] == b"Adobe"}
        if not (_APP0 <= marker < _APP0 + 16 or marker == _COMMENT) or (colours.get(marker) and len(content) >= 12):
            parts.append(encoded[begin:end])
    return b"".join(parts) + encoded[rest:], exif


def strips(image: TiffImagePlugin.TiffImageFile, encoded: bytes) -> list[bytes]:
    """Return the JPEGs that a TIFF's strips or tiles are, each with the tables that the file has once; none in other
    TIFFs."""
    tags = image.tag_v2
    if tags.get(259) != 7:  # compression
        return []
    tables = tags.get(347, b"")
    offsets, counts = (tags.get(273), tags.get(279)) if 273 in tags else (tags.get(324), tags.get(325))
    tables = tables[2:-2] if isinstance(tables, bytes) and tables[:2] == b"\xff\xd8" else b""
    pieces = [encoded[begin : begin + count] for begin, count in zip(offsets or (), counts or (), strict=False)]
    return [piece[:2] + tables + piece[2:] for piece in pieces if piece[:2] == b"\xff\xd8"]
