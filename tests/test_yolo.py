"""YOLO sets: as supervision writes them, in every arrangement of folders, and with rows that cannot be used."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from helpers.source_items import dataset, image, images, in_pixels, items, put, reasons

from gligen_xl.prepare.captions.table import CaptionTable
from gligen_xl.prepare.sources import open_source, recognise
from gligen_xl.prepare.sources.rows import LABELS, looks_like_labels
from gligen_xl.prepare.sources.yolo import BAD_CLASS, BAD_ROW, OUTSIDE_SHARES, PIXELS, YoloReader

BOXES = {"a.jpg": [(1, [20, 10, 60, 30]), (0, [0, 0, 8, 8])], "b.jpg": [(0, [40, 20, 80, 40])], "c.jpg": []}
ROW = "1 0.5 0.5 0.5 0.5\n"  # the middle of the image


def check(found, prefix=""):
    good = images(found)
    assert list(good) == [f"{prefix}{name}" for name in ("a", "b", "c")]
    a, b, c = good.values()
    assert (a.phrases, in_pixels(a), a.scores) == (("dog", "cat"), [[20, 10, 60, 30], [0, 0, 8, 8]], (1.0, 1.0))
    assert (b.phrases, in_pixels(b)) == (("cat",), [[40, 20, 80, 40]])
    assert (c.boxes, c.caption) == ((), "")


def simple(folder, rows=ROW, names="cat\ndog\n", stem="a"):
    """An image with its label beside it."""
    put(folder / f"{stem}.jpg", image())
    put(folder / f"{stem}.txt", rows)
    if names:
        put(folder / "classes.txt", names)
    return folder


def test_a_set_of_supervision(tmp_path):
    dataset(tmp_path / "images", BOXES).as_yolo(
        annotations_directory_path=str(tmp_path / "labels"), data_yaml_path=str(tmp_path / "data.yaml")
    )
    assert recognise(tmp_path) == recognise(tmp_path / "data.yaml") == "yolo"
    check(items(tmp_path), "images/")
    check(items(tmp_path / "data.yaml", unit_size=1), "images/")


def test_polygons_and_oriented_boxes_of_supervision(tmp_path):
    mask = np.zeros((1, 40, 80), bool)
    mask[0, 10:30, 20:60] = True
    corners = np.array([[[20, 10], [59, 10], [59, 29], [20, 29]]], float)
    set_ = dataset(tmp_path / "images", {"a.jpg": [(1, [20, 10, 59, 29])]}, **{"a.jpg": {"mask": mask}})
    set_.as_yolo(annotations_directory_path=str(tmp_path / "labels"), data_yaml_path=str(tmp_path / "data.yaml"))
    assert len((tmp_path / "labels/a.txt").read_text().split()) > 6
    (a,) = items(tmp_path)
    np.testing.assert_allclose(in_pixels(a), [[20, 10, 60, 30]], atol=1)
    oriented = dataset(
        tmp_path / "obb/images", {"a.jpg": [(1, [20, 10, 59, 29])]}, **{"a.jpg": {"data": {"xyxyxyxy": corners}}}
    )
    oriented.as_yolo(
        annotations_directory_path=str(tmp_path / "obb/labels"),
        data_yaml_path=str(tmp_path / "obb/data.yaml"),
        is_obb=True,
    )
    assert len((tmp_path / "obb/labels/a.txt").read_text().split()) == 9
    (a,) = items(tmp_path / "obb")
    assert in_pixels(a) == [[20, 10, 59, 29]]


def splits(folder, images_first):
    """images/train with labels/train, or train/images with train/labels as Roboflow has it."""
    for split, stem in (("train", "a"), ("valid", "b"), ("test", "c")):
        for kind, name, contents in (("images", f"{stem}.jpg", image()), ("labels", f"{stem}.txt", ROW)):
            put(folder / (f"{kind}/{split}" if images_first else f"{split}/{kind}") / name, contents)
    return folder


@pytest.mark.parametrize("images_first", [True, False])
@pytest.mark.parametrize("with_lists", [True, False])
def test_splits(tmp_path, images_first, with_lists):
    root = splits(tmp_path / "set", images_first)
    place = "images/{}" if images_first else "../{}/images"  # Roboflow's paths begin one folder too high
    lists = "".join(f"{key}: {place.format(name)}\n" for key, name in
                    (("train", "train"), ("val", "valid"), ("test", "test")) if with_lists)  # fmt: skip
    put(root / "data.yaml", f"{lists}nc: 2\nnames: ['cat', 'dog']\n")
    everything = images(items(root))
    assert sorted(name[-1] for name in everything) == ["a", "b", "c"]
    assert all(item.phrases == ("dog",) and in_pixels(item) == [[20, 10, 60, 30]] for item in everything.values())
    for split, stem in (("train", "a"), ("val", "b"), ("valid", "b"), ("test", "c")):
        assert [name[-1] for name in images(items(root, split=split))] == [stem]
    with pytest.raises(ValueError, match="has no split dev; it has"):
        open_source(root, split="dev")


def test_all_splits_are_told(tmp_path, caplog):
    root = splits(tmp_path / "set", True)
    put(root / "data.yaml", "names: {0: cat, 1: dog}\n")
    open_source(root)
    assert "all splits are taken" in caplog.text
    assert "val (1)" in caplog.text


@pytest.mark.parametrize("said", [".", "../set", "set", "", "/content/datasets/set", "ABSOLUTE"])
def test_paths_of_a_description(tmp_path, said):
    root = splits(tmp_path / "set", True)
    said = str(root) if said == "ABSOLUTE" else said
    file = put(root / "data.yaml", f"path: {said}\ntrain: [images/train, images/valid]\nnames:\n  0: cat\n  1: dog\n")
    assert [name[-1] for name in images(items(file))] == ["a", "b"]


def test_lists_of_images(tmp_path, caplog):
    root = splits(tmp_path / "set", True)
    lines = ["./images/train/a.jpg", f"{root}/images/valid/b.jpg", "/elsewhere/set/images/test/c.jpg", "images/no.jpg"]
    put(root / "train.txt", "\n".join(lines))
    put(root / "data.yaml", "train: train.txt\nnames: [cat, dog]\n")
    found = items(root)
    assert [name[-1] for name in images(found)] == ["c", "a", "b"]
    assert reasons(found) == {"images/no": "file is missing"}
    assert images(found)["images/train/a"].phrases == ("dog",)


def test_a_description_whose_images_are_not_there(tmp_path):
    file = put(tmp_path / "data.yaml", "train: images/none\nnames: [cat]\n")
    with pytest.raises(ValueError, match=r"data\.yaml names train: images/none, which is not there"):
        open_source(file)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("names: [cat", "is neither YAML nor JSON"),
        ("- a\n", "expected names"),
        ("names: 3\ntrain: .\n", "names is '3'"),
        ("names: {a: cat}\n", "names has 'a': 'cat'; expected a number and a name"),
        ("names: [[cat]]\n", "names has .0.: a list"),
        ("nc: 1\nnames: [cat, dog]\n", "nc is 1, but names has 2"),
        ("names: [cat, dog]\nkpt_shape: x\n", "kpt_shape is x"),
        ("names: ['0', '1']\n", "the classes are called 0, 1; phrases are words: give them by --classes"),
    ],
)
def test_descriptions_that_are_broken(tmp_path, text, what):
    simple(tmp_path, names="")
    with pytest.raises(ValueError, match=what):
        open_source(put(tmp_path / "data.yaml", text), kind="yolo")


def test_words_that_yaml_takes_for_truths(tmp_path):
    simple(tmp_path, names="")
    put(tmp_path / "data.yaml", "names: [no, yes]\n")
    (a,) = items(tmp_path)
    assert a.phrases == ("yes",)


def test_a_yaml_of_aliases_of_aliases(tmp_path):
    simple(tmp_path, names="")
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for k in range(1, 9):
        laughs += f"{chr(97 + k)}: &{chr(97 + k)} [{', '.join([f'*{chr(96 + k)}'] * 9)}]\n"
    with pytest.raises(ValueError, match="stands for more than 200000 values"):
        open_source(put(tmp_path / "data.yaml", f"{laughs}names: *i\n"), kind="yolo")


@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "labels/classes.txt"])
def test_labels_beside_images(tmp_path, name):
    simple(tmp_path, names="")
    simple(tmp_path, stem="d.e", names="")
    put(tmp_path / name, "\ufeffcat\r\na big dog\r\n")
    assert recognise(tmp_path) == "yolo"
    found = images(items(tmp_path))
    assert list(found) == ["a", "d.e"]
    assert all((item.phrases, item.caption) == (("a big dog",), "") for item in found.values())


def test_darknets_description_as_cvat_writes_it(tmp_path):
    put(tmp_path / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    put(tmp_path / "obj.names", "cat\ndog\n")
    put(tmp_path / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    put(tmp_path / "obj_train_data/a.jpg", image())
    put(tmp_path / "obj_train_data/b.jpg", image())
    put(tmp_path / "obj_train_data/a.txt", ROW)
    put(tmp_path / "obj_train_data/b.txt", "")
    found = images(items(tmp_path))
    assert [(name, item.phrases) for name, item in found.items()] == [
        ("obj_train_data/a", ("dog",)), ("obj_train_data/b", ()),
    ]  # fmt: skip
    for stem in "ab":
        (tmp_path / f"photos/{stem}.jpg").parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / f"obj_train_data/{stem}.jpg", tmp_path / f"photos/{stem}.jpg")
    elsewhere = images(items(tmp_path, images=tmp_path / "photos"))
    assert [(name, item.phrases) for name, item in elsewhere.items()] == [("photos/a", ("dog",)), ("photos/b", ())]


def test_images_in_a_folder_of_their_own(tmp_path):
    put(tmp_path / "export/labels/a.txt", ROW)
    put(tmp_path / "export/classes.txt", "cat\ndog\n")
    put(tmp_path / "photos/2020/a.JPEG", image())
    with pytest.raises(ValueError, match="none of 1 files of annotations has its image; name its folder: --images"):
        open_source(tmp_path / "export")
    (item,) = items(tmp_path / "export", images=tmp_path / "photos")
    assert (item.phrases, item.image.name) == (("dog",), "a.JPEG")


def test_names_in_large_letters(tmp_path):
    put(tmp_path / "one/IMAGES/A.JPG", image())
    put(tmp_path / "one/LABELS/A.TXT", ROW)
    put(tmp_path / "two/A.JPG", image())
    put(tmp_path / "two/A.TXT", ROW)
    for name in ("one", "two"):
        put(tmp_path / name / "classes.txt", "cat\ndog\n")
        assert [item.phrases for item in items(tmp_path / name)] == [("dog",)]


def test_pipes_are_not_waited_for(tmp_path):
    simple(tmp_path)
    for name in ("b.txt", "b.xml", "b.json", "b.parquet", "b.yaml", "b.data"):
        os.mkfifo(tmp_path / name)
    put(tmp_path / "b.jpg", image())
    put(tmp_path / "c.jpg", image())
    (tmp_path / "c.txt").symlink_to("b.txt")
    found = items(tmp_path)
    assert reasons(found) == {"c": "its annotations are no file"}
    assert {name: len(item.boxes) for name, item in images(found).items()} == {"a": 1, "b": 0}


def test_classes_become_other_phrases(tmp_path):
    simple(tmp_path / "set", ROW + "0 0.5 0.5 1 1\n")
    mapping = put(tmp_path / "classes.yaml", "dog: a small dog\ncat: null\n")
    (a,) = items(tmp_path / "set", classes=mapping)
    assert (a.phrases, a.dropped) == (("a small dog",), {"class left out by the mapping": 1})
    first, second = open_source(tmp_path / "set"), open_source(tmp_path / "set", classes=mapping)
    assert first[0].identity() != second[0].identity()
    with pytest.raises(ValueError, match="there is no category bird; there are cat, dog"):
        open_source(tmp_path / "set", classes=put(mapping, "bird: a bird\n"))
    put(tmp_path / "set/classes.txt", "0\n1\n")
    assert items(tmp_path / "set", classes=put(mapping, "0: a cat\n1: a dog\n"))[0].phrases == ("a dog", "a cat")


def test_labels_without_names(tmp_path):
    simple(tmp_path, names="")
    with pytest.raises(ValueError, match=r"nothing names the classes; expected data\.yaml \(names\) or classes\.txt"):
        open_source(tmp_path)


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason", "told"),
    [
        ("2 0.5 0.5 0.2 0.2", BAD_CLASS, "class 2; expected one of classes 0 to 1"),
        ("-1 0.5 0.5 0.2 0.2", BAD_ROW, "its class is -1"),
        ("dog 0.5 0.5 0.2 0.2", BAD_ROW, "'dog' is no number"),
        ("0.5 0.5 0.5 0.2 0.2", BAD_ROW, "its class is 0.5"),
        ("1 0.5 0.5 0.2", BAD_ROW, "it has 4 numbers"),
        ("1", BAD_ROW, "it has 1 numbers"),
        ("1,0.5,0.5,0.2,0.2", BAD_ROW, "is no number"),
        ("1 0.5 0.5 0.2 nan", BAD_ROW, "'nan' is no number"),
        ("1 0.5 0.5 0.2 1e999", BAD_ROW, "its class is 1"),
        ("1 1.5 0.5 0.2 0.2", OUTSIDE_SHARES, "a number is 1.5; expected 0 to 1"),
        ("1 0.5 -0.5 0.2 0.2", OUTSIDE_SHARES, "a number is -0.5"),
        ("1 40 20 40 20", PIXELS, "a number is 40; expected shares of the image"),
        ("1 20 10 60 10 60 30", PIXELS, "a number is 60"),
        ("1 0.5 0.5 0.2 0.2 7", BAD_ROW, "its last number, 7, is no confidence"),
        ("1 0.5 0.5 0.2 0.2 0.5 0.5 2 0.4 0.4 2", OUTSIDE_SHARES, "a number is 2"),
        ("1 0.5 0.5 0.2 0.2 0.5 0.5 1 0.4 0.4", BAD_ROW, "keypoints need kpt_shape in data.yaml"),
        ("1_0 0.5 0.5 0.2 0.2", BAD_ROW, "'1_0' is no number"),
        ("٣ 0.5 0.5 0.2 0.2", BAD_ROW, "is no number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, reason, told):
    simple(tmp_path, f"{ROW}{row}\n")
    (a,) = items(tmp_path, kind="yolo")
    assert (a.phrases, a.dropped) == (("dog",), {reason: 1})
    assert told in a.dropped_examples[reason]
    assert a.dropped_examples[reason].startswith("line 2, ")
    simple(tmp_path, f"{row}\n")
    with pytest.raises(ValueError, match=r"a\.txt: .*None of the 1 annotations that were looked at can be used"):
        open_source(tmp_path, kind="yolo")


def test_rows_that_can_be_used():
    names = {0: "cat", 1: "dog"}
    text = (
        "\n1 0.5 0.5 0.5 0.5 0.87\n\t1.0  0.25 0.5 0.5 1.0\r\n0 0.1 0.2 0.3 0.2 0.3 0.4\n"
        "0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4\n1 0.5 0.5 1.004 1\n"
    )
    rows = YoloReader(phrases=names).read_rows(text)
    assert not rows.dropped
    assert rows.phrases == ("dog", "dog", "cat", "cat", "dog")
    assert rows.scores == (0.87, 1, 1, 1, 1)
    expected = [
        (0.25, 0.25, 0.75, 0.75),
        (0, 0, 0.5, 1),
        (0.1, 0.2, 0.3, 0.4),
        (0.1, 0.1, 0.3, 0.4),
        (-0.002, 0, 1.002, 1),
    ]
    np.testing.assert_allclose(rows.boxes, expected, atol=1e-9)


def test_poses(tmp_path):
    simple(tmp_path, "0 0.5 0.5 0.5 0.5 0.4 0.4 2 0.6 0.6 0\n", names="")
    put(tmp_path / "data.yaml", "names: [person]\nkpt_shape: [2, 3]\n")
    (a,) = items(tmp_path)
    assert (a.phrases, in_pixels(a)) == (("person",), [[20, 10, 60, 30]])


def test_files_of_labels_that_are_odd(tmp_path, caplog):
    simple(tmp_path)
    for stem, contents in {
        "empty": b"", "latin": b"\xe9 0.5 0.5\n", "utf16": ROW.encode("utf-16"), "binary": b"\0" * 9,
        "large": ROW.encode() * 300_000,
    }.items():  # fmt: skip
        simple(tmp_path, b"" if contents is None else contents, stem=stem)
    put(tmp_path / "none.jpg", image())
    put(tmp_path / "lost.txt", ROW)
    put(tmp_path / "README.roboflow.txt", "Exported by a program")
    secret = put(tmp_path.parent / f"{tmp_path.name}-secret.txt", ROW)
    put(tmp_path / "link.jpg", image())
    (tmp_path / "link.txt").symlink_to(secret)
    put(tmp_path / "a.png", image("PNG"))
    found = items(tmp_path, kind="yolo")
    not_text = "its label file is not UTF-8"
    assert reasons(found) == {
        "latin": not_text, "utf16": not_text, "binary": not_text, "large": "its annotations are too large",
        "lost": "annotations without their image", "link": "its annotations are a link that leaves the folder",
        "a": "image_id stands there twice",
    }  # fmt: skip
    assert {name: len(item.boxes) for name, item in images(found).items()} == {"a": 1, "empty": 0, "none": 0}
    assert "1 of 9 images have no file of annotations, as none.jpg" in caplog.text


def test_a_label_that_is_mended_makes_another_unit(tmp_path):
    simple(tmp_path)
    before = open_source(tmp_path)[0].identity()
    put(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.1 0.1\n")
    assert open_source(tmp_path)[0].identity() != before


# Rows that are no captions ------------------------------------------------------------------------------------------


def test_rows_are_told_from_captions():
    assert looks_like_labels(ROW)
    assert looks_like_labels("0 100 200 50 60\n\n1 10 10 5 5")
    for caption in ("", "a cat", "3 cats 0.5 0.5 0.2", "2 0 2 0", "1 2 3 4 5 Go!", "0 0.5 0.5 0.2 0.2\na cat"):
        assert not looks_like_labels(caption)


def test_rows_never_become_captions(tmp_path):
    simple(tmp_path / "set")
    with pytest.raises(ValueError, match=r"a\.txt holds rows of YOLO labels and no caption"):
        open_source(tmp_path / "set", kind="imagefolder")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, contents in (("0.jpg", image()), ("0.txt", ROW.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    with pytest.raises(ValueError, match=rf"a\.tar, sample 0: {LABELS}: 0\.txt is '1 0\.5 0\.5 0\.5 0\.5'"):
        open_source(tmp_path / "a.tar")
    put(tmp_path / "rows/a.jpg", image())
    put(tmp_path / "rows/metadata.jsonl", '{"file_name": "a.jpg", "text": "0 0.5 0.5 0.2 0.2"}\n')
    with pytest.raises(ValueError, match=LABELS):
        open_source(tmp_path / "rows")
    put(tmp_path / "captions/a.txt", ROW)
    with pytest.raises(ValueError, match=r"holds no captions: 0 empty, 1 over .* bytes, rows of YOLO labels"):
        CaptionTable.open(tmp_path / "captions", tmp_path / "cache")
    put(tmp_path / "captions/b.txt", "a dog")
    with CaptionTable.open(tmp_path / "captions", tmp_path / "cache") as table:
        assert (table.get("a"), table.get("b"), table.counts.refused) == (None, "a dog", 1)


def test_a_label_among_captions_is_left_out(tmp_path):
    for k in range(1001):
        put(tmp_path / f"{k:04d}.txt", "a dog")
        put(tmp_path / f"{k:04d}.jpg", b"x")
    put(tmp_path / "9999.txt", ROW)
    put(tmp_path / "9999.jpg", image())
    found = items(tmp_path)
    assert reasons(found) == {"9999": LABELS}
