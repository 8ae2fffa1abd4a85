"""Images of every kind: their size from the header, their pixels upright, and what is wrong with bad ones."""

import io
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from gligen_xl.images.crop import bucket_frame, square_frame
from gligen_xl.images.decode import DAMAGED, EMPTY, NO_IMAGE, TOO_LARGE, ImageError, decode, framed, image_size

ORIENTATION = 274


def photo(height=60, width=90, mode="RGB", seed=0, cell=8):
    """Coloured noise, smooth enough to survive JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (max(height // cell, 2), max(width // cell, 2), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_size(jpeg, height, width=None):
    """The JPEG, whose header now claims another size."""
    place = re.search(rb"\xff[\xc0-\xc2]\x00.\x08", jpeg, re.DOTALL).end()
    sides = height.to_bytes(2, "big") + (width.to_bytes(2, "big") if width else jpeg[place + 2 : place + 4])
    return jpeg[:place] + sides + jpeg[place + 4 :]


def png(width, height, depth, colour, rows, *chunks):
    """A PNG written by hand, for kinds that Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def reason(source, act=decode):
    with pytest.raises(ImageError) as caught:
        act(source)
    return caught.value.reason


# Size and orientation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright(kind, orientation):
    """As EXIF defines them: the stored image is the upright one, turned back."""
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32], upright[:20, 32:], upright[20:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    source = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert image_size(source) == (40, 64)
    decoded = np.asarray(decode(source), int)
    for y, x in ((10, 16), (10, 48), (30, 16), (30, 48)):
        assert abs(decoded[y, x] - upright[y, x]).max() < 12


def test_files_and_bytes_are_alike(tmp_path):
    source = encoded(photo())
    file = tmp_path / "not-called.what-it-is"
    file.write_bytes(source)
    assert image_size(file) == image_size(source) == (60, 90)
    assert decode(file).tobytes() == decode(source).tobytes()
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        image_size(tmp_path / "pipe.jpg")


def test_a_nonsense_orientation_is_none():
    exif = Image.Exif()
    exif[ORIENTATION] = 77
    assert image_size(encoded(photo(), exif=exif)) == (60, 90)


def test_size_is_a_hundred_times_faster_than_decoding():
    exif = Image.Exif()
    exif[ORIENTATION], exif[271] = 6, "a camera"
    source = encoded(photo(1500, 2250), exif=exif, quality=90)
    assert image_size(source) == (2250, 1500)

    def seconds(act, times):
        best = []
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(times):
                act(source)
            best.append((time.perf_counter() - begin) / times)
        return min(best)

    assert seconds(decode, 1) > 100 * seconds(image_size, 100)


# Colours ------------------------------------------------------------------------------------------------------------


def test_kinds_of_colour():
    image = photo()
    pixels = np.asarray(image, int)
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        assert (np.asarray(decode(encoded(image, kind))) == pixels).all()
    assert (np.asarray(decode(encoded(image.convert("L"), "PNG")))[..., 1] == np.asarray(image.convert("L"))).all()
    black_white = image.convert("1")
    assert (np.asarray(decode(encoded(black_white, "PNG")))[..., 0] == np.asarray(black_white) * 255).all()
    for mode, options in (("CMYK", {}), ("YCbCr", {})):
        decoded = decode(encoded(image.convert(mode), "JPEG", quality=98, subsampling=0, **options))
        assert decoded.mode == "RGB"
        assert abs(np.asarray(decoded, int) - pixels).mean() < 3
    for kind in ("WEBP", "AVIF"):
        assert abs(np.asarray(decode(encoded(image, kind, quality=95)), int) - pixels).mean() < 6


def test_ycck_jpeg():
    """A CMYK JPEG says by its Adobe marker whether its inks are stored as they are or as Y, Cb, Cr of themselves."""
    source = bytearray(encoded(Image.new("CMYK", (32, 32), (0, 0, 0, 100)), quality=98))
    source[source.index(b"Adobe") + 11] = 2  # YCCK; the inks, stored inverted, now are Y = Cb = Cr = 255
    inks = np.clip([255 + 1.402 * 127, 255 - (0.344 + 0.714) * 127, 255 + 1.772 * 127], 0, 255)
    expected = (255 - inks) * (1 - 100 / 255)
    assert abs(np.array(decode(bytes(source)).getpixel((16, 16))) - expected).max() < 4


def test_transparency_shows_white():
    half = np.zeros((8, 8, 4), np.uint8)
    half[..., 0], half[:, :4, 3], half[:, 4:, 3] = 200, 255, 51
    for kind in ("PNG", "TIFF"):
        decoded = np.asarray(decode(encoded(Image.fromarray(half), kind)), int)
        assert (decoded[0, 0] == (200, 0, 0)).all()
        assert abs(decoded[0, 7] - (244, 204, 204)).max() <= 1  # 51 of 255 is a fifth
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30, 90, 90, 90])
    palette.putpixel((0, 0), 2)
    for options, corner in (({}, (90, 90, 90)), ({"transparency": 2}, (255, 255, 255))):
        decoded = decode(encoded(palette, "PNG", **options))
        assert decoded.getpixel((0, 0)) == corner
        assert decoded.getpixel((1, 1)) == (10, 20, 30)
    assert decode(encoded(palette, "PNG", transparency=b"\xff\xff\x00")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("LA", (4, 4), (7, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == (
        (255, 255, 255)
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 256, 0x4000], [0x8000, 0xC0FF, 0xFFFF]], np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), kind)), int)
    assert abs(decoded[..., 0] - np.array([[0, 1, 64], [128, 192, 255]])).max() <= 1
    assert (decoded == decoded[..., :1]).all()


