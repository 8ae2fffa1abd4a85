"""Detection sets with images inside: as `datasets` writes them to parquet and to disk, and as older versions did."""

import io
import json
import shutil
import tracemalloc
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.source_items import HEIGHT, WIDTH, image, images, in_pixels, items, put, reasons
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets

from gligen_xl.prepare.sources import open_source, recognise

NAMES = ["cat", "dog"]
OBJECTS = [[([20, 10, 40, 20], 1), ([0, 0, 8, 8], 0)], [], [([40, 20, 40, 20], 0)]]  # xywh in pixels


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def as_dict(objects, names=None):
    return {
        "bbox": [box for box, _ in objects],
        "category": [which if names is None else names[which] for _, which in objects],
    }


def as_list(objects, names=None):
    return [{"bbox": box, "category": which if names is None else names[which]} for box, which in objects]


def hugging(form="dict", text=False, **more):
    label = datasets.Value("string") if text else datasets.ClassLabel(names=NAMES)
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    values = [as_dict(entry, NAMES if text else None) for entry in OBJECTS]
    if form == "list":
        values = [as_list(entry, NAMES if text else None) for entry in OBJECTS]
        feature = datasets.List({"bbox": box, "category": label})
    elif form == "sequence":  # which older versions wrote
        feature = datasets.Sequence({"bbox": box, "category": label})
    else:
        feature = {"bbox": datasets.List(box), "category": datasets.List(label)}
    columns = {"image": [Image.open(io.BytesIO(image("PNG"))) for _ in OBJECTS], "objects": values} | more
    features = {"image": datasets.Image(), "objects": feature}
    for name, column in more.items():
        features[name] = datasets.Value("int64" if isinstance(column[0], int) else "string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def check(found):
    first, second, third = images(found).values()
    assert (first.phrases, in_pixels(first)) == (("dog", "cat"), [[20, 10, 60, 30], [0, 0, 8, 8]])
    assert (second.boxes, second.phrases) == ((), ())
    assert (third.phrases, in_pixels(third)) == (("cat",), [[40, 20, 80, 40]])
    assert all(Image.open(io.BytesIO(item.image)).size == (WIDTH, HEIGHT) for item in (first, second, third))


@pytest.mark.parametrize("form", ["dict", "list", "sequence"])
@pytest.mark.parametrize("text", [False, True])
def test_sets_of_datasets(tmp_path, form, text):
    made = hugging(form, text)
    made.to_parquet(tmp_path / "one.parquet")
    made.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    made.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "dict")
    for path in (tmp_path / "one.parquet", tmp_path / "hub", tmp_path / "disk", tmp_path / "dict"):
        assert recognise(path) == "huggingface"
        for unit_size in (2, 100):
            check(items(path, unit_size=unit_size))


def test_ids_captions_and_sizes(tmp_path):
    made = hugging(image_id=[7, 8, 9], caption=["a dog", "", "a cat"], width=[WIDTH] * 3, height=[HEIGHT] * 3)
    made.to_parquet(tmp_path / "x.parquet")
    found = items(tmp_path / "x.parquet")
    assert [(item.image_id, item.caption, item.size) for item in found] == [
        ("7", "a dog", (HEIGHT, WIDTH)), ("8", "", (HEIGHT, WIDTH)), ("9", "a cat", (HEIGHT, WIDTH)),
    ]  # fmt: skip
    check(found)


def test_splits(tmp_path, caplog):
    made = hugging(image_id=[1, 2, 3])
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "disk")
    for split in ("train", "test"):
        made.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    for path in (tmp_path / "disk", tmp_path / "hub"):
        assert sorted(images(items(path))) == ["test/1", "test/2", "test/3", "train/1", "train/2", "train/3"]
        assert "all splits are taken" in caplog.text
        assert list(images(items(path, split="test"))) == ["test/1", "test/2", "test/3"]
        with pytest.raises(ValueError, match="has no split dev; it has "):
            open_source(path, split="dev")


