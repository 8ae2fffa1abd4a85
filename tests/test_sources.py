"""Sources: what is recognised, the items each kind gives, and how bad rows are told."""

import errno
import io
import json
import os
import pickle
import random
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.source_items import images as items_by_id
from helpers.source_items import items, reasons
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gligen_xl.images.decode import DAMAGED
from gligen_xl.prepare.item import BAD_TEXT, TWICE, Item
from gligen_xl.prepare.sources import open_source, recognise, rows, tables
from gligen_xl.prepare.sources.json_members import members
from gligen_xl.prepare.sources.paths import find_images
from gligen_xl.prepare.sources.rows import BOX_FORMATS, convert_boxes
from gligen_xl.prepare.sources.tars import DOTS

HEIGHT, WIDTH = 40, 80


def image(orientation=1, kind="JPEG"):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(stream, kind, exif=exif)
    return stream.getvalue()


def put(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def lines(entries):
    return "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)


def tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, contents in files:
            contents = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


def folder(path, entries, name="metadata.jsonl", images=("a.jpg", "b.jpg", "c.jpg")):
    for file in images:
        put(path / file, image())
    put(path / name, lines(entries))
    return path


# SA-1B --------------------------------------------------------------------------------------------------------------


def sa1b_json(number, height=HEIGHT, width=WIDTH, annotations=3):
    image = {"image_id": number, "width": width, "height": height, "file_name": f"sa_{number}.jpg"}
    mask = {"segmentation": {"size": [height, width], "counts": "xyz" * 50}, "bbox": [1, 2, 3, 4]}
    return {"image": image, "annotations": [mask] * annotations}


@pytest.mark.parametrize(("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar", "w:gz")])
def test_sa1b(tmp_path, ending, mode):
    files = [("sa_1.jpg", image()), ("sa_1.json", sa1b_json(1)), ("sa_2.json", sa1b_json(2)), ("sa_2.jpg", b"two")]
    path = tar(tmp_path / f"sa_000007{ending}", files, mode)
    assert recognise(path) == recognise(tmp_path) == "sa1b"
    (unit,) = open_source(path)
    assert unit.name == "sa_000007"
    assert unit.weight == path.stat().st_size
    changed = path.stat().st_mtime_ns
    assert unit.identity() == {"kind": "sa1b", "file": path.name, "bytes": unit.weight, "mtime_ns": changed}
    first, second = items(tmp_path)
    assert (first.image_id, first.image, first.size, first.boxes) == ("sa_1", image(), (HEIGHT, WIDTH), ())
    assert (second.image_id, second.image, second.size) == ("sa_2", b"two", (HEIGHT, WIDTH))


def test_sa1b_whose_json_stands_elsewhere_or_is_broken(tmp_path):
    files = [(f"./sa_{k}.jpg", image()) for k in range(3)]
    files += [(f"./sa_{k}.json", sa1b_json(k)) for k in range(3)]
    broken = [b"", b"{", b'{"image": 3}', b'{"image": {"height": "40", "width": 80}}', b"[" * 100_000, b"\xff\xfe"]
    broken += [b'{"image": {"height": 1e999, "width": 80}}', b'{"annotations": []}']
    for k, contents in enumerate(broken, start=10):
        files += [(f"sa_{k}.jpg", image()), (f"sa_{k}.json", contents)]
    late = {"annotations": sa1b_json(0)["annotations"], "image": {"height": 40, "width": 80.0}}
    files += [("sa_50.jpg", image()), ("sa_50.json", late)]
    # Cut behind the image: what is asked for was there.
    files += [("sa_51.jpg", image()), ("sa_51.json", json.dumps(sa1b_json(51)).encode()[:-9])]
    found = items(tar(tmp_path / "sa_000000.tar", files))
    assert not reasons(found)
    sizes = {item.image_id: item.size for item in found}
    assert sizes.pop("sa_50") == sizes.pop("sa_51") == (HEIGHT, WIDTH)
    assert len(sizes) == 3 + len(broken)
    assert set(sizes.values()) == {None}


def test_archives_have_names_of_their_own(tmp_path):
    for name in ("sa_000001.tar", "sa_000000.tar", "._sa_000000.tar", "sa_000002.tar.part"):
        tar(tmp_path / name, [("sa_1.jpg", image())])
    assert [unit.name for unit in open_source(tmp_path)] == ["sa_000000", "sa_000001"]
    tar(tmp_path / "sa_000001.tgz", [("sa_1.jpg", image())], "w:gz")
    with pytest.raises(ValueError, match=r"sa_000001\.tar and sa_000001\.tgz would both be called sa_000001"):
        open_source(tmp_path)


def test_a_cut_archive_opens_and_then_fails(tmp_path):
    path = tar(tmp_path / "sa_000000.tar", [(f"sa_{k}.jpg", image()) for k in range(9)])
    path.write_bytes(path.read_bytes()[:4000])
    for kind in ("sa1b", "webdataset"):
        (unit,) = open_source(tmp_path, kind=kind)
        with pytest.raises(ValueError, match=r"sa_000000\.tar is cut short.*fetch it again"):
            list(unit.items())