def test_sixteen_bit_colours():
    rows = [struct.pack(">6H", 0x1000, 0x8000, 0xFFFF, 0xFF00, 0, 0x7F00)]
    decoded = np.asarray(decode(png(2, 1, 16, 2, rows)))
    assert decoded.tolist() == [[[0x10, 0x80, 0xFF], [0xFF, 0, 0x7F]]]
    alpha = np.asarray(decode(png(1, 1, 16, 6, [struct.pack(">4H", 0x1000, 0x8000, 0xFFFF, 0)])))
    assert alpha.tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255]),
        (np.float32([0, 64, 255]), [0, 64, 255]),
        (np.float32([0, 65535 / 5, 65535]), [0, 51, 255]),
        (np.float32([-10, 0, 15.5]), [0, 100, 255]),
        (np.float32([np.nan, np.inf, 1]), [0, 0, 255]),
        (np.float32([0, 0, 0]), [0, 0, 0]),
        (np.int32([0, 64, 255]), [0, 64, 255]),
        (np.int32([0, 1, 1]), [0, 1, 1]),
        (np.int32([-100, 0, 155]), [0, 100, 255]),
        (np.int32([0, 100_000, 500_000]), [0, 51, 255]),
    ],
)
def test_numbers_as_grey(values, expected):
    source = encoded(Image.fromarray(values[None]), "TIFF")
    assert np.asarray(decode(source))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    source = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert abs(np.array(decode(source).getpixel((8, 8))) - (250, 0, 0)).max() < 16


# Frames -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from([64, 128]), st.booleans())
def test_framed_is_resized_then_cut(height, width, resolution, buckets):
    image = photo(height, width)
    frame = (bucket_frame if buckets else square_frame)(height, width, resolution)
    whole = np.asarray(image.resize(frame.resized[::-1], Image.Resampling.BILINEAR))
    h, w = frame.size
    result = framed(image, frame)
    assert result.shape == (h, w, 3)
    assert result.dtype == np.uint8
    assert (result == whole[frame.top : frame.top + h, frame.left : frame.left + w]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 6]))
