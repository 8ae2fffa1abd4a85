"""Files of annotations that are not read are refused by name, never passed over."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.source_items import image, items, put

from gligen_xl.prepare.sources import KINDS, open_source

LABELME = {"version": "5", "flags": {}, "shapes": [{"label": "cat", "points": [[1, 2], [3, 4]]}], "imagePath": "a.jpg"}
CREATEML = [{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": {"x": 1, "y": 2, "width": 3}}]}]
VIA = {"a.jpg123": {"filename": "a.jpg", "regions": [{"shape_attributes": {"name": "rect"}, "region_attributes": {}}]}}
STUDIO = [{"id": 1, "annotations": [{"result": [{"type": "rectanglelabels"}]}], "data": {"image": "a.jpg"}}]


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("a.json", json.dumps(LABELME), "LabelMe"),
        ("_annotations.createml.json", json.dumps(CREATEML), "CreateML"),
        ("via_project.json", json.dumps({"_via_settings": {}}), "VIA"),
        ("via.json", json.dumps(VIA), "VIA"),
        ("export.json", json.dumps(STUDIO), "Label Studio"),
        ("deep/b.json", '{"x": 1}', "JSON of no known form"),
        ("annotations.xml", "<annotations><image name='a.jpg'/></annotations>", "CVAT"),
        ("a.xml", "<x/>", "none of Pascal VOC"),
        ("_annotations.csv", "filename,width\na.jpg,3\n", "a table"),
        ("labels.tsv", "a.jpg\t1\n", "a table"),
        ("train.tfrecord", "x", "not a format that is read"),
        ("boxes.parquet", "x", "a table without images"),
        ("set.yaml", "a: 1\n", "YAML"),
        ("a.jsonl", "{}\n", "JSON"),
    ],
)
def test_files_that_are_not_read(tmp_path, caplog, name, contents, told):
    put(tmp_path / "a.jpg", image())
    put(tmp_path / name, contents)
    with pytest.raises(ValueError, match=r"may hold annotations, and is not read \(") as error:
        open_source(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert told in str(error.value)
    assert all(f"  {kind} " in str(error.value) for kind in KINDS)
    (item,) = items(tmp_path, kind="imagefolder")
    assert item.boxes == ()
    assert f"{tmp_path / name} is not read" in caplog.text
    assert len(items(tmp_path, other_uses=[tmp_path / name])) == 1


def test_what_is_no_annotation_is_passed_over(tmp_path):
    put(tmp_path / "a.jpg", image())
    put(tmp_path / "a.txt", "a cat")
    for name in ("README.md", "LICENSE", ".cache/x.json", ".hidden.json", "notes.docx", "Thumbs.db"):
        put(tmp_path / name, "text")
    put(tmp_path / "shards/.prepared/settings.json", "{}")
    put(tmp_path / "shards/prepare.json", "{}")
    put(tmp_path / "captions/all.jsonl", "{}")
    (item,) = items(tmp_path, other_uses=[tmp_path / "captions"])
    assert (item.image_id, item.caption, item.boxes) == ("a", "a cat", ())


def test_annotations_of_several_kinds(tmp_path):
    put(tmp_path / "a.jpg", image())
    put(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    put(tmp_path / "classes.txt", "cat\n")
    voc = (
        "<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    )
    put(tmp_path / "a.xml", f"{voc}</object></annotation>")
    with pytest.raises(ValueError, match="holds annotations of several kinds, yolo and voc; choose one by --kind"):
        open_source(tmp_path)
    assert [items(tmp_path, kind=kind)[0].phrases for kind in ("yolo", "voc")] == [("cat",), ("dog",)]


def test_options_of_other_kinds(tmp_path):
    put(tmp_path / "set/a.jpg", image())
    for name, value in (("images", tmp_path / "set"), ("split", "train")):
        with pytest.raises(ValueError, match=f"{name} is of kind coco, yolo, voc, huggingface; this is imagefolder"):
            open_source(tmp_path / "set", **{name: value})


@pytest.mark.parametrize("name", ["data.yaml", "classes.txt", "result.json", "a.parquet", "metadata.jsonl"])
def test_files_that_are_links_out_of_the_folder(tmp_path, name):
    root = tmp_path / "set"
    said = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    contents = {"data.yaml": "names: [cat]\n", "classes.txt": "cat\n", "result.json": json.dumps(said),
                "metadata.jsonl": '{"file_name": "a.jpg"}\n'}  # fmt: skip
    put(root / "a.jpg", image())
    if name in ("data.yaml", "classes.txt"):
        put(root / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    target = tmp_path / f"elsewhere-{name}"
    if name == "a.parquet":
        pq.write_table(pa.table({"image": [image()]}), target)
    else:
        put(target, contents[name])
    (root / name).symlink_to(target)
    with pytest.raises(ValueError, match=r"is a link to a file outside of .*; copy that file there"):
        open_source(root)
    (root / name).unlink()
    (root / name).write_bytes(target.read_bytes())
    assert len(items(root)) == 1
