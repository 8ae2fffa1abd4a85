"""Protocols: which layouts are evaluated, at the edges of their filters; real images are framed as the boxes are."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gligen_xl.evaluate.coco_layouts import CocoImage, gligen_layouts, layout_to_image_layouts
from gligen_xl.evaluate.coco_mig import draw_layouts
from gligen_xl.evaluate.protocols import PROTOCOLS, find_protocol
from gligen_xl.evaluate.real_images import RealImages, centre_crop, squeeze
from gligen_xl.layout import Layout, write_layouts
from gligen_xl.toyworld.detector import detect
from gligen_xl.toyworld.world import HELD_OUT_SEED, draw, sample_scene, scene_layout

CATEGORIES = {1: "person", 2: "cat", 3: "dining table"}

LARGE = [20, 10.5, 0]  # width and height in an image of 100 x 100, crowd: 2.1 %
EXACT = [20, 10, 0]  # 2 % exactly
CROWD = [50, 50, 1]

# Ten images by their objects, and how many of those coco-2017 keeps (0: the image is left out).
IMAGES = {
    139: ([LARGE] * 3, 3),
    285: ([LARGE] * 8, 8),
    632: ([LARGE] * 2, 0),
    724: ([LARGE] * 9, 0),
    776: ([LARGE] * 2 + [EXACT], 0),
    785: ([LARGE] * 3 + [EXACT], 3),
    802: ([LARGE] * 8 + [EXACT], 8),
    872: ([LARGE] * 2 + [CROWD], 0),
    885: ([LARGE] * 3 + [CROWD], 3),
    1000: ([], 0),
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def coco_folder(folder: Path, split="val2017", captions=True, with_files=True) -> Path:
    """The ten images as a COCO folder; annotations are in no order of images, as COCO's are not."""
    images = [{"id": k, "file_name": f"{k:012d}.png", "height": 100, "width": 100} for k in IMAGES]
    annotations = [
        {
            "id": 10 * number + turn,
            "image_id": image,
            "category_id": 1 + turn % 3,
            "bbox": [5 * turn, 8 * turn, objects[turn][0], objects[turn][1]],
            "iscrowd": objects[turn][2],
        }
        for turn in range(9)
        for number, (image, (objects, _)) in enumerate(IMAGES.items())
        if turn < len(objects)
    ]
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    write(
        folder / "annotations" / f"instances_{split}.json",
        {"info": {}, "images": images, "annotations": annotations, "categories": categories},
    )
    if captions:
        texts = [
            {"id": 9 - turn, "image_id": k, "caption": f"Take {turn}\n of {k} "} for turn in (0, 1) for k in IMAGES
        ]
        texts = [text for text in texts if text["image_id"] != 285]
        write(folder / "annotations" / f"captions_{split}.json", {"images": images, "annotations": texts})
    if with_files:
        (folder / split).mkdir()
        for number, image in enumerate(images):
            Image.new("RGB", (100, 100), (20 * number, 0, 0)).save(folder / split / image["file_name"])
    return folder