def test_boxes_in_other_formats(tmp_path):
    made = hugging("list").to_dict()
    for objects in made["objects"]:
        for entry in objects:
            x, y, w, h = entry["bbox"]
            entry["bbox"] = [x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT]
    datasets.Dataset.from_dict(made, features=hugging("list").features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 1: boxes look like shares of the image"):
        open_source(tmp_path / "x.parquet")
    check(items(tmp_path / "x.parquet", box_format="xyxy"))
    hugging().to_parquet(tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="boxes look like pixels"):
        open_source(tmp_path / "y.parquet", box_format="xywh")


def table(path, columns, metadata=None):
    made = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize("feature", [
    {"feature": {"bbox": {}, "category": {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "Sequence"}},
     "_type": "Sequence"},
    [{"bbox": [], "category": {"names": NAMES, "_type": "ClassLabel"}}],
    {"bbox": [], "category": [{"names": NAMES, "num_classes": 2, "_type": "ClassLabel"}]},
])  # fmt: skip
def test_descriptions_of_other_versions(tmp_path, feature):
    said = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "objects": feature}}})
    columns = {"image": [{"bytes": image(), "path": None}] * 3, "objects": [as_dict(entry) for entry in OBJECTS]}
    check(items(table(tmp_path / "a.parquet", columns, {"huggingface": said})))


def test_numbers_without_names(tmp_path):
    columns = {"image": [image()] * 3, "objects": [as_dict(entry) for entry in OBJECTS]}
    path = table(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=r"phrases are numbers: they are \[1, 0\]; expected the names of the classes"):
        open_source(path)
    check(items(path, classes=put(tmp_path / "c.json", '{"0": "cat", "1": "dog"}')))
    (first, *_) = items(path, classes=put(tmp_path / "c.json", '{"0": null, "1": "a dog"}'))
    assert (first.phrases, first.dropped) == (("a dog",), {"class left out by the mapping": 1})


def test_classes_of_class_labels(tmp_path):
    hugging().to_parquet(tmp_path / "x.parquet")
    first, _, third = items(tmp_path / "x.parquet", classes=put(tmp_path / "c.json", '{"cat": null, "dog": "a dog"}'))
    assert (first.phrases, first.dropped) == (("a dog",), {"class left out by the mapping": 1})
    assert (third.boxes, third.dropped) == ((), {"class left out by the mapping": 1})
    with pytest.raises(ValueError, match="there is no category bird; there are cat, dog"):
        open_source(tmp_path / "x.parquet", classes=put(tmp_path / "c.json", '{"bird": "x"}'))


def test_columns_of_their_own(tmp_path):
    columns = {
        "img": [image()] * 3,
        "bboxes": [[box for box, _ in entry] for entry in OBJECTS],
        "labels": [[NAMES[which] for _, which in entry] for entry in OBJECTS],
    }
    check(items(table(tmp_path / "a.parquet", columns)))


def test_rows_that_are_odd(tmp_path):
    boxes = [[1.0, 2.0, 3.0, 4.0]]
    good = {"bbox": boxes, "category": ["cat"]}
    rows = [
        (image(), good), (None, good), (image(), {"bbox": boxes, "category": ["cat", "dog"]}),
        (image(), {"bbox": [[1.0, 2.0, 3.0]], "category": ["cat"]}), (image(), None),
        (image(), {"bbox": [[float("nan"), 2.0, 3.0, 4.0]], "category": ["cat"]}),
    ]  # fmt: skip
    path = table(tmp_path / "a.parquet", {"image": [row[0] for row in rows], "objects": [row[1] for row in rows]})
    found = items(path)
    assert list(images(found)) == ["a-1", "a-5"]
    assert reasons(found) == {
        "a-2": "file is missing", "a-3": "boxes and phrases differ in number", "a-4": "its boxes are wrong",
        "a-6": "its boxes are wrong",
    }  # fmt: skip


