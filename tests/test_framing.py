"""Framing: images and boxes go together into squares and buckets, upright and mirrored, decoded once."""

import io
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from gligen_xl.images.crop import BUCKETS, bucket_frame, square_frame
from gligen_xl.prepare import framing
from gligen_xl.prepare.framing import Framed, Framing, frame_image
from gligen_xl.prepare.item import Item
from gligen_xl.prepare.report import UnitReport
from gligen_xl.prepare.settings import Settings
from gligen_xl.prepare.views import views

RED, BLUE = (250, 10, 20), (20, 30, 240)
sides = st.integers(40, 1200)


def encoded(image, form="PNG", orientation=None, **options):
    """The bytes of a file; with an EXIF orientation, stored so that it is seen upright again."""
    if orientation is not None:
        stored_by = {
            1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
        }[orientation]  # fmt: skip
        image = image if stored_by is None else image.transpose(stored_by)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise_image(height, width, seed=0):
    """Full of detail."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def natural_image(height, width):
    """Smooth noise of several scales, and shapes with edges."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cells, strength in ((6, 60), (40, 25), (200, 8)):
        coarse = rng.normal(0, strength, (cells, cells, 3))
        layers = [Image.fromarray(coarse[..., k].astype(np.float32)) for k in range(3)]
        total += np.stack([np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) for layer in layers], -1)
    image = Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, size = rng.integers(0, width), rng.integers(0, height), rng.integers(20, 200)
        pen.ellipse((x, y, x + size, y + size), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    return image.filter(ImageFilter.GaussianBlur(0.7))


def taken(source, stated=None, **options):
    result = frame_image(source, stated, Framing(**options))
    assert isinstance(result, Framed), result
    return result


# Frames -------------------------------------------------------------------------------------------------------------


@given(sides, sides, st.sampled_from([64, 512, 1024]))
def test_a_square_is_the_middle_of_the_short_side(height, width, resolution):
    frame = square_frame(height, width, resolution)
    assert frame.size == (resolution, resolution)
    assert min(frame.resized) == resolution
    assert max(frame.resized) == int(resolution * max(height, width) / min(height, width))  # torchvision's
    assert 0 <= frame.top <= frame.resized[0] - resolution
    assert 0 <= frame.left <= frame.resized[1] - resolution
    x0, y0, x1, y1 = frame.region
    assert abs((x0 + x1) / 2 - 0.5) <= 0.5 / frame.resized[1] + 1e-9
    assert abs((y0 + y1) / 2 - 0.5) <= 0.5 / frame.resized[0] + 1e-9


@given(sides, sides, st.sampled_from([64, 512, 1024]))
def test_a_bucket_is_of_the_nearest_shape_and_filled(height, width, resolution):
    frame = bucket_frame(height, width, resolution)
    h, w = frame.size
    ratio = max(h / w / (height / width), height / width / (h / w))
    assert all(ratio <= max(a / b * width / height, b / a * height / width) + 1e-9 for a, b in BUCKETS)
    assert (h % (resolution // 16), w % (resolution // 16)) == (0, 0)
    assert frame.resized[0] >= h
    assert frame.resized[1] >= w
    assert h == frame.resized[0] or w == frame.resized[1]
    stretch = frame.resized[0] / height / (frame.resized[1] / width)
    assert abs(math.log(stretch)) < 1.01 / min(frame.resized)  # of rounding alone


@given(sides, sides, st.booleans(), st.lists(st.tuples(*[st.floats(-1, 2)] * 4), max_size=4))
def test_moved_back_boxes_are_where_they_were(height, width, buckets, boxes):
    frame = (bucket_frame if buckets else square_frame)(height, width, 64)
    given_boxes = np.array(boxes).reshape(-1, 4)
    np.testing.assert_allclose(frame.back(frame.move(given_boxes)), given_boxes, atol=1e-9)
    np.testing.assert_allclose(frame.move(np.array([frame.region])), [[0, 0, 1, 1]], atol=1e-9)


# Images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 400), (48, 60)])
def test_a_framed_image_is_resized_whole_and_cut(size, buckets):
    image = noise_image(*size)
    result = taken(encoded(image), resolutions=(64, 128), buckets=buckets)
    for resolution, frame, pixels in zip((64, 128), result.frames, result.pixels, strict=True):
        assert frame == (bucket_frame if buckets else square_frame)(*size, resolution)
        assert frame.original == size
        height, width = frame.resized
        whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        cut = whole[frame.top : frame.top + frame.size[0], frame.left : frame.left + frame.size[1]]
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, cut)


def test_several_resolutions_are_of_one_decode(monkeypatch):
    decoded = []
    real = framing.decode
    monkeypatch.setattr(framing, "decode", lambda *a, **b: decoded.append(1) or real(*a, **b))
    data = encoded(noise_image(300, 200), "JPEG")
    together = taken(data, resolutions=(128, 64, 32))
    assert len(decoded) == 1
    for k, resolution in enumerate((128, 64, 32)):
        assert np.array_equal(together.pixels[k], taken(data, resolutions=(resolution,)).pixels[0])


def test_fast_jpeg_differs_little():
    data = encoded(natural_image(2250, 1500), "JPEG", quality=90)
    full, fast = (taken(data, resolutions=(512,), fast_jpeg=fast) for fast in (False, True))
    assert full.frames == fast.frames
    difference = np.abs(full.pixels[0].astype(float) - fast.pixels[0])
    assert 0 < difference.mean() < 1
    assert difference.max() < 40
    # 1024 wants all pixels of it, so both resolutions are of the whole
    both = taken(data, resolutions=(512, 1024), fast_jpeg=True)
    assert np.array_equal(both.pixels[0], full.pixels[0])


def test_fast_jpeg_leaves_others_as_they_are():
    data = encoded(natural_image(400, 300))
    full, fast = (taken(data, resolutions=(64,), fast_jpeg=fast) for fast in (False, True))
    assert np.array_equal(full.pixels[0], fast.pixels[0])


def test_what_cannot_be_framed_says_why(tmp_path):
    data = encoded(noise_image(100, 80), "JPEG")
    plain = Framing(resolutions=(64,))
    (tmp_path / "a.jpg").write_bytes(data)
    assert isinstance(frame_image(tmp_path / "a.jpg", (100, 80), plain), Framed)
    reasons = [
        (data, (80, 100), plain, "its size is not what its annotation states"),
        (data, None, Framing(resolutions=(64,), min_side=81), "too small"),
        (tmp_path / "none.jpg", None, plain, "file is missing"),
        (data[: len(data) // 2], None, plain, "truncated or damaged"),
        (b"", None, plain, "empty file"),
        (b"no image at all", None, plain, "not an image"),
        (encoded(Image.new("RGB", (60_000, 1))), None, Framing(resolutions=(512,)), "too long and narrow"),
    ]
    for source, stated, how, reason in reasons:
        assert frame_image(source, stated, how) == reason
    assert isinstance(frame_image(data, None, Framing(resolutions=(64,), min_side=80)), Framed)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_stated_size_is_that_of_the_upright_image(orientation):
    data = encoded(noise_image(100, 80), "JPEG", orientation)
    assert frame_image(data, (80, 100), Framing(resolutions=(64,))) == "its size is not what its annotation states"
    assert taken(data, (100, 80), resolutions=(64,)).frames[0].original == (100, 80)


# Boxes --------------------------------------------------------------------------------------------------------------


def item(**changes):
    values = {"image_id": "a", "image": b"", "boxes": ((0.2, 0.2, 0.8, 0.8),), "phrases": ("a ring",)}
    values |= changes
    return Item(**{"scores": (0.5,) * len(values["boxes"]), **values})


def seen(item, size, report=None, resolution=64, buckets=False, pixels=None, **options):
    """Images and rows of an item in one frame."""
    how = Settings(framing=Framing(resolutions=(resolution,), buckets=buckets), **options)
    (frame,) = how.framing.frames(*size)
    pixels = np.zeros((*frame.size, 3), np.uint8) if pixels is None else pixels
    return list(views(item, frame, pixels, how, report if report is not None else UnitReport()))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_painted_box_is_where_its_row_says(data):
    height, width = data.draw(st.integers(60, 500), "height"), data.draw(st.integers(60, 500), "width")
    x0, y0 = data.draw(st.integers(0, width - 12), "x0"), data.draw(st.integers(0, height - 12), "y0")
    x1, y1 = data.draw(st.integers(x0 + 10, width), "x1"), data.draw(st.integers(y0 + 10, height), "y1")
    resolution, buckets = data.draw(st.sampled_from([64, 128, 256]), "resolution"), data.draw(st.booleans(), "buckets")
    orientation = data.draw(st.integers(1, 8), "orientation")
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (x0, y0, x1, y1))
    stored = encoded(image, "PNG", orientation)
    with Image.open(io.BytesIO(stored)) as opened:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(opened)), np.asarray(image))
    framed = taken(stored, (height, width), resolutions=(resolution,), buckets=buckets)
    box = (x0 / width, y0 / height, x1 / width, y1 / height)
    found = seen(
        item(boxes=(box,)), (height, width), None, resolution, buckets, framed.pixels[0], min_share=0, flip="both"
    )
    assert [row.image_id for _, row in found] == ["a", "a-mirrored"]
    for pixels, row in found:
        h, w = pixels.shape[:2]
        red = (pixels == RED).all(-1)
        blue = (pixels == BLUE).all(-1)
        scale = max(framed.frames[0].resized[0] / height, framed.frames[0].resized[1] / width)
        blur = 1 + max(scale, 1)  # pixels around an edge that are of both colours
        if not row.boxes:
            assert red.sum() <= 2 * max(h, w)  # at most a line of it
            continue
        left, top, right, bottom = np.array(row.boxes[0]) * (w, h, w, h)
        x, y = np.arange(w) + 0.5, np.arange(h)[:, None] + 0.5
        inside = (x > left + blur) & (x < right - blur) & (y > top + blur) & (y < bottom - blur)
        outside = (x < left - blur) | (x > right + blur) | (y < top - blur) | (y > bottom + blur)
        assert red[inside].all()
        assert blue[outside].all()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_box_is_kept_where_enough_of_it_is_seen(data):
    size = data.draw(st.tuples(sides, sides), "size")
    buckets, min_share = data.draw(st.booleans(), "buckets"), data.draw(st.floats(0, 1), "min_share")
    (frame,) = Framing(resolutions=(512,), buckets=buckets).frames(*size)
    corner = st.tuples(st.floats(-0.2, 1), st.floats(-0.2, 1))
    spans = st.tuples(st.floats(0.05, 0.6), st.floats(0.05, 0.6))
    boxes = [
        (x, y, x + w, y + h) for (x, y), (w, h) in data.draw(st.lists(st.tuples(corner, spans), max_size=5), "boxes")
    ]
    x0, y0, x1, y1 = frame.region
    shares, widths = [], []
    for box in boxes:  # areas in the whole image: no box is moved here
        wide, high = min(box[2], x1) - max(box[0], x0), min(box[3], y1) - max(box[1], y0)
        shares.append(max(wide, 0) * max(high, 0) / ((box[2] - box[0]) * (box[3] - box[1])))
        widths.append(min(wide * frame.resized[1], high * frame.resized[0]))
    assume(
        all(abs(share - min_share) > 1e-6 and abs(wide - 1) > 1e-6 for share, wide in zip(shares, widths, strict=True))
    )
    expected = [k for k in range(len(boxes)) if shares[k] >= min_share and widths[k] >= 1]
    report = UnitReport()
    given_item = item(boxes=tuple(boxes), phrases=tuple(f"thing {k}" for k in range(len(boxes))))
    ((_, row),) = seen(given_item, size, report, 512, buckets, min_share=min_share)
    assert row.phrases == [f"thing {k}" for k in expected]
    assert sum(report.dropped_boxes.values()) == len(boxes) - len(expected)
    assert all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in row.boxes)


