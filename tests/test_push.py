"""Adapters to the Hub: the card says what the run was, loads as it says, and holds nothing of the machine."""

import ast
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.commands import fails, run
from helpers.tiny import grounded, sd_pipeline, sdxl_pipeline
from PIL import Image
from safetensors.torch import load_file

from gligen_xl.adapter import AdapterConfig, adapter_state_dict, read_adapter, save_adapter, write_adapter
from gligen_xl.hub import upload
from gligen_xl.io import write_json
from gligen_xl.manifest import write_manifest
from gligen_xl.redact import public, public_name
from gligen_xl.train.publish import find_source, publish_adapter, stage_adapter

SECRETS = ("/home/mallory", "mallory", "hunter2", "bucket-of-ours")
TRAINING = {
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "data": {"/home/mallory/shards-512": 0.9, "s3://mallory:hunter2@bucket-of-ours/own-set?key=hunter2": 0.1},
    "out": "/home/mallory/runs/mine",
    "init_adapter": "/home/mallory/runs/before",
    "samples": 1280,
    "batch_size": 64,
    "precision": "fp16",
    "adapter": {"every": 1, "grounding_logit_bias": 0.0},
    "augmentation": {"drop_grounding": 0.1, "drop_caption": 0.5, "min_score": 0.25, "slots": 4},
    "optimization": {"learning_rate": 5e-5, "warmup_samples": 640, "ema_decay": 0.99},
    "validation": {"data": "C:\\mallory\\held-out", "pictures": 12},
}


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, with a checkpoint on the way."""
    folder = tmp_path / "mine"
    unet = grounded(sdxl_pipeline()).unet
    about = {"base_model": TRAINING["model"], "training": TRAINING, "versions": {"torch": "2.13.0"}}
    save_adapter(unet, folder / "adapter", metadata={**about, "samples": 1280})
    save_adapter(unet, folder / "checkpoint-00000640", metadata={**about, "samples": 640})
    write_json(folder / "checkpoint-00000640" / "state.json", {"position": 640})
    write_manifest(folder / "checkpoint-00000640")
    write_json(folder / "config.json", {"config": TRAINING, "versions": about["versions"]})
    rows = [
        {"kind": "validation", "samples": 64 * k, "loss": 0.2, "loss_no_boxes": 0.3, "grounding_gain": 0.01 * k,
         "on_mean_iou": 0.03 * k, "off_mean_iou": 0.1, "on_recall_50": 0.04 * k, "off_recall_50": 0.05}
        for k in (5, 10, 15, 20)
    ]  # fmt: skip
    rows += [{"kind": "train", "samples": 64 * k, "loss": 1.0, "samples_per_s": 32} for k in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation").mkdir()
    for row in rows[:4]:
        info = Image.new("RGB", (64, 96), "white")
        info.save(folder / "validation" / f"{row['samples']:08d}.png")
    return folder


STAGED = {"repository": "someone/meadow", "license": "openrail++"}


def card(folder):
    """The front matter, and the text after it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_the_run_was(finished, tmp_path):
    folder = stage_adapter(finished, tmp_path / "staged", **STAGED)
    front, body = card(folder)
    assert front["license"] == "openrail++"
    assert front["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert front["base_model_relation"] == "adapter"
    assert (front["library_name"], front["pipeline_tag"]) == ("gligen-xl", "text-to-image")
    assert {"gligen", "diffusers"} <= set(front["tags"])
    assert body.lstrip().startswith("# meadow")
    for words in (
        "1,280, in batches of 64", "shards-512 (90 %), own-set (10 %)", "AdamW at 5e-05", "warm-up over 640 samples",
        "`before`", "40 s (32 samples/s)", "torch 2.13.0", "arxiv.org/abs/2301.07093", "12 held-out layouts",
        "| Mean IoU | 0.6 | 0.1 |", "| Recall@0.5 | 80 % | 5 % |", "take away | 20 % |",
    ):  # fmt: skip
        assert words in body, words
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", body)
    assert images == ["images/validation-00001280.jpg", "images/validation-00000320.jpg"]
    for name in images:
        with Image.open(folder / name) as image:
            assert image.size == (64, 96)


def test_nothing_of_the_machine_is_in_what_is_uploaded(finished, tmp_path):
    folder = stage_adapter(finished, tmp_path / "staged", **STAGED)
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not any(word.encode() in text for word in (*SECRETS, str(tmp_path))), path
    training = json.loads((folder / "gligen_adapter.json").read_text())["training"]
    assert training["data"] == {"shards-512": 0.9, "own-set": 0.1}
    assert training["validation"]["data"] == "held-out"
    assert training["optimization"] == TRAINING["optimization"]
    assert training["model"] == TRAINING["model"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/data/sa1b/shards-512/", "shards-512"),
        ("~/shards", "shards"),
        ("runs\\mine", "mine"),
        ("hf://datasets/someone/set/train", "hf://datasets/someone/set/train"),
        ("s3://key:secret@bucket", "bucket"),
        ("https://host/set?token=secret#x", "set"),
        ("shapes:50000", "shapes:50000"),
        ("bf16", "bf16"),
    ],
)
def test_of_a_path_the_last_name_is_said(text, said):
    assert public_name(text) == said
    assert public({"a": [{"data": text}]}) == {"a": [{"data": said}]}