def test_images_that_are_only_named(tmp_path):
    put(tmp_path / "photos/x/a.jpg", image())
    columns = {
        "image": [{"bytes": None, "path": "/cache/x/a.jpg"}, {"bytes": None, "path": "../../etc/passwd"}],
        "objects": [as_dict(OBJECTS[0], NAMES)] * 2,
    }
    path = table(tmp_path / "set/a.parquet", columns)
    found = items(path, images=tmp_path / "photos")
    assert images(found)["a"].image == tmp_path / "photos/x/a.jpg"
    assert reasons(found) == {"passwd": "file is missing"}


def test_tables_that_are_none(tmp_path):
    path = table(tmp_path / "boxes.parquet", {"id": [1], "bbox": [[[1, 2, 3, 4]]]})
    with pytest.raises(ValueError, match=r"boxes\.parquet is a file of no known kind \(a table without images"):
        open_source(path)
    with pytest.raises(ValueError, match="has the columns id, bbox, and none of images; expected image"):
        open_source(path, kind="huggingface")
    with pytest.raises(ValueError, match="objects is string; expected bbox and category in it"):
        open_source(table(path, {"image": [image()], "objects": ["x"]}))
    with pytest.raises(ValueError, match=r"boxes\.parquet is not a readable parquet file"):
        open_source(put(path, b"PAR1xxxx"), kind="huggingface")


def test_folders_that_are_not_whole(tmp_path):
    hugging().save_to_disk(tmp_path / "disk")
    arrow = tmp_path / "disk/data-00000-of-00001.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow is not a readable Arrow file"):
        open_source(tmp_path / "disk")
    arrow.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data-00000-of-00001\.arrow, one of its 1 files"):
        open_source(tmp_path / "disk")
    for state in ('{"_data_files": [{"filename": "../x.arrow"}]}', "{}", "[]", "{"):
        put(tmp_path / "disk/state.json", state)
        with pytest.raises(ValueError, match=r"state\.json"):
            open_source(tmp_path / "disk")
    shutil.rmtree(tmp_path / "disk")
    put(tmp_path / "disk/dataset_dict.json", '{"splits": ["../../etc"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json: expected"):
        open_source(tmp_path / "disk")


@pytest.mark.parametrize("saved", [True, False])
def test_memory_is_that_of_some_rows(tmp_path, saved):
    noise = image() + np.random.default_rng(0).bytes(2**20)
    columns = {"image": [{"bytes": noise, "path": None}] * 64, "objects": [as_dict(OBJECTS[0], NAMES)] * 64}
    made = pa.table(columns)
    path = tmp_path / "a.parquet"
    if saved:
        path = tmp_path / "a.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(made)
    else:
        pq.write_table(made, path, use_dictionary=False, compression="none", write_batch_size=1)  # a page each
    (unit,) = open_source(path)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for item in unit.items():
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert in_pixels(item) == [[20, 10, 60, 30], [0, 0, 8, 8]]
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python < 8 * 2**20
    assert peak < 40 * 2**20


def test_a_table_that_changes_makes_another_unit(tmp_path):
    hugging().to_parquet(tmp_path / "x.parquet")
    before = open_source(tmp_path / "x.parquet")[0].identity()
    hugging("list").to_parquet(tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet")[0].identity() != before


# A folder of images with a table beside them ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "list"])
def test_objects_in_metadata(tmp_path, form):
    rows = []
    for name, entry in zip("abc", OBJECTS, strict=True):
        put(tmp_path / f"{name}.jpg", image())
        objects = as_dict(entry, NAMES)
        if form == "list":
            objects = as_list(entry, NAMES)
        rows.append({"file_name": f"{name}.jpg", "objects": objects})
    put(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = items(tmp_path)
    assert [item.phrases for item in found] == [("dog", "cat"), (), ("cat",)]
    assert in_pixels(found[0]) == [[20, 10, 60, 30], [0, 0, 8, 8]]
    (tmp_path / "metadata.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    assert [(item.boxes, item.phrases) for item in items(tmp_path)] == [(item.boxes, item.phrases) for item in found]
