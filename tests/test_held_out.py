"""Images of the training's own data are held out of it for validation: the same ones always, with all of their rows."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import final, lines, train_until

from gligen_xl.cli.main import main
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.held_out import FEWEST, hold_out
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Shard, find_shards
from gligen_xl.train.checkpoint import list_checkpoints
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.estimate import describe, estimate
from gligen_xl.train.loop import train
from gligen_xl.train.options import Optimization, Validation


def write(folder, count, first=0, shard="a", side=8):
    rows = [replace(row(1 + k % 3), image_id=f"picture-{first + k}") for k in range(count)]
    write_shard(folder / shard, latents(count, side=side), rows, METADATA)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def config(base, tmp_path):
    return TrainConfig(
        model=str(base), data=str(write(tmp_path / "shards", 40)), out=str(tmp_path / "run"), samples=48, batch_size=4,
        checkpoint_every=16, log_every=2, track=[], optimization=Optimization(warmup_samples=0, ema_decay=0.5),
        validation=Validation(held_out=0.1, every=24, loss_samples=8, pictures=1, steps=2),
    )  # fmt: skip


def ids(dataset):
    return [dataset.row(number).image_id for number in range(len(dataset))]


def opened(folders, shares):
    return ShardDataset(folders, Augmentation(), 0, held_out=shares)


def test_training_and_validation_share_no_image_and_lose_none(tmp_path):
    write(tmp_path / "x", 30, shard="a")
    write(tmp_path / "x", 50, first=30, shard="b")
    write(tmp_path / "x", 20, first=80, shard="wide", side=16)
    dataset = opened([tmp_path / "x"], [0.1])
    rest = dataset.held_out_samples(Augmentation())
    assert (len(dataset), len(rest)) == (90, 10)
    assert sorted(ids(dataset) + ids(rest)) == sorted(f"picture-{k}" for k in range(100))
    assert sum(dataset.groups) == 90
    order = dataset.order(1, 0)
    epoch = {int(order.batch(k)[0]) for k in range(order.batches_per_epoch)}
    assert epoch == set(range(90))


def test_each_sample_is_the_row_and_the_latents_of_its_image(tmp_path):
    write(tmp_path / "x", 30, shard="a")
    write(tmp_path / "x", 50, first=30, shard="b")
    dataset = opened([tmp_path / "x"], [0.2])
    stored = {
        entry["image_id"]: shard.latents[k]
        for shard in find_shards(tmp_path / "x")
        for k, entry in enumerate(shard.rows("image_id"))
    }
    for part in (dataset, dataset.held_out_samples(Augmentation(drop_grounding=0, drop_caption=0))):
        for number in range(len(part)):
            shard, index = part.find(number)
            assert shard.row(index).image_id == part.row(number).image_id
            assert np.array_equal(part[number, 0].latents, stored[part.row(number).image_id])


def test_what_is_held_out_follows_from_the_ids_alone(tmp_path):
    write(tmp_path / "one", 100)
    write(tmp_path / "two", 60, shard="a")
    write(tmp_path / "two", 40, first=60, shard="b")
    held = [ids(opened([tmp_path / name], [0.1]).held_out_samples(Augmentation())) for name in ("one", "two")]
    assert sorted(held[0]) == sorted(held[1])
    assert len(held[0]) == 10


def test_an_image_is_held_out_with_its_mirror_image(tmp_path):
    rows = [replace(row(1), image_id=f"p{k // 2}" + ("-mirrored" if k % 2 else "")) for k in range(80)]
    write_shard(tmp_path / "a", latents(80, side=8), rows, METADATA)
    dataset = opened([tmp_path], [0.1])
    held = ids(dataset.held_out_samples(Augmentation()))
    assert dataset.held_out[0].images == 4
    assert len(held) == 8
    assert {name + "-mirrored" for name in held if not name.endswith("-mirrored")} <= {*held}


def test_of_a_mixture_each_source_gives_its_own(tmp_path):
    folders = [write(tmp_path / "x", 40), write(tmp_path / "y", 20, first=100), write(tmp_path / "z", 5, first=200)]
    dataset = opened(folders, [0.1, 0.1, 0.1])
    assert [part.images for part in dataset.held_out] == [4, 2, 0]
    assert len(dataset.held_out_samples(Augmentation())) == 6
    assert dataset.groups == [36, 18, 5]
    assert opened(folders, [0.1, 0.0, 0.0]).groups == [36, 20, 5]


@pytest.mark.parametrize(("count", "held"), [(1, 0), (FEWEST - 1, 0), (FEWEST, 1), (20, 1), (30, 2), (200, 10)])
def test_of_few_images_few_or_none_are_held_out(tmp_path, count, held):
    dataset = opened([write(tmp_path / "x", count)], [0.05])
    assert len(dataset) == count - held
    assert len(dataset.held_out_samples(Augmentation())) == held or count  # of too few, those of the training


def test_of_many_images_a_few_shards_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.data.held_out.SEARCHED", 50)
    for k in range(10):
        write(tmp_path / "x", 20, first=20 * k, shard=f"s{k}")
    held = hold_out([Shard(shard.stem, with_table=False) for shard in find_shards(tmp_path / "x")], 0.05)
    assert (held.images, held.of, len(held.rows)) == (10, 60, 3)


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_on_own_images_is_validated_on_what_it_does_not_see_and_resumes_to_the_bit(config, tmp_path, capsys):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    said = capsys.readouterr().out
    assert f"images that are kept out of the training (validation.held_out 0.1): 4 of {config.data}" in said
    assert f"{config.data}: 2.0 boxes an image on average, every image has some" in said
    train_until(40, config)
    train(config)
    (expected, state), (got, again) = final(whole.out), final(config.out)
    assert state["groups"] == again["groups"] == [36]
    assert state["held_out"] == again["held_out"]
    assert all(value.equal(got[name]) for name, value in expected.items())
    assert lines(config.out, "validation") == lines(whole.out, "validation")
    assert [entry["samples"] for entry in lines(config.out, "validation")] == [24, 48]


def test_other_images_or_another_share_under_a_run_are_refused(config, tmp_path):
    train_until(40, config)
    with pytest.raises(ValueError, match=r"begun with validation\.held_out 0\.1, now it is 0\.2"):
        train(replace(config, validation=replace(config.validation, held_out=0.2)))
    write(Path(config.data), 40, first=7)
    with pytest.raises(ValueError, match="other images held out"):
        train(config)


def test_a_run_may_go_on_without_validation_or_with_other_data_and_sees_the_same_images(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    other = write(tmp_path / "other", 12, first=900)
    for name, change in (("off", {"held_out": 0.0}), ("other", {"data": str(other)})):
        begun = replace(config, out=str(tmp_path / name))
        train_until(24, begun)
        train(replace(begun, validation=replace(config.validation, **change)))
        expected, got = final(whole.out)[0], final(begun.out)[0]
        assert all(value.equal(got[key]) for key, value in expected.items())


def test_a_run_that_was_begun_without_held_out_images_goes_on_so(config, tmp_path):
    """One of version 0.1, whose recipe named other data or none."""
    other = str(write(tmp_path / "other", 12, first=900))
    for name, data, validated in (("none", None, []), ("other", other, [24, 48])):
        former = replace(config.validation, held_out=0.0, data=data) if data else Validation()
        begun = replace(config, out=str(tmp_path / name), validation=former)
        train_until(36, begun)
        last = list_checkpoints(begun.out)[-1]
        state = json.loads((last / "state.json").read_text())
        assert state.pop("held_out") is None
        del state["config"]["validation"]["held_out"]
        (last / "manifest.json").unlink()
        (last / "state.json").write_text(json.dumps(state | {"sha256": checksums(last)}))
        train(replace(begun, validation=config.validation))
        assert final(begun.out)[1]["groups"] == [40]
        assert [entry["samples"] for entry in lines(begun.out, "validation")] == validated


def checksums(folder):
    """As version 0.1 has them in its state."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_too_few_images_are_looked_at_themselves(config, tmp_path, capsys):
    few = replace(config, data=str(write(tmp_path / "few", 6)))
    train(few)
    assert "on the 6 images of the training itself, too few to keep any out" in capsys.readouterr().out
    assert len(lines(few.out, "validation")) == 2