def test_a_base_in_a_folder_is_not_taken_for_a_repository(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = {"model": "runs/base", "base_model": "someone/base", "data": "runs/base"}
    assert public(settings) == {"model": "base", "base_model": "someone/base", "data": "base"}


def code(body):
    return re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]


def test_the_lines_of_the_card_run(tmp_path, monkeypatch):
    """As they stand, on the embedded model; the repository is the folder that was uploaded."""
    from gligen_xl import StableDiffusionXLGLIGENPipeline
    from gligen_xl.toyworld import model_folder

    monkeypatch.chdir(tmp_path)
    form, state, about = read_adapter(model_folder() / "gligen_adapter")
    write_adapter(tmp_path / "mine", form, state, about | {"base_model": "shapes"})
    stage_adapter(tmp_path / "mine", tmp_path / "someone" / "meadow", **STAGED)
    front, body = card(tmp_path / "someone" / "meadow")
    assert "base_model" not in front
    lines = code(body)
    assert len(lines.splitlines()) <= 12
    real = StableDiffusionXLGLIGENPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionXLGLIGENPipeline, "__call__", lambda *a, **k: real(*a, **k, num_inference_steps=2)
    )
    names = {}
    exec(compile(lines, "card", "exec"), names)
    assert names["image"].size == (64, 64)


def test_the_card_names_the_pipeline_of_the_base(tmp_path):
    unet = grounded(sd_pipeline()).unet
    state = adapter_state_dict(unet)
    form = AdapterConfig(cross_attention_dim=768, phrase_dim=768)
    write_adapter(tmp_path / "sd", form, state, {"base_model": "/models/my-sd15", "converted_from": "gligen.bin"})
    front, body = card(stage_adapter(tmp_path / "sd", tmp_path / "staged", **STAGED))
    compile(code(body), "card", "exec")
    assert "StableDiffusionGLIGENPipeline" in code(body)
    assert "my-sd15: a folder with the model that it was trained on" in code(body)
    assert "Converted from | `gligen.bin`" in body
    assert "base_model" not in front
    named = stage_adapter(tmp_path / "sd", tmp_path / "named", **STAGED, base_model="someone/sd15")
    assert card(named)[0]["base_model"] == "someone/sd15"
    assert json.loads((named / "gligen_adapter.json").read_text())["base_model"] == "someone/sd15"
    assert '"someone/sd15", torch_dtype=torch.float16' in code(card(named)[1])


def test_the_adapter_comes_back_as_it_was(finished, tmp_path):
    pipeline = sdxl_pipeline()
    pipeline.load_gligen_adapter(stage_adapter(finished, tmp_path / "staged", **STAGED))
    expected = adapter_state_dict(grounded(sdxl_pipeline()).unet)
    got = adapter_state_dict(pipeline.unet)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    half = stage_adapter(finished, tmp_path / "half", **STAGED, dtype=torch.float16)
    assert {v.dtype for v in load_file(half / "gligen_adapter.safetensors").values()} == {torch.float16}


