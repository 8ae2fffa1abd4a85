"""Generating and scoring: seeds, kills, several processes, damaged images, other programs' images, comparing."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.painters import Painter, noise
from helpers.tiny import grounded, sdxl_pipeline
from PIL import Image

from gligen_xl import Layout
from gligen_xl.evaluate import compare, evaluate_layouts, find_detector, find_protocol, point_metrics, summarize
from gligen_xl.evaluate.clip import ClipScore
from gligen_xl.evaluate.output_folder import claim_generation, generation_settings, only_one_at
from gligen_xl.evaluate.real_images import real_images_of
from gligen_xl.evaluate.run import find_images, generate_all, image_set_named, score_all, shuffled
from gligen_xl.evaluate.sampling import (
    ImageSet,
    find_files,
    generate_images,
    keyed,
    plan_image_sets,
    read_about,
    seeded,
)
from gligen_xl.toyworld.detectors import ShapesDetector

ON, OFF = ImageSet.grounded(1.0, 2.0), ImageSet.off(2.0)
RED = {"prompt": "grass", "phrases": ["a red circle"], "boxes": [[0.1, 0.1, 0.5, 0.5]]}


def scenes(count):
    protocol = find_protocol("shapes", count=count)
    return protocol, keyed(protocol.layouts)


def point(condition):
    return point_metrics([score for image in condition.images for score in image.objects])


class Counting(ShapesDetector):
    """Counts what it looks at."""

    def __init__(self):
        self.looked, self.largest = 0, 0

    def detect(self, images, layouts):
        self.looked += len(images)
        self.largest = max(self.largest, len(images))
        return super().detect(images, layouts)


# Names, seeds, ways -------------------------------------------------------------------------------------------------


def test_names_of_images():
    ids = [None, "cat-1.2", "a/b", "../x", "", "Grün", "y" * 100, None]
    keys = list(keyed([Layout(**RED, id=name) for name in ids]))
    assert keys[0] == "000000"
    assert keys[1] == "cat-1.2"
    assert keys[7] == "000007"
    assert len(set(keys)) == 8
    assert all(len(key) < 100 and "/" not in key and key[0] != "." for key in keys)
    for pair in (["a", "A"], ["000001", None]):
        with pytest.raises(ValueError, match="layouts 0 and 1 would both be called"):
            keyed([Layout(**RED, id=name) for name in pair])


def test_the_seed_follows_from_what_the_layout_says():
    first = seeded(Layout(**RED), 0).seed
    assert first == seeded(Layout(**RED), 0).seed == 69855604329614
    others = [Layout(**RED | {"prompt": "sand"}), Layout(**RED, id="x"), Layout(**RED | {"boxes": [[0, 0, 0.5, 0.5]]})]
    assert len({first, seeded(Layout(**RED), 1).seed, *(seeded(layout, 0).seed for layout in others)}) == 5
    assert seeded(Layout(**RED, seed=7), 3).seed == 7


def test_ways_by_name_and_none_twice():
    sweep = {"beta": [0, 0.4, 1], "guidance_scale": [1, 2, 5.5]}
    image_sets = plan_image_sets([1.0], 2.0, sweep, off=True)
    assert [image_set.name for image_set in image_sets] == [
        "beta-1",
        "beta-0.4",
        "guidance_scale-1",
        "guidance_scale-5.5",
        "off",
    ]
    assert image_sets[3].settings == {"beta": 1.0, "guidance_scale": 5.5}
    assert [image_set.name for image_set in plan_image_sets([0, 1], 2.0, off=False)] == ["beta-0", "beta-1"]
    assert [image_set.name for image_set in plan_image_sets([0], 2.0, off=True)] == ["off"]
    for bad, says in (
        ({"steps": [3]}, "sweep of 'steps'"),
        ({"beta": [2]}, "0 to 1"),
        ({"guidance_scale": [-1]}, "-1"),
    ):
        with pytest.raises(ValueError, match=says):
            plan_image_sets([1.0], 2.0, bad, off=True)


def test_shuffled_layouts_are_the_next_ones():
    _, layouts = scenes(24)
    keys, other = list(layouts), shuffled(layouts)
    assert [other[key] for key in keys] == [layouts[key] for key in [*keys[1:], keys[0]]]
    assert shuffled(dict(list(layouts.items())[:1])) == dict(list(layouts.items())[:1])


# Generating ---------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_in_whatever_batch_order_or_part_it_is_made(tmp_path):
    """Of a real pipeline, to rounding."""
    pipeline = grounded(sdxl_pipeline())
    layouts = keyed(
        [
            Layout(
                **RED, id=f"{k}", width=16 + 8 * (k % 2), height=16, **({"negative_prompt": "sea"} if k == 3 else {})
            )
            for k in range(6)
        ]
    )
    assert generate_images(pipeline, layouts, tmp_path / "whole", ON, steps=3, batch_size=4) == 6
    turned = dict(reversed(layouts.items()))
    for part in ((2, 2), (1, 2)):
        assert generate_images(pipeline, turned, tmp_path / "parts", ON, steps=3, batch_size=2, part=part) == 3
    few = {key: layouts[key] for key in ("4", "1")}
    assert generate_images(pipeline, few, tmp_path / "few", ON, steps=3, batch_size=1) == 2
    for folder in ("parts", "few"):
        for key, path in find_files(tmp_path / folder, layouts).items():
            with Image.open(path) as one, Image.open(tmp_path / "whole" / f"{key}.png") as other:
                assert one.size == other.size == (layouts[key].width, 16)
                assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    said = read_about(tmp_path / "few" / "4.png")
    assert said["layout"] == seeded(layouts["4"], 0).to_dict()
    assert (said["beta"], said["guidance_scale"], said["steps"]) == (1.0, 2.0, 3)


def test_nothing_is_made_twice_after_an_interrupt(tmp_path):
    protocol, layouts = scenes(10)
    painter = Painter(protocol, most=4)
    with pytest.raises(KeyboardInterrupt):
        generate_images(painter, layouts, tmp_path, ON, steps=3, batch_size=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 4
    again = Painter(protocol)
    assert generate_images(again, layouts, tmp_path, ON, steps=3, batch_size=4) == again.made == 6
    assert generate_images(again, layouts, tmp_path, ON, steps=3, batch_size=4) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(layouts)


def _paint(folder, count, part):
    protocol, layouts = scenes(count)
    generate_images(Painter(protocol, seconds=0.01), layouts, folder, ON, steps=3, batch_size=2, part=part)


def test_a_killed_process_and_two_at_once(tmp_path):
    """Every file is a whole image at every moment; what a killed process made stays as it is."""
    begin = multiprocessing.get_context("fork").Process
    killed = begin(target=_paint, args=(tmp_path, 40, (1, 1)))
    killed.start()
    while len(list(tmp_path.glob("*.png"))) < 5:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*.png")}
    assert 5 <= len(before) < 40
    both = [begin(target=_paint, args=(tmp_path, 40, (k, 2))) for k in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*.png")}
    assert before.items() <= after.items()
    assert len(after) == 40
    for path in after:
        with Image.open(path) as image:
            image.load()


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    protocol, layouts = scenes(2)
    painter = Painter(protocol)
    settings = {"steps": 3, "seed": 0, "about": {"model": "one"}}
    generate_all(painter, layouts, tmp_path, [ON, OFF], **settings)
    assert painter.made == 4
    for other, says in (
        ({"steps": 4}, "steps 3, now it is 4"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"about": {"model": "two"}}, "model 'one', now it is 'two'"),
    ):
        with pytest.raises(ValueError, match=says):
            generate_all(painter, layouts, tmp_path, [ON], **{**settings, **other})
    (key, layout), *rest = layouts.items()
    moved = {key: replace(layout, boxes=[[0, 0, 0.5, 0.5]] * len(layout.boxes)), **dict(rest)}
    with pytest.raises(ValueError, match=f"{key}.png is an image of another layout"):
        generate_all(painter, moved, tmp_path, [ON], **settings)
    with pytest.raises(ValueError, match="guidance_scale"):
        generate_all(
            painter, layouts, tmp_path, [replace(ON, settings={"beta": 1.0, "guidance_scale": 3.0})], **settings
        )
    assert painter.made == 4
    (tmp_path / "generation.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not say"):
        generate_all(painter, layouts, tmp_path, [ON], **settings)


def test_another_adapter_of_the_same_name_is_refused(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    claim_generation(tmp_path, {}, generation_settings(pipeline))
    claim_generation(tmp_path, {}, generation_settings(grounded(sdxl_pipeline())))
    next(iter(p for n, p in pipeline.unet.named_parameters() if "fuser" in n)).data.add_(1)
    with pytest.raises(ValueError, match="adapter_checksum"):
        claim_generation(tmp_path, {}, generation_settings(pipeline))
    with pytest.raises(ValueError, match=r"adapter_checksum '[0-9a-f]{16}', now it is 'no adapter'"):
        claim_generation(tmp_path, {}, generation_settings(sdxl_pipeline()))
    pipeline = grounded(sdxl_pipeline())
    pipeline.unet.conv_in.weight.data[0].add_(1)
    with pytest.raises(ValueError, match="unet_checksum"):
        claim_generation(tmp_path, {}, generation_settings(pipeline))
    pipeline.unet.to("meta")
    assert generation_settings(pipeline) == {"scheduler": "DDIMScheduler"}  # offloaded: nothing can be read


def test_what_is_refused_leaves_the_layouts_as_they_are(tmp_path):
    _, layouts = scenes(6)
    claim_generation(tmp_path, layouts, {"steps": 20})
    before = (tmp_path / "layouts.jsonl").read_bytes()
    with pytest.raises(ValueError, match="steps 20, now it is 30"):
        claim_generation(tmp_path, scenes(2)[1], {"steps": 30})
    assert (tmp_path / "layouts.jsonl").read_bytes() == before


def test_more_objects_than_slots_are_refused_at_once(tmp_path):
    layout = Layout(prompt="x", phrases=["a dog"] * 3, boxes=[[0, 0, 1, 1]] * 3, id="much")
    with pytest.raises(ValueError, match="layout much has 3 objects, the adapter 2 slots"):
        generate_all(grounded(sdxl_pipeline(), slots=2), keyed([layout]), tmp_path, [ON], steps=2)


def test_one_process_at_a_part(tmp_path):
    with (
        only_one_at(tmp_path, (1, 2)),
        only_one_at(tmp_path, (2, 2)),
        pytest.raises(ValueError, match="another process generates part 1/2"),
        only_one_at(tmp_path, (1, 2)),
    ):
        pass
    with only_one_at(tmp_path, (1, 2)):
        pass


# Scoring ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """The folder of twenty scenes, painted and scored."""
    out, (protocol, _), detector = tmp_path_factory.mktemp("painted"), scenes(20), Counting()
    evaluate_layouts(Painter(protocol), protocol, detector, out, betas=[1])
    assert detector.looked == 80  # on, off, real and empty; shuffled are images that were looked at
    assert detector.largest <= 16
    return out


@pytest.fixture
def evaluated(painted, tmp_path):
    """A copy of it, whose detections are kept: protocol, a detector that has not looked at anything, conditions."""
    shutil.copytree(painted, tmp_path / "out")
    (protocol, _), detector = scenes(20), Counting()
    conditions = evaluate_layouts(Painter(protocol), protocol, detector, tmp_path / "out", betas=[1])
    return protocol, detector, conditions


def test_what_was_found_is_kept(evaluated, tmp_path):
    protocol, detector, conditions = evaluated
    out, painter = tmp_path / "out", Painter(protocol)
    again = evaluate_layouts(painter, protocol, detector, out, betas=[1])
    assert again == conditions
    assert (detector.looked, painter.made) == (0, 0)

    file = out / "detections" / "beta-1" / "shapes.jsonl"
    file.write_bytes(file.read_bytes()[:-30])  # a kill cut the last line short
    assert evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False) == conditions[:1]
    assert evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False) == conditions[:1]
    assert detector.looked == 1
    first, *others = file.read_text().splitlines()
    box = {"box": [0.5], "label": "red circle", "score": 1, "attributes": {}}
    file.write_text("\n".join([json.dumps(json.loads(first) | {"found": [box]}), *others, ""]))  # JSON, and no box
    assert evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False) == conditions[:1]
    assert detector.looked == 2
    file.write_text("\n".join([json.dumps(json.loads(first) | {"found": [box | {"attributes": None}]}), *others, ""]))
    assert evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False) == conditions[:1]
    assert detector.looked == 3
    detector.looked = 1

    path = conditions[0].paths[conditions[0].images[3].key]
    noise((64, 64)).save(path)  # another image under the same name
    changed = evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False)
    assert detector.looked == 2
    assert changed[0].images[3] != conditions[0].images[3]
    detector.settings = {"detector": "shapes", "threshold": 0.5}
    evaluate_layouts(painter, protocol, detector, out, betas=[1], controls=False)
    assert detector.looked == 22


def test_damaged_and_missing_images_are_named_and_in_no_metric(evaluated, tmp_path):
    protocol, detector, conditions = evaluated
    whole = conditions[0]
    truncated, text, empty, gone, large = (whole.images[k].key for k in (2, 5, 7, 11, 13))
    path = whole.paths[truncated]
    path.write_bytes(path.read_bytes()[:-200])
    whole.paths[text].write_text("no image")
    whole.paths[empty].write_bytes(b"")
    whole.paths[gone].unlink()
    with Image.open(whole.paths[large]) as image:
        image.resize((128, 96), Image.Resampling.NEAREST).save(whole.paths[large])
    layouts = keyed(protocol.layouts)
    after = score_all(protocol, find_images(tmp_path / "out" / "pictures", layouts), tmp_path / "out", detector)
    damaged = after[0]
    assert list(damaged.unread) == [truncated, text, empty, gone]
    assert "truncated or damaged" in damaged.unread[truncated]
    assert "not an image" in damaged.unread[text]
    assert damaged.unread[empty] == "empty file"
    assert damaged.unread[gone] == "missing"
    kept = [score for score in whole.images if score.key not in damaged.unread and score.key != large]
    assert [score for score in damaged.images if score.key != large] == kept
    assert point(damaged)["recall_50"] == 1
    by_name = {condition.name: condition for condition in after}
    assert by_name["shuffled"].unread == damaged.unread
    assert not by_name["off"].unread
    assert len(by_name["off"].images) == len(by_name["real"].images) == 20


def test_a_condition_without_any_readable_image_is_told_as_such(evaluated, tmp_path):
    protocol, detector, conditions = evaluated
    by_name = {condition.name: condition for condition in conditions}
    for path in by_name["off"].paths.values():
        path.write_text("x")
    conditions = evaluate_layouts(Painter(protocol), protocol, detector, tmp_path / "out", betas=[1])
    by_name = {condition.name: condition for condition in conditions}
    assert (len(by_name["off"].images), len(by_name["off"].unread)) == (0, 20)
    assert len(by_name["beta-1"].images) == 20
    for path in by_name["beta-1"].paths.values():
        path.write_text("x")
    with pytest.raises(ValueError, match="none of 20 images of beta-1, off can be read; the first one, "):
        evaluate_layouts(Painter(protocol), protocol, detector, tmp_path / "out", betas=[1])


def test_other_real_images_take_the_place_of_the_former(tmp_path):
    protocol, layouts = scenes(4)
    for name, image_of in (("good", protocol.real), ("bad", protocol.empty)):
        (tmp_path / name).mkdir()
        for layout in layouts.values():
            image_of(layout).save(tmp_path / name / f"{layout.id}.png")

    def success(name):
        real = replace(protocol, real=real_images_of(tmp_path / name, protocol.layouts))
        conditions = evaluate_layouts(Painter(protocol), real, ShapesDetector(), tmp_path / "out", betas=[1])
        return point(next(condition for condition in conditions if condition.kind == "real"))["success"]

    assert (success("good"), success("bad"), success("good")) == (1, 0, 1)


def test_objects_that_real_images_hold_beside_those_asked_for_are_passed_over(tmp_path):
    """As protocols leave small objects out of their layouts, but not out of the photographs."""
    whole, _ = scenes(24)
    several = [layout for layout in whole.layouts if len(layout.boxes) > 1]
    asked = [replace(layout, phrases=layout.phrases[:1], boxes=layout.boxes[:1]) for layout in several]
    (tmp_path / "real").mkdir()
    for layout in several:
        whole.real(layout).save(tmp_path / "real" / f"{layout.id}.png")
    real_images = replace(
        real_images_of(tmp_path / "real", asked),
        annotated={layout.id: (layout.phrases, np.array(layout.boxes)) for layout in several},
    )
    assert [[name for name, _ in real_images.ignored(layout)] for layout in asked] == [
        list(layout.phrases[1:]) for layout in several
    ]
    protocol = replace(whole, layouts=asked, real=real_images)

    def bound(protocol, out):
        conditions = evaluate_layouts(Painter(protocol), protocol, ShapesDetector(), tmp_path / out, betas=[1])
        (real,) = [condition for condition in conditions if condition.kind == "real"]
        return summarize(real.images)

    with_them, without = bound(protocol, "a"), bound(replace(protocol, real=replace(real_images, annotated={})), "b")
    assert with_them["success"].value == without["success"].value == 1
    assert (with_them["wrong_count"].value, with_them["ap_50"].value) == (0, 1)
    assert without["wrong_count"].value > 0.9
    assert without["ap_50"].value < 0.95


def test_real_images_that_cannot_be_read_are_named(tmp_path):
    protocol, layouts = scenes(4)
    broken = list(layouts)[1]

    def real(layout):
        if layout.id == broken:
            raise ValueError("truncated or damaged: photo.jpg")
        return protocol.real(layout)

    conditions = evaluate_layouts(
        Painter(protocol), replace(protocol, real=real), ShapesDetector(), tmp_path, betas=[1]
    )
    (condition,) = [condition for condition in conditions if condition.kind == "real"]
    assert condition.unread == {broken: "truncated or damaged: photo.jpg"}


def test_a_real_image_that_was_damaged_later_is_in_no_figure(tmp_path):
    protocol, _ = scenes(4)
    (tmp_path / "real").mkdir()
    for layout in protocol.layouts:
        protocol.real(layout).save(tmp_path / "real" / f"{layout.id}.png")
    protocol = replace(protocol, real=real_images_of(tmp_path / "real", protocol.layouts))
    for damaged in ([], [protocol.layouts[1].id]):
        for name in damaged:
            (tmp_path / "real" / f"{name}.png").write_bytes(b"x")
        conditions = evaluate_layouts(Painter(protocol), protocol, ShapesDetector(), tmp_path / "out", betas=[1])
        (real,) = [condition for condition in conditions if condition.kind == "real"]
        assert list(real.unread) == damaged
        assert len(real.images) == 4 - len(damaged)


# Images of other programs -----------------------------------------------------------------------------------------


def test_images_of_any_program_in_any_format(tmp_path):
    protocol, layouts = scenes(6)
    flat, image_sets = tmp_path / "flat", tmp_path / "ways"
    flat.mkdir()
    for k, (key, layout) in enumerate(layouts.items()):
        for folder in ("off", "beta-0.4", "beta-1", "mine"):
            (image_sets / folder).mkdir(parents=True, exist_ok=True)
            protocol.real(layout).save(image_sets / folder / f"{key}.{'webp' if k % 2 else 'png'}", lossless=True)
        protocol.real(layout).save(flat / f"{key}.bmp")
    (flat / "readme.txt").write_text("x")
    found = find_images(flat, layouts)
    assert [(one.name, one.kind, one.settings) for one in found] == [("pictures", "grounded", {})]
    assert point(score_all(protocol, found, tmp_path / "a", ShapesDetector(), controls=False)[0])["recall_50"] == 1
    found = find_images(image_sets, layouts)
    assert [image_set.name for image_set in found] == ["beta-1", "beta-0.4", "mine", "off"]
    assert [image_set.kind for image_set in found] == ["grounded"] * 3 + ["off"]
    assert list(found)[1].settings == {"beta": 0.4}
    (image_sets / "shuffled").mkdir()
    with pytest.raises(ValueError, match="the name of a control"):
        find_images(image_sets, layouts)
    (flat / f"{next(iter(layouts))}.jpg").write_text("")
    with pytest.raises(ValueError, match="leave one of the two"):
        find_images(flat, layouts)
    with pytest.raises(ValueError, match=r"expected 000000\.png and so on"):
        find_images(flat, keyed([Layout(**RED)]))
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "nowhere", layouts)


def test_images_that_say_they_are_of_another_layout(evaluated, tmp_path):
    protocol, detector, conditions = evaluated
    first, second = (conditions[0].paths[score.key] for score in conditions[0].images[:2])
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{second.name} is of a layout with other"):
        score_all(protocol, {ON: first.parent}, tmp_path / "out", detector)


# Comparing ----------------------------------------------------------------------------------------------------------


def test_two_evaluations_are_compared_image_by_image(evaluated, tmp_path):
    _, detector, conditions = evaluated
    worse, _ = scenes(20)
    bad = {layout.id for layout in worse.layouts[:5]}
    layouts = keyed(worse.layouts)
    (tmp_path / "theirs").mkdir()
    for key, layout in layouts.items():
        image = worse.empty(layout) if layout.id in bad else worse.real(layout)
        image.save(tmp_path / "theirs" / f"{key}.png")
    other = tmp_path / "other"
    score_all(worse, find_images(tmp_path / "theirs", layouts), other, detector)
    (compared,) = compare(conditions, other, detector)
    assert (compared.condition, compared.other) == ("beta-1", "pictures")
    objects = sum(len(layout.boxes) for layout in worse.layouts)
    lost = sum(len(layout.boxes) for layout in worse.layouts[:5])
    difference = compared.difference["recall_50"]
    assert difference.value == pytest.approx(lost / objects)
    assert 0 < difference.low < difference.value < difference.high
    same = compare(conditions, tmp_path / "out", detector)
    assert [(c.condition, c.other) for c in same] == [("beta-1", "beta-1"), ("off", "off")]
    assert same[0].difference["mean_iou"].value == 0

    # Images of the same bytes, and one that changes into such a one: each is compared as it was last seen.
    first, *others, last = (tmp_path / "theirs" / f"{key}.png" for key in layouts)
    for same in (others, [last]):
        for path in same:
            shutil.copy(first, path)
        (theirs,) = score_all(worse, find_images(first.parent, layouts), other, detector, controls=False)
        (compared,) = compare(conditions, other, detector)
        assert compared.difference["pictures"].value == len(layouts)
        success = point(conditions[0])["success"] - point(theirs)["success"]
        assert compared.difference["success"].value == pytest.approx(success)

    detector.settings = {"detector": "shapes", "threshold": 0.9}
    with pytest.raises(ValueError, match="holds nothing that shapes with these settings found"):
        compare(conditions, other, detector)
    with pytest.raises(FileNotFoundError, match="no evaluation"):
        compare(conditions, tmp_path / "theirs", detector)


def test_what_clip_has_not_seen_in_all_images_is_not_compared(tmp_path):
    class Similar:
        settings = {"clip": "similar"}  # noqa: RUF012

        def score(self, images, layouts):
            return [SimpleNamespace(clip=0.3, clip_objects=[0.2] * len(layout.boxes)) for layout in layouts]

    protocol, layouts = scenes(6)
    (tmp_path / "pictures").mkdir()
    for key, layout in layouts.items():
        protocol.real(layout).save(tmp_path / "pictures" / f"{key}.png")
    found, detector, clip = find_images(tmp_path / "pictures", layouts), ShapesDetector(), Similar()
    conditions = score_all(protocol, found, tmp_path / "out", detector, clip=clip, controls=False)
    (whole,) = compare(conditions, tmp_path / "out", detector, clip)
    assert whole.difference["clip"].value == 0
    file = tmp_path / "out" / "detections" / "pictures" / "clip.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    (part,) = compare(conditions, tmp_path / "out", detector, clip)
    assert part.difference["pictures"].value == 6
    assert not {"clip", "clip_objects"} & set(part.difference)


def test_without_a_prompt_clip_has_no_score_of_the_whole_and_that_is_kept(tmp_path):
    """It is not measured anew each time, and the images that have one are compared."""

    class Similar:
        settings = {"clip": "similar"}  # noqa: RUF012
        looked = 0

        def score(self, images, layouts):
            self.looked += len(images)
            return [ClipScore(0.3 if layout.prompt else None, (0.2,) * len(layout.boxes)) for layout in layouts]

    protocol, _ = scenes(6)
    layouts = [replace(layout, prompt="") if k % 2 else layout for k, layout in enumerate(protocol.layouts)]
    protocol, by_key = replace(protocol, layouts=layouts), keyed(layouts)
    (tmp_path / "pictures").mkdir()
    for (key, _), drawn in zip(by_key.items(), scenes(6)[0].layouts, strict=True):
        protocol.real(drawn).save(tmp_path / "pictures" / f"{key}.png")
    found, detector, clip = find_images(tmp_path / "pictures", by_key), ShapesDetector(), Similar()
    for _ in range(2):
        conditions = score_all(protocol, found, tmp_path / "out", detector, clip=clip, controls=False)
        assert [score.clip for score in conditions[0].images] == [0.3, None] * 3
        assert clip.looked == 6
    (compared,) = compare(conditions, tmp_path / "out", detector, clip)
    assert compared.difference["clip"].value == 0
    assert compared.difference["clip_objects"].value == 0
    assert summarize(conditions[0].images, ap=False)["clip"].value == pytest.approx(0.3)


def test_what_is_kept_in_another_form_is_said_and_looked_at_anew(evaluated, tmp_path):
    protocol, _, conditions = evaluated
    images = {ON: next(iter(conditions[0].paths.values())).parent}
    score_all(protocol, images, tmp_path, ShapesDetector(), controls=False)
    (file,) = tmp_path.glob("detections/*/*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    strange = json.loads(lines[0]) | {"found": {"boxes": 7}}
    file.write_text("".join([json.dumps(strange) + "\n", *lines[1:-1], lines[-1][:40]]))
    detector = Counting()
    with pytest.warns(UserWarning, match="1 lines are of another form"):
        score_all(protocol, images, tmp_path, detector, controls=False)
    assert detector.looked == 2


def test_images_of_other_programs_in_odd_forms(tmp_path):
    """Modes, sizes, ids that are numbers, files that belong to nobody, images that are missing or hold nothing."""
    protocol, _ = scenes(6)
    layouts = [replace(layout, id=str(7 + k)) for k, layout in enumerate(protocol.layouts)]
    protocol, by_key = replace(protocol, layouts=layouts), keyed(layouts)
    folder = tmp_path / "pictures"
    folder.mkdir()
    drawn = [protocol.real(layout) for layout in scenes(6)[0].layouts]
    drawn[0].convert("RGBA").save(folder / "7.png")
    drawn[1].resize((512, 512)).save(folder / "8.JPEG", quality=95)
    drawn[2].quantize(64).save(folder / "9.png")
    Image.new("L", (64, 64), 128).save(folder / "10.png")
    Image.new("I;16", (200, 100), 40_000).save(folder / "11.png")
    for name in ("7.json", "7.txt", "99.png", "7-boxes.png", ".8.png", "Thumbs.db"):
        (folder / name).write_text("x")
    (folder / "7.png.d").mkdir()
    (condition,) = score_all(protocol, find_images(folder, by_key), tmp_path / "out", ShapesDetector(), controls=False)
    assert [score.key for score in condition.images] == ["7", "8", "9", "10", "11"]
    assert dict(condition.unread) == {"12": "missing"}
    assert all(one.iou > 0.8 for score in condition.images[:3] for one in score.objects)
    for score in condition.images[3:]:
        assert score.detections == ()
        assert score.missing == len(score.objects)
        assert {one.iou for one in score.objects} == {0.0}
    assert summarize(condition.images, ap=True)["recall_50"].value < 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [("beta-0.4", {"beta": 0.4}), ("guidance_scale-7", {"guidance_scale": 7.0}), ("beta-nan", {}), ("beta-inf", {}),
     ("beta-mine", {}), ("beta-", {}), ("mine", {})],
)  # fmt: skip
def test_what_the_name_of_a_folder_tells(name, settings):
    assert image_set_named(name).settings == settings
    assert image_set_named("x", {"beta": True, "guidance_scale": "5"}).settings == {}


def test_layouts_are_written_by_their_keys(evaluated, tmp_path):
    _, _, conditions = evaluated
    lines = [json.loads(line) for line in (tmp_path / "out" / "layouts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [score.key for score in conditions[0].images]
    assert find_detector("shapes").name == "shapes"
