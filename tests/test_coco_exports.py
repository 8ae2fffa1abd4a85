"""COCO as supervision, Label Studio, CVAT and Roboflow write it: ids, file names, folders and segmentations."""

import json

import numpy as np
import pytest
from helpers.source_items import HEIGHT, WIDTH, dataset, image, images, in_pixels, items, put, reasons
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as masks

from gligen_xl.evaluate.protocols import find_protocol
from gligen_xl.prepare.sources import open_source, recognise
from gligen_xl.prepare.sources.coco import NO_CATEGORY, NO_IMAGE
from gligen_xl.prepare.sources.coco_file import NO_BOX, segment_box
from gligen_xl.prepare.sources.paths import ImageFinder

BOXES = {"a.jpg": [(1, [20, 10, 60, 30]), (0, [0, 0, 8, 8])], "b.jpg": [(0, [40, 20, 80, 40])], "c.jpg": []}


def content(names=("a.jpg", "b.jpg"), **changes):
    return {
        "images": [{"id": k, "file_name": name, "width": WIDTH, "height": HEIGHT} for k, name in enumerate(names)],
        "categories": [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [20, 10, 40, 20], "iscrowd": 0}
            for k in range(len(names))
        ],
    } | changes


def folder(path, said, files=("a.jpg", "b.jpg"), name="result.json"):
    for file in files:
        put(path / file, image())
    put(path / name, json.dumps(said))
    return path


def test_a_set_of_supervision(tmp_path):
    set_ = dataset(tmp_path / "images", BOXES)
    set_.as_coco(annotations_path=str(tmp_path / "annotations.json"))
    assert recognise(tmp_path) == recognise(tmp_path / "annotations.json") == "coco"
    for path, options in (
        (tmp_path, {}), (tmp_path / "annotations.json", {}),
        (tmp_path / "images", {"instances": tmp_path / "annotations.json"}),
        (tmp_path / "annotations.json", {"images": tmp_path / "images"}),
    ):  # fmt: skip
        a, b, c = items(path, **options)
        assert (a.phrases, in_pixels(a)) == (("dog", "cat"), [[20, 10, 60, 30], [0, 0, 8, 8]])
        assert (b.phrases, in_pixels(b)) == (("cat",), [[40, 20, 80, 40]])
        assert c.boxes == ()


# File names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg", "./a.jpg", "images/a.jpg", "images\\a.jpg", "images\\\\a.jpg", "C:\\Users\\me\\images\\a.jpg",
        "/content/drive/set/images/a.jpg", "../../label-studio/media/a.jpg", "train/images/a.jpg",
        "/data/local-files/?d=some/where/images/a.jpg", "/data/local-files/?d=images%2Fa.jpg",
        "/data/upload/1/0f3a9c1d-a.jpg", "0f3a9c1d-a.jpg", "http://localhost:8080/data/upload/1/0f3a9c1d-a.jpg?x=1",
        "s3://bucket/folder/a.jpg", "https://host/images/a.jpg",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["", "images/", "val2017/"])
def test_file_names(tmp_path, name, place):
    root = folder(tmp_path, content([name]), [f"{place}a.jpg"])
    (item,) = items(root)
    assert item.image == tmp_path / f"{place}a.jpg"
    assert in_pixels(item) == [[20, 10, 60, 30]]


def test_file_names_with_spaces_and_percent_signs(tmp_path):
    root = folder(tmp_path, content(["images/my%20cat.jpg", "100%25.jpg", "b%20c.jpg"]),
                  ["my cat.jpg", "100%25.jpg", "100%.jpg", "b%20c.jpg", "b c.jpg"])  # fmt: skip
    assert [item.image.name for item in items(root)] == ["my cat.jpg", "100%25.jpg", "b%20c.jpg"]


def test_the_longest_end_of_a_name_counts(tmp_path):
    root = folder(tmp_path, content(["x/train/a.jpg", "x/val/a.jpg"]), ["train/a.jpg", "val/a.jpg", "a.jpg"])
    assert [str(item.image.relative_to(root)) for item in items(root)] == ["train/a.jpg", "val/a.jpg"]


def test_names_that_could_be_two_images_are_not_guessed(tmp_path):
    root = folder(tmp_path, content(["a.jpg", "x/b.jpg", "y/b.jpg"]), ["one/a.jpg", "two/a.jpg", "b.jpg"])
    found = items(root)
    assert reasons(found) == dict.fromkeys(["0", "1", "2"], "file is missing")


