"""Looking at shards: what is wrong with them is said, and their samples become images."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from gligen_xl.cli.main import main
from gligen_xl.data.check import check_shards
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Row, Shard
from gligen_xl.prepare.preview import show_samples
from gligen_xl.toyworld.data import write_shards
from gligen_xl.toyworld.detector import detect
from gligen_xl.toyworld.world import sample_scene

METADATA = {"resolution": "64", "vae": "x", "scaling_factor": "1.0"}


def rows(count, prefix="a"):
    box = (0.1, 0.2, 0.5, 0.6)
    return [
        Row(
            image_id=f"{prefix}{k}", caption="grass", boxes=[box], scores=[0.5], phrases=["a ring"],
            original_height=64, original_width=64,
        )
        for k in range(count)
    ]  # fmt: skip


def latents(count):
    return np.random.default_rng(0).standard_normal((count, 4, 8, 8)).astype(np.float16)


def test_good_shards_have_no_problem(tmp_path):
    write_shard(tmp_path / "one", latents(3), rows(3), METADATA)
    write_shard(tmp_path / "two", latents(2), rows(2, "b"), METADATA)
    report = check_shards(tmp_path)
    assert (report.shards, report.images, report.boxes, report.problems) == (2, 5, 5, [])
    assert main(["check", str(tmp_path)]) == 0


def test_every_problem_is_named_with_its_place(tmp_path, capsys):
    write_shard(tmp_path / "one", latents(3), rows(3), METADATA)
    write_shard(tmp_path / "same", latents(1), rows(1), METADATA | {"vae": "y"})
    write_shard(tmp_path / "torn", latents(2), rows(2, "c"), METADATA)
    write_shard(tmp_path / "lone", latents(2), rows(2, "d"), METADATA)
    values = load_file(tmp_path / "one.safetensors")["latents"].copy()
    values[1, 0, 0, 0], values[2] = np.inf, 0
    header = {"format": "gligen-xl-shard", "version": "2", **METADATA}
    save_file({"latents": values}, tmp_path / "one.safetensors", metadata=header)
    torn = (tmp_path / "torn.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(torn[:-100])
    (tmp_path / "lone.arrow").unlink()
    (tmp_path / ".two.safetensors.77.partial").write_bytes(b"half")
    problems = "\n".join(check_shards(tmp_path).problems)
    for says in (
        "one: latents of row 1 hold NaN or infinity",
        "one: latents of row 2 are all the same number",
        "row 0 (a0) stands in one too",
        "torn.safetensors is cut short",
        "lacks lone.arrow",
        "latents of different VAEs: x, scaling factor 1.0 (as one); y",
        ".two.safetensors.77.partial is the rest of a write that was cut short",
    ):
        assert says in problems, problems
    assert main(["check", str(tmp_path)]) == 2
    assert "7 problems" in capsys.readouterr().err


def test_sizes_that_cannot_be_are_problems(tmp_path):
    good = rows(3)
    odd = [
        replace(good[0], image_id="b0", crop_left=1),  # a square has nothing to cut off
        replace(good[1], image_id="b1", original_height=128, crop_top=65),
        replace(good[2], image_id="b2", original_height=128, crop_top=64),
    ]
    write_shard(tmp_path / "crops", latents(3), [replace(odd[0], crop_left=3), *odd[1:]], METADATA)
    write_shard(tmp_path / "size", latents(2), rows(2), METADATA | {"resolution": "512"})
    problems = check_shards(tmp_path).problems
    assert problems == [
        "crops: row 0 (b0): its crop begins at 0, 3, too far for an image of 64 x 64, resized to fill 64 x 64",
        "size: its images have 64 x 64 pixels, its resolution is 512",
    ]


def test_many_problems_are_told_in_short(tmp_path):
    write_shard(tmp_path / "one", latents(60), rows(60), METADATA)
    write_shard(tmp_path / "same", latents(60), rows(60), METADATA)
    problems = check_shards(tmp_path).problems
    assert len(problems) == 21
    assert problems[:2] == ["same: row 0 (a0) stands in one too", "same: row 1 (a1) stands in one too"]
    assert problems[-1] == "and 40 more of this kind"


def test_to_show_one_sample_one_table_is_read(tmp_path, shapes_pipeline, monkeypatch):
    for seed in range(3):
        write_shards(shapes_pipeline.vae, tmp_path, 4, seed=seed, captions="plain")
    read = []
    real = Shard.read_table
    monkeypatch.setattr(Shard, "read_table", lambda shard: read.append(shard.stem.name) or real(shard))
    show_samples(tmp_path, index=5)
    assert len(read) == 1


def test_folders_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        check_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_shards(tmp_path / "nowhere")


def test_shown_samples_are_the_images_that_were_encoded(tmp_path, shapes_pipeline, capsys):
    write_shards(shapes_pipeline.vae, tmp_path / "shards", 6, seed=4, captions="plain")
    image, lines = show_samples(tmp_path / "shards", count=4)
    assert len(lines) == 4
    assert image.width > 2 * 256
    out = tmp_path / "one.png"
    assert main(["show", str(tmp_path / "shards"), "--index", "3", "--out", str(out)]) == 0
    assert "shapes-4-3" in capsys.readouterr().out
    with Image.open(out) as shown:
        assert min(shown.size) >= 256
    plain, _ = show_samples(tmp_path / "shards", index=3, min_score=2)  # every box is left out
    side = 8 + 2  # two frames of a grid
    crop = plain.crop((side, plain.height - side - 256, side + 256, plain.height - side))
    crop = crop.resize((64, 64), Image.Resampling.BOX)
    found = detect(crop)
    assert len(found) >= len(sample_scene(4, 3).objects) - 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--index", "99"], "there is no sample 99"),
        (["--grid", "0"], "--grid is 0"),
        (["--vae", "nowhere/at-all"], "could not be loaded"),
    ],
)
def test_wrong_wishes(words, says, tmp_path, capsys):
    write_shard(tmp_path / "one", latents(3), rows(3), METADATA | {"vae": "shapes"})
    assert main(["show", str(tmp_path), "--out", str(tmp_path / "x.png"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
