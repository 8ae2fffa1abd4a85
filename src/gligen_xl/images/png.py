"""PNG files without what is no image in them: profiles, texts, animations.

Pillow unpacks all profiles and texts of a PNG and refuses the whole file where one has more than a megabyte. No pixel
depends on them, so Pillow is given the file without them; how the image lies is looked for here.
"""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 2**20  # bytes of one text, unpacked, that are looked at for the orientation

_RAW_EXIF = (b"Raw profile type exif", b"Raw profile type APP1")  # how ImageMagick and older programs write it
_XMP = b"XML:com.adobe.xmp"


def essential_png(file: IO[bytes], *, pixels: bool) -> tuple[BytesIO, bytes | None, bytes | None]:
    """Return the chunks that pixels depend on: all critical ones and tRNS.

    Args:
        file: at its begin, a PNG by its signature.
        pixels: False leaves out what comes after the header of the first chunk of pixels.

    Returns:
        those chunks as a file, its EXIF block (TIFF), and its XMP packet; None each where there is none.
    """
    essential = BytesIO()
    essential.write(file.read(len(SIGNATURE)))
    exif = xmp = raw_exif = None
    before_pixels = True
    while len(head := file.read(8)) == 8:
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if not name.isalpha() or length >= 2**31:  # Pillow says what is wrong
            if pixels or before_pixels:
                essential.write(head + file.read())
            break
        if name[:1].isupper() or name == b"tRNS":
            if pixels or (before_pixels and name != b"IDAT"):
                essential.write(head + file.read(length + 4))
            else:
                if before_pixels:
                    essential.write(head)
                file.seek(length + 4, 1)
            before_pixels &= name != b"IDAT"
            if name == b"IEND":
                break
        elif name == b"eXIf" or name in (b"tEXt", b"zTXt", b"iTXt"):
            data, _ = file.read(min(length, MAX_TEXT)), file.seek(max(0, length - MAX_TEXT) + 4, 1)
            if name == b"eXIf":
                exif = data
            elif data.startswith(_XMP + b"\0") and name == b"iTXt":
                xmp = _text(data, compressed=data[len(_XMP) + 1 : len(_XMP) + 2] == b"\1", skip=2, texts=2)
            elif data.startswith(_RAW_EXIF) and name != b"iTXt":
                raw_exif = _from_hexadecimal(_text(data, compressed=name == b"zTXt", skip=name == b"zTXt", texts=0))
        else:
            file.seek(length + 4, 1)
    essential.seek(0)
    return essential, exif or raw_exif, xmp


def _text(data: bytes, *, compressed: bool, skip: int, texts: int) -> bytes:
    """Return what follows a keyword, `skip` bytes and `texts` texts that end with a zero; b"" if it is damaged."""
    rest = data.partition(b"\0")[2][skip:]
    for _ in range(texts):
        rest = rest.partition(b"\0")[2]
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT)
    except zlib.error:
        return b""


def _from_hexadecimal(text: bytes) -> bytes | None:
    """Lines of a name, a length and hexadecimal digits, as ImageMagick writes profiles."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return None