# Webdatasets --------------------------------------------------------------------------------------------------------


def test_webdataset(tmp_path):
    layout = {"boxes": [[8, 4, 40, 20]], "phrases": ["a dog"], "scores": [0.5], "box_format": "xyxy_pixels"}
    files = [
        ("d/000.jpg", image()), ("d/000.txt", b"\xef\xbb\xbfa dog on grass\n"),
        ("d/000.json", {"caption": "no"} | layout),
        ("d/001.png", image(kind="PNG")), ("d/001.json", {"prompt": "a prompt"}),
        ("d/002.jpg", image(6)), ("d/002.json", layout),
        ("d/003.webp", b"not looked at here"),
        ("d/004.txt", b"alone"),
        ("d/005.jpg", image()), ("d/005.json", b"{"),
        ("d/006.jpg", b"broken"), ("d/006.json", layout),
        ("../007.jpg", image()),
        ("d/008.jpg", image()), ("d/008.json", {"boxes": [[0, 0, 1, 1]], "phrases": ["x"]}),
    ]  # fmt: skip
    path = tar(tmp_path / "train-00.tar", files)
    assert recognise(tmp_path) == "webdataset"
    found = items(path)
    good = items_by_id(found)
    assert list(good) == ["d/000", "d/001", "d/002", "d/003"]
    first = good["d/000"]
    assert (first.caption, first.boxes, first.phrases) == ("a dog on grass", ((0.1, 0.1, 0.5, 0.5),), ("a dog",))
    assert (first.scores, first.size) == ((0.5,), (HEIGHT, WIDTH))
    assert good["d/001"].caption == "a prompt"
    assert good["d/002"].boxes == ((8 / HEIGHT, 4 / WIDTH, 40 / HEIGHT, 20 / WIDTH),)  # it stands upright
    assert (good["d/003"].size, good["d/003"].image) == (None, b"not looked at here")
    assert reasons(found) == {
        "d/004": "no image beside its text",
        "d/005": "its row is not JSON",
        "d/006": "not an image",
        "../007": "its name in the archive leads elsewhere",
        "d/008": "its box_format is not known",
    }
    assert isinstance(items_by_id(items(path, box_format="xyxy"))["d/008"], Item)


def test_a_webdataset_whose_first_boxes_are_of_no_format(tmp_path):
    sample = [("0.jpg", image()), ("0.json", {"boxes": [[0, 0, 1, 1]], "phrases": ["x"]})]
    path = tar(tmp_path / "a.tar", sample)
    with pytest.raises(ValueError, match=r"a\.tar, sample 0: .*name one of xyxy, xywh, .*--box_format"):
        open_source(path)
    assert len(items(path, box_format="xywh")) == 1


@pytest.mark.parametrize("kind", ["sa1b", "webdataset"])
def test_texts_that_are_too_large_are_not_read(tmp_path, kind):
    bomb = b"[" + b"{}," * 6_000_000 + b"{}]"
    files = [("0.jpg", image()), ("0.json", bomb), ("1.jpg", image()), ("1.txt", b"x" * (2**20 + 1))]
    path = tar(tmp_path / "a.tar", [*files, ("2.jpg", image())])
    (unit,) = open_source(path, kind=kind)
    tracemalloc.start()
    found = list(unit.items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if kind == "webdataset":
        assert reasons(found) == {"0": "its .json: too large", "1": "its .txt: too large"}
    assert list(items_by_id(found)) == (["2"] if kind == "webdataset" else ["0", "1", "2"])
    assert peak < 4 * 2**20


@pytest.mark.parametrize("kind", ["sa1b", "webdataset"])
def test_images_with_several_dots_in_their_names_are_told(tmp_path, kind):
    names = ["img.2020.0.png", "img.2020.1.PNG", "other.png", "other.mask.png"]
    found = items(tar(tmp_path / "a.tar", [(f"d/{name}", image()) for name in names]), kind=kind)
    assert reasons(found) == dict.fromkeys(["d/img.2020.0.png", "d/img.2020.1.png"], DOTS)
    assert len(items_by_id(found)) == 1


# Image folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BOX_FORMATS)
def test_box_formats(tmp_path, form):
    """The same box in every convention, said by the row or by the caller; the row wins."""
    said = {
        "xyxy": [0.25, 0.5, 0.75, 1.0],
        "xywh": [0.25, 0.5, 0.5, 0.5],
        "cxcywh": [0.5, 0.75, 0.5, 0.5],
        "xyxy_pixels": [20, 20, 60, 40],
        "xywh_pixels": [20, 20, 40, 20],
        "cxcywh_pixels": [40, 30, 40, 20],
    }[form]
    row = {"file_name": "a.jpg", "boxes": [said], "phrases": ["x"]}
    other = next(other for other in BOX_FORMATS if other != form)
    stated = row | {"file_name": "b.jpg", "box_format": form, "width": 160, "height": 80}
    path = folder(tmp_path / "set", [row | {"box_format": form}, stated], images=["a.jpg", "b.jpg"])
    first, second = items(path, box_format=other)
    assert first.boxes == ((0.25, 0.5, 0.75, 1.0),)
    assert second.size == (80, 160)
    assert second.boxes == (((0.125, 0.25, 0.375, 0.5),) if "pixels" in form else first.boxes)
    put(path / "metadata.jsonl", lines([row]))
    assert items(path, box_format=form)[0].boxes == first.boxes


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5), st.integers(1, 5000), st.integers(1, 5000))
def test_conversions_agree(boxes, height, width):
    xyxy = np.array(boxes).reshape(-1, 4)
    scale = np.array([width, height, width, height])
    size = xyxy[:, 2:] - xyxy[:, :2]
    other = {
        "xyxy": xyxy,
        "xywh": np.concatenate([xyxy[:, :2], size], -1),
        "cxcywh": np.concatenate([xyxy[:, :2] + size / 2, size], -1),
    }
    for form, values in other.items():
        for name, given_values in ((form, values), (f"{form}_pixels", values * scale)):
            if "pixels" in name and 0 < max(given_values.max(initial=0), 0) <= 1:
                continue  # these are taken for shares
            converted = np.array(convert_boxes(given_values.tolist(), name, (height, width))).reshape(-1, 4)
            np.testing.assert_allclose(converted, xyxy, atol=1e-9)