def image(boxes, size=(100, 100), categories=None, name="7"):
    """`boxes` in shares."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return CocoImage(name, f"{name}.png", size, tuple(categories or ["cat"] * len(boxes)), boxes, areas)


# COCO 2017, layout-to-image -----------------------------------------------------------------------------------------


def test_coco_2017_keeps_three_to_eight_objects_above_two_percent(tmp_path):
    protocol = find_protocol("coco-2017", coco=coco_folder(tmp_path))
    assert {layout.id: len(layout.boxes) for layout in protocol.layouts} == {
        str(image): kept for image, (_, kept) in IMAGES.items() if kept
    }
    layout = protocol.layouts[0]
    assert layout.prompt == "Take 1 of 139"  # of the lowest annotation id
    assert layout.phrases == ("person", "cat", "dining table")
    assert np.allclose(layout.boxes, [[0, 0, 0.2, 0.105], [0.05, 0.08, 0.25, 0.185], [0.1, 0.16, 0.3, 0.265]])
    assert protocol.layouts[1].prompt == "person, cat, dining table"  # it has no caption
    assert protocol.parameters["prompts"] == "first caption"
    assert protocol.real is not None
    real = protocol.real(layout)
    assert real.size == (512, 512)
    assert real.getpixel((9, 9)) == (0, 0, 0)
    assert protocol.real(protocol.layouts[1]).getpixel((9, 9)) == (20, 0, 0)
    assert protocol.empty(layout).getextrema() == ((128, 128),) * 3


def test_coco_is_2017_where_the_folder_has_both(tmp_path):
    folder = coco_folder(coco_folder(tmp_path, split="val2014"))
    assert find_protocol("coco", coco=folder).name == "coco-2017"
    (folder / "annotations" / "instances_val2017.json").unlink()
    assert find_protocol("coco", coco=folder).name == "coco-2014"


def test_annotations_alone_have_prompts_of_names_and_no_real_images(tmp_path):
    protocol = find_protocol("coco-2017", coco=coco_folder(tmp_path, captions=False, with_files=False))
    assert protocol.layouts[0].prompt == "person, cat, dining table"
    assert protocol.real is None
    assert protocol.parameters["real_pictures"] == "none, the folder has no val2017/"


def test_count_takes_the_first_and_only_their_images_are_asked_for(tmp_path):
    folder = coco_folder(tmp_path)
    (folder / "val2017" / f"{885:012d}.png").unlink()
    assert [layout.id for layout in find_protocol("coco-2017", coco=folder, count=2).layouts] == ["139", "285"]
    with pytest.raises(FileNotFoundError, match=r"1 of 5 images are missing.*885\.png; they are in http.*val2017\.zip"):
        find_protocol("coco-2017", coco=folder)
    with pytest.raises(ValueError, match="count is 6; coco-2017 holds 5 layouts"):
        find_protocol("coco-2017", coco=folder, count=6)
    with pytest.raises(ValueError, match="0 layouts; expected at least 1"):
        find_protocol("coco-2017", coco=folder, count=0)


def test_an_image_that_is_not_the_annotated_one(tmp_path):
    folder = coco_folder(tmp_path)
    Image.new("RGB", (60, 100)).save(folder / "val2017" / f"{139:012d}.png")
    protocol = find_protocol("coco-2017", coco=folder)
    with pytest.raises(ValueError, match="60 x 100 pixels, but its annotations are made for 100 x 100"):
        protocol.real(protocol.layouts[0])  # type: ignore[misc]
    (folder / "val2017" / f"{285:012d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="not an image"):
        protocol.real(protocol.layouts[1])  # type: ignore[misc]


# COCO 2014, GLIGEN --------------------------------------------------------------------------------------------------


def test_coco_2014_is_the_middle_square_with_objects_of_one_percent(tmp_path):
    protocol = find_protocol("coco-2014", coco=coco_folder(tmp_path, split="val2014"))
    assert {layout.id: len(layout.boxes) for layout in protocol.layouts} == {
        str(image): sum(not crowd for _, _, crowd in objects) for image, (objects, _) in IMAGES.items() if objects
    }
    # 200 x 100 pixels: the middle from a quarter to three quarters.
    wide = image(
        [[0, 0, 0.2, 1], [0.2, 0, 0.3, 0.5], [0.4, 0.2, 0.5, 0.7], [0.5, 0, 0.555, 0.1], [0.5, 0, 0.545, 0.1]],
        size=(100, 200),
        categories=["left", "cut", "within", "above", "below"],
    )
    (layout,) = gligen_layouts([wide, image([[0, 0, 0.09, 0.09]])], {})
    assert layout.phrases == ("within", "cut", "above")  # largest first; the second image has no object left
    assert np.allclose(layout.boxes, [[0.3, 0.2, 0.5, 0.7], [0, 0, 0.1, 0.5], [0.5, 0, 0.61, 0.1]])


def test_coco_2014_keeps_the_thirty_largest():
    boxes = [[0, 0, 0.2 + k / 100, 0.2] for k in range(31)]
    (layout,) = gligen_layouts([image(boxes)], {})
    assert np.allclose([box[2] for box in layout.boxes], [0.5 - k / 100 for k in range(30)])


# Frames -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(60, 700), st.integers(60, 700)),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    sides=st.tuples(st.floats(0.3, 0.5), st.floats(0.3, 0.5)),
    cropped=st.booleans(),
)
def test_an_object_of_the_framed_image_is_where_its_layout_says(tmp_path_factory, size, corner, sides, cropped):
    height, width = size
    x0, y0 = round(corner[0] * width), round(corner[1] * height)
    x1, y1 = x0 + round(sides[0] * width), y0 + round(sides[1] * height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    path = tmp_path_factory.mktemp("frame") / "7.png"
    Image.fromarray(pixels).save(path)
    annotated = image([[x0 / width, y0 / height, x1 / width, y1 / height]] * 3, size)

    layouts = (gligen_layouts if cropped else layout_to_image_layouts)([annotated], {})
    if not layouts:
        assert cropped  # the object lies beside the middle square
        return
    frame = centre_crop if cropped else squeeze
    real_images = RealImages(files={"7": path}, frame=frame, sizes={"7": size})
    rows, columns = np.nonzero(np.asarray(real_images(layouts[0]))[..., 0] > 127)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 512
    assert np.abs(seen - layouts[0].boxes[0]).max() < 1.6 / 512


# COCO-MIG, COCO-Position --------------------------------------------------------------------------------------------

ENTRY = {
    "caption": "a photo of a red cat and a blue cat ",
    "segment": [
        {"bbox": [0.1, 0.2, 0.5, 0.6], "label": "a red cat"},
        {"bbox": [0.5, 0.5, 1.0, 1.0000001], "label": "a blue cat"},
    ],
    "image_id": "500084",
}


def test_the_published_file_of_coco_mig_is_read(tmp_path):
    write(tmp_path / "mig_bench.json", {"10": ENTRY, "2": {**ENTRY, "caption": "second"}})
    protocol = find_protocol("coco-mig", coco=tmp_path)
    assert [layout.id for layout in protocol.layouts] == ["2", "10"]
    assert protocol.layouts[1] == Layout(
        prompt="a photo of a red cat and a blue cat",
        phrases=["a red cat", "a blue cat"],
        boxes=[[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 1, 1]],
        id="10",
    )
    assert (protocol.parameters["file"], protocol.attributes, protocol.real) == ("mig_bench.json", ("colour",), None)


def test_the_published_yaml_of_coco_mig_is_read(tmp_path):
    text = """
