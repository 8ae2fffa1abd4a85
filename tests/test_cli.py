"""The commands, with good and with bad input: images and reports appear, errors are one line and exit code 2."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.commands import FAST, fails, run
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from PIL import Image
from safetensors.torch import load_file

from gligen_xl import StableDiffusionXLGLIGENPipeline, __version__
from gligen_xl.adapter import AdapterConfig, adapter_config, attach
from gligen_xl.cli.main import COMMANDS, main
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.images.draw import METADATA_KEY
from gligen_xl.recipes import find_recipe, recipe_names


def test_generate_writes_images_that_say_how_they_were_made(capsys, model, layouts, tmp_path):
    out = tmp_path / "out"
    words = ("generate", "--model", model, "--layout", layouts, "--out", out, "--draw", "--beta", "0.5", "--seed", 3)
    code, _, error = run(capsys, *words, *FAST)
    assert code == 0, error
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000-one_.._x-boxes.png", "0000-one_.._x.png", "0001-boxes.png", "0001.png"]
    for k, (name, seed) in enumerate([("0000-one_.._x.png", 7), ("0001.png", 4)]):
        with Image.open(out / name) as image:
            about = json.loads(image.text[METADATA_KEY])
        assert about["seed"] == seed
        assert about["layout"]["prompt"] == ("grass", "sand with a ring")[k]
        assert about["beta"] == 0.5
        assert about["versions"]["gligen-xl"]
    with Image.open(out / "0001-boxes.png") as drawn:
        assert min(drawn.size) >= 256


def test_generate_from_flags_and_the_same_seed_is_the_same_image(capsys, model, tmp_path):
    words = ["generate", "--model", model, "--prompt", "grass", "--phrase", "a ring", "--box", "0.1,0.2,0.6,0.7"]
    words += ["--phrase", "a star", "--box", 0.5, 0.5, 0.9, 0.9, "--beta", "0.2,0.4,0.4", "--count", 2, *FAST]
    images = []
    for name in ("a", "b"):
        code, _, error = run(capsys, *words, "--out", tmp_path / name, "--batch_size", 1 if name == "a" else 2)
        assert code == 0, error
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["0000.png", "0001.png"]
        images.append([Image.open(tmp_path / name / f"000{k}.png").convert("RGB") for k in range(2)])
    assert images[0][0].tobytes() != images[0][1].tobytes()
    for first, second in zip(*images, strict=True):
        differences = [abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)]
        assert max(differences) <= 1  # rounding between batch sizes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "either --layout FILE, or --prompt"),
        (("--layout", "none.jsonl"), "no layout file none.jsonl"),
        (("--layout", "x", "--prompt", "y"), "not both"),
        (("--prompt", "a", "--phrase", "b"), "1 phrases but 0 boxes"),
        (("--prompt", "a", "--phrase", "b", "--box", "0", "0", "300", "200"), "looks like pixels"),
        (("--prompt", "a", "--phrase", "b", "--box", "x"), "--box is 'x'; expected numbers"),
        (("--prompt", "a", "--beta", "7"), "beta is 7"),
        (("--prompt", "a", "--beta", "much"), "--beta is 'much'"),
        (("--prompt", "a", "--steps", "0"), "--steps is 0"),
        (("--prompt", "a", "--steps", "few"), "steps"),
        (("--prompt", "a", "--count", "0"), "--count is 0"),
        (("--prompt", "a", "--seed", "-5"), "seed"),
        (("--prompt", "a", "--width", "-8"), "width is -8"),
        (("--prompt", "a", "--width", "13"), "divisible by 8"),
        (("--prompt", "a", "--device", "abacus"), "abacus"),
        (("--prompt", "a", "--adapter", "./nowhere"), "no adapter folder ./nowhere"),
        (("--prompt", "a", "--colour", "red"), "--colour"),
    ],
)
def test_generate_refuses_wrong_input_in_one_line(capsys, model, tmp_path, words, says):
    assert says in fails(capsys, "generate", "--model", model, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_generate_without_such_a_model(capsys, tmp_path):
    assert "nowhere" in fails(capsys, "generate", "--prompt", "a", "--model", "./nowhere", "--out", tmp_path)


def test_train_runs_a_recipe_file_and_continues(capsys, model, tmp_path):
    write_shard(tmp_path / "data" / "a", latents(16, side=8), [row(1) for _ in range(16)], METADATA)
    recipe = {
        "model": model, "data": str(tmp_path / "data"), "out": str(tmp_path / "run"), "samples": 8, "batch_size": 4,
        "track": [], "augmentation": {"slots": 2}, "optimization": {"learning_rate": 0.01, "warmup_samples": 4},
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    code, output, error = run(capsys, "train", path, "--optimization.beta2", 0.9)
    assert code == 0, error
    assert "beta2: 0.9" in output  # the resolved configuration is shown
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert said["config"]["optimization"]["beta2"] == 0.9
    assert said["config"]["optimization"]["learning_rate"] == 0.01
    assert (tmp_path / "run" / "adapter" / "gligen_adapter.safetensors").is_file()
    assert "begun with optimization.beta2 0.9" in fails(capsys, "train", path)
    assert "seed" in fails(capsys, "train", path, "--seed", "x")
    path.write_text(yaml.safe_dump(recipe | {"learning_rate": 1}))
    assert "learning_rate" in fails(capsys, "train", path)
    path.write_text("- a\n- b")
    assert "expected settings" in fails(capsys, "train", path)
    path.write_text("a: [")
    assert "is neither YAML nor JSON" in fails(capsys, "train", path)


def test_train_without_such_a_recipe(capsys, tmp_path):
    assert "there is no recipe 'shape'; there are" in fails(capsys, "train", "shape")
    assert "no recipe file" in fails(capsys, "train", tmp_path / "none.yaml")
    assert "sdxl-512 has no short form" in fails(capsys, "train", "sdxl-512", "--quick")
    assert "recipe" in fails(capsys, "train")


def test_every_recipe_is_a_configuration():
    from gligen_xl.cli.common import Parser

    for name in recipe_names():
        config, *_ = COMMANDS["train"].parse(Parser(prog="gligen-xl train"), [name])
        settings = yaml.safe_load(find_recipe(name).read_text())
        assert config.samples == settings["samples"]
        assert config.augmentation.slots == settings["augmentation"]["slots"]
        assert config.optimization.learning_rate == settings["optimization"]["learning_rate"]


def test_shapes_draw_makes_layouts_that_generate_reads(capsys, model, tmp_path):
    assert run(capsys, "shapes", "draw", "--count", 3, "--out", tmp_path / "scenes")[0] == 0
    assert len(list((tmp_path / "scenes").glob("*.png"))) == 3
    words = ("generate", "--model", model, "--layout", tmp_path / "scenes" / "layouts.jsonl", "--out", tmp_path / "out")
    assert run(capsys, *words, *FAST)[0] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert "--count is 0" in fails(capsys, "shapes", "draw", "--count", 0)
    assert "action" in fails(capsys, "shapes", "paint") or "paint" in fails(capsys, "shapes", "paint")
    fails(capsys, "shapes")


def test_evaluate_writes_its_report(capsys, tmp_path):
    out = tmp_path / "report"
    code, output, error = run(capsys, "evaluate", "--count", 2, "--steps", 2, "--beta", 1, "--out", out)
    assert code == 0, error
    assert "beta-1" in output
    assert {"grid.png", "report.json", "report.md", "pictures", "detections"} <= {path.name for path in out.iterdir()}
    gone = next((out / "pictures" / "beta-1").iterdir())
    gone.unlink()
    code, _, error = run(capsys, "evaluate", "--count", 2, "--pictures", out / "pictures", "--out", tmp_path / "again")
    assert code == 1
    assert f"not scored: beta-1 {gone.stem}: missing" in error
    (tmp_path / "dogs.json").write_text('{"phrases": ["a dog"], "boxes": [[0, 0, 1, 1]]}')
    assert "cannot look for 'a dog'" in fails(
        capsys, "evaluate", "--layouts", tmp_path / "dogs.json", "--detector", "shapes", "--out", out
    )
    assert "no detector 'yolo'" in fails(capsys, "evaluate", "--detector", "yolo")


def test_version_and_help(capsys):
    code, output, _ = run(capsys, "version")
    assert code == 0
    assert f"gligen-xl {__version__}" in output
    assert re.search(r"^torch \d", output, re.MULTILINE)
    code, output, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in output for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"gligen-xl {name}" in capsys.readouterr().out
    assert "there is no command 'paint'" in fails(capsys, "paint")


def test_the_installed_command_starts_without_loading_torch():
    code = "import sys, gligen_xl.cli.main as cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("samples: many", "samples"),
        ("samples: null", "samples"),
        ("optimization: {learning_rate: fast}", "learning_rate"),
        ("augmentation: 5", "wrong kind"),
        ("validation: {every: 0}", "validation.every is 0"),
        ("validation: {every: x}", "every"),
        ("precision: fp8", "precision"),
    ],
)
def test_settings_of_the_wrong_kind_in_a_recipe(capsys, tmp_path, setting, says):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: nowhere\nout: {tmp_path / 'run'}\n{setting}\n")
    assert says in fails(capsys, "train", path)


def test_a_second_command_leaves_the_images_of_the_first(model, layouts, tmp_path, capsys):
    command = ("generate", "--layout", layouts, "--model", model, "--out", tmp_path / "p", *FAST)
    assert run(capsys, *command)[0] == run(capsys, *command)[0] == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["0000-one_.._x.png", "0001.png", "0002-one_.._x.png", "0003.png"]
    assert Image.open(tmp_path / "p" / "0001.png").tobytes() == Image.open(tmp_path / "p" / "0003.png").tobytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--count", 3), "count is 3; .* holds 2 layouts"),
        (("--part", "3/2"), "--part is '3/2'"),
        (("--sweep", "beta=x"), "--sweep is 'beta=x'"),
        (("--sweep", "steps=1"), "sweep of 'steps'"),
        (("--compare", "nowhere"), "nowhere is no evaluation"),
        (("--fid", "nowhere"), "nowhere holds no images"),
        (("--clip", "nowhere"), "no CLIP model folder nowhere"),
        (("--segmenter", "some/sam"), "--segmenter is for colours"),
        (("--beta", 1, 7), "shares of the steps, 0 to 1"),
        (("--seed", 10**20), "--seed is 1"),
        (("--out", "FILE"), "file is a file; expected a folder"),
        (("--device", "cuda:77"), "cannot use the device 'cuda:77'"),
    ],
)
def test_evaluate_complains_before_it_generates(model, layouts, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.setattr("gligen_xl.evaluate.sampling.generate", lambda *_, **__: pytest.fail("generated"))
    (tmp_path / "file").write_text("")
    words = [tmp_path / "file" if word == "FILE" else word for word in words]
    out = () if "--out" in words else ("--out", tmp_path / "report")
    assert re.search(
        says, fails(capsys, "evaluate", "--layouts", layouts, "--detector", "shapes", "--model", model, *out, *words)
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pictures", "here", "--beta", 1), "--beta is of generating"),
        (("--pictures", "here", "--model", "mine"), "--model is of generating"),
        (("--pictures", "here", "--steps", 3), "--steps is of generating"),
        (("--generate_only", "--clip", "x"), "--clip is of scoring"),
        (("--part", "1/2", "--detector", "x"), "--detector is of scoring"),
        (("--fid_python", "python"), "--fid_python is the interpreter for --fid"),
        (("--coco", "here"), "--coco is the folder of layouts that begin with coco; --layouts is shapes"),
        (("--layouts", "coco.jsonl", "--coco", "here"), "--coco is the folder"),
        (("--layouts", "coco-2017", "--layout_seed", 1), "--layout_seed is of coco-mig and coco-position"),
        (("--layouts", "coco-mig", "--real", "here"), "--real is of layouts in a file"),
    ],
)
def test_evaluate_refuses_what_it_would_ignore(tmp_path, capsys, words, says):
    assert says in fails(capsys, "evaluate", "--out", tmp_path / "report", *words)
    assert not (tmp_path / "report").exists()


def test_shapes_pack_makes_a_folder_with_both(model, tmp_path, capsys):
    pipeline = sdxl_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=40, slots=3))
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    words = ("shapes", "pack", "--base", model, "--adapter", tmp_path / "adapter", "--out", tmp_path / "packed")
    assert run(capsys, *words)[0] == 0
    packed = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "packed")
    assert adapter_config(packed.unet).slots == 3
    assert json.loads((tmp_path / "packed" / "gligen_adapter" / "gligen_adapter.json").read_text())["base_model"]
    weights = load_file(tmp_path / "packed" / "gligen_adapter" / "gligen_adapter.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert "no adapter folder" in fails(capsys, *words[:-3], tmp_path / "nothing", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()
