"""The same images and boxes in YOLO, Pascal VOC, COCO and Hugging Face sets: the command makes the same shards."""

import json
import warnings

import numpy as np
import pytest
from helpers.commands import fails, succeeds
from helpers.source_items import HEIGHT, WIDTH, dataset, image, put
from helpers.tiny import sdxl_vae

from gligen_xl.data.shards import find_shards

BOXES = {"a.jpg": [(1, [20, 10, 60, 30]), (0, [30, 0, 38, 8])], "b.jpg": [(0, [40, 20, 60, 40])], "c.jpg": []}
NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    sdxl_vae().save_pretrained(folder)
    return "--vae", folder, "--resolution", HEIGHT, "--workers", 0


def as_yolo(folder):
    dataset(folder / "images", BOXES).as_yolo(
        annotations_directory_path=str(folder / "labels"), data_yaml_path=str(folder / "data.yaml")
    )
    return (folder,)


def as_voc(folder):
    dataset(folder / "JPEGImages", BOXES).as_pascal_voc(annotations_directory_path=str(folder / "Annotations"))
    return (folder,)


def as_coco(folder):
    dataset(folder / "photos", BOXES).as_coco(annotations_path=str(folder / "export/result.json"))
    return folder / "export", "--images", folder / "photos"


def as_parquet(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets

    datasets.disable_progress_bars()
    rows = [
        {"image": {"bytes": image(), "path": name},
         "objects": [{"bbox": [x0, y0, x1 - x0, y1 - y0], "category": which} for which, (x0, y0, x1, y1) in objects]}
        for name, objects in BOXES.items()
    ]  # fmt: skip
    label = {"bbox": datasets.List(datasets.Value("float64")), "category": datasets.ClassLabel(names=NAMES)}
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(label)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return (folder,)


@pytest.mark.parametrize("write", [as_yolo, as_voc, as_coco, as_parquet])
def test_the_same_boxes_from_every_form(capsys, tmp_path, options, write):
    output = succeeds(capsys, "prepare", *write(tmp_path / "set"), *options, "--out", tmp_path / "shards")
    assert "images: 3 seen, 3 used, 3 rows" in output
    (shard,) = find_shards(tmp_path / "shards")
    rows = [shard.row(k) for k in range(3)]
    assert [row.phrases for row in rows] == [["dog", "cat"], ["cat"], []]
    for row, objects in zip(rows, BOXES.values(), strict=True):
        # The middle square of an image that is twice as wide as high: 20 pixels are cut off at the left.
        expected = [np.array([x0 - 20, y0, x1 - 20, y1]) / HEIGHT for _, (x0, y0, x1, y1) in objects]
        np.testing.assert_allclose(np.reshape(row.boxes, (-1, 4)), np.reshape(expected, (-1, 4)), atol=1e-5)
        assert (row.original_height, row.original_width, row.caption) == (HEIGHT, WIDTH, "")


def test_what_is_lost_is_in_the_report(capsys, tmp_path, options):
    root = as_yolo(tmp_path / "set")[0]
    put(root / "labels/b.txt", "0 0.5 0.5 0.2 0.2\n9 0.5 0.5 0.2 0.2\n")
    put(root / "labels/lost.txt", "0 0.5 0.5 0.2 0.2\n")
    output = succeeds(capsys, "prepare", root, *options, "--out", tmp_path / "shards")
    assert "skipped, annotations without their image: 1 (as labels/lost)" in output
    assert "boxes dropped, its class has no name: 1" in output
    assert "class 9; expected one of classes 0 to 1" in output
    report = json.loads((tmp_path / "shards/prepare.json").read_text())
    assert report["dropped_boxes"] == {"its class has no name": 1}
    put(root / "labels/b.txt", "0 0.5 0.5 0.2 0.2\n")
    assert "done again, changed: its files of annotations: set-00000" in succeeds(
        capsys, "prepare", root, *options, "--out", tmp_path / "shards"
    )


def test_splits_share_a_folder(capsys, tmp_path, options):
    for split, names in (("train", ["a.jpg", "b.jpg"]), ("val", ["c.jpg", "d.jpg"])):
        for name in names:
            put(tmp_path / f"set/images/{split}/{name}", image())
            put(tmp_path / f"set/labels/{split}/{name[0]}.txt", "0 0.5 0.5 0.2 0.2\n")
    put(tmp_path / "set/data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")
    for split in ("train", "val"):
        succeeds(capsys, "prepare", tmp_path / "set", "--split", split, *options, "--out", tmp_path / "shards")
    shards = find_shards(tmp_path / "shards")
    assert [shard.row(0).image_id for shard in shards] == ["images/train/a", "images/val/c"]


def test_annotations_that_are_not_understood_are_one_error(capsys, tmp_path, options):
    put(tmp_path / "set/a.jpg", image())
    put(tmp_path / "set/a.json", json.dumps({"shapes": [], "imagePath": "a.jpg", "flags": {}}))
    words = ("prepare", tmp_path / "set", *options, "--out", tmp_path / "set/shards")
    error = fails(capsys, *words)
    assert "a.json may hold annotations, and is not read (LabelMe; " in error
    succeeds(capsys, *words, "--kind", "imagefolder", "--without-boxes")
    (tmp_path / "set/a.json").unlink()
    assert "already there" in succeeds(capsys, *words, "--without-boxes")  # its own shards are no annotations