? a photo of a white cat and a brown bed
  and a white cat
: a brown bed:
  - - 0.0
    - 0.5
    - 1.0
    - 1.0
  a white cat:
  - - 0.1
    - 0.1
    - 0.3
    - 0.3
  - - 0.6
    - 0.1
    - 0.9
    - 0.3
  coco_id: '12'
"""
    write(tmp_path / "annotations" / "mig_bench_anno.yaml", text)
    (layout,) = find_protocol("coco-mig", coco=tmp_path).layouts
    assert layout.id == "12"
    assert layout.prompt == "a photo of a white cat and a brown bed and a white cat"
    assert layout.phrases == ("a brown bed", "a white cat", "a white cat")
    assert layout.boxes[2] == (0.6, 0.1, 0.9, 0.3)


def test_the_published_file_of_coco_position_has_real_images(tmp_path):
    write(tmp_path / "coco_position.jsonl", {"0": {**ENTRY, "question_prompt": "unused"}})
    assert find_protocol("coco-position", coco=tmp_path).real is None
    (tmp_path / "val2014").mkdir()
    with pytest.raises(FileNotFoundError, match=r"COCO_val2014_000000500084\.jpg"):
        find_protocol("coco-position", coco=tmp_path)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "val2014" / "COCO_val2014_000000500084.jpg")
    protocol = find_protocol("coco-position", coco=tmp_path)
    assert protocol.real is not None
    assert protocol.real(protocol.layouts[0]).size == (512, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "mig_bench.json"),
        ("[]", "holds a list; expected an object of layouts"),
        ("{}", "holds no layouts"),
        ({"0": {**ENTRY, "segment": [{"bbox": [0, 0, 1, 1]}]}}, "layout '0': expected caption, segment"),
        ({"x": ENTRY}, "layout 'x': expected caption"),
        ({"0": {**ENTRY, "segment": [{"bbox": [0, 0, 0, 1], "label": "a cat"}]}}, r"layout 0: boxes\[0\].*empty"),
    ],
)
def test_a_published_file_that_is_not_as_expected(tmp_path, content, message):
    write(tmp_path / "mig_bench.json", content)
    with pytest.raises(ValueError, match=message):
        find_protocol("coco-mig", coco=tmp_path)


def test_coco_mig_is_drawn_by_its_procedure():
    eighth = image([[0, 0, 0.125, 0.125], [0.5, 0.5, 0.624, 1], [0.5, 0.5, 1, 1]], name="eighth")
    person = image([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], categories=["cat", "person"], name="person")
    thin = image([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.1, 1]], categories=["cat", "dog", "person"], name="thin")
    seven = image([[0, 0, 0.2 + k / 10, 0.5] for k in range(7)], name="seven")
    one = image([[0, 0, 1, 1]], name="one")
    images = [eighth, person, thin, seven, one]
    layouts = draw_layouts(images, colours=True, seed=3)
    by_id = {layout.id: layout for layout in layouts}
    assert set(by_id) == {"eighth", "thin", "seven"}
    assert by_id["eighth"].boxes == ((0, 0, 0.125, 0.125), (0.5, 0.5, 1, 1))
    assert np.allclose([box[2] for box in by_id["seven"].boxes], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    phrase = by_id["thin"].phrases[1]
    assert phrase.startswith("a ")
    assert phrase.endswith(" dog")
    assert phrase in by_id["thin"].prompt
    assert draw_layouts(images, colours=True, seed=3) == layouts
    assert draw_layouts(images, colours=True, seed=4) != layouts
    plain = {layout.id: layout for layout in draw_layouts(images, colours=False, seed=3)}
    assert plain["thin"].prompt == "a photo of a cat and a dog"
    assert plain["thin"].phrases == ("a cat", "a dog")


def test_drawn_layouts_take_turns_and_end_at_160_of_a_number():
    two = [image([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], name=f"two{k}") for k in range(200)]
    four = [image([[0, 0, 0.5, 0.5]] * 4, name=f"four{k}") for k in range(3)]
    layouts = draw_layouts([*two, *four], colours=False, seed=0)
    assert [len(layout.boxes) for layout in layouts] == [2, 4] * 3 + [2] * 157
    other = draw_layouts([*two, *four], colours=False, seed=1)
    assert {layout.id for layout in other} != {layout.id for layout in layouts}
    coloured = draw_layouts(two, colours=True, seed=0)
    assert len({layout.prompt for layout in coloured}) == len(coloured) <= 49  # of seven colours each, none twice


def test_drawn_layouts_of_a_folder_say_so(tmp_path):
    protocol = find_protocol("coco-mig", coco=thick_folder(tmp_path), seed=5)
    assert "not the published layouts" in protocol.parameters["drawn"]
    assert protocol.parameters["layout_seed"] == 5
    assert protocol.parameters["layouts_by_objects"][2] == 2
    assert protocol.real is None
    protocol = find_protocol("coco-position", coco=tmp_path, seed=5)
    boxes = [box for layout in protocol.layouts for box in layout.boxes]
    assert np.allclose(sorted(boxes), [[0.05 * k, 0, 0.05 * k + 0.15, 0.4] for k in range(4)])  # of width and height
    assert protocol.real is not None
    assert {layout.prompt for layout in protocol.layouts} == {"a photo of a cat and a cat"}


def thick_folder(folder):
    """Two wide images of two cats each."""
    annotations = [
        {"id": k, "image_id": 1 + k % 2, "category_id": 2, "bbox": [10 * k, 0, 30, 40], "iscrowd": 0} for k in range(4)
    ]
    images = [{"id": k, "file_name": f"{k}.png", "height": 100, "width": 200} for k in (1, 2)]
    write(
        folder / "annotations" / "instances_val2017.json",
        {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "cat"}]},
    )
    (folder / "val2017").mkdir()
    for k in (1, 2):
        Image.new("RGB", (200, 100)).save(folder / "val2017" / f"{k}.png")
    return folder


# Bad folders --------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    for name in PROTOCOLS[1:]:
        with pytest.raises(ValueError, match=r"none is given \(--coco\).*http.*annotations_trainval201[47]\.zip"):
            find_protocol(name)
        with pytest.raises(FileNotFoundError, match=r"has no annotations/instances_val.*http"):
            find_protocol(name, coco=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mig_bench\.json is linked at"):
        find_protocol("coco-mig", coco=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "is not a COCO instances file: not JSON"),
        ({"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]},
         "it holds captions"),
        ({"images": [], "annotations": [], "categories": []}, "has no images"),
        ({"images": [{"id": 1, "file_name": "1.png"}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]},
         "image 1 has no width and height"),
        ({"images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}], "annotations": [],
          "categories": [{"id": 1, "name": "cat"}]},
         "nothing is left of .* for coco-2017: split val2017.*fewest_objects 3"),
    ],
)  # fmt: skip
def test_an_instances_file_that_is_not_as_expected(tmp_path, content, message):
    write(tmp_path / "annotations" / "instances_val2017.json", content)
    with pytest.raises(ValueError, match=message):
        find_protocol("coco-2017", coco=tmp_path)


def test_file_names_that_lead_out_of_the_folder(tmp_path):
    file = coco_folder(tmp_path) / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace(f"{139:012d}.png", "../139.png"))
    with pytest.raises(ValueError, match=r"image 139: file_name is '\.\./139\.png'; expected a file in"):
        find_protocol("coco-2017", coco=tmp_path)


def test_a_captions_file_of_another_kind(tmp_path):
    folder = coco_folder(tmp_path)
    annotations = folder / "annotations"
    (annotations / "captions_val2017.json").write_bytes((annotations / "instances_val2017.json").read_bytes())
    with pytest.raises(ValueError, match="expected COCO captions"):
        find_protocol("coco-2017", coco=folder)


# The shapes world, files --------------------------------------------------------------------------------------------


def test_shapes_draws_the_scenes_of_its_layouts():
    protocol = find_protocol("shapes", count=3, seed=9)
    for k, layout in enumerate(protocol.layouts):
        scene = sample_scene(HELD_OUT_SEED, k)
        assert layout == scene_layout(scene, seed=HELD_OUT_SEED, index=k, places=False)
        assert protocol.real is not None
        assert protocol.real(layout).tobytes() == draw(scene).tobytes()
        assert len(detect(protocol.real(layout))) == len(layout.boxes)
        assert not detect(protocol.empty(layout))
        assert protocol.empty(layout).getpixel((0, 0)) == protocol.real(layout).getpixel((0, 0))
    assert len(find_protocol("shapes").layouts) == 256


def test_a_file_of_layouts_with_real_images_by_id(tmp_path):
    layouts = [Layout(prompt="p", phrases=["a dog"], boxes=[[0, 0, 1, 1]], id=name, width=40) for name in ("a", "b/c")]
    write_layouts(tmp_path / "mine.jsonl", layouts)
    protocol = find_protocol(tmp_path / "mine.jsonl")
    assert (protocol.name, protocol.layouts, protocol.real) == ("mine", layouts, None)
    assert protocol.empty(layouts[0]).size == (40, 512)
    (tmp_path / "real" / "b").mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "real" / "a.png")
    with pytest.raises(ValueError, match="no image of 1 of 2 layouts, the first is 'b/c'"):
        find_protocol(tmp_path / "mine.jsonl", images=tmp_path / "real")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "real" / "b" / "c.png")
    protocol = find_protocol(tmp_path / "mine.jsonl", images=tmp_path / "real")
    assert protocol.real is not None
    assert protocol.real(layouts[1]).getpixel((0, 0)) == (0, 0, 255)
    assert protocol.real(layouts[1]).size == (30, 20)  # as it is: its boxes are the user's
    Image.new("RGB", (30, 20), "red").save(tmp_path / "real" / "a.bmp")
    with pytest.raises(ValueError, match=r"two images a: a\.bmp and a\.png"):
        find_protocol(tmp_path / "mine.jsonl", images=tmp_path / "real")
    write_layouts(tmp_path / "unnamed.jsonl", [Layout(phrases=["a dog"], boxes=[[0, 0, 1, 1]])])
    (tmp_path / "real" / "a.bmp").unlink()
    with pytest.raises(ValueError, match="layout 0 has no id"):
        find_protocol(tmp_path / "unnamed.jsonl", images=tmp_path / "real")
    with pytest.raises(FileNotFoundError, match="no such protocol; there are shapes, coco, "):
        find_protocol("coc")


def test_parameters_are_json_and_metrics_have_known_names(tmp_path):
    known = {
        "success",
        "picture_success",
        "mean_iou",
        "mean_iou_right",
        "recall_50",
        "recall_75",
        "wrong_count",
        "extra_objects",
    }
    known |= {"colour", "shape", "colour_of_found", "shape_of_found"}
    known |= {"ap", "ap_50", "ap_75", "ar", "clip", "clip_objects", "fid"}
    thick_folder(tmp_path / "thick")
    coco_folder(coco_folder(tmp_path / "ten"), split="val2014")
    for name in PROTOCOLS:
        folder = tmp_path / ("thick" if name in ("coco-mig", "coco-position") else "ten")
        protocol = find_protocol(name, coco=folder)
        json.dumps(dict(protocol.parameters))
        assert set(protocol.metrics) <= known
        assert len(set(protocol.metrics)) == len(protocol.metrics)
        assert set(protocol.attributes) <= set(protocol.metrics)