def test_boxes_without_a_format(tmp_path):
    rows_ = [{"file_name": "b.jpg"}, {"file_name": "a.jpg", "boxes": [[0, 0, 1, 1]], "phrases": ["x"]}]
    path = folder(tmp_path, rows_)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, row 2: .*xyxy, xywh, cxcywh, .*\"box_format\": \"xyxy\""):
        open_source(path)
    with pytest.raises(ValueError, match=r"box_format is 'yxyx'; expected one of xyxy, "):
        open_source(path, box_format="yxyx")
    put(path / "metadata.jsonl", lines([rows_[1] | {"box_format": "voc"}]))
    with pytest.raises(ValueError, match=r"row 1: its box_format is not known: it is 'voc'; expected one of xyxy"):
        open_source(path)


def test_hugging_face_objects_are_cocos(tmp_path):
    objects = {"bbox": [[20, 10, 40, 20], [0, 0, 8, 8]], "categories": ["cat", "dog"]}
    path = folder(tmp_path, [{"file_name": "a.jpg", "text": "pets", "objects": objects}])
    (item,) = items(path)
    assert item.boxes == ((0.25, 0.25, 0.75, 0.75), (0, 0, 0.1, 0.2))
    assert (item.phrases, item.scores, item.caption) == (("cat", "dog"), (1.0, 1.0), "pets")
    objects = {"bbox": [[20, 10, 40, 20]], "categories": [3]}
    put(tmp_path / "metadata.jsonl", lines([{"file_name": "a.jpg", "objects": objects}]))
    with pytest.raises(
        ValueError, match=r"row 1: phrases are numbers: they are \[3\]; expected the names of the classes"
    ):
        open_source(tmp_path)


