"""Every command says how many boxes the images have, and stops where none has one, unless that is meant."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from PIL import Image

from gligen_xl.cli.main import main
from gligen_xl.data.box_statistics import BoxStatistics, of_shards
from gligen_xl.data.check import check_shards
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import find_shards
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import Optimization


def write(folder, counts, score=0.5, shard="a"):
    rows = [replace(row(count), image_id=f"{shard}{k}", scores=[score] * count) for k, count in enumerate(counts)]
    write_shard(folder / shard, latents(len(counts), side=8), rows, METADATA)
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    sdxl_pipeline().save_pretrained(folder / "base")
    file = folder / "recipe.yaml"
    file.write_text(f"model: {folder / 'base'}\nsamples: 4\nbatch_size: 2\ntrack: []\n")
    return file


def test_images_and_boxes_are_counted(tmp_path):
    folder = write(tmp_path, [0, 1, 3, 0, 2])
    write(tmp_path, [4], score=0.1, shard="b")
    shards = find_shards(folder)
    assert of_shards(shards) == BoxStatistics(images=6, boxes=10, without=2)
    assert of_shards(shards, min_score=0.25) == BoxStatistics(images=6, boxes=6, without=3)
    assert of_shards(shards, min_score=0.5) == BoxStatistics(images=6, boxes=0, without=6)
    assert str(of_shards(shards)) == "1.7 boxes an image on average, 2 of 6 images have none"


def test_a_table_that_changes_is_counted_anew(tmp_path):
    assert of_shards(find_shards(write(tmp_path, [1, 1]))).boxes == 2
    assert of_shards(find_shards(write(tmp_path, [3, 0]))).boxes == 3


def test_check(tmp_path, capsys):
    assert main(["check", write(tmp_path / "some", [2, 0])]) == 0
    assert "boxes: 1.0 boxes an image on average, 1 of 2 images have none" in capsys.readouterr().out
    none = write(tmp_path / "none", [0, 0])
    assert main(["check", none]) == 2
    out, err = capsys.readouterr()
    assert "none of the 2 images has a box" in out
    assert "no problem" not in out
    assert err.strip().count("\n") == 0 or "check" in err
    assert main(["check", none, "--without-boxes"]) == 0
    assert check_shards(none, without_boxes=True).problems == []
    assert len(check_shards(write(tmp_path / "empty", [])).problems) == 1


def images(folder, boxes):
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for k, of_image in enumerate(boxes):
            Image.fromarray(np.full((64, 64, 3), 40 * k, np.uint8)).save(folder / f"{k}.png")
            entry = {"file_name": f"{k}.png", "text": "grass", "phrases": ["a"] * len(of_image), "boxes": of_image}
            file.write(json.dumps(entry | {"box_format": "xyxy"}) + "\n")
    return folder


def prepared(source, out, *words):
    how = ["--vae", "shapes", "--resolution", "64", "--workers", "0"]
    return main(["prepare", str(source), "--out", str(out), *how, *words])


def test_prepare(tmp_path, capsys, caplog):
    box = [0.1, 0.1, 0.9, 0.9]
    assert prepared(images(tmp_path / "some", [[box, box], [], [box]]), tmp_path / "a") == 0
    assert "boxes: 1.0 boxes an image on average, 1 of 3 images have none" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "prepare.json").read_text())["rows_without_boxes"] == 1
    assert caplog.text == ""
    none = images(tmp_path / "none", [[], []])
    assert prepared(none, tmp_path / "b") == 2
    out, err = capsys.readouterr()
    assert "0.0 boxes an image on average, 2 of 2 images have none" in out
    assert f"none of the 2 images of {none} has a usable box" in err
    assert "--without-boxes" in err
    assert "none of its 2 rows has a box" in caplog.text
    assert prepared(none, tmp_path / "b", "--without-boxes") == 0  # what is done stays
    assert "1 already there" in capsys.readouterr().out


def test_prepare_in_parts_judges_the_whole_alone(tmp_path, capsys):
    box = [0.1, 0.1, 0.9, 0.9]
    source = images(tmp_path / "some", [[], [box]])
    for out, order in (("a", (1, 2)), ("b", (2, 1))):
        for part in order:
            assert prepared(source, tmp_path / out, "--unit-size", "1", "--part", f"{part}/2") == 0
    none = images(tmp_path / "none", [[], []])
    assert prepared(none, tmp_path / "c", "--unit-size", "1", "--part", "1/2") == 0
    assert prepared(none, tmp_path / "c", "--unit-size", "1", "--part", "2/2") == 2
    assert "none of the 2 images" in capsys.readouterr().err


def test_prepare_says_what_became_of_the_boxes(tmp_path, capsys):
    thin = [0.5, 0.1, 0.5, 0.9]
    assert prepared(images(tmp_path / "thin", [[thin], [thin]]), tmp_path / "a") == 2
    assert "look whether box_format is that of the source" in capsys.readouterr().err


def test_marks_of_version_01_are_counted_from_their_shards(tmp_path, capsys):
    box = [0.1, 0.1, 0.9, 0.9]
    source = images(tmp_path / "some", [[box], [], []])
    assert prepared(source, tmp_path / "a") == 0
    (mark,) = (tmp_path / "a" / ".prepared" / "units").glob("*.json")
    content = json.loads(mark.read_text())
    del content["report"]["rows_without_boxes"]
    mark.write_text(json.dumps(content))
    capsys.readouterr()
    assert prepared(source, tmp_path / "a") == 0
    assert "2 of 3 images have none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"shards": ["../../x"]}, {"shards": ["/x"]}, {"shards": [3]}, {"report": {"seen": "x"}}, {"report": {"y": 1}},
     {"report": {"skipped": {"why": 3}}}, {"report": []}, {"settings": 1}, {"source": None}, {"identity": []}],
)  # fmt: skip
def test_a_damaged_mark_of_prepare_is_one_line(tmp_path, capsys, change):
    source = images(tmp_path / "some", [[[0.1, 0.1, 0.9, 0.9]]])
    assert prepared(source, tmp_path / "a") == 0
    (mark,) = (tmp_path / "a" / ".prepared" / "units").glob("*.json")
    mark.write_text(json.dumps(json.loads(mark.read_text()) | change))
    capsys.readouterr()
    assert prepared(source, tmp_path / "a") == 2
    assert f"{mark} is no mark of a unit; remove it" in capsys.readouterr().err
    (tmp_path / "a" / ".prepared" / "settings.json").write_text("[]")
    assert prepared(source, tmp_path / "a") == 2
    assert "settings.json does not hold settings" in capsys.readouterr().err


def test_train_and_its_dry_run(tmp_path, recipe, capsys):
    some, none = write(tmp_path / "some", [2, 0]), write(tmp_path / "none", [0, 0])
    low = write(tmp_path / "low", [2, 2], score=0.2)
    for dry in ([], ["--dry-run"]):
        words = ["train", str(recipe), "--out", str(tmp_path / "run"), *dry]
        assert main([*words, "--data", some]) == 0
        assert f"{some}: 1.0 boxes an image on average, 1 of 2 images have none" in capsys.readouterr().out
        assert main([*words, "--data", none]) == 2
        assert f"none of the 2 images of {none} has a usable box" in (err := capsys.readouterr().err)
        assert err.count("\n") == 1
        assert main([*words, "--data", low]) == 2
        assert "its 4 boxes have scores of 0.25 or less (augmentation.min_score)" in capsys.readouterr().err
        assert main([*words, "--data", some, "--validation.data", none]) == 2
        assert f"none of the 2 images of validation.data {none}" in capsys.readouterr().err
        mixture = json.dumps({some: 0.5, none: 0.5})
        assert main([*words, "--data", mixture]) == 2
        assert f"of {none} has a usable box" in capsys.readouterr().err
    assert main(["train", str(recipe), "--out", str(tmp_path / "meant"), "--data", none, "--without-boxes"]) == 0


def test_the_loop_itself_refuses(tmp_path, recipe):
    """Also data that is not here before, as that of a URL."""
    none = Path(write(tmp_path / "none", [0, 0]))
    config = TrainConfig(
        model=str(recipe.parent / "base"), data=none.as_uri(), out=str(tmp_path / "run"), samples=2, batch_size=2,
        track=[], optimization=Optimization(warmup_samples=0),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"none of the 2 images of file://.* has a usable box"):
        train(config)
    train(replace(config, without_boxes=True))