def test_a_checkpoint_is_told_as_far_as_it_came(finished, tmp_path):
    shutil.rmtree(finished / "adapter")
    for source in (finished, finished / "checkpoint-00000640"):
        folder = stage_adapter(source, tmp_path / f"staged-{source.name}", **STAGED)
        _, body = card(folder)
        assert "640 of 1,280 planned" in body
        assert "| Mean IoU | 0.3 | 0.1 |" in body
        assert "20 s (32 samples/s)" in body
        assert sorted(path.name for path in (folder / "images").iterdir()) == [
            "validation-00000320.jpg", "validation-00000640.jpg",
        ]  # fmt: skip


def test_an_adapter_alone_has_no_run(finished, tmp_path):
    other = finished / "elsewhere"
    shutil.copytree(finished / "adapter", other)
    assert find_source(other).run is None
    assert find_source(finished / "adapter").run is not None
    _, body = card(stage_adapter(other, tmp_path / "staged", **STAGED))
    assert "How well boxes are followed" not in body
    assert "AdamW at 5e-05" in body  # the adapter's own description says it


def test_what_is_wrong_is_said_before_anything_is_written(finished, tmp_path):
    for settings, says in (
        ({"repository": "meadow"}, "expected OWNER/NAME"),
        ({"repository": "some one/meadow"}, "expected OWNER/NAME"),
        ({"base_model": "/models/base"}, "'/models/base' does not name a repository"),
    ):
        with pytest.raises(ValueError, match=says):
            stage_adapter(finished, tmp_path / "staged", **(STAGED | settings))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        stage_adapter(finished, tmp_path / "full", **STAGED)
    for name in ("adapter", "checkpoint-00000640"):
        shutil.rmtree(finished / name)
    with pytest.raises(FileNotFoundError, match="no finished adapter and no checkpoint yet"):
        stage_adapter(finished, tmp_path / "staged", **STAGED)
    with pytest.raises(FileNotFoundError, match="neither the folder of a run nor an adapter"):
        stage_adapter(tmp_path / "full", tmp_path / "staged", **STAGED)
    assert not (tmp_path / "staged").exists()


# To the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """What was uploaded: its folder, and the arguments."""
    seen = {}

    def create_repo(repo_id, **options):
        seen["created"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, repo_id, folder_path, **options):
        seen["uploaded"] = {"repo_id": repo_id, **options}
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("gligen_xl.hub.create_repo", create_repo)
    monkeypatch.setattr("gligen_xl.hub.upload_folder", upload_folder)
    return seen


WORDS = ("--repository", "someone/meadow", "--license", "openrail++")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_uploaded_is_what_a_dry_run_writes(capsys, finished, uploads, tmp_path):
    code, output, error = run(capsys, "push", finished, *WORDS, "--dry-run", tmp_path / "dry")
    assert code == 0, error
    assert not uploads
    before = sorted(path.name for path in finished.iterdir())
    code, output, error = run(capsys, "push", finished, *WORDS, "--private", "--token", "hunter2")
    assert code == 0, error
    assert output.strip() == "https://huggingface.co/someone/meadow/commit/1"
    assert files(tmp_path / "uploaded") == files(tmp_path / "dry")
    assert set(files(tmp_path / "dry")) == {
        "README.md", "gligen_adapter.json", "gligen_adapter.safetensors", "images/validation-00000320.jpg",
        "images/validation-00001280.jpg",
    }  # fmt: skip
    assert uploads["created"] == {
        "repo_id": "someone/meadow", "private": True, "token": "hunter2", "exist_ok": True,
    }  # fmt: skip
    assert uploads["uploaded"]["token"] == "hunter2"
    assert sorted(path.name for path in finished.iterdir()) == before  # nothing is left beside the adapter


def test_a_repository_that_is_not_said_to_be_private_is_as_its_owner_likes(finished, uploads):
    publish_adapter(finished, "someone/meadow", license="mit")
    assert uploads["created"]["private"] is None
    assert uploads["created"]["token"] is None