def test_bad_rows_are_told_apart(tmp_path):
    def row(name, **values):
        return {"image_id": name, "file_name": "a.jpg", "boxes": [[0, 0, 1, 1]], "phrases": ["x"]} | values

    secret = put(tmp_path / "secret.jpg", image())
    entries = {
        "good": row("good"),
        "metadata.jsonl row 2": "{not json",
        "metadata.jsonl row 3": "[1, 2]",
        "deep": "[" * 100_000,
        "no-file": row("no-file", file_name=None),
        "nul": row("nul", file_name="a\0.jpg"),
        "half": row("half", file_name="a\ud800.jpg", box_format="xyxy_pixels"),
        "up": row("up", file_name="../secret.jpg"),
        "deep-up": row("deep-up", file_name="x/../../secret.jpg"),
        "absolute": row("absolute", file_name=str(secret)),
        "missing": row("missing", file_name="none.jpg"),
        "below-a-file": row("below-a-file", file_name="a.jpg/b.jpg"),
        "long": row("long", file_name="n" * 300, box_format="xyxy_pixels"),
        "loop": row("loop", file_name="loop.jpg", box_format="xyxy_pixels"),
        "missing-pixels": row("missing-pixels", file_name="none.jpg", box_format="xyxy_pixels"),
        "a-folder": row("a-folder", file_name="sub", box_format="xyxy_pixels"),
        "damaged": row("damaged", file_name="cut.jpg", box_format="xyxy_pixels"),
        "pixels": row("pixels", boxes=[[3, 4, 50, 60]]),
        "shares": row("shares", boxes=[[0.1, 0.2, 0.5, 1]], box_format="xywh_pixels"),
        "few": row("few", boxes=[[0, 0, 1]]),
        "text": row("text", boxes=[["0", 0, 1, 1]]),
        "bool": row("bool", boxes=[[True, 0, 1, 1]]),
        "nan": row("nan", boxes=[[float("nan"), 0, 1, 1]]),
        "inf": row("inf", boxes=[[float("inf"), 0, 1, 1]]),
        "huge": '{"image_id": "huge", "file_name": "a.jpg", "boxes": [[1'
        + "0" * 400
        + ', 0, 1, 1]], "phrases": ["x"]}',
        "bare": row("bare", boxes=[0, 0, 1, 1]),
        "object": row("object", boxes={"a": 1}),
        "more": row("more", phrases=["x", "y"]),
        "no-phrases": row("no-phrases", phrases=None),
        "number": row("number", phrases=[3]),
        "string": row("string", phrases="x"),
        "scores": row("scores", scores=[1, 2]),
        "score": row("score", scores=["high"]),
        "caption": row("caption", text=["a", "b"]),
        "format": row("format", box_format=["xyxy"]),
        "size": row("size", width=-3, height=5),
        "twice": row("good"),
        "reversed": row("reversed", boxes=[[0.9, 0.9, 0.1, 0.1]]),
        "overstepping": row("overstepping", boxes=[[-0.5, 0, 1.5, 1]]),
        "blank": row("blank", boxes=[[0, 0, 1, 1]] * 3, phrases=["", "  ", "x"], scores=[0.1, 0.2, 0.3]),
        "surrogate": '{"image_id": "surrogate", "file_name": "a.jpg", "text": "a \\ud83d b"}',
    }
    path = folder(tmp_path / "set", entries.values())
    put(path / "cut.jpg", image()[:30])
    (path / "sub").mkdir()
    (path / "loop.jpg").symlink_to("loop.jpg")
    found = items(path, box_format="xyxy")
    told = reasons(found)
    assert told.pop("metadata.jsonl row 4") == rows.NOT_JSON
    assert told == (
        dict.fromkeys(["metadata.jsonl row 2", "metadata.jsonl row 3"], rows.NOT_JSON)
        | dict.fromkeys(["no-file", "nul", "half"], rows.NO_PATH)
        | dict.fromkeys(["up", "deep-up", "absolute"], rows.OUTSIDE)
        | dict.fromkeys(["missing", "below-a-file", "missing-pixels", "a-folder"], rows.MISSING)
        | {"long": "file cannot be read (File name too long)"}
        | {"loop": "file cannot be read (Too many levels of symbolic links)"}
        | {"shares": rows.SHARES, "number": rows.NUMBERS}
        | {"damaged": DAMAGED, "pixels": rows.PIXELS, "format": rows.NO_FORMAT, "good": TWICE}
        | dict.fromkeys(["few", "text", "bool", "nan", "inf", "huge", "bare", "object"], rows.WRONG_BOXES)
        | dict.fromkeys(["more", "no-phrases"], rows.UNEQUAL)
        | {"string": rows.WRONG_PHRASES, "caption": rows.WRONG_CAPTION, "size": rows.WRONG_SIZE}
        | dict.fromkeys(["scores", "score"], rows.WRONG_SCORES)
        | {"surrogate": BAD_TEXT}
    )
    good = items_by_id(found)
    assert list(good) == ["good", "reversed", "overstepping", "blank"]
    assert good["reversed"].boxes == ((0.9, 0.9, 0.1, 0.1),)
    assert good["overstepping"].boxes == ((-0.5, 0, 1.5, 1),)
    assert (good["blank"].phrases, good["blank"].scores, good["blank"].dropped) == (("x",), (0.3,), {"no phrase": 2})
    assert len(found) == len(entries)


BAD_ROWS = [
    "{",
    "3",
    {"image": "a.jpg"},
    {"file_name": "../a.jpg"},
    {"file_name": "none.jpg"},
    {"file_name": "cut.jpg", "boxes": [[0, 0, 9, 9]], "phrases": ["x"], "box_format": "xyxy_pixels"},
    {"file_name": "a.jpg", "boxes": [[0, 0, 1, 1]], "phrases": []},
]


