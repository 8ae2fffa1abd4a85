"""`gligen-xl prepare` and what comes after it: check, show, train. Wrong input is one line."""

import json
import re
import shutil
import signal
import tarfile

import numpy as np
import pytest
import yaml
from helpers.commands import fails, run, succeeds
from helpers.scenes import scenes_folder
from helpers.tiny import sdxl_vae
from PIL import Image

from gligen_xl.cli import prepare as command
from gligen_xl.cli.common import Parser
from gligen_xl.data.shards import find_shards
from gligen_xl.layout import box_iou
from gligen_xl.prepare.settings import Settings
from gligen_xl.toyworld.world import sample_scene, scene_layout

COUNT = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return scenes_folder(tmp_path_factory.mktemp("source") / "scenes", COUNT, seed=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a VAE that costs nothing."""
    folder = tmp_path_factory.mktemp("vae")
    sdxl_vae().save_pretrained(folder)
    return folder


def test_from_images_to_a_trained_adapter(capsys, source, tmp_path):
    shards = tmp_path / "shards"
    words = ("prepare", source, "--out", shards, "--vae", "shapes", "--resolution", 64, "--workers", 1)
    output = succeeds(capsys, *words)
    assert "1 of 1 units done" in output
    assert f"images: {COUNT} seen, {COUNT} used, {COUNT} rows" in output
    assert output.rstrip().endswith(f"in {shards}")
    (shard,) = find_shards(shards)
    for index in range(COUNT):
        row, layout = shard.row(index), scene_layout(sample_scene(2, index), seed=2, index=index)
        assert (row.caption, row.phrases) == (layout.prompt, list(layout.phrases))
        np.testing.assert_allclose(row.boxes, layout.boxes, atol=1e-6)
    assert "1 already there" in succeeds(capsys, *words)
    succeeds(capsys, "check", shards)
    succeeds(capsys, "show", shards, "--grid", 4, "--out", tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as shown:
        assert min(shown.size) >= 128
    recipe = {
        "model": "shapes", "data": str(shards), "out": str(tmp_path / "run"), "samples": 16, "batch_size": 8,
        "track": [], "augmentation": {"slots": 4}, "optimization": {"warmup_samples": 8},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    succeeds(capsys, "train", tmp_path / "mine.yaml")
    assert (tmp_path / "run" / "adapter" / "gligen_adapter.safetensors").is_file()


def test_several_resolutions_and_shapes(capsys, source, tiny, tmp_path):
    words = ("prepare", source, "--vae", tiny, "--resolution", 64, "--resolution", 32, "--unit_size", 5)
    output = succeeds(capsys, *words, "--out", tmp_path / "squares", "--workers", 0, "--flip", "both")
    assert output.splitlines()[-3:] == [
        "each resolution is a folder of its own, to train on, check and show:",
        f"in {tmp_path / 'squares' / '64'}",
        f"in {tmp_path / 'squares' / '32'}",
    ]
    for resolution in (64, 32):
        shards = find_shards(tmp_path / "squares" / f"{resolution}")
        assert [len(shard) for shard in shards] == [10, 10, 4]
        assert all(shard.latent_shape == (4, resolution // 2, resolution // 2) for shard in shards)
    succeeds(capsys, *words, "--out", tmp_path / "buckets", "--workers", 0, "--buckets")
    assert [shard.stem.name[-5:] for shard in find_shards(tmp_path / "buckets" / "64")] == ["64x64"] * 3


def test_parts_make_the_whole(capsys, source, tiny, tmp_path):
    words = ("prepare", source, "--vae", tiny, "--resolution", 32, "--unit_size", 5, "--workers", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeds(capsys, *words, "--out", whole)
    for part in ("1/2", "2/2"):
        output = succeeds(capsys, *words, "--out", parts, "--part", part)
    assert "3 of 3" in output or "2 not of this part" in output
    for shard in find_shards(whole):
        for ending in (".safetensors", ".arrow"):
            name = shard.stem.name + ending
            assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_boxes_are_detected_and_captions_joined(capsys, source, tmp_path):
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image_id": f"{k}", "caption": f"number {k}"}) + "\n" for k in range(10)))
    words = ("prepare", source, "--out", tmp_path / "out", "--vae", "shapes", "--resolution", 64, "--workers", 0)
    output = succeeds(capsys, *words, "--detector", "shapes", "--captions", captions)
    assert "skipped, no caption: 2 (as 10, 11)" in output
    (shard,) = find_shards(tmp_path / "out")
    overlaps = []
    for index in range(10):
        row, layout = shard.row(index), scene_layout(sample_scene(2, index), seed=2, index=index)
        assert row.caption == f"number {index}"
        for phrase, box in zip(layout.phrases, layout.boxes, strict=True):
            same = [other for other, name in zip(row.boxes, row.phrases, strict=True) if name.split()[1] in phrase]
            overlaps.append(box_iou(np.array([box]), np.array(same)).max() if same else 0.0)
    assert np.mean(np.array(overlaps) > 0.7) > 0.9


def test_a_second_source_of_that_name_is_refused(capsys, source, tiny, tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "scenes"
    shutil.copytree(source, other)
    rows = (other / "metadata.jsonl").read_text().splitlines()
    (other / "metadata.jsonl").write_text("\n".join(rows[1:]))
    options = ("--out", out, "--vae", tiny, "--resolution", 32, "--workers", 0)
    succeeds(capsys, "prepare", source, *options, "--unit_size", 4)
    said = fails(capsys, "prepare", other, *options)
    assert f"holds scenes-00000 of {source}, and {other} has another one of that name" in said
    monkeypatch.chdir(source.parent)  # the same source, called otherwise and cut otherwise
    output = succeeds(capsys, "prepare", "scenes", *options, "--unit_size", 20)
    assert "removed, the source has them no more: scenes-00001, scenes-00002" in output
    assert [len(shard) for shard in find_shards(out)] == [COUNT]


def test_the_annotations_are_part_of_what_a_coco_source_is():
    (arguments,) = command.parse(Parser(), ["x", "--out", "y", "--instances", "/a.json"])
    (others,) = command.parse(Parser(), ["x", "--out", "y", "--instances", "/b.json"])
    assert command._source_name(arguments) != command._source_name(others)


def test_a_source_without_an_image_is_an_error(capsys, tiny, tmp_path):
    (tmp_path / "wds").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "wds" / f"{name}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("readme.md"))
    words = ("prepare", tmp_path / "wds", "--vae", tiny, "--resolution", 32, "--workers", 0)
    assert f"no image was found in {tmp_path / 'wds'}" in fails(capsys, *words, "--out", tmp_path / "out")
    succeeds(capsys, *words, "--out", tmp_path / "parts", "--part", "1/2")  # the other part may have some


def settings_of(*words):
    (arguments,) = command.parse(Parser(prog="gligen-xl prepare"), [str(word) for word in ("x", "--out", "y", *words)])
    return command._settings(arguments)


def test_every_option_arrives():
    options = {
        "flip": "random", "min_share": 0.25, "min_boxes": 2, "captions": "c.tar.gz", "detector": "d",
        "box_threshold": 0.3, "text_threshold": 0.1, "detect_text": "a dog.", "vae": "v", "latents": "mean", "seed": 7,
        "dtype": "float16", "at_once": 4,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    made = settings_of(*words, "--resolution", 1024, "--resolution", 512, "--buckets", "--min_side", 300)
    assert {name: getattr(made, name) for name in options} == options
    assert (made.framing.resolutions, made.framing.buckets, made.framing.min_side) == ((1024, 512), True, 300)
    assert made.framing.fast_jpeg is False
    plain = settings_of()
    assert plain == Settings(framing=plain.framing)
    assert plain.framing.resolutions == (512,)


def test_options_are_spelled_with_dashes_too():
    values = ["--seed", "3", "--detector", "a"]
    underscores = settings_of("--fast_jpeg", "--min_side", 10, "--detect_text=a-red_dog.", *values)
    dashes = settings_of("--fast-jpeg", "--min-side", 10, "--detect-text=a-red_dog.", *values)
    assert underscores == dashes
    assert (dashes.framing.fast_jpeg, dashes.framing.min_side, dashes.detect_text) == (True, 10, "a-red_dog.")


def test_wrong_input_is_one_line(capsys, source, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("no image")
    good = ("--vae", tiny, "--resolution", 32, "--workers", 0)
    wrong = [
        ((tmp_path / "nowhere", *good), "there is no .*nowhere"),
        ((tmp_path / "empty", *good), "empty holds nothing; expected one of"),
        ((tmp_path / "text", *good), "holds readme.txt; expected one of"),
        ((source, *good[2:], "--vae", tmp_path / "no-vae"), "no VAE folder .*no-vae"),
        ((source, *good, "--part", "4/3"), "part is '4/3'; expected k/n"),
        ((source, *good, "--kind", "pictures"), "--kind"),
        ((source, *good, "--kind", "coco"), "coco needs instances"),
        ((source, *good, "--classes", "c.json"), r"there is no c\.json"),
        ((source, "--vae", tiny, "--resolution", 33), "resolution is 33; this VAE needs a multiple of 2"),
        ((source, "--vae", tiny, "--resolution", "large"), "--resolution is large; expected pixels"),
        ((source, "--vae", tiny, "--resolution", 0), "resolutions are .*expected different numbers of pixels"),
        ((source, *good, "--workers", -1), "workers is -1; expected at least 0"),
        ((source, *good, "--batch_size", 0), "batch_size is 0; expected at least 1"),
        ((source, *good, "--runners", 2), "runners is 2 with runner 'local'"),
        ((source, *good, "--detect_text", "a dog."), "no detector; name one"),
        ((source, *good, "--box_threshold", 0.3), "box_threshold is 0.3 but there is no detector"),
        ((source, *good, "--detector", "shapes", "--text_threshold", 0.2), "the detector of shapes has no text"),
        ((source, *good, "--detector", tmp_path / "empty"), "holds no config.json"),
        ((source, *good, "--captions", tmp_path / "none.jsonl"), "none.jsonl"),
        ((source, *good, "--min_share", 2), "min_share is 2.0; expected a share"),
        ((source, *good, "--min_side", 65), "no image could be used; the reasons are above"),
        ((source, *good, "--unit_size", 0), "unit_size is 0"),
        ((source, *good, "--wide"), "--wide"),
    ]
    for k, (words, says) in enumerate(wrong):
        said = fails(capsys, "prepare", *words, "--out", tmp_path / f"out-{k}")
        assert re.search(says, said), said


def test_a_failed_unit_fails_the_command(capsys, source, tiny, tmp_path):
    words = ("prepare", source, "--out", tmp_path, "--vae", tiny, "--resolution", 32, "--unit_size", 6, "--workers", 0)
    succeeds(capsys, *words, "--part", "1/2")
    first = find_shards(tmp_path)[0].stem
    other = tmp_path / "scenes-00001"
    for ending in (".safetensors", ".arrow"):  # a shard that something else has made
        content = first.with_name(first.name + ending).read_bytes()
        other.with_name(other.name + ending).write_bytes(content.replace(b'"prepared": "', b'"prepared": "x'))
    code, output, error = run(capsys, *words)
    assert code == 2
    assert "failed: scenes-00001: " in output
    assert error.rstrip().endswith("1 of 2 units failed; the same command tries those again")


def test_signals_are_as_before(capsys, source, tiny, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = ("prepare", source, "--out", tmp_path, "--vae", tiny, "--resolution", 32, "--workers", 0)
    succeeds(capsys, *words)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Bar:
    """A progress bar of four seconds."""

    def __init__(self):
        self.initial, self.n, self.text, self.format_dict = 0, 0, "", {"elapsed": 4.0}

    def set_description_str(self, text, refresh):
        self.text = text

    def update(self, weight):
        self.n += weight


def test_the_bar_counts_no_speed_for_what_was_done_before():
    bar = Bar()
    shown = command.PrepareProgress(bar, lambda: None)
    for weight, images in ((50, 0), (5, 1), (5, 1)):
        shown(weight, images)
    assert (bar.n, bar.initial) == (60, 50)
    assert "2 images, 0.5/s" in bar.text