def test_a_dry_run_says_it(config):
    told = describe(estimate(config))
    assert f"(validation.held_out 0.1): 4 of {config.data}" in told
    assert f"{config.data}: 2.0 boxes an image on average, every image has some (of a score above 0.25)" in told


def test_the_recipe_of_the_embedded_model_looks_at_own_images(tmp_path, capsys):
    """Drawn as images of one's own: the detector of the shapes world knows their phrases, but not others."""
    assert main(["shapes", "draw", "--count", "24", "--out", str(tmp_path / "pictures")]) == 0
    words = [str(tmp_path / "pictures"), "--vae", "shapes", "--resolution", "64", "--workers", "0"]
    assert main(["prepare", *words, "--out", str(tmp_path / "shards")]) == 0
    quick = ["--samples", "64", "--validation.pictures", "2", "--validation.steps", "1", "--track", "[]"]
    quick += ["--validation.loss_samples", "8"]
    run = ["train", "shapes", "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), *quick]
    assert main(run) == 0
    assert f"1 of {tmp_path / 'shards'}" in capsys.readouterr().out
    assert "on_mean_iou" in lines(tmp_path / "run", "validation")[0]
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    entries = [json.loads(line) for line in metadata.read_text().splitlines()]
    changed = [entry | {"phrases": ["a purple elephant" for _ in entry["phrases"]]} for entry in entries]
    metadata.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert main(["prepare", *words, "--out", str(tmp_path / "others")]) == 0
    run = ["train", "shapes", "--data", str(tmp_path / "others"), "--out", str(tmp_path / "other"), *quick]
    assert main(run) == 0
    assert "does not know 'a purple elephant'" in capsys.readouterr().out
    assert "on_mean_iou" not in lines(tmp_path / "other", "validation")[0]
