"""Pascal VOC sets: as supervision writes them, in several arrangements, and with XML that is odd or hostile."""

import time
import tracemalloc

import numpy as np
import pytest
from helpers.source_items import HEIGHT, WIDTH, dataset, image, images, in_pixels, items, put, reasons

from gligen_xl.prepare.sources import open_source, recognise
from gligen_xl.prepare.sources.voc import BAD_XML, NO_BOX
from gligen_xl.prepare.sources.voc_xml import MAX_OBJECTS, XmlError, read_xml

BOXES = {"a.jpg": [(1, [20, 10, 60, 30]), (0, [0, 0, 8, 8])], "b.jpg": [(0, [40, 20, 80, 40])], "c.jpg": []}


def thing(box=(21, 11, 60, 30), name="dog", more=""):
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def xml(*things, size=(WIDTH, HEIGHT), filename="a.jpg", head=""):
    said = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"{head}<annotation><filename>{filename}</filename>{said}{''.join(things)}</annotation>"


def beside(folder, contents, stem="a"):
    put(folder / f"{stem}.jpg", image())
    put(folder / f"{stem}.xml", contents)
    return folder


@pytest.mark.parametrize("folder", ["Annotations", "JPEGImages"])
def test_a_set_of_supervision(tmp_path, folder):
    """In folders as VOC has them, and beside each other; its boxes come back as they were."""
    dataset(tmp_path / "JPEGImages", BOXES).as_pascal_voc(annotations_directory_path=str(tmp_path / folder))
    assert recognise(tmp_path) == "voc"
    for unit_size in (1, 100):
        a, b, c = items(tmp_path, unit_size=unit_size)
        assert [item.image_id for item in (a, b, c)] == ["JPEGImages/a", "JPEGImages/b", "JPEGImages/c"]
        assert (a.phrases, in_pixels(a)) == (("dog", "cat"), [[20, 10, 60, 30], [0, 0, 8, 8]])
        assert (b.phrases, in_pixels(b), b.size) == (("cat",), [[40, 20, 80, 40]], (HEIGHT, WIDTH))
        assert (c.boxes, c.dropped) == ((), {})


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(1, 1, 80, 40)], [[0, 0, 80, 40]]),  # the whole image, in VOC's own counting
        ([(21, 11, 60, 30)], [[20, 10, 60, 30]]),
        ([(0, 0, 80, 40)], [[0, 0, 80, 40]]),  # from 0
        ([(0, 5, 9, 9), (21, 11, 60, 30)], [[0, 5, 9, 9], [21, 11, 60, 30]]),
        ([(20.5, 10.25, 60, 30)], [[20.5, 10.25, 60, 30]]),  # CVAT
    ],
)
def test_where_pixels_are_counted_from(tmp_path, boxes, expected):
    (a,) = items(beside(tmp_path, xml(*map(thing, boxes))))
    assert in_pixels(a) == expected


def test_splits_of_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for stem in ("2007_000001", "2007_000002", "2007_000003"):
        put(root / f"JPEGImages/{stem}.jpg", image())
        put(root / f"Annotations/{stem}.xml", xml(thing(), filename=f"{stem}.jpg"))
        put(root / f"SegmentationClass/{stem}.png", image("PNG"))
    put(root / "ImageSets/Main/train.txt", "2007_000001\n2007_000009\n")
    put(root / "ImageSets/Main/dog_val.txt", "2007_000002 -1\n2007_000003  1\n")
    for path in (tmp_path, root):
        assert [item.image_id[-1] for item in items(path)] == ["1", "2", "3"]
        found = items(path, split="train")
        assert [name[-1] for name in images(found)] == ["1"]
        assert list(reasons(found).values()) == ["file is missing"]
        assert [item.image_id[-1] for item in items(path, split="dog_val")] == ["2", "3"]
        with pytest.raises(ValueError, match="has no split test in ImageSets/Main or as a folder; it has dog_val"):
            open_source(path, split="test")


def test_folders_as_roboflow_has_them(tmp_path):
    for split, colour in (("train", "dog"), ("valid", "cat")):
        beside(tmp_path / split, xml(thing(name=colour)))
    assert {item.image_id: item.phrases for item in items(tmp_path)} == {"train/a": ("dog",), "valid/a": ("cat",)}
    assert [item.image_id for item in items(tmp_path, split="valid")] == ["valid/a"]


def test_images_found_by_their_names(tmp_path):
    """The name of the XML is another than the image's, which stands elsewhere."""
    put(tmp_path / "set/annotations/0001.xml", xml(thing(), filename="C:\\photos\\x\\cat 1.jpeg"))
    put(tmp_path / "photos/x/cat 1.jpeg", image())
    (item,) = items(tmp_path / "set", images=tmp_path / "photos")
    assert (item.phrases, item.image.name) == (("dog",), "cat 1.jpeg")


def test_images_without_annotations_and_the_other_way_round(tmp_path, caplog):
    beside(tmp_path, xml(thing()))
    put(tmp_path / "b.JPG", image())
    put(tmp_path / "lost.xml", xml(thing(), filename="lost.jpg"))
    found = items(tmp_path)
    assert reasons(found) == {"lost": "annotations without their image"}
    assert {name: len(item.boxes) for name, item in images(found).items()} == {"a": 1, "b": 0}
    assert "1 of 2 images have no file of annotations, as b.JPG" in caplog.text