def test_boxes_that_cannot_be_used_are_counted_by_reason():
    report = UnitReport()
    boxes = {
        "a dog": (0.4, 0.4, 0.6, 0.6), "at the edge": (0.0, 0.0, 0.1, 0.1), "reversed": (0.6, 0.4, 0.5, 0.6),
        "a line": (0.4, 0.4, 0.6, 0.4), " ": (0.4, 0.4, 0.6, 0.6), "": (0.5, 0.5, 0.6, 0.6),
        "a hair": (0.5, 0.4, 0.5001, 0.6), "beyond": (0.5, 1.1, 0.6, 1.3), "mostly beyond": (-0.9, 0.4, 0.5, 0.6),
    }  # fmt: skip
    given_item = item(boxes=tuple(boxes.values()), phrases=tuple(boxes), scores=tuple(k / 10 for k in range(9)))
    ((_, row),) = seen(given_item, (100, 200), report)
    assert (row.phrases, row.scores) == (["a dog"], [0.0])
    assert report.dropped_boxes == {
        "cut away by the crop": 1, "without a phrase": 2, "without width or height": 1,
        "reversed, its second corner comes before its first": 1, "smaller than a pixel of the frame": 1,
        "outside the image": 2,
    }  # fmt: skip
    told = report.dropped_examples
    assert told["reversed, its second corner comes before its first"].startswith(
        "a: 'reversed' at [0.6, 0.4, 0.5, 0.6] (xyxy; in pixels [120.0, 40.0, 100.0, 60.0] of 200 x 100); expected "
    )
    assert "'beyond' at [0.5, 1.1, 0.6, 1.3]" in told["outside the image"]
    assert "'at the edge'" in told["cut away by the crop"]
    assert "64 x 64 pixels show [0.25, 0.0, 0.75, 1.0] of it" in told["cut away by the crop"]