def test_without_a_network_the_error_says_what_it_takes(capsys, finished, monkeypatch):
    """And the token is not in it, whatever the library says."""

    def no_network(*_, token, **__):
        raise ConnectionError(f"cannot reach huggingface.co with {token}\nand so on")

    monkeypatch.setattr("gligen_xl.hub.create_repo", no_network)
    says = fails(capsys, "push", finished, *WORDS, "--token", "hunter2")
    assert "someone/meadow was not uploaded: cannot reach huggingface.co with ..." in says
    assert "hf auth login" in says
    assert "hunter2" not in says
    assert not list(finished.glob(".push-*"))


def test_the_command_wants_a_repository_and_a_licence(capsys, finished, tmp_path):
    assert "license" in fails(capsys, "push", finished, "--repository", "someone/meadow")
    assert "repository" in fails(capsys, "push", finished, "--license", "mit")
    assert "expected OWNER/NAME" in fails(capsys, "push", finished, "--repository", "x", "--license", "mit")
    assert "neither the folder of a run" in fails(capsys, "push", tmp_path, *WORDS)


def test_an_upload_is_made_as_asked(uploads, tmp_path):
    (tmp_path / "folder").mkdir()
    upload(tmp_path / "folder", "me/x", "a message", commit_message="mine", create_pr=True)
    assert uploads["uploaded"] == {"repo_id": "me/x", "token": None, "commit_message": "mine", "create_pr": True}


# What the card claims ------------------------------------------------------------------------------------------------


def adapter_of(folder, about, *, gate=None, cross_attention_dim=40):
    """An adapter folder whose gates are all the same."""
    state = adapter_state_dict(grounded(sdxl_pipeline()).unet)
    if gate is not None:
        state = {name: torch.full_like(v, gate) if "alpha_" in name else v for name, v in state.items()}
    form = AdapterConfig(cross_attention_dim=cross_attention_dim, phrase_dim=cross_attention_dim)
    write_adapter(folder, form, state, about)
    return folder


def body_of(folder, tmp_path, **settings):
    return card(stage_adapter(folder, tmp_path / "staged", **STAGED, **settings))[1]


def test_an_untrained_adapter_claims_nothing(tmp_path):
    body = body_of(adapter_of(tmp_path / "a", {"samples": 0, "base_model": "shapes"}, gate=0.0), tmp_path)
    for says in (
        "It has seen no sample: it was not trained.", "Its gates are closed", "has learned nothing yet",
        "Whether objects stand in their boxes was not measured.", "(the grounding gain) was not measured.",
    ):  # fmt: skip
        assert says in body, says
    assert "where you draw" not in body
    assert "| Samples seen | 0" in body


def test_what_was_never_written_down_is_said_to_be_unknown(tmp_path):
    about = {"converted_from": "gligen/gligen-generation-text-box", "base_family": "Stable Diffusion 1.x"}
    body = body_of(adapter_of(tmp_path / "a", about, gate=0.5, cross_attention_dim=768), tmp_path)
    assert "Stable Diffusion 1.x (which base model it was trained on is not recorded)" in body
    assert "How many samples it has seen in training is not recorded." in body
    assert "Its gates are open by 0.462" in body
    assert "# BASE_MODEL: a folder, or a repository of the Hub, with a model of this family" in code(body)
    assert "`gligen/gligen-generation-text-box`" in body