def test_scaled_decoding_is_never_smaller_than_asked(height, width, least_height, least_width, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    source = encoded(photo(height, width), exif=exif)
    upright = (width, height) if orientation == 6 else (height, width)
    decoded = decode(source, at_least=(least_height, least_width))
    for side, least, whole in zip(decoded.size[::-1], (least_height, least_width), upright, strict=True):
        assert side >= min(least, whole)
    if min(upright[0] // least_height, upright[1] // least_width) >= 8:
        assert decoded.size[::-1] == tuple(-(-side // 8) for side in upright)


def test_scaled_decoding_is_close():
    source = encoded(photo(600, 900, cell=30), quality=95)
    frame = square_frame(600, 900, 128)
    whole = framed(decode(source), frame).astype(int)
    scaled = decode(source, at_least=frame.resized)
    assert scaled.size == (225, 150)
    assert abs(framed(scaled, frame) - whole).mean() < 1
    upright = encoded(photo(600, 900), "PNG")
    assert decode(upright, at_least=(10, 10)).size == (900, 600)  # only JPEG can


# What is wrong with bad ones ------------------------------------------------------------------------------------------


def test_nothing_and_no_image(tmp_path):
    tmp_path.joinpath("empty.jpg").touch()
    for act in (decode, image_size):
        assert reason(b"", act) == reason(tmp_path / "empty.jpg", act) == EMPTY
        for other in (b"<html>404</html>", b"\0" * 3000, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P"):
            assert reason(other, act) == NO_IMAGE


def test_formats_outside_the_list_are_not_opened():
    for kind in ("ICO", "TGA", "PCX", "SGI", "EPS", "ICNS"):
        assert reason(encoded(photo(64, 64), kind)) == NO_IMAGE


def test_cut_images():
    image = photo(200, 300)
    whole = {kind: encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")}
    whole["progressive"] = encoded(image, "JPEG", progressive=True)
    for kind, source in whole.items():
        for share in (0.02, 0.1, 0.5, 0.9):
            cut = source[: int(len(source) * share)]
            assert reason(cut) == DAMAGED, (kind, share)


def test_other_settings_of_pillow_do_not_let_cut_images_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    source = encoded(photo(200, 300))
    assert reason(source[: len(source) // 2]) == DAMAGED
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
def test_a_jpeg_that_lies_about_its_size(progressive, options):
    """libjpeg fills the rest with grey and does not complain."""
    honest = encoded(photo(64, 96), progressive=progressive, **options)
    assert decode(honest).size == (96, 64)
    for height, width in ((80, None), (640, None), (6400, None), (64, 960), (4000, 4000)):
        liar = with_size(honest, height, width)
        assert image_size(liar) == (height, width or 96)
        assert reason(liar) == DAMAGED
        assert reason(liar, lambda source: decode(source, at_least=(8, 8))) == DAMAGED
    if not progressive:  # there, a later scan only refines
        assert reason(honest[: len(honest) * 2 // 3] + b"\xff\xd9") == DAMAGED


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("least", [None, (5, 5), (30, 30)])
def test_grey_images_are_no_lie(progressive, options, least):
    for size in ((65, 97), (64, 96), (33, 15)):
        grey = Image.new("RGB", size[::-1], (128, 128, 128))
        framed_in_grey = grey.copy()
        framed_in_grey.paste(photo(24, 10), (2, 2))
        for image in (grey, framed_in_grey, grey.convert("L"), Image.new("CMYK", size, (127, 127, 127, 127))):
            source = encoded(image, progressive=progressive, **options)
            assert decode(source, at_least=least).mode == "RGB"
            assert decode(source + b"trailing bytes of a telephone", at_least=least).mode == "RGB"


def test_bombs_are_refused_by_their_header():
    bomb = png(100_000, 100_000, 8, 2, [b""])
    almost = png(13_000, 13_000, 1, 0, [bytes(1625)] * 13_000)  # above where Pillow begins to warn
    above = png(13_378, 13_378, 1, 0, [b""])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for act in (decode, image_size):
            assert reason(bomb, act) == reason(above, act) == TOO_LARGE
        assert image_size(almost) == (13_000, 13_000)
    jpeg = with_size(encoded(photo()), 65_500, 65_500)
    assert reason(jpeg) == TOO_LARGE
    assert len(almost) < 40_000


def test_the_limits_hold_whatever_pillow_is_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(png(100_000, 100_000, 8, 2, [b""])) == TOO_LARGE


def test_encoded_size_is_limited(tmp_path):
    file = tmp_path / "huge.jpg"
    with file.open("wb") as stream:
        stream.write(encoded(photo()))
        stream.truncate(512 * 2**20 + 1)  # sparse: takes no space
    assert reason(file) == reason(file, image_size) == TOO_LARGE


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF"]), st.data())
def test_damage_is_an_error_of_ours_or_an_image(kind, data):
    source = bytearray(encoded(photo(24, 24), kind))
    for place in data.draw(st.lists(st.integers(0, min(len(source) - 1, 400)), max_size=6)):
        source[place] = data.draw(st.integers(0, 255))
    for act in (decode, image_size):
        try:
            result, why = act(bytes(source)), None
        except ImageError as error:
            result, why = None, error.reason
        assert why in (None, NO_IMAGE, TOO_LARGE, DAMAGED)
        assert result is None or act is image_size or result.mode == "RGB"


def test_nothing_heavy_is_imported():
    code = (
        "import sys, gligen_xl.prepare.sources as s; assert not {'torch', 'diffusers', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_own_transposition_is_pillows():
    """Where Pillow knows the orientation, it turns the same way."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        source = encoded(photo(), exif=exif)
        with Image.open(io.BytesIO(source)) as image:
            assert decode(source).tobytes() == ImageOps.exif_transpose(image).tobytes()
