"""What is wrong on the command line is said before anything heavy is imported; and what is nearly right is named."""

import json
import subprocess
import sys

import pytest
from helpers.commands import fails
from PIL import Image

from gligen_xl.cli.common import Parser
from gligen_xl.cli.schedulers import NAMED, new_scheduler, scheduler_settings
from gligen_xl.cli.values import UsageError
from gligen_xl.dtypes import dtype_name
from gligen_xl.layout import Layout
from gligen_xl.suggestions import did_you_mean

ONE = ("--prompt", "grass", "--phrase", "a red circle", "--box", "0.1", "0.2", "0.6", "0.7")

REFUSED = [  # words, and what the line says
    (("generat",), "there is no command 'generat'; did you mean generate?"),
    (("trian", "shapes"), "did you mean train?"),
    (("generate", *ONE, "--promt", "x"), "there is no option --promt; did you mean --prompt"),
    (("generate", *ONE, "--guidance-scal", "3"), "did you mean --guidance_scale?"),
    (("generate", "--prompt", "a", "red", "circle"), "'red circle' belongs to no option; put quotes around"),
    (("generate", *ONE, "--model", "shape"), "did you mean shapes?"),
    (("generate", *ONE, "--model", "./nowhere"), "no pipeline folder ./nowhere"),
    (("generate", *ONE, "--model", "FOLDER/modle"), "did you mean FOLDER/model?"),
    (("generate", *ONE, "--adapter", "./nowhere"), "no adapter folder ./nowhere"),
    (("generate", *ONE, "--adapter", "FILE"), "is a file; expected an adapter folder"),
    (("generate", *ONE, "--lora", "./nowhere.safetensors"), "no LoRA folder ./nowhere.safetensors"),
    (("generate", *ONE, "--lora", "FILE=much"), "the scale of --lora is 'much'"),
    (("generate", *ONE, "--controlnet", "./no", "--control_image", "PICTURE"), "no ControlNet folder ./no"),
    (("generate", *ONE, "--controlnet", "FOLDER", "--control_image", "./no.png"), "no image ./no.png"),
    (("generate", *ONE, "--image", "./no.png"), "no image ./no.png"),
    (("generate", *ONE, "--image", "FOLDER"), "is a folder; expected an image"),
    (("generate", *ONE, "--image", "PICTURE", "--mask", "./no.png"), "no image ./no.png"),
    (("generate", *ONE, "--mask", "PICTURE"), "give both"),
    (("generate", *ONE, "--inpaint_image", "./no.png"), "no image ./no.png"),
    (("generate", "--layout", "./no.jsonl"), "no layout file ./no.jsonl"),
    (("generate", "--layout", "FILE", "--prompt", "a"), "not both"),
    (("generate", *ONE, "--beta", "2"), "--beta is 2.0; expected shares of the steps, 0 to 1"),
    (("generate", *ONE, "--beta", "-1"), "--beta is -1.0"),
    (("generate", *ONE, "--beta", "0.5,0.1,0.1"), "sum to 1"),
    (("generate", "--prompt", "a", "--beta", "1"), "--beta is of the boxes, and there are none"),
    (("generate", "--prompt", "a", "--draw"), "--draw draws the boxes, and there are none"),
    (("generate", "--prompt", "a", "--adapter_scale", "0.5"), "--adapter_scale is of the boxes"),
    (("generate", "--prompt", "a", "--inpaint_image", "PICTURE"), "every layout needs one or more"),
    (
        ("generate", *ONE, "--device", "gpu"),
        "--device is 'gpu'; expected cpu, cuda, cuda:1, mps, ...; did you mean cuda?",
    ),
    (("generate", *ONE, "--device", "gpu:1"), "did you mean cuda:1?"),
    (("generate", *ONE, "--device", "cuda:x"), "--device is 'cuda:x'"),
    (("generate", *ONE, "--device", "cpu", "--offload", "model"), "--offload keeps parts"),
    (("generate", *ONE, "--dtype", "fp15"), "--dtype: 'fp15' is no number format"),
    (("generate", *ONE, "--steps", "0"), "--steps is 0; expected at least 1"),
    (("generate", *ONE, "--steps", "few"), "--steps is 'few'; expected a whole number"),
    (("generate", *ONE, "--batch_size", "0"), "--batch_size is 0"),
    (("generate", *ONE, "--guidance_scale", "nan"), "guidance_scale is nan; expected a number"),
    (("generate", *ONE, "--guidance_scale", "1", "--negative_prompt", "x"), "--negative_prompt works by guidance"),
    (("generate", *ONE, "--width", "13"), "width is 13; expected a number divisible by 8"),
    (("generate", *ONE, "--seed", "-5"), "--seed is -5"),
    (("generate", *ONE, "--scheduler", "eulr"), "did you mean euler"),
    (("generate", *ONE, "--out", "FILE"), "is a file; expected a folder"),
    (("generate", *ONE, "--out", "FILE/deeper"), "which is a file"),
    (("generate", *ONE, "--variant", "fp16"), "--variant chooses among the files"),
    (("generate", *ONE, "--config", "FOLDER"), "--config is for a checkpoint in one file"),
    (("generate", *ONE, "--image", "PICTURE", "--strength", "0.05", "--steps", "10"), "is less than one step"),
    (("generate", *ONE, "--image", "PICTURE", "--strength", "0"), "--strength is 0.0; expected more than 0"),
    (("generate", *ONE[:5], "0.1", "0.2", "0.6"), "3 numbers; expected four"),
    (("generate", *ONE[:5], "10", "20", "60", "70"), "which look like percent"),
    (("generate", *ONE[:5], "10", "20", "600", "700"), "which looks like pixels"),
    (("generate", *ONE, "--box", "0.1,0.2,0.6,0.7"), "1 phrases but 2 boxes"),
    (("generate", "--prompt", "a\udcff", "--phrase", "b", "--box", "0,0,1,1"), "prompt is 'a\\udcff'"),
    (("generate", "--layout", "SURROGATE"), "phrases[0] is 'a \\ud800'"),
    (("generate", "--layout", "SEEDED", "--seed", "3"), "every layout of SEEDED has its own"),
    (("evaluate", "--beta", "2"), "--beta is 2.0"),
    (("evaluate", "--sweep", "bta=1"), "a sweep of 'bta'; expected one of beta, guidance_scale"),
    (("evaluate", "--layouts", "shape"), "did you mean shapes?"),
    (("evaluate", "--detector", "shpes"), "did you mean shapes?"),
    (("evaluate", "--model", "./nowhere"), "no pipeline folder"),
    (("evaluate", "--out", "FILE"), "is a file; expected a folder"),
    (("evaluate", "--pictures", "./nowhere"), "there is no such folder"),
    (("evaluate", "--compare", "./nowhere"), "./nowhere is no evaluation"),
    (("evaluate", "--clip", "./nowhere"), "no CLIP model folder ./nowhere"),
    (("evaluate", "--threshold", "2"), "--threshold is 2.0"),
    (("evaluate", "--device", "gpu"), "did you mean cuda?"),
    (("evaluate", "--steps", "0"), "--steps is 0"),
    (("train", "shape"), "there is no recipe 'shape'; there are"),
    (("train", "shape"), "did you mean shapes?"),
    (("prepare", "./nowhere", "--out", "NEW"), "there is no nowhere"),
    (("prepare", "FOLDER", "--out", "FILE"), "is a file; expected a folder"),
    (("prepare", "FOLDER", "--out", "NEW", "--kind", "coc"), "did you mean coco?"),
    (("prepare", "FOLDER", "--out", "NEW", "--vae", "./no"), "no VAE folder ./no"),
    (("prepare", "FOLDER", "--out", "NEW", "--device", "gpu"), "did you mean cuda?"),
    (("prepare", "FOLDER", "--out", "NEW", "--resolution", "100"), "a multiple of 8"),
    (("prepare", "FOLDER", "--out", "NEW", "--runners", "2"), "goes with --runner ray"),
    (("show", "./nowhere"), "there is no such folder"),
    (("show", "FOLDER", "--out", "FOLDER"), "is a folder; expected the file to write"),
    (("show", "FOLDER", "--index", "1", "--grid", "4"), "--grid is of several samples"),
    (("convert", "./nowhere", "--out", "NEW"), "no adapter folder ./nowhere"),
    (("convert", "FILE", "--out", "NEW", "--variant", "fp16"), "--variant chooses among the files"),
    (("convert", "FILE", "--out", "NEW", "--revision", "main"), "--revision is of a Hub repository"),
    (("convert", "FILE", "--out", "FILE"), "is a file; expected a folder"),
    (("export", "--model", "./nowhere", "--out", "NEW"), "no pipeline folder ./nowhere"),
    (("export", "--model", "shapes", "--out", "FILE"), "is a file; expected a folder"),
    (("export", "--model", "shapes", "--out", "FOLDER"), "is not empty"),
    (("export", "--model", "shapes", "--adapter", "./no", "--out", "NEW"), "no adapter folder ./no"),
    (("push", "./nowhere", "--repository", "a/b", "--license", "mit"), "there is no such folder"),
    (("check", "./nowhere"), "there is no such folder"),
    (("report", "./nowhere"), "there is no such folder"),
    (("import", "./nowhere", "FOLDER", "--out", "NEW"), "there is no such folder"),
    (("shapes", "dmo"), "did you mean demo?"),
    (("shapes", "pack", "--base", "./nowhere"), "there is no such folder"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders that the words name."""
    root = tmp_path_factory.mktemp("places")
    (root / "folder" / "model").mkdir(parents=True)
    (root / "file").write_text("no model")
    Image.new("RGB", (16, 16)).save(root / "picture.png")
    layout = {"prompt": "a", "phrases": ["a b"], "boxes": [[0, 0, 1, 1]], "seed": 3}
    (root / "seeded.json").write_text(json.dumps(layout))
    (root / "surrogate.json").write_text(json.dumps({**layout, "phrases": ["a \ud800"]}))
    names = {"FOLDER": "folder", "FILE": "file", "PICTURE": "picture.png", "NEW": "new", "SEEDED": "seeded.json",
             "SURROGATE": "surrogate.json"}  # fmt: skip
    return {name: str(root / file) for name, file in names.items()}


def test_refusals_come_before_anything_heavy(places, tmp_path):
    """Each in one process, which has imported nothing that computes by the end."""

    def filled(text):
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    cases = [([filled(word) for word in words], filled(says)) for words, says in REFUSED]
    script = (
        "import contextlib, io, json, sys; from gligen_xl.cli.main import main; wrong = []\n"
        "for words, says in json.loads(sys.argv[1]):\n"
        "    errors = io.StringIO()\n"
        "    with contextlib.redirect_stderr(errors): code = main(words)\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    lines = errors.getvalue().splitlines()\n"
        "    if code != 2 or len(lines) != 1 or says not in lines[0]:\n"
        "        wrong.append([words, says, code, lines])\n"
        "    assert not heavy, (words, heavy)\n"
        "print(json.dumps(wrong))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cases)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert not list(tmp_path.iterdir())  # and nothing was written


def test_training_is_refused_before_a_model_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.train.loop.train", lambda config: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"data": str(tmp_path), "out": str(tmp_path / "run"), "model": "shapes"}))
    for words, says in [
        (("--model", "./nowhere"), "no pipeline folder ./nowhere"),
        (("--data", "./nowhere"), "data ./nowhere is not there"),
        (("--out", tmp_path / "file"), "is a file; expected a folder"),
        (("--precision", "fp8"), "precision is fp8; expected one of no, fp16, bf16"),
        (("--optimization.learning_rat", "1"), "did you mean --optimization.learning_rate"),
    ]:
        assert says in fails(capsys, "train", recipe, *words)


# Names --------------------------------------------------------------------------------------------------------------


def test_near_names():
    assert did_you_mean("genrate", ["generate", "train"]) == "; did you mean generate?"
    assert did_you_mean("sdxl_512", ["sdxl-512", "sdxl-1024"]) == "; did you mean sdxl-512?"
    assert did_you_mean("zebra", ["generate", "train"]) == ""
    assert did_you_mean("x" * 10**6, ["generate"]) == ""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", "float16"),
        ("half", "float16"),
        ("FP32", "float32"),
        ("torch.bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
    ],
)
def test_number_formats_by_the_names_people_know(name, dtype):
    assert dtype_name(name) == dtype


def test_precisions_of_training_have_one_name_each():
    from gligen_xl.train.config import TrainConfig

    for given, name in {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "fp32": "no", "no": "no"}.items():
        assert TrainConfig(data="d", out="o", precision=given).precision == name
    assert TrainConfig(data="d", out="o", gradient_compression="bfloat16").gradient_compression == "bf16"


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("k_euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler",
         {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
        ("dpmpp_2m_sde_karras", "DPMSolverMultistepScheduler",
         {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("DDIM", "DDIMScheduler", {}),
        ("UniPC", "UniPCMultistepScheduler", {}),
        ("lcm", "LCMScheduler", {}),
        ("eulerdiscretescheduler", "EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler", {}),
    ],
)  # fmt: skip
def test_schedulers_by_the_names_people_know(name, kind, settings):
    assert scheduler_settings(name) == (kind, settings)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # scipy's, of diffusers' tensors
def test_each_named_scheduler_takes_the_settings_of_the_models(shapes_pipeline):
    former = shapes_pipeline.scheduler
    for name, (kind, settings) in NAMED.items():
        if kind == "DPMSolverSDEScheduler":  # needs torchsde
            with pytest.raises(UsageError, match="torchsde"):
                new_scheduler(name, former)
            continue
        made = new_scheduler(name, former)
        assert type(made).__name__ == kind
        assert {setting: made.config[setting] for setting in settings} == settings
        assert made.config["beta_start"] == former.config["beta_start"]
    assert new_scheduler("dpm++2m-karras", former).config["use_karras_sigmas"] is True
    with pytest.raises(UsageError, match="has no use_karras_sigmas"):
        new_scheduler("ddim-karras", former)
    with pytest.raises(UsageError, match=r"this model takes .*; did you mean EulerDiscreteScheduler"):
        new_scheduler("EulerDiscretScheduler", former)


# Words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "boxes",
    [
        ("--box", "0.1", "0.2", "0.6", "0.7", "--box", "0.5", "0.5", "0.9", "0.9"),
        ("--box", "0.1,0.2,0.6,0.7", "--box=0.5,0.5,0.9,0.9"),
        ("--box", "0.1", "0.2", "0.6", "0.7", "0.5", "0.5", "0.9", "0.9"),
        ("--box", "0.1,0.2,0.6,0.7", "0.5,0.5,0.9,0.9"),
        ("--box", "1e-1", ".2", "6e-1", "0.7", "--box=0.5 0.5 0.9 0.9"),
    ],
)
def test_boxes_are_spelled_as_one_likes(boxes):
    from gligen_xl.cli import generate

    words = ["--prompt", "--a dash-ed prompt", "--phrase", "a", "--phrase", "b", *boxes]
    _, layouts, beta = generate.parse(Parser(prog="x"), words)
    assert layouts == [
        Layout(prompt="--a dash-ed prompt", phrases=["a", "b"], boxes=[[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 0.9, 0.9]])
    ]
    assert beta == 0.3


def test_a_negative_number_is_no_option():
    from gligen_xl.cli import generate

    words = ["--prompt", "a", "--phrase", "b", "--box", "-.002,-1e-3,0.5", "0.5"]
    _, layouts, _ = generate.parse(Parser(prog="x"), words)
    assert layouts[0].boxes == ((0.0, 0.0, 0.5, 0.5),)


def test_several_prompts_share_their_boxes():
    from gligen_xl.cli import generate

    words = ["--prompt", "grass", "--prompt", "sand", "--phrase", "b", "--box", "0,0,1,1", "--count", "2"]
    _, layouts, _ = generate.parse(Parser(prog="x"), words)
    assert [layout.prompt for layout in layouts] == ["grass", "grass", "sand", "sand"]
    assert {layout.boxes for layout in layouts} == {((0.0, 0.0, 1.0, 1.0),)}