def test_measurements_are_told_as_they_are(finished, tmp_path):
    body = card(stage_adapter(finished, tmp_path / "good", **STAGED))[1]
    assert "Objects stood in their boxes more often with grounding on than with it off: 80 % against 5 %" in body
    assert "the boxes take away 20 % of the loss" in body
    last = {"kind": "validation", "samples": 1280, "grounding_gain": -0.01, "on_recall_50": 0.05, "off_recall_50": 0.05}
    (finished / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    body = card(stage_adapter(finished, tmp_path / "bad", **STAGED))[1]
    assert "no more often with grounding on than with it off: 5 % against 5 %" in body
    assert "the boxes do not lower the loss (the grounding gain is -1 %)" in body


@pytest.mark.parametrize(
    ("base", "says", "line"),
    [
        ("someone/base", "[someone/base](https://huggingface.co/someone/base)", '"someone/base", torch_dtype'),
        ("shapes", "the tiny model of the shapes world", '"shapes"'),
        ("base", "a base model called `base`, which was a file or folder", '"base", torch_dtype'),
        ("my.safetensors", "called `my.safetensors`", "from_single_file"),
    ],
)
def test_the_card_names_the_base(tmp_path, base, says, line):
    body = body_of(adapter_of(tmp_path / "a", {"base_model": base}), tmp_path)
    assert says in body
    assert line in code(body)


def test_the_variant_of_the_base_is_named(tmp_path):
    about = {"base_model": "someone/base", "training": {"model": "someone/base", "variant": "fp16"}}
    body = body_of(adapter_of(tmp_path / "a", about), tmp_path)
    assert "loaded from its files of the variant `fp16`" in body
    assert '"someone/base", torch_dtype=torch.float16, variant="fp16"' in code(body)


EVIL = 'x/y"\nimport os; os.system("boom") #|`</script><script>alert(1)</script>[a](javascript:b)\u202e\x1b[31m'


@pytest.mark.parametrize("name", ["base_model", "converted_from"])
def test_names_of_others_are_text(tmp_path, name):
    about = {name: EVIL, "versions": {EVIL: EVIL}, "samples": 3, "training": {"init_adapter": EVIL, "data": {EVIL: 1}}}
    front, body = card(stage_adapter(adapter_of(tmp_path / "a", about), tmp_path / "staged", **STAGED))
    assert "base_model" not in front
    for hidden in ("\u202e", "\x1b"):
        assert hidden not in body
    tree = ast.parse(code(body))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert [name.name for node in imports for name in node.names] == ["torch"]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "os"]
    text = re.sub(r"```python\n.*?```", "", body, flags=re.DOTALL)
    outside = re.sub(r"(`+).*?\1", "", text.replace("\\`", ""))
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    for line in (line for line in body.splitlines() if line.startswith("| ")):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    "strange",
    [
        {"training": "text"},
        {"training": {"data": 7, "batch_size": "x", "optimization": [1], "adapter": {"every": "x"}}},
        {"training": {"optimization": {"learning_rate": "fast", "warmup_samples": None}, "validation": "no"}},
        {"samples": "many", "versions": ["torch"], "base_model": 5}, {"samples": True, "training": None},
    ],
)  # fmt: skip
def test_descriptions_of_another_form_are_no_hindrance(tmp_path, strange):
    body = body_of(adapter_of(tmp_path / "a", strange), tmp_path)
    compile(code(body), "card", "exec")


def test_of_images_those_that_can_be_read_are_shown(finished, tmp_path):
    for samples in (320, 1280):
        file = finished / "validation" / f"{samples:08d}.png"
        file.write_bytes(file.read_bytes()[:60])
    folder = stage_adapter(finished, tmp_path / "staged", **STAGED)
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        "validation-00000640.jpg", "validation-00000960.jpg",
    ]  # fmt: skip


# The token ----------------------------------------------------------------------------------------------------------


def test_the_token_from_a_file(capsys, finished, uploads, tmp_path):
    (tmp_path / "token").write_text("\ufeffhunter2\n", encoding="utf-8")
    code, output, error = run(capsys, "push", finished, *WORDS, "--token-file", tmp_path / "token")
    assert (code, error) == (0, ""), error
    assert uploads["created"]["token"] == "hunter2"
    assert "hunter2" not in output


def test_a_token_on_the_command_line_is_warned_of(capsys, finished, uploads):
    code, _, error = run(capsys, "push", finished, *WORDS, "--token", "hunter2")
    assert code == 0
    assert uploads["created"]["token"] == "hunter2"
    assert "other users of this machine can read it; set HF_TOKEN, or give --token_file" in error
    assert "hunter2" not in error


def test_what_is_no_token_is_refused(capsys, finished, uploads, tmp_path):
    (tmp_path / "two").write_text("hunter2 hunter3")
    says = fails(capsys, "push", finished, *WORDS, "--token-file", tmp_path / "two")
    assert "holds 2 words; expected the token alone" in says
    assert "hunter" not in says
    assert "no file" in fails(capsys, "push", finished, *WORDS, "--token-file", tmp_path / "none")
    both = ("--token-file", tmp_path / "two", "--token", "hunter2")
    assert "leave --token out" in fails(capsys, "push", finished, *WORDS, *both)
    assert not uploads