@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["..", ".", "", "a", "C:", "?d=", "%2e%2e", "secret.jpg"])).map("/".join)
)
def test_nothing_outside_of_the_folder_is_found(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("root")
    put(root / "secret.jpg", image())
    put(root / "set/inner.jpg", image())
    assert ImageFinder(root / "set").find(name) in (None, "inner.jpg")


def test_images_elsewhere(tmp_path):
    root = folder(tmp_path / "export", content(["images\\a.jpg"]), [], "annotations/instances_default.json")
    put(tmp_path / "photos/a.jpg", image())
    with_root = items(root, images=tmp_path / "photos")
    assert [item.image for item in with_root] == [tmp_path / "photos/a.jpg"]
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(root, images=tmp_path / "none")
    with pytest.raises(ValueError, match="is not a folder of images"):
        open_source(root, images=root / "annotations/instances_default.json")


def test_splits_as_roboflow_has_them(tmp_path, caplog):
    for split in ("train", "valid", "test"):
        folder(tmp_path / split, content(), name="_annotations.coco.json")
    found = images(items(tmp_path))
    assert sorted(found) == sorted(f"{split}/{k}" for split in ("train", "valid", "test") for k in (0, 1))
    assert all(in_pixels(item) == [[20, 10, 60, 30]] for item in found.values())
    assert "all splits are taken: test (2), train (2), valid (2)" in caplog.text
    assert [item.image.parent.name for item in items(tmp_path, split="val")] == ["valid"] * 2
    assert items(tmp_path, split="valid") == items(tmp_path, split="val")
    assert [item.image_id for item in items(tmp_path / "train")] == ["0", "1"]


def test_several_instances_files(tmp_path):
    for name in ("train2017", "val2017"):
        put(tmp_path / f"annotations/instances_{name}.json", json.dumps(content()))
        for file in ("a.jpg", "b.jpg"):
            put(tmp_path / name / file, image())
    put(tmp_path / "annotations/captions_val2017.json", json.dumps({"images": [], "annotations": []}))
    with pytest.raises(
        ValueError, match=r"several instances files, annotations/instances_train2017\.json, .*--instances"
    ):
        open_source(tmp_path)
    found = reasons(items(tmp_path, split="val"))
    assert found == dict.fromkeys(["0", "1"], "file is missing")  # a.jpg stands in two folders
    found = items(tmp_path, split="val", images=tmp_path / "val2017")
    assert [item.image.parent.name for item in found] == ["val2017"] * 2


# Ids ----------------------------------------------------------------------------------------------------------------


def as_text(entries, *keys):
    return [entry | {key: str(entry[key]) for key in keys} for entry in entries]


@pytest.mark.parametrize("text", ["images", "annotations", "categories", "floats"])
def test_ids_that_are_text_on_one_side(tmp_path, text):
    said = content()
    if text == "images":
        said["images"] = as_text(said["images"], "id")
    elif text == "annotations":
        said["annotations"] = as_text(said["annotations"], "image_id", "category_id")
    elif text == "categories":
        said["categories"] = as_text(said["categories"], "id")
    else:
        said["annotations"] = [entry | {"image_id": float(entry["image_id"])} for entry in said["annotations"]]
    found = items(folder(tmp_path, said))
    assert [(item.image_id, item.phrases) for item in found] == [("0", ("cat",)), ("1", ("cat",))]


def test_ids_that_are_words(tmp_path):
    said = content()
    for k, entry in enumerate(said["images"]):
        entry["id"] = said["annotations"][k]["image_id"] = f"img-{k}"
    assert [item.image_id for item in items(folder(tmp_path, said))] == ["img-0", "img-1"]


def test_the_same_id_as_text_and_as_number_is_one(tmp_path):
    said = content()
    said["images"][1]["id"] = "0"
    with pytest.raises(ValueError, match="two images have the id 0"):
        open_source(folder(tmp_path, said))


def test_orphans_are_counted(tmp_path, caplog):
    said = content()
    said["annotations"] += [
        {"id": 7, "image_id": 99, "category_id": 1, "bbox": [0, 0, 8, 8]},
        {"id": 8, "image_id": 99, "category_id": 1, "bbox": [0, 0, 8, 8]},
        {"id": 9, "image_id": 1, "category_id": 5, "bbox": [0, 0, 8, 8]},
    ]
    found = items(folder(tmp_path, said), unit_size=1)
    assert reasons(found) == {"99": NO_IMAGE}
    assert next(item.detail for item in found if item.image_id == "99").startswith("2 annotations, the first is 7")
    assert images(found)["1"].dropped == {NO_CATEGORY: 1}
    assert images(found)["1"].dropped_examples == {NO_CATEGORY: "annotation 9: category_id is 5"}
    assert "the image_id of 2 of 5 annotations is not in the file, as 99" in caplog.text
    for key in ("image_id", "category_id"):
        said = content()
        for entry in said["annotations"]:
            entry[key] = "x"
        with pytest.raises(ValueError, match=f"the {key} of 2 of 2 annotations is not in the file, as x"):
            open_source(folder(tmp_path, said))


def test_images_alone(tmp_path):
    said = content()
    for changes in ({"annotations": []}, {"annotations": [], "categories": []}, {"annotations": None}):
        found = items(folder(tmp_path, said | changes))
        assert [item.boxes for item in found] == [(), ()]
    del said["annotations"]
    assert [item.boxes for item in items(folder(tmp_path, said))] == [(), ()]


def test_evaluation_compares_ids_as_text(tmp_path, caplog):
    said = content(["a.jpg"])
    said["annotations"] = [
        {"id": k, "image_id": 0, "category_id": 1, "bbox": [20 * k, 0, 20, 40], "iscrowd": 0} for k in range(3)
    ]
    said["annotations"].append({"id": 9, "image_id": 77, "category_id": 1, "bbox": [0, 0, 9, 9]})
    said["images"] = as_text(said["images"], "id")
    put(tmp_path / "annotations/instances_val2017.json", json.dumps(said))
    captions = {"annotations": [{"id": 1, "image_id": 0, "caption": "three cats"}]}
    put(tmp_path / "annotations/captions_val2017.json", json.dumps(captions))
    (layout,) = find_protocol("coco-2017", coco=tmp_path).layouts
    assert (layout.id, layout.prompt, layout.phrases) == ("0", "three cats", ("cat",) * 3)
    assert "the image_id of 1 of 4 annotations is not in the file, as 77" in caplog.text
    for entry in said["annotations"]:
        entry["image_id"] = "zero"
    put(tmp_path / "annotations/instances_val2017.json", json.dumps(said))
    with pytest.raises(ValueError, match="the image_id of 4 of 4 annotations is not in the file, as zero"):
        find_protocol("coco-2017", coco=tmp_path)


# Boxes --------------------------------------------------------------------------------------------------------------


def test_boxes_as_text_and_from_segmentations(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 20:60] = 1
    compressed = masks.encode(np.asfortranarray(mask))
    runs = np.diff(np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0, append=0)), prepend=0)
    counts = [*runs.tolist(), int(mask.size - runs.sum())]
    given = [
        {"bbox": ["20.0", "10", 40, "20"]},
        {"bbox": [], "segmentation": [[20, 10, 60, 10, 60, 30, 20, 30]]},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}},
        {"bbox": None, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}},
    ]
    said = content(
        ["a.jpg"], annotations=[{"id": k, "image_id": 0, "category_id": "1"} | e for k, e in enumerate(given)]
    )
    (item,) = items(folder(tmp_path, said))
    assert in_pixels(item) == [[20, 10, 60, 30]] * 4


