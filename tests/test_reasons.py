"""Why images and boxes are left out: told by kind, with one of each whole; where all fail alike nothing is begun."""

import io
import json
import tarfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import sdxl_vae
from PIL import Image

from gligen_xl.images.crop import REVERSED
from gligen_xl.prepare.framing import Framing
from gligen_xl.prepare.item import BAD_TEXT
from gligen_xl.prepare.run import prepare
from gligen_xl.prepare.runners import Machine
from gligen_xl.prepare.settings import Settings
from gligen_xl.prepare.sources import open_source, rows

HERE = Machine()


@pytest.fixture(scope="module")
def how(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    sdxl_vae().save_pretrained(folder)
    return Settings(framing=Framing(resolutions=(32,)), vae=str(folder))


def image(width=64, height=32):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(stream, "PNG")
    return stream.getvalue()


def put(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def metadata(folder, entries, images=("good.png",)):
    for name in images:
        put(folder / name, image())
    return put(folder / "metadata.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def box(*corners, form="xyxy_pixels", phrase="a dog"):
    return {"file_name": "good.png", "boxes": [list(corners)], "phrases": [phrase], "box_format": form}


# Boxes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corners", "form", "reason", "told"),
    [
        ((50, 4, 30, 20), "xyxy_pixels", REVERSED, "[50.0, 4.0, 30.0, 20.0]"),
        ((0.9, 0.2, 0.4, 0.9), "xyxy", REVERSED, "[0.9, 0.2, 0.4, 0.9]"),
        ((30, 4, -10, 8), "xywh_pixels", REVERSED, "[30.0, 4.0, 20.0, 12.0]"),
        ((70, 4, 90, 20), "xyxy_pixels", "outside the image", "[70.0, 4.0, 90.0, 20.0] of 64 x 32"),
        ((-0.6, 0.1, -0.1, 0.9), "xyxy", "outside the image", "[-0.6, 0.1, -0.1, 0.9]"),
        ((30, 30, 50, 200), "xyxy_pixels", "outside the image", "[30.0, 30.0, 50.0, 200.0] of 64 x 32"),
        ((0, 4, 14, 20), "xyxy_pixels", "cut away by the crop", "32 x 32 pixels show [0.25, 0.0, 0.75, 1.0] of it"),
        ((20, 4, 20, 20), "xyxy_pixels", "without width or height", "[20.0, 4.0, 20.0, 20.0]"),
        ((20, 4, 20.4, 20), "xyxy_pixels", "smaller than a pixel of the frame", "[20.0, 4.0, 20.4, 20.0]"),
    ],
)  # fmt: skip
def test_why_a_box_is_dropped(tmp_path, how, corners, form, reason, told):
    path = metadata(tmp_path / "set", [box(*corners, form=form) | {"image_id": k} for k in range(3)])
    report = prepare(open_source(tmp_path / "set"), tmp_path / "out", how, HERE)
    assert report.total.dropped_boxes == {reason: 3}
    example = report.total.dropped_examples[reason]
    assert example.startswith(f"{path}, row 1: 'a dog' at [")
    assert told in example
    assert f"  boxes dropped, {reason}: 3\n    {example}\n" in str(report)
    assert json.loads((tmp_path / "out/prepare.json").read_text())["dropped_examples"] == {reason: example}


def test_boxes_that_a_source_drops_have_an_example(tmp_path, how):
    path = metadata(tmp_path / "set", [box(0, 0, 32, 32, phrase=" ")])
    report = prepare(open_source(tmp_path / "set"), tmp_path / "out", how, HERE)
    assert report.total.dropped_examples == {rows.NO_PHRASE: f"{path}, row 1: phrases[0] is ' '"}


# Images -----------------------------------------------------------------------------------------------------------


def test_every_reason_has_its_own_count_and_one_example_whole(tmp_path, how):
    entries = {
        "path": {"file_name": "sub/none.png"},
        "few": box(1, 2, 3),
        "more": box(0, 0, 9, 9) | {"phrases": ["a", "b"]},
        "scores": box(0, 0, 9, 9) | {"scores": [float("inf")]},
        "caption": {"file_name": "good.png", "text": 3},
        "size": {"file_name": "good.png", "width": 0, "height": 3},
        "stated": {"file_name": "good.png", "width": 10, "height": 20},
        "text": {"file_name": "good.png", "text": "\0"},
        "cut": {"file_name": "cut.png"},
    }
    entries = [entry | {"image_id": f"{name}-{k}"} for k in range(2) for name, entry in entries.items()]
    path = metadata(tmp_path / "set", [{"file_name": "good.png", "image_id": "good"}, *entries])
    put(tmp_path / "set/cut.png", image()[:60])
    report = prepare(open_source(tmp_path / "set"), tmp_path / "out", how, HERE)
    assert (report.total.seen, report.total.used) == (19, 1)
    told = {reason: entry["example"].removeprefix(f"{path}, row ") for reason, entry in report.total.skipped.items()}
    assert {entry["count"] for entry in report.total.skipped.values()} == {2}
    missing = tmp_path / "set/sub/none.png"
    folder = tmp_path / "set"
    assert told.pop("truncated or damaged").startswith("10: ")
    assert told == {
        rows.MISSING: f"2: {missing}: there is no such file; expected the path of an image relative to {folder}",
        rows.WRONG_BOXES: "3: boxes[0] is [1, 2, 3]; expected boxes as [[x, y, x, y], ...]",
        rows.UNEQUAL: "4: 1 boxes but 2 phrases; expected one a box",
        rows.WRONG_SCORES: "5: scores is [inf]; expected a list of finite numbers",
        rows.WRONG_CAPTION: "6: it is 3; expected a string",
        rows.WRONG_SIZE: "7: height is 3, width 0; expected pixels",
        "its size is not what its annotation states": "8: it is 64 x 32 (width x height), its annotation states "
        "10 x 20",
        BAD_TEXT: "9: '\\x00' has U+0000 at character 0; expected text",
    }


def test_what_becomes_known_when_decoding_is_told_from_another_process_too(tmp_path, how):
    metadata(tmp_path / "set", [{"file_name": "good.png"}, {"file_name": "small.png"}])
    put(tmp_path / "set/small.png", image(20, 20))
    small = replace(how, framing=Framing(resolutions=(32,), min_side=24))
    for workers in (0, 1):
        units = open_source(tmp_path / "set")
        report = prepare(units, tmp_path / f"{workers}", small, Machine(workers=workers))
        (entry,) = report.total.skipped.values()
        assert entry["example"].endswith("row 2: it is 20 x 20; expected at least 24 pixels a side")


def test_an_image_without_enough_boxes_says_how_many(tmp_path, how):
    entries = [{"image_id": k, "boxes": [[20, 4, 40, 20]] * k, "phrases": ["x"] * k} for k in (3, 1)]
    metadata(tmp_path / "set", [box(20, 4, 40, 20) | entry for entry in entries])
    report = prepare(open_source(tmp_path / "set"), tmp_path / "out", replace(how, min_boxes=2), HERE)
    assert report.total.skipped["too few boxes"]["example"].endswith(
        "row 2: it has 1 boxes before those are dropped; expected 2 that stay"
    )


def test_files_beside_images_that_are_of_no_use_are_counted(tmp_path, how, caplog):
    for name in ("a.png", "b/c.png"):
        put(tmp_path / "set" / name, image())
    for name in ("a.txt", "b/c.txt", "a.json", "b/c.json", "b/c.caption", "lone.txt", ".hidden.json", "README"):
        put(tmp_path / "set" / name, "x")
    units = open_source(tmp_path / "set", kind="imagefolder", unit_size=1)  # who says so means the images alone
    assert "a.json" in caplog.text
    report = prepare(units, tmp_path / "out", how, HERE)
    assert report.total.unread == {".json": 2, ".caption": 1, ".txt": 1}
    assert "  files that were not read, by ending: .json: 2, " in str(report)


# All alike ----------------------------------------------------------------------------------------------------------


def rows_of(count, name):
    def write(root):
        metadata(root / "set", [{"file_name": f"{k}.png"} for k in range(count)])
        return {"path": root / "set"}, r"set/metadata\.jsonl, row 1: file is missing: \S+/set/0\.png: there is no such"

    def parquet(root):
        put(root / "set/good.png", image())
        table = pa.table({"file_name": [f"{k}.png" for k in range(count)]})
        pq.write_table(table, root / "set/metadata.parquet")
        return {"path": root / "set"}, r"set/metadata\.parquet, row 1: file is missing: \S+/set/0\.png"

    def layouts(root):
        put(root / "a.jsonl", "".join(json.dumps({"image": f"{k}.png", "prompt": "x"}) + "\n" for k in range(count)))
        return {"path": root / "a.jsonl"}, r"a\.jsonl, row 1: file is missing: \S+/0\.png"

    def coco(root):
        put(root / "set/good.png", image())
        images = [{"id": k, "file_name": f"x/{k}.png"} for k in range(count)]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
        where = {"path": root / "set", "instances": put(root / "i.json", json.dumps(content))}
        return where, r"i\.json, image 0 .*: file is missing: \S+/set/x/0\.png: there is no such file"

    def plain(root):
        for k in range(count):
            put(root / f"set/{k:03d}.png", image())
            put(root / f"set/{k:03d}.txt", "un café".encode("latin-1"))
        return {"path": root / "set"}, r"set/000\.png: its caption is not UTF-8: \S+/000\.txt: byte 6 is 0xe9"

    def archive(root):
        (root / "set").mkdir()
        with tarfile.open(root / "set/a.tar", "w") as tar:
            for k in range(count):
                for ending, contents in (("png", image()), ("json", b"[]")):
                    info = tarfile.TarInfo(f"{k}.{ending}")
                    info.size = len(contents)
                    tar.addfile(info, io.BytesIO(contents))
        return {"path": root / "set"}, r"set/a\.tar, sample 0: its row is not JSON: "

    return locals()[name]


@pytest.mark.parametrize("name", ["write", "parquet", "layouts", "coco", "plain", "archive"])
def test_where_the_first_hundred_fail_alike_nothing_is_begun(tmp_path, name):
    where, says = rows_of(100, name)(tmp_path)
    with pytest.raises(ValueError, match=says + r".*So it is with all of the first 100$"):
        open_source(**where, unit_size=30)


@pytest.mark.parametrize("name", ["write", "parquet", "layouts", "coco", "plain", "archive"])
def test_fewer_are_left_to_the_report(tmp_path, name):
    where, _ = rows_of(99, name)(tmp_path)
    assert open_source(**where, unit_size=30)


def test_a_hundred_with_two_faults_are_left_to_the_report(tmp_path):
    entries = [{"file_name": f"{k}.png"} for k in range(100)]
    entries[60] = box(1, 2, 3)
    metadata(tmp_path / "set", [*entries, {"file_name": "good.png"}])
    assert [unit.count for unit in open_source(tmp_path / "set")] == [101]


def test_what_is_known_only_when_decoding_or_joining_ends_it_too(tmp_path, how):
    for k in range(100):
        put(tmp_path / f"set/{k:03d}.png", image())
    units, out = open_source(tmp_path / "set"), tmp_path / "out"
    large = replace(how, framing=Framing(resolutions=(32,), min_side=99))
    with pytest.raises(ValueError, match=r"set/000\.png: too small: it is 64 x 32; expected at least 99 .* first 100$"):
        prepare(units, out, large, HERE)
    joined = replace(how, captions=str(put(tmp_path / "caps.jsonl", '{"id": "other/x", "text": "y"}')))
    with pytest.raises(ValueError, match=r"set/000\.png: no caption: no id of the captions ends as '000'\. So it is"):
        prepare(units, out, joined, HERE)
    with pytest.raises(
        ValueError, match=r"set/000\.png: too few boxes: it has 0 boxes, no more; expected 1\. So it is"
    ):
        prepare(units, out, replace(how, min_boxes=1), HERE)
    assert not list(out.glob("*.safetensors"))
    put(tmp_path / "set/099.png", image(200, 200))
    assert prepare(open_source(tmp_path / "set"), out, large, HERE).total.used == 1


def test_a_source_of_which_something_is_done_is_not_stopped(tmp_path, how):
    metadata(tmp_path / "set", [{"file_name": "good.png"}, *({"file_name": f"{k}.png"} for k in range(150))])
    assert prepare(open_source(tmp_path / "set", unit_size=1), tmp_path / "out", how, HERE).total.used == 1
