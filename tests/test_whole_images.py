"""Whole images are used whatever stands beside their pixels, and turned where that can be read; ones that end early,
however neatly, are refused."""

import io
import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from gligen_xl.images.decode import DAMAGED, ImageError, decode, image_size
from gligen_xl.images.orientation import upright
from gligen_xl.prepare.framing import Framing, frame_image

SIZE = (40, 64)  # of the upright image, height and width


def photo(height=40, width=64, mode="RGB", seed=0, cell=8):
    small = np.random.default_rng(seed).integers(0, 256, (max(height // cell, 2), max(width // cell, 2), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def is_damaged(source):
    with pytest.raises(ImageError) as caught:
        decode(source)
    assert caught.value.reason == DAMAGED
    return str(caught.value)


# EXIF, as exiftool writes it ------------------------------------------------------------------------------------------


def exif_block(order="<", orientation=6, kind=3, *, count=1, value=None, more=(), following=0, ifd=8):
    """A TIFF block by hand: maker, orientation, a pointer to an EXIF directory with a maker's note, the next directory.

    Args:
        more: entries (tag, type, count, value) beside.
        value: the four bytes of the orientation, in place of a number.
        following: where the next directory stands; 8 is a loop.
        ifd: where the header says that the first stands.
    """
    pack = lambda form, *values: struct.pack(order + form, *values)  # noqa: E731
    entries = [(0x010F, 2, 4, b"Odd\0"), (0x0112, kind, count, value or pack("HH", orientation, 0)), *more]
    entries = sorted(entries, key=lambda entry: entry[0])
    body = b"".join(pack("HHI", *entry[:3]) + entry[3] for entry in entries)
    directory = pack("H", len(entries)) + body + pack("I", following)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + pack("I", ifd) + directory + b"\xa5" * 64


def with_exif(kind, exif, image=None):
    """The image with this block put in by hand: Pillow would read it, and mend it, when it writes."""
    image = image or photo(SIZE[1], SIZE[0])
    if kind == "JPEG":
        source = encoded(image, "JPEG", quality=95)
        block = b"Exif\0\0" + exif
        return source[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + source[2:]
    if kind == "PNG":
        source = encoded(image, "PNG")
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        return source[:33] + chunk + source[33:]
    if kind == "WEBP":
        source = encoded(image, "WEBP", exif=b"II*\0" + b"X" * (len(exif) - 4))
        assert source[12:16] == b"VP8X"
        return source.replace(b"II*\0" + b"X" * (len(exif) - 4), exif)
    raise AssertionError(kind)


KINDS = ["JPEG", "PNG", "WEBP"]


def turned(source):
    """Is the image, stored lying, decoded upright?"""
    expected = np.asarray(photo(SIZE[1], SIZE[0]).transpose(Image.Transpose.ROTATE_270), int)
    decoded = np.asarray(decode(source), int)
    assert decoded.shape[:2] == image_size(source)
    return decoded.shape == expected.shape and bool(abs(decoded - expected).mean() < 12)


def lies(source):
    expected = np.asarray(photo(SIZE[1], SIZE[0]), int)
    decoded = np.asarray(decode(source), int)
    assert decoded.shape[:2] == image_size(source)
    return decoded.shape == expected.shape and bool(abs(decoded - expected).mean() < 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_from_blocks_that_are_damaged_elsewhere(kind, order):
    pack = lambda value: struct.pack(order + "I", value)  # noqa: E731
    blocks = {
        "whole": exif_block(order),
        "a loop of directories": exif_block(order, following=8),
        "a next directory outside": exif_block(order, following=2**32 - 9),
        "an EXIF directory outside": exif_block(order, more=[(0x8769, 4, 1, pack(2**31))]),
        "an EXIF directory that is its own": exif_block(order, more=[(0x8769, 4, 1, pack(8))]),
        "a maker's note of junk": exif_block(order, more=[(0x927C, 7, 2**31, pack(60))]),
        "a resolution outside": exif_block(order, more=[(0x011A, 5, 1, pack(2**32 - 1))]),
        "a type that is none": exif_block(order, more=[(0x0131, 99, 7, pack(0))]),
        "huge counts": exif_block(order, more=[(0x0131, 12, 2**32 - 1, pack(4))]),
        "prefixed twice": b"Exif\0\0" + exif_block(order),
    }
    for what, block in blocks.items():
        assert turned(with_exif(kind, block)), what


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_with_an_unreadable_block_is_whole(kind):
    for block in (
        b"JUNKJUNKJUNKJUNK" * 4,
        b"II*\0",
        b"II*\0\x08\0\0",
        b"\0" * 40,
        exif_block(ifd=2**32 - 1),
        exif_block(ifd=0),
        b"MM*\0" + exif_block()[4:],
        exif_block("<")[:14],
        b"\xff" * 60,
    ):
        source = with_exif(kind, block)
        assert lies(source), block
        assert not isinstance(frame_image(source, None, Framing(resolutions=(32,))), str)


def test_unreadable_exif_of_an_avif():
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Odd", 6
    source = encoded(photo(SIZE[1], SIZE[0]), "AVIF", exif=exif)
    place = source.index(b"Odd\0") - 18  # in the first entry
    assert source[place : place + 4] in (b"II*\0", b"MM\0*")
    for junk in (b"JUNK", b"\0\0\0\0", b"\xff\xff*\0"):
        broken = source[:place] + junk + source[place + 4 :]
        with pytest.raises((Image.UnidentifiedImageError, SyntaxError, ValueError)):
            Image.open(io.BytesIO(broken))
        assert decode(broken).size == decode(source).size  # turned by AVIF's own property


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_directories_of_a_tiff(order):
    """A TIFF is an EXIF block itself."""
    pixels = np.asarray(photo(SIZE[1], SIZE[0]))
    for more in (
        [(0x8769, 4, 1, struct.pack(order + "I", 2**31))],
        [(0x8769, 4, 1, struct.pack(order + "I", 8))],
        [(0x8825, 4, 1, struct.pack(order + "I", 3))],
        [(0x83BB, 7, 2**30, struct.pack(order + "I", 9))],
    ):
        assert turned(tiff(pixels, order, [(0x0112, 3, 1, struct.pack(order + "HH", 6, 0)), *more]))


def tiff(pixels, order="<", more=(), rows=None):
    """An uncompressed TIFF of one strip; `rows` is the height that it states."""
    height, width = pixels.shape[:2]
    number = lambda value: struct.pack(order + "I", value)  # noqa: E731
    short = lambda value: struct.pack(order + "HH", value, 0)  # noqa: E731
    entries = [
        (256, 4, 1, number(width)),
        (257, 4, 1, number(rows or height)),
        (258, 3, 3, None),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(2)),
        (273, 4, 1, None),
        (277, 3, 1, short(3)),
        (278, 4, 1, number(height)),
        (279, 4, 1, number(pixels.nbytes)),
        *more,
    ]
    end = 8 + 2 + 12 * len(entries) + 4
    values = {258: number(end), 273: number(end + 6)}
    body = b"".join(
        struct.pack(order + "HHI", tag, kind, count) + (value or values[tag])
        for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0])
    )
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + number(8) + struct.pack(order + "H", len(entries))
    return header + body + number(0) + struct.pack(order + "3H", 8, 8, 8) + pixels.tobytes()


@pytest.mark.parametrize("kind", [*KINDS, "TIFF"])
@pytest.mark.parametrize(
    ("form", "count", "value", "is_turned"),
    [
        (3, 1, struct.pack("<HH", 6, 0), True),
        (4, 1, struct.pack("<I", 6), True),
        (1, 1, b"\6\0\0\0", True),
        (11, 1, struct.pack("<f", 6.0), True),
        (3, 2, struct.pack("<HH", 6, 6), True),
        (3, 1, struct.pack("<HH", 0, 0), False),
        (3, 1, struct.pack("<HH", 9, 0), False),
        (3, 1, struct.pack("<HH", 65535, 0), False),
        (11, 1, struct.pack("<f", 6.5), False),
        (11, 1, struct.pack("<f", float("nan")), False),
        (11, 1, struct.pack("<f", float("inf")), False),
        (2, 1, b"\0\0\0\0", False),
        (2, 4, b"up!\0", False),
        (9, 1, struct.pack("<i", -6), False),
        (99, 1, struct.pack("<I", 6), False),
    ],
)
def test_orientations_of_odd_types(kind, form, count, value, is_turned):
    if kind == "TIFF":
        pixels = np.asarray(photo(SIZE[1], SIZE[0]))
        source = tiff(pixels, more=[(0x0112, form, count, value)])
        if (form, count) in ((1, 1), (3, 2)):
            assert decode(source).size in (SIZE, SIZE[::-1])
            return
    else:
        source = with_exif(kind, exif_block(kind=form, count=count, value=value))
    assert (turned if is_turned else lies)(source)


def test_text_and_ratio_as_orientation():
    assert turned(with_exif("JPEG", exif_block(kind=2, count=2, value=b"6\0\0\0")))
    assert turned(with_exif("JPEG", exif_block(kind=5, value=struct.pack("<I", 50))[:50] + struct.pack("<II", 12, 2)))
    assert lies(with_exif("JPEG", exif_block(kind=5, value=struct.pack("<I", 50))[:50] + struct.pack("<II", 12, 0)))
    assert lies(with_exif("JPEG", exif_block(kind=5, value=struct.pack("<I", 2**31))))


def test_orientation_elsewhere():
    image = photo(SIZE[1], SIZE[0])
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    raw = PngImagePlugin.PngInfo()
    block = exif_block()
    raw.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    behind = with_exif("PNG", exif_block())
    begin = behind.index(b"eXIf") - 4
    chunk, rest = behind[begin : begin + 12 + len(block)], behind[begin + 12 + len(block) :]
    behind = behind[:begin] + rest[:-12] + chunk + rest[-12:]
    for source in (encoded(image, "PNG", pnginfo=info), encoded(image, "PNG", pnginfo=raw), behind):
        assert turned(source)
    assert turned(encoded(image, "WEBP", xmp=xmp, quality=95))
    assert turned(encoded(image, "JPEG", xmp=xmp, quality=95))


def test_images_that_are_open_are_turned_whatever_their_exif():
    for block, expected in ((exif_block(), (64, 40)), (exif_block(ifd=2**32 - 1), (40, 64)), (b"junk" * 9, (40, 64))):
        with Image.open(io.BytesIO(with_exif("WEBP", block))) as image:
            assert upright(image).size == expected
    plain = photo(SIZE[1], SIZE[0])
    plain.getexif()[0x0112] = 6
    assert upright(plain).size == (64, 40)


# Profiles and texts ---------------------------------------------------------------------------------------------------


def with_chunks(source, *chunks, behind=False):
    made = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    place = len(source) - 12 if behind else 33
    return source[:place] + made + source[place:]


@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_large_or_odd_profiles_and_texts_is_whole(behind):
    image = photo()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    random = np.random.default_rng(0).bytes(3 * 2**20)
    for chunk in (
        (b"iCCP", b"large\0\0" + zlib.compress(profile + random)),
        (b"iCCP", b"bomb\0\0" + zlib.compress(bytes(50 * 2**20), 9)),
        (b"iCCP", b"damaged\0\0" + b"no zlib"),
        (b"iCCP", b"kind\0\7" + zlib.compress(profile)),
        (b"iCCP", b""),
        (b"tEXt", b"Comment\0" + random),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50 * 2**20), 9)),
        (b"zTXt", b"Comment\0\7" + b"kind"),
        (b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(bytes(50 * 2**20), 9)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(50 * 2**20), 9)),
        (b"eXIf", random),
        (b"prIv", random),
        (b"pHYs", b"short"),
        (b"gAMA", b""),
        (b"acTL", struct.pack(">II", 2**31, 0)),
        (b"fcTL", b"junk"),
    ):
        source = with_chunks(encoded(image, "PNG"), chunk, behind=behind)
        assert decode(source).tobytes() == image.tobytes(), chunk[0]
        assert image_size(source) == SIZE
    many = with_chunks(encoded(image, "PNG"), *[(b"tEXt", b"k%d\0" % k + random[:1000]) for k in range(3000)])
    assert decode(many).tobytes() == image.tobytes()
    wrong = bytearray(with_chunks(encoded(image, "PNG"), (b"tEXt", b"Comment\0wrong sum")))
    wrong[33 + 8 + 3] ^= 1
    assert decode(bytes(wrong)).tobytes() == image.tobytes()