def test_boxes_that_are_wrong(tmp_path):
    given = [
        {"bbox": [20, 10, 40, 20]}, {"bbox": [1, 2, 3]}, {"bbox": {"x": 1}}, {"bbox": ["a", 1, 2, 3]}, {},
        {"bbox": [1, 2, 3, float("inf")]}, {"segmentation": {"size": [10**6, 10**6], "counts": [0, 10**12]}},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "~~~"}}, {"segmentation": [["x", "y"]]},
        {"bbox": [0, 0, 8, 8], "iscrowd": "1"}, {"bbox": [0, 0, 8, 8], "iscrowd": "0"},
    ]  # fmt: skip
    said = content(["a.jpg"], annotations=[{"id": k, "image_id": 0, "category_id": 1} | e for k, e in enumerate(given)])
    (item,) = items(folder(tmp_path, said))
    assert item.dropped == {NO_BOX: 8, "crowd": 1}
    assert item.dropped_examples[NO_BOX].startswith("annotation 1: bbox is [1, 2, 3]; expected [x, y, width, height]")
    assert in_pixels(item) == [[20, 10, 60, 30], [0, 0, 8, 8]]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_boxes_of_masks_are_those_of_pycocotools(height, width, data):
    values = data.draw(st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width))
    mask = np.array(values, np.uint8).reshape(height, width)
    encoded = masks.encode(np.asfortranarray(mask))
    box = segment_box({"size": [height, width], "counts": encoded["counts"].decode()})
    assert box == (masks.toBbox(encoded).tolist() if mask.any() else None)


@given(st.text(max_size=40) | st.lists(st.integers(-5, 2000) | st.text(max_size=2), max_size=12))
def test_masks_of_anything_are_a_box_or_none(counts):
    box = segment_box({"size": [40, 80], "counts": counts})
    if box is not None:
        x, y, w, h = box
        assert min(x, y) >= 0
        assert min(w, h) >= 1
        assert (x + w <= 80, y + h <= 40) == (True, True)