def test_objects_that_are_odd(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    things = [
        thing(name="caf\u00e9 &amp; bar", more="<difficult>1</difficult><truncated>1</truncated>"),
        thing(name="dog", more=part),
        thing(name="  "),
        thing(box=("x", 1, 2, 3)),
        thing(box=("nan", 1, 2, 3)),
        "<object><name>dog</name></object>",
    ]
    (a,) = items(beside(tmp_path, xml(*things)))
    assert a.phrases == ("caf\u00e9 & bar", "dog")
    assert in_pixels(a) == [[20, 10, 60, 30]] * 2
    assert a.dropped == {"no phrase": 1, NO_BOX: 3}
    assert "object 4, 'dog': xmin x, ymin 1" in a.dropped_examples[NO_BOX]


def test_sizes_that_are_not_said_or_wrong(tmp_path):
    for stem, size in {"a": None, "b": (0, 0), "c": ("x", 40), "d": (160, 80)}.items():
        beside(tmp_path, xml(thing(), size=size), stem)
    a, b, c, d = items(tmp_path)
    assert [in_pixels(item) for item in (a, b, c)] == [[[20, 10, 60, 30]]] * 3
    assert (a.size, d.size) == (None, (80, 160))  # of which the image is not: it is left out when it is decoded


def test_classes(tmp_path):
    beside(tmp_path / "set", xml(thing(), thing(name="cat")))
    mapping = put(tmp_path / "classes.json", '{"dog": "a dog", "cat": null}')
    (a,) = items(tmp_path / "set", classes=mapping)
    assert (a.phrases, a.dropped) == (("a dog",), {"class left out by the mapping": 1})
    with pytest.raises(ValueError, match="there is no category bird; there are cat, dog"):
        open_source(tmp_path / "set", classes=put(mapping, '{"bird": "x"}'))
    beside(tmp_path / "numbers", xml(thing(name="3")))
    with pytest.raises(ValueError, match="the classes are called 3; phrases are words"):
        open_source(tmp_path / "numbers")


@pytest.mark.parametrize(
    ("contents", "encoded"),
    [
        (xml(thing(name="Käfer")), "utf-8"),
        (xml(thing(name="Käfer"), head='<?xml version="1.0" encoding="UTF-8"?>'), "utf-8-sig"),
        (xml(thing(name="Käfer"), head='<?xml version="1.0" encoding="ISO-8859-1"?>'), "latin-1"),
        (xml(thing(name="Käfer"), head='<?xml version="1.0" encoding="windows-1252"?>'), "cp1252"),
        (xml(thing(name="Käfer"), head='<?xml version="1.0" encoding="UTF-16"?>'), "utf-16"),
    ],
)
def test_encodings(tmp_path, contents, encoded):
    (a,) = items(beside(tmp_path, contents.encode(encoded)))
    assert a.phrases == ("Käfer",)


def laughs():
    entities = '<!ENTITY a "ha">' + "".join(f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(9))
    return f"<!DOCTYPE annotation [{entities}]><annotation><object><name>&j;</name></object></annotation>"


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (laughs(), "declares a document type or an entity"),
        ('<!DOCTYPE annotation SYSTEM "http://localhost:1/x.dtd"><annotation/>', "declares a document type"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "document type"),
        (xml(thing())[:-20], "it is no XML that can be read"),
        (xml(thing(name="K\u00e4fer")).encode("latin-1"), "expected UTF-8, or the encoding that it declares"),
        ('<?xml version="1.0" encoding="x-none"?><annotation/>', "it is no XML that can be read"),
        ("<annotation>" + "<a>" * 40, "more than 32 deep"),
        (f"<annotation>{'<object/>' * (MAX_OBJECTS + 1)}</annotation>", f"more than {MAX_OBJECTS} objects"),
        ("<annotations><image/></annotations>", "expected <annotation>, as Pascal VOC has it"),
        (b"", "it is no XML"),
        (b"\0\0\0", "it is no XML"),
    ],
)
def test_xml_that_is_refused(tmp_path, contents, told):
    beside(tmp_path, xml(thing()), "good")
    beside(tmp_path, contents)
    begin = time.perf_counter()
    found = items(tmp_path)
    assert time.perf_counter() - begin < 5
    assert reasons(found) == {"a": BAD_XML}
    assert told in next(item.detail for item in found if item.image_id == "a")
    assert list(images(found)) == ["good"]


def test_sets_of_nothing_but_hostile_xml_are_refused_as_voc(tmp_path):
    beside(tmp_path, laughs())
    with pytest.raises(ValueError, match=r"a\.xml: its XML is none of Pascal VOC: it declares a document type"):
        open_source(tmp_path)


def test_huge_xml_is_not_read(tmp_path):
    beside(tmp_path, xml(thing()), "good")
    beside(tmp_path, b"<annotation>" + b"<object></object>" * 2_000_000)
    tracemalloc.start()
    found = items(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(found) == {"a": "its annotations are too large"}
    assert peak < 40 * 2**20
    with pytest.raises(XmlError, match="more than 20000 objects"):
        read_xml(b"<annotation>" + b"<object></object>" * 100_000)


def test_boxes_that_are_shares(tmp_path):
    with pytest.raises(ValueError, match="boxes look like shares of the image: no number is above 0"):
        open_source(beside(tmp_path, xml(thing(box=(0.1, 0.2, 0.3, 0.5)))))


def test_links_that_leave_the_folder(tmp_path):
    secret = put(tmp_path / "secret.xml", xml(thing()))
    root = beside(tmp_path / "set", xml(thing()), "good")
    put(root / "a.jpg", image())
    (root / "a.xml").symlink_to(secret)
    assert reasons(items(root)) == {"a": "its annotations are a link that leaves the folder"}


def test_annotations_that_are_mended_make_another_unit(tmp_path):
    beside(tmp_path, xml(thing()))
    before = open_source(tmp_path)[0].identity()
    put(tmp_path / "a.xml", xml(thing(), thing()))
    assert open_source(tmp_path)[0].identity() != before
    np.testing.assert_equal(len(items(tmp_path)[0].boxes), 2)