def test_bombs_in_chunks_take_no_memory():
    code = """
import resource, struct, sys, zlib
from gligen_xl.images.decode import decode
source = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(source)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    bomb = zlib.compress(bytes(400 * 2**20), 9)
    chunks = [(b"iCCP", b"p\0\0" + bomb), (b"zTXt", b"Raw profile type exif\0\0" + bomb)]
    source = with_chunks(encoded(photo(), "PNG"), *chunks, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))
    ran = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True, check=True)
    assert int(ran.stdout) < 50_000  # KiB; each bomb alone is 400 MiB


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "AVIF", "PNG"])
def test_odd_profiles(kind):
    image = photo()
    for profile in (b"junk", b"\0" * 200_000, np.random.default_rng(0).bytes(200_000)):
        assert decode(encoded(image, kind, icc_profile=profile)).size == image.size


def test_a_jpeg_with_odd_segments_is_whole():
    source = encoded(photo(), "JPEG")
    expected = decode(source).tobytes()
    for name, data in (
        (0xE2, b"ICC_PROFILE\0\x02\x09junk"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0" + b"junk" * 20),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\x09\0\0\0\0\0\0\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff\xff"),
        (0xE0, b"JFIF"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff" * 100),
    ):
        odd = source[:2] + bytes((0xFF, name)) + struct.pack(">H", len(data) + 2) + data + source[2:]
        assert decode(odd).tobytes() == expected, data
        assert image_size(odd) == SIZE


def test_more_than_one_image_in_a_file():
    frames = [photo(), photo(seed=1)]
    for kind, options in (("MPO", {}), ("GIF", {}), ("WEBP", {}), ("PNG", {"default_image": True}), ("PNG", {})):
        source = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        decoded = np.asarray(decode(source), int)
        assert abs(decoded - np.asarray(frames[0], int)).mean() < 15, kind
        assert image_size(source) == SIZE
    mpo = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    second = mpo.index(b"\xff\xd8", 2)
    assert decode(mpo[: second + 40]).size == frames[0].size  # the second is cut: the first is whole


# Data that end early --------------------------------------------------------------------------------------------------


def png_of(image, share, *, interlace=0, depth=8):
    """A PNG by hand, whose compressed data close after this share of them."""
    colour, bands = {"L": (0, 1), "1": (0, 1), "P": (3, 1), "LA": (4, 2), "RGB": (2, 3), "RGBA": (6, 4)}[image.mode]
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    pixels = pixels.reshape(*pixels.shape[:2], bands)
    passes = [(0, 0, 1, 1)]
    if interlace:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = []
    for y, x, down, right in passes:
        for row in pixels[y::down, x::right]:
            if len(row):
                flat = np.packbits(row > 127) if depth == 1 else np.repeat(row, depth // 8, axis=-1)
                rows.append(b"\0" + flat.tobytes())
    data = b"".join(rows)
    whole = zlib.compress(data[: int(len(data) * share)])
    header = struct.pack(">IIBBBBB", image.width, image.height, depth, colour, 0, 0, interlace)
    chunks = [(b"IHDR", header)]
    if image.mode == "P":
        chunks.append((b"PLTE", bytes(image.getpalette()[:768])))
    source = b"\x89PNG\r\n\x1a\n"
    for name, content in [*chunks, (b"IDAT", whole), (b"IEND", b"")]:
        source += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return source


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "RGBA", "16"])
@pytest.mark.parametrize("interlace", [0, 1])
def test_a_png_that_ends_early_but_neatly(mode, interlace):
    depth = {"16": 16, "1": 1}.get(mode, 8)
    mode = "L" if mode == "16" else mode
    images = [photo(height, width).convert(mode) for height, width in ((100, 60), (7, 5), (1, 9), (9, 1))]
    for colour in ("black", "white", (253, 2, 251), (2, 253, 6)):
        images.append(Image.new("RGB", (30, 20), colour).convert(mode))
    if mode == "P":
        images += [Image.new("P", (30, 20), index) for index in (0, 2, 253, 255)]
        for image in images[-4:]:
            image.putpalette(bytes(range(256)) * 3)
    for image in images:
        whole = png_of(image, 1, interlace=interlace, depth=depth)
        with Image.open(io.BytesIO(whole)) as opened:
            size = opened.size
        assert decode(whole).size == size
        if min(size) > 4:
            for share in (0, 0.01, 0.3, 0.6, 0.98):
                is_damaged(png_of(image, share, interlace=interlace, depth=depth))


def segments(jpeg):
    """Where scans begin, and where their data end."""
    place, scans = 2, []
    while jpeg[place + 1] != 0xD9:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4], "big")
        begin, place = place, place + 2 + length
        if marker == 0xDA:
            while jpeg[place] != 0xFF or jpeg[place + 1] == 0 or 0xD0 <= jpeg[place + 1] <= 0xD7:
                place += 1
            scans.append((begin, place))
    return scans


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 7}, {"quality": 97}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_that_ends_early(mode, options):
    whole = encoded(photo(120, 200, mode), "JPEG", progressive=True, **options)
    scans = segments(whole)
    assert len(scans) >= 6
    decode(whole)
    for begin, end in scans:
        is_damaged(whole[:begin] + b"\xff\xd9")
        cut = begin + (end - begin) // 2
        if whole[cut - 1] == 0xFF:
            cut -= 1
        source = whole[:cut] + b"\xff\xd9"
        if mode != "CMYK":  # half of its scans code nothing but zeros
            is_damaged(source)
    assert decode(whole[: scans[-1][1]] + b"\xff\xd9").size == (200, 120)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"keep_rgb": True}])
def test_a_jpeg_that_ends_early(mode, options):
    if options.get("keep_rgb") and mode != "RGB":
        pytest.skip("of RGB only")
    whole = encoded(photo(120, 200, mode), "JPEG", **options)
    decode(whole)
    (begin, end), *_ = segments(whole)
    for share in (0.1, 0.5, 0.9):
        cut = begin + int((end - begin) * share)
        cut -= whole[cut - 1] == 0xFF
        assert "ends before" in is_damaged(whole[:cut] + b"\xff\xd9")


def gif_of(image, share, *, interlace=False, transparency=None):
    """A GIF by hand whose codes stay 8 bits wide and end, with their end code, after this share of the pixels."""
    rows = list(range(image.height))
    if interlace:
        rows = [*rows[::8], *rows[4::8], *rows[2::4], *rows[1::2]]
    pixels = np.asarray(image)[rows].ravel()
    codes = []
    for begin in range(0, round(len(pixels) * share), 100):
        codes += [128, *pixels[begin : min(begin + 100, round(len(pixels) * share))].tolist()]
    data = bytes([*codes, 129])
    blocks = b"".join(bytes([len(data[k : k + 255])]) + data[k : k + 255] for k in range(0, len(data), 255)) + b"\0"
    control = b"" if transparency is None else b"\x21\xf9\4\1\0\0" + bytes([transparency]) + b"\0"
    size = struct.pack("<HH", *image.size)
    palette = bytes(value for k in range(128) for value in (k * 2, 255 - k, k))
    local = b"," + bytes(4) + size + bytes([0x40 * interlace]) + b"\7"
    return b"GIF89a" + size + b"\xf6\0\0" + palette + control + local + blocks + b";"


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("transparency", [None, 5])
def test_a_gif_that_ends_early(interlace, transparency):
    values = np.random.default_rng(0).integers(0, 128, (40, 30), np.uint8)
    for pixels in (values, np.full((40, 30), 2, np.uint8), np.full((40, 30), 5, np.uint8), values[:1], values[:, :1]):
        image = Image.fromarray(pixels)
        assert decode(gif_of(image, 1, interlace=interlace, transparency=transparency)).size == image.size
        for share in (0.0, 0.1, 0.5, 0.9):
            is_damaged(gif_of(image, share, interlace=interlace, transparency=transparency))


def test_a_gif_frame_need_not_fill_the_image():
    """What no frame covers is background, not missing."""
    source = bytearray(gif_of(Image.new("L", (30, 40), 9), 1))
    source[6:10] = struct.pack("<HH", 50, 60)
    assert decode(bytes(source)).size == (50, 60)


def test_a_tiff_that_lacks_rows():
    pixels = np.asarray(photo())
    assert decode(tiff(pixels)).tobytes() == pixels.tobytes()
    assert "ends before" in is_damaged(tiff(pixels, rows=80))
    for fill in (0, 253, 2):
        assert decode(tiff(np.full((20, 30, 3), fill, np.uint8))).size == (30, 20)


def test_a_strip_of_a_tiff_that_ends_early():
    """JPEG within TIFF: its decoder, too, makes the rest grey."""
    for options in ({}, {"quality": 95}):
        source = encoded(photo(200, 300), "TIFF", compression="jpeg", **options)
        assert decode(source).size == (300, 200)
        scan = source.rindex(b"\xff\xda")
        cut = scan + (len(source) - scan) // 3
        assert "ends before" in is_damaged(source[:cut] + b"\xff\xd9" + source[cut + 2 :])


def test_uncompressed_and_packed_rows_are_all_there():
    for kind in ("BMP", "PPM"):
        source = bytearray(encoded(photo(), kind))
        if kind == "BMP":
            source[22:26] = struct.pack("<i", 80)
        is_damaged(bytes(source) if kind == "BMP" else bytes(source).replace(b"64 40", b"64 80"))
    packed = bytes((20, 7, 0, 0)) * 9 + b"\0\1"  # of 10 rows
    header = struct.pack("<IiiHHIIiiII", 40, 20, 10, 1, 8, 1, len(packed), 0, 0, 256, 0)
    palette = bytes(value for k in range(256) for value in (k, k, k, 0))
    bmp = b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(packed), 0, 0, 14 + 40 + 1024) + header + palette
    is_damaged(bmp + packed)
    assert decode(bmp + packed[:-2] + packed[:4] + b"\0\1").size == (20, 10)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_decoders_that_notice_themselves(kind):
    """Files cut short whose sizes are put right afterwards."""
    source = encoded(photo(120, 200), kind, quality=90)
    for share in (0.3, 0.6, 0.95):
        if kind == "WEBP":
            length = int(len(source) * share) // 2 * 2
            cut = source[:4] + struct.pack("<I", length - 8) + source[8:16] + struct.pack("<I", length - 20)
            is_damaged(cut + source[20:length])
        else:
            place = source.index(b"mdat")
            length = len(source) - place - 4
            keep = int(length * share)
            cut = source[: place - 4] + struct.pack(">I", keep + 8) + source[place : place + 4 + keep]
            assert cut.count(struct.pack(">I", length)) == 1
            is_damaged(cut.replace(struct.pack(">I", length), struct.pack(">I", keep)))


def images_of_every_kind():
    """Many colours and sizes, those that are filled in before decoding among them."""
    for height, width in ((1, 1), (1, 50), (50, 1), (8, 8), (17, 33), (64, 96), (65, 97)):
        yield photo(height, width)
    for colour in ((253, 2, 251), (2, 253, 6), (128, 128, 128), (127, 127, 127), (0, 0, 0), (255, 255, 255)):
        yield Image.new("RGB", (40, 30), colour)
        framed = photo(30, 40)
        framed.paste(colour, (0, 10, 40, 30))
        yield framed


OPTIONS = {
    "JPEG": [
        *(
            {"quality": q, "subsampling": s, "progressive": p}
            for q, s, p in itertools.product((5, 75, 100), (0, 2), (0, 1))
        ),
        {"optimize": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 1, "progressive": True},
        {"keep_rgb": True},
        {"keep_rgb": True, "progressive": True},
        {"streamtype": 0},
    ],
    "PNG": [{}, {"optimize": True}, {"compress_level": 0}, {"compress_level": 9}],
    "GIF": [{}, {"interlace": 0}, {"interlace": 1}, {"optimize": True}],
    "TIFF": [{"compression": c} for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")],
    "WEBP": [{}, {"lossless": True}, {"method": 6, "quality": 10}],
    "BMP": [{}],
    "PPM": [{}],
    "AVIF": [{"speed": 10}],
}
MODES = {
    "JPEG": ["RGB", "L", "CMYK", "YCbCr"],
    "PNG": ["RGB", "L", "1", "P", "LA", "RGBA", "I;16"],
    "GIF": ["RGB", "L", "1", "P", "RGBA"],
    "TIFF": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F", "LAB"],
    "WEBP": ["RGB", "RGBA", "L"],
    "BMP": ["RGB", "L", "1", "P", "RGBA"],
    "PPM": ["RGB", "L", "1"],
    "AVIF": ["RGB", "RGBA"],
}


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_no_whole_image_is_taken_for_one_that_ends_early(kind):
    tried = 0
    for image in images_of_every_kind():
        for mode, options in itertools.product(MODES[kind], OPTIONS[kind]):
            options = {name: value for name, value in options.items() if value is not None}
            converted = _converted(image, mode)
            try:
                source = encoded(converted, kind, **options)
            except (OSError, ValueError, KeyError):  # not a kind that Pillow writes
                continue
            assert decode(source).size == image.size, (mode, options, image.size)
            tried += 1
    assert tried >= 19


def _converted(image, mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return image.convert("L").convert(mode)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    return image.convert(mode)


def test_every_way_in_reads_images_alike(tmp_path):
    """`generate --image`, images to inpaint, and the real images of an evaluation."""
    from gligen_xl.cli.generate import _open
    from gligen_xl.evaluate.real_images import real_images_of
    from gligen_xl.layout import Layout
    from gligen_xl.pipelines.inpaint import fit_images

    for name, block, size in (("junk", b"junk" * 9, (40, 64)), ("loop", exif_block(following=8), (64, 40))):
        path = tmp_path / f"{name}.png"
        path.write_bytes(with_exif("PNG", block))
        assert _open(str(path)).size == size
        layout = Layout(id=name, phrases=["a"], boxes=[[0, 0, 1, 1]])
        assert real_images_of(tmp_path, [layout])(layout).size == size
        with Image.open(path) as opened:
            assert fit_images(opened, 1, size[1], size[0])[0].tobytes() == decode(path).tobytes()
    (tmp_path / "half.png").write_bytes(png_of(photo(), 0.5))
    with pytest.raises(ValueError, match=r"half\.png: truncated or damaged: it ends before"):
        _open(str(tmp_path / "half.png"))