@pytest.mark.parametrize(
    ("boxes", "form", "what"),
    [
        ([[9, 9, 50, 50]], "xyxy", "boxes look like pixels: .*say xyxy_pixels"),
        ([[0.1, 0.2, 0.5, 1]], "xywh_pixels", "boxes look like shares of the image: .*say xywh"),
        ([[0, 0, 1, 1]], None, "its box_format is not known"),
    ],
)
@pytest.mark.parametrize("before", [0, 8])
def test_a_fault_of_all_rows_ends_it_at_once(tmp_path, boxes, form, what, before):
    """Also where other rows stand before it, damaged ones as well."""
    rows_ = [*BAD_ROWS, {"file_name": "b.jpg"}][:before]
    folder(tmp_path, [*rows_, {"file_name": "a.jpg", "boxes": boxes, "phrases": ["x"]}])
    put(tmp_path / "cut.jpg", image()[:30])
    for unit_size in (1, 100):
        with pytest.raises(ValueError, match=rf"metadata\.jsonl, row {before + 1}: {what}"):
            open_source(tmp_path, box_format=form, unit_size=unit_size)
    samples = [("00.jpg", image()), ("00.json", b"{"), ("01.jpg", b"cut"), ("02.jpg", image())][: before // 2]
    samples += [("09.jpg", image()), ("09.json", {"boxes": boxes, "phrases": ["x"]})]
    with pytest.raises(ValueError, match=rf"a\.tar, sample 09: {what}"):
        open_source(tar(tmp_path / "a.tar", samples), box_format=form)


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_first_row_that_is_damaged_is_one_row(tmp_path, row):
    folder(tmp_path, [row, {"file_name": "b.jpg"}])
    put(tmp_path / "cut.jpg", image()[:30])
    found = items(tmp_path, box_format="xyxy")
    assert list(items_by_id(found)) == ["b"]
    assert len(reasons(found)) == 1


def test_no_more_than_the_first_rows_are_looked_at(tmp_path, monkeypatch):
    folder(tmp_path, [{"file_name": "a.jpg"}] * 1000)
    asked = []
    monkeypatch.setattr(tables, "read_row", lambda line: asked.append(line) or json.loads(line))
    open_source(tmp_path)
    assert len(asked) <= rows.FIRST_ROWS + 1


def test_a_file_without_rows(tmp_path):
    put(tmp_path / "metadata.jsonl", "\n \n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl holds no rows"):
        open_source(tmp_path)


def test_ids_of_rows(tmp_path):
    entries = [{"file_name": "a.jpg"}, {"file_name": "b.jpg", "image_id": 7}, {"file_name": "./c.jpg", "id": "see"}]
    found = items(folder(tmp_path, entries))
    assert [item.image_id for item in found] == ["a", "7", "see"]
    assert [item.image for item in found] == [tmp_path / f"{name}.jpg" for name in "abc"]
    assert [item.size for item in found] == [None] * 3


@pytest.mark.parametrize("unit_size", [1, 3, 7, 100])
def test_units_are_consecutive_rows(tmp_path, unit_size):
    names = [f"{k:02d}.jpg" for k in range(20)]
    entries = [{"file_name": name, "text": f"caption {name}", "x": "y" * k} for k, name in enumerate(names)]
    path = folder(tmp_path / "set", entries, images=names)
    text = (path / "metadata.jsonl").read_text().replace("\n", "\n\n  \n")
    put(path / "metadata.jsonl", b"\xef\xbb\xbf" + text.encode().rstrip())  # blank lines, no end of the last
    units = open_source(path, unit_size=unit_size)
    assert [unit.name for unit in units] == [f"set-{k:05d}" for k in range(-(-20 // unit_size))]
    found = [item for unit in units for item in unit.items()]
    assert [item.caption for item in found] == [f"caption {name}" for name in names]
    assert sum(unit.weight for unit in units) == 20
    assert all(list(unit.items())[-1].done == unit.weight for unit in units)
    assert all(len(pickle.dumps(unit)) < 1000 for unit in units)


def test_identity_follows_the_lines(tmp_path):
    names = [f"{k}.jpg" for k in range(6)]
    path = folder(tmp_path, [{"file_name": name, "text": "a"} for name in names], images=names)
    before = [unit.identity() for unit in open_source(path, unit_size=2)]
    text = (path / "metadata.jsonl").read_text()
    put(path / "metadata.jsonl", text.replace('"3.jpg", "text": "a"', '"3.jpg", "text": "b"'))
    after = [unit.identity() for unit in open_source(path, unit_size=2)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    other = [unit.identity() for unit in open_source(path, unit_size=2, box_format="xywh")]
    assert all(a != b for a, b in zip(after, other, strict=True))


@pytest.mark.parametrize("group", [4, 100])
def test_parquet(tmp_path, group):
    entries = [
        {
            "file_name": f"{k}.jpg",
            "text": f"t{k}",
            "boxes": [[0.1, 0.2, 0.3, 0.4]] * (k % 3),
            "phrases": ["x"] * (k % 3),
        }
        for k in range(10)
    ]
    for k in range(10):
        put(tmp_path / f"{k}.jpg", image())
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "metadata.parquet", row_group_size=group)
    assert recognise(tmp_path) == "imagefolder"
    found = items(tmp_path, box_format="xyxy", unit_size=3)
    assert [(item.image_id, item.caption, len(item.boxes)) for item in found] == [
        (str(k), f"t{k}", k % 3) for k in range(10)
    ]
    put(tmp_path / "metadata.parquet", "PAR1")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        open_source(tmp_path)


def test_a_folder_of_images_alone(tmp_path):
    names = ["b.jpg", "a/2.png", "a/1.JPG", "c.tiff", "a/b/0.webp", "b.png"]
    for name in [*names, ".hidden.jpg", ".cache/x.jpg", "notes.md"]:
        put(tmp_path / "set" / name, image())
    put(tmp_path / "set/a/1.txt", "a caption\n")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/d.jpg").symlink_to(tmp_path / "set/b.jpg")
    assert recognise(tmp_path / "set") == "imagefolder"
    expected = ["a/1", "a/2", "a/b/0", "b", "b", "c", "d"]
    for unit_size in (2, 100):
        units = open_source(tmp_path / "set", unit_size=unit_size)
        found = [item for unit in units for item in unit.items()]
        assert [item.image_id for item in found] == expected
        assert found[0].caption == "a caption"
        assert [unit.name for unit in units] == [f"set-{k:05d}" for k in range(-(-7 // unit_size))]
    assert reasons(found) == {"b": TWICE}
    before = [unit.identity() for unit in open_source(tmp_path / "set", unit_size=3)]
    put(tmp_path / "set/c.tiff", image() + b"more")
    after = [unit.identity() for unit in open_source(tmp_path / "set", unit_size=3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_captions_beside_images_are_part_of_the_identity(tmp_path):
    for k in range(6):
        put(tmp_path / f"{k}.jpg", image())
        put(tmp_path / f"{k}.txt", "a cat")

    def identities():
        return [unit.identity() for unit in open_source(tmp_path, unit_size=2)]

    before = identities()
    put(tmp_path / "3.txt", "a dog")  # as long as it was
    (tmp_path / "0.txt").touch()
    assert [a == b for a, b in zip(before, identities(), strict=True)] == [True, False, True]
    (tmp_path / "5.txt").unlink()
    assert identities()[2] != before[2]


def test_files_that_cannot_be_read_are_single_images(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        put(tmp_path / name, image())
    (tmp_path / "b.txt").symlink_to("b.txt")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("none.jpg")
    found = items(tmp_path)
    assert reasons(found) == {"b": "file cannot be read (Too many levels of symbolic links)"}
    assert list(items_by_id(found)) == ["a", "c", "loop", "nowhere"]  # the last two are found out when they are decoded


def test_a_disk_that_fails_takes_one_row(tmp_path, monkeypatch):
    def failing(path):
        if path.name == "a.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return HEIGHT, WIDTH

    monkeypatch.setattr(rows, "image_size", failing)
    row = {"boxes": [[0, 0, 8, 8]], "phrases": ["x"], "box_format": "xyxy_pixels"}
    found = items(folder(tmp_path, [row | {"file_name": "a.jpg"}, row | {"file_name": "b.jpg"}]))
    assert (reasons(found), list(items_by_id(found))) == ({"a": "file cannot be read (Input/output error)"}, ["b"])


@given(st.sets(st.sampled_from([f"{a}{b}" for a in ("", "a/", "b/", "a/b/", "a.b/") for b in "0ab"]), min_size=1))
def test_units_of_images_begin_where_the_last_ended(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("set")
    for name in names:
        put(path / f"{name}.jpg", b"x")
    whole = list(find_images(path))
    assert whole == sorted(whole, key=lambda image: image.parts)
    for size in (1, 2, 3):
        units = open_source(path, unit_size=size)
        parts = [[item.image for item in unit.items()] for unit in units]
        assert parts == [whole[k : k + size] for k in range(0, len(whole), size)]
        assert all(len(pickle.dumps(unit)) < 700 for unit in units)


def test_folders_before_a_unit_are_not_looked_into(tmp_path, monkeypatch):
    for k in range(20):
        put(tmp_path / f"set/{k:02d}/0.jpg", image())
    units = open_source(tmp_path / "set", unit_size=1)
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path).name) or scandir(path))
    assert [item.image_id for item in units[15].items()] == ["15/0"]
    assert looked == ["set", "15", "16"]


def test_metadata_that_would_be_overlooked(tmp_path):
    put(tmp_path / "train/a.jpg", image())
    put(tmp_path / "train/metadata.jsonl", lines([{"file_name": "a.jpg"}]))
    with pytest.raises(ValueError, match=r"has no metadata file, but .*train has; give that folder"):
        open_source(tmp_path)
    assert len(items(tmp_path / "train")) == len(items(tmp_path / "train/metadata.jsonl")) == 1
    put(tmp_path / "other/a.jpg", image())
    put(tmp_path / "other/metadata.csv", "file_name,text\na.jpg,a\n")
    with pytest.raises(ValueError, match=r"metadata\.csv: a table of text cannot hold boxes; write .* metadata\.jsonl"):
        open_source(tmp_path / "other")
    put(tmp_path / "train/metadata.parquet", "PAR1")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.parquet"):
        open_source(tmp_path / "train")


# Layouts ------------------------------------------------------------------------------------------------------------


def test_layouts(tmp_path):
    layout = {"prompt": "a dog", "phrases": ["dog"], "boxes": [[0, 0.5, 0.5, 1]], "seed": 3, "width": 1024, "height": 7}
    entries = [
        layout | {"image": "p/a.jpg"},
        layout
        | {"image": "p/b.jpg", "id": "bee", "box_format": "xyxy_pixels", "boxes": [[0, 20, 40, 40]], "scores": [0.2]},
        layout | {"image": "../outside.jpg"},
        layout,
    ]
    path = folder(tmp_path, entries, name="mine.jsonl", images=["p/a.jpg", "p/b.jpg"]) / "mine.jsonl"
    assert recognise(path) == "layouts"
    found = items(path)
    first, second = items_by_id(found).values()
    assert (first.image_id, first.caption, first.phrases, first.size) == ("p/a", "a dog", ("dog",), None)
    assert (second.image_id, second.scores, second.size) == ("bee", (0.2,), (HEIGHT, WIDTH))
    assert first.boxes == second.boxes == ((0, 0.5, 0.5, 1),)
    assert list(reasons(found).values()) == [rows.OUTSIDE, rows.NO_PATH]
    assert open_source(path)[0].name == "mine-00000"


# COCO ---------------------------------------------------------------------------------------------------------------


def coco(images=4):
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 10 + k, "file_name": f"{k}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
            for k in range(images)
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 12,
                "category_id": 3,
                "bbox": [20, 10, 40, 20],
                "iscrowd": 0,
                "segmentation": [[1, 2]],
            },
            {"id": 2, "image_id": 10, "category_id": 1, "bbox": [0, 0, 8, 8], "iscrowd": 0},
            {"id": 3, "image_id": 12, "category_id": 1, "bbox": [0, 0, 8, 8], "iscrowd": 0},
            {"id": 4, "image_id": 12, "category_id": 1, "bbox": [0, 0, 80, 40], "iscrowd": 1},
            {"id": 5, "image_id": 10, "category_id": 1, "bbox": [0, 0, "x", 8], "iscrowd": 0},
            {"id": 6, "image_id": 99, "category_id": 1, "bbox": [0, 0, 8, 8], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "person", "supercategory": "x"}, {"id": 3, "name": "dog"}],
    }


def coco_folder(tmp_path, content, images=3):
    for k in range(images):
        put(tmp_path / f"val/{k}.jpg", image())
    put(tmp_path / "instances_val.json", content if isinstance(content, str) else json.dumps(content))
    return {"path": tmp_path / "val", "instances": tmp_path / "instances_val.json"}


@pytest.mark.parametrize("unit_size", [1, 2, 100])
def test_coco(tmp_path, unit_size):
    where = coco_folder(tmp_path, coco())
    found = items(**where, unit_size=unit_size)
    good = items_by_id(found)
    assert list(good) == ["10", "11", "12"]
    assert reasons(found) == {"13": rows.MISSING, "99": "annotations of an image that the file does not list"}
    assert good["12"].phrases == ("dog", "person")
    np.testing.assert_allclose(good["12"].boxes, [(0.25, 0.25, 0.75, 0.75), (0, 0, 0.1, 0.2)], atol=1e-7)
    assert (good["12"].size, good["12"].scores, good["12"].dropped) == ((HEIGHT, WIDTH), (1.0, 1.0), {"crowd": 1})
    assert (good["10"].phrases, good["10"].dropped) == (("person",), {"its box is wrong": 1})
    assert (good["11"].boxes, good["11"].image) == ((), tmp_path / "val/1.jpg")
    assert open_source(**where)[0].name == "instances_val-00000"


def test_coco_classes(tmp_path):
    where = coco_folder(tmp_path, coco())
    yaml = put(tmp_path / "classes.yaml", "person: a human\ndog:\n")
    as_json = put(tmp_path / "classes.json", json.dumps({"person": "a human", "dog": None}))
    found = items_by_id(items(**where, classes=yaml))
    assert found == items_by_id(items(**where, classes=as_json))
    assert found["12"].phrases == ("a human",)
    assert found["12"].dropped == {"crowd": 1, "class left out by the mapping": 1}
    assert open_source(**where)[0].identity() != open_source(**where, classes=yaml)[0].identity()
    put(yaml, "persn: human\n")
    with pytest.raises(ValueError, match=r"classes\.yaml: there is no category persn; there are dog, person"):
        open_source(**where, classes=yaml)
    for text in ("- person\n", "person: [a]\n", "person: ''\n"):
        put(yaml, text)
        with pytest.raises(ValueError, match="expected a mapping of category name to phrase or null"):
            open_source(**where, classes=yaml)
    put(yaml, "a: b: c")
    with pytest.raises(ValueError, match="is neither YAML nor JSON"):
        open_source(**where, classes=yaml)


def test_coco_files_that_contradict_themselves(tmp_path):
    def broken(change):
        content = coco()
        change(content)
        return content

    cases = [
        ("{", "is not a COCO instances file: not JSON"),
        ("[]", "is not a COCO instances file: not JSON"),
        ({"images": []}, "has no images"),
        (
            broken(lambda c: c["categories"].clear()),
            "category_id of 6 of 6 annotations is not in the file, as 3",
        ),
        (broken(lambda c: c["images"].append(c["images"][0])), "two images have the id 10"),
        (broken(lambda c: c["categories"].append(c["categories"][0])), "two categories have the id 1"),
        (broken(lambda c: c["images"][1].pop("file_name")), "has no 'file_name'"),
        (broken(lambda c: c["images"].append(3)), "one of its images is 3; expected an object"),
        (broken(lambda c: c["annotations"][0].pop("image_id")), "has no 'image_id'"),
        (broken(lambda c: c["annotations"][0].update(image_id=[1])), "has no image_id or no category_id"),
        (
            broken(lambda c: c.update(annotations=[{"image_id": 10, "id": 1, "caption": "a dog"}])),
            "it holds captions; expected instances_",
        ),
    ]
    for content, what in cases:
        with pytest.raises(ValueError, match=rf"instances_val\.json:? .*{what}"):
            open_source(**coco_folder(tmp_path, content))


def test_coco_paths_and_sizes(tmp_path):
    content = coco()
    content["images"][0]["file_name"] = "../val/none.jpg"
    content["images"][1]["file_name"] = "/etc/passwd"
    del content["images"][2]["height"]
    names = ["a\ud800.jpg", "n" * 300, "loop.jpg", "a\0.jpg"]
    content["images"] += [{"id": 20 + k, "file_name": name} for k, name in enumerate(names)]
    where = coco_folder(tmp_path, content)
    (where["path"] / "loop.jpg").symlink_to("loop.jpg")
    found = items(**where)
    assert reasons(found) == {
        "10": rows.OUTSIDE, "11": rows.OUTSIDE, "13": rows.MISSING, "20": rows.NO_PATH, "23": rows.NO_PATH,
        "21": "file cannot be read (File name too long)",
        "22": "file cannot be read (Too many levels of symbolic links)",
        "99": "annotations of an image that the file does not list",
    }  # fmt: skip
    assert items_by_id(found)["12"].size == (HEIGHT, WIDTH)


def test_coco_boxes_that_are_shares(tmp_path):
    content = coco()
    for entry in content["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(ValueError, match=r"instances_val\.json: boxes look like shares .* COCO's are xywh in pixels"):
        open_source(**coco_folder(tmp_path, content))


def test_big_coco_files_make_small_units(tmp_path):
    rng = random.Random(0)
    images = [{"id": k, "file_name": f"{k:012d}.jpg", "height": 480, "width": 640} for k in range(4000)]
    annotations = [
        {"image_id": rng.randrange(4000), "category_id": 1, "bbox": [1.5, 2, 3, 4], "segmentation": [[0.5] * 50]}
        for _ in range(28_000)
    ]
    content = {"annotations": annotations, "images": images, "categories": [{"id": 1, "name": "dog"}]}
    options = coco_folder(tmp_path, content)
    put(options["path"] / f"{0:012d}.jpg", image())
    units = open_source(**options, unit_size=1000)
    assert [unit.weight for unit in units] == [1000] * 4
    assert all(len(pickle.dumps(unit)) < 250_000 for unit in units)
    assert sum(len(unit.owners) for unit in units) == 28_000


# Recognition --------------------------------------------------------------------------------------------------------


def test_what_is_not_recognised(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match=r"(?s)holds nothing; expected one of.*sa1b.*webdataset.*imagefolder.*coco"):
        open_source(tmp_path)
    for k in range(9):
        put(tmp_path / f"{k}.md", "text")
    with pytest.raises(ValueError, match=r"holds 0\.md, 1\.md, 2\.md, 3\.md, 4\.md and 4 more; expected one of"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"0\.md is a file of no known kind; expected one of"):
        open_source(tmp_path / "0.md")
    for kind in ("sa1b", "webdataset"):
        with pytest.raises(ValueError, match=r"holds no \.tar"):
            open_source(tmp_path, kind=kind)
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path, kind="imagefolder")


def test_arguments_that_do_not_go_together(tmp_path):
    tar(tmp_path / "sa_000000.tar", [("sa_1.jpg", image())])
    instances = put(tmp_path / "i.json", "{}")
    for options, what in (
        ({"kind": "coc"}, "kind is 'coc'; expected auto, sa1b, "),
        ({"kind": "coco"}, r"coco needs instances \(--instances\)"),
        ({"box_format": "xyxy"}, "sa1b has a format of its own; leave it out"),
        ({"kind": "sa1b", "instances": instances}, "instances is of kind coco; this is sa1b"),
        ({"classes": instances}, "classes is of kind coco, yolo, voc, huggingface; this is sa1b"),
        ({"unit_size": 0}, "unit_size is 0; expected a positive number"),
        ({"kind": "layouts"}, "is not a file"),
    ):
        with pytest.raises(ValueError, match=what):
            open_source(tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(tmp_path, instances=tmp_path / "none.json")
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(instances, instances=instances)


# JSON, member by member ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.sampled_from([None, 1]), st.data())
def test_members_are_what_json_says(value, indent, data):
    text = json.dumps(value, indent=indent)
    expected = [(k, v) for k, member in value.items() for v in (member if isinstance(member, list) else [member])]
    assert list(members(f" {text}\n")) == expected
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ValueError, match="not JSON"):
        list(members(text[:cut]))


def test_members_of_what_is_no_object():
    for text in (
        "",
        "[]",
        "3",
        '{"a" 1}',
        '{"a": [1 2]}',
        '{"a": [1,]}',
        '{"a": 1,}',
        "{1: 2}",
        '{"a": ' + "[" * 10**5,
    ):
        with pytest.raises(ValueError, match="not JSON"):
            list(members(text))


def test_sources_do_not_need_their_folder_to_be_absolute(tmp_path, monkeypatch):
    folder(tmp_path / "set", [{"file_name": "a.jpg"}])
    monkeypatch.chdir(tmp_path / "set")
    (unit,) = open_source(Path())
    assert unit.name == "set-00000"
    assert len(list(unit.items())) == 1