def test_images_with_too_few_boxes_are_left_out():
    edge = item(boxes=((0.0, 0.0, 0.1, 0.1), (0.4, 0.4, 0.6, 0.6)), phrases=("a", "b"))
    assert len(seen(edge, (100, 200), min_boxes=1, flip="both")) == 2
    assert seen(edge, (100, 200), min_boxes=2, flip="both") == []
    assert len(seen(item(boxes=(), phrases=()), (100, 200), min_boxes=0)) == 1


# Mirror images ------------------------------------------------------------------------------------------------------


def test_a_mirrored_row_describes_the_mirrored_image():
    pixels = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)
    box = (0.3, 0.2, 0.5, 0.9)
    (plain, row), (turned, mirrored) = seen(item(boxes=(box,)), (100, 202), pixels=pixels, flip="both")
    assert np.array_equal(plain, pixels)
    assert np.array_equal(turned, pixels[:, ::-1])
    x0, y0, x1, y1 = row.boxes[0]
    np.testing.assert_allclose(mirrored.boxes[0], (1 - x1, y0, 1 - x0, y1))
    frame = square_frame(100, 202, 64)
    assert (frame.left, frame.resized[1]) == (32, 129)  # what is cut away is not the same on both sides
    assert row.crop_left == frame.left
    assert row.crop_left + 64 + mirrored.crop_left == frame.resized[1]  # what is cut away right is now left
    assert (row.original_height, row.original_width, row.crop_top) == (100, 202, 0)
    assert (mirrored.caption, mirrored.phrases, mirrored.scores) == (row.caption, row.phrases, row.scores)


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("a dog left of a cat", True), ("On the RIGHT, a house.", True), ("a left-hand drive", True),
        ("the leftmost chair", True), ("a right-handed player", True), ("rightwards arrow", True),
        ("seen from the right side", True), ("a rightward turn", True), ("the lefthand door", True),
        ("a bright copyright sign", False), ("an upright piano", False), ("leftovers on a plate", False),
        ("bright light, cleft chin", False), ("", False),
    ],
)  # fmt: skip
def test_words_of_sides_keep_an_image_from_being_mirrored(text, stays):
    for change in ({"caption": text}, {"phrases": (text or "a dog",)}):
        found = seen(item(**change), (64, 64), flip="both")
        assert [row.image_id for _, row in found] == (["a"] if stays else ["a", "a-mirrored"])
    by_chance = [seen(item(caption=text, image_id=f"{k}"), (64, 64), flip="random")[0][1] for k in range(20)]
    assert any(row.image_id.endswith("-mirrored") for row in by_chance) != stays


def test_random_flips_are_half_and_follow_from_the_seed():
    def mirrored(seed):
        rows = [seen(item(image_id=f"sa_{k}"), (64, 64), flip="random", seed=seed)[0][1] for k in range(1000)]
        return [row.image_id.endswith("-mirrored") for row in rows]

    first, again, other = mirrored(0), mirrored(0), mirrored(1)
    assert first == again
    assert 420 < sum(first) < 580
    assert 420 < sum(a != b for a, b in zip(first, other, strict=True)) < 580
