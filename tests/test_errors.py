"""Every error of a command is one line that names the file and leaves nothing for a terminal to obey; a successful
command says nothing on the standard error but what concerns its user."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import fails, run
from helpers.tiny import grounded, sdxl_pipeline
from PIL import Image
from tqdm import tqdm

from gligen_xl.cli.errors import one_line, shown
from gligen_xl.cli.main import COMMANDS, main
from gligen_xl.cli.prepare import PrepareProgress
from gligen_xl.images.draw import METADATA_KEY, draw_boxes
from gligen_xl.io import reading
from gligen_xl.toyworld import model_folder

ONE = ("--prompt", "grass", "--phrase", "a red circle", "--box", "0.1", "0.2", "0.6", "0.7", "--beta", "1")
TINY = (*ONE, "--steps", "1", "--width", "16", "--height", "16")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    grounded(sdxl_pipeline()).save_pretrained(folder)
    return folder


# The line -----------------------------------------------------------------------------------------------------------


class PanicException(BaseException):  # as tokenizers' of Rust: no Exception
    pass


class OutOfMemoryError(RuntimeError):
    pass


RAISED = [
    (KeyError("id"), "error: KeyError: 'id'"),
    (TypeError("no such\n  argument"), "error: TypeError: no such argument"),
    (ValueError(), "error: ValueError"),
    (PanicException("index out of bounds"), "error: PanicException: index out of bounds"),
    (RecursionError("too deep"), "nested too deeply"),
    (MemoryError(), "error: out of memory"),
    (OutOfMemoryError("CUDA out of memory"), "error: out of memory (CUDA out of memory)"),
    (OSError(28, "No space left on device", "/somewhere/a.png"), "error: /somewhere/a.png: No space left on device"),
    (PermissionError(13, "Permission denied", b"/some\xff"), "error: /some\\\\xff: Permission denied"),
    (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"), "surrogates not allowed"),
    (ValueError("a\x1b[31m\u202eb\ud800"), "error: a\\x1b[31m\\u202eb\\ud800"),
    (SystemExit("some\nlibrary gives up"), "error: some library gives up"),
    (BrokenPipeError("of a worker"), "error: of a worker"),
]


@pytest.mark.parametrize(("error", "says"), RAISED, ids=lambda value: type(value).__name__)
def test_every_exception_is_one_line_and_code_2(error, says, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(COMMANDS["version"], "run", fail)
    assert main(["version"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("gligen-xl version: error: ")
    assert says.replace("\\\\", "\\") in lines[0]


def test_a_long_message_is_cut():
    assert len(one_line(ValueError("x" * 10**6))) < 2100
    assert shown("ordinary text, größer als 漢字") == "ordinary text, größer als 漢字"


@pytest.mark.parametrize("words", [["--traceback", "version"], ["version", "--traceback"]])
def test_the_traceback_is_shown_where_asked(words, capsys, monkeypatch):
    def fail():
        raise KeyError("id")

    monkeypatch.setattr(COMMANDS["version"], "run", fail)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1] == "gligen-xl version: error: KeyError: 'id'"
    monkeypatch.setenv("GLIGEN_XL_TRACEBACK", "1")
    assert main(["version"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_reader_that_is_gone_ends_it_without_a_word():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "gligen_xl.cli", "version"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_reading_keeps_what_names_its_file_and_wraps_the_rest(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is not settings: KeyError: 'id'"), reading("a.json", "settings"):
        raise KeyError("id")
    with pytest.raises(ValueError, match=r"^a\.json, line 3: wrong$"), reading("a.json", "settings"):
        raise ValueError("a.json, line 3: wrong")
    with pytest.raises(FileNotFoundError), reading("a.json", "settings"):
        (tmp_path / "nothing").read_text()


# The Hub ------------------------------------------------------------------------------------------------------------


def commands_that_fetch(folder):
    return [
        ["download", "boxes", "--archives", "1", "--out", "d"],
        ["generate", *TINY, "--model", "some/thing"],
        ["generate", *TINY, "--adapter", "some/thing"],
        ["generate", *TINY, "--lora", "some/thing"],
        ["generate", *TINY, "--lora", "some/thing/style.safetensors"],
        ["generate", *TINY, "--controlnet", "some/thing", "--control_image", f"{folder}/a.png"],
        ["evaluate", "--count", "1", "--steps", "1", "--model", "some/thing", "--out", "e"],
        ["evaluate", "--count", "1", "--steps", "1", "--clip", "some/thing", "--out", "e"],
        ["evaluate", "--count", "1", "--steps", "1", "--detector", "some/thing", "--out", "e"],
        ["convert", "some/thing", "--out", "c"],
        ["export", "--model", "some/thing", "--out", "x"],
        ["export", "--model", "shapes", "--adapter", "some/thing", "--out", "x"],
        ["prepare", folder, "--out", "p", "--vae", "some/thing", "--resolution", "64", "--workers", "0"],
        ["prepare", folder, "--out", "q", "--vae", "shapes", "--detector", "some/thing", "--workers", "0"],
        ["train", "shapes", "--model", "some/thing", "--dry_run"],
        ["train", "shapes", "--model", "some/thing", "--out", "t"],
    ]


def test_a_hub_that_cannot_be_reached_is_one_line_in_every_command(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    script = (
        "import contextlib, io, json, sys; from gligen_xl.cli.main import main; told = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    errors = io.StringIO()\n"
        "    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()): code = main(words)\n"
        "    told.append([code, errors.getvalue().splitlines()])\n"
        "print(json.dumps(told))"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    commands = commands_that_fetch(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    for words, (code, lines) in zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (code, len(lines)) == (2, 1), (words, lines)
        assert ("sa-1b_boxes_sdxl" if words[0] == "download" else "some/thing") in lines[0]
        assert "the Hub cannot be reached" in lines[0]
        assert "check the network, or give a folder" in lines[0]


def test_offline_the_line_says_that_it_was_asked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gligen_xl.hub.HF_HUB_OFFLINE", True)
    says = fails(capsys, "generate", *TINY, "--lora", "some/thing")
    assert "no LoRA folder some/thing" in says
    assert "HF_HUB_OFFLINE is set" in says
    assert "HF_HUB_OFFLINE is set" in fails(capsys, "download", "boxes", "--out", tmp_path)


# Noise --------------------------------------------------------------------------------------------------------------


def test_imports_and_success_are_silent(good, tmp_path):
    """In one process, where each library is imported once; bars are for terminals."""
    commands = [
        ["version"],
        ["shapes", "draw", "--count", "2", "--out", "scenes"],
        ["generate", *ONE, "--steps", "1"],
        ["generate", "--layout", "scenes/layouts.jsonl", "--steps", "1", "--beta", "1", "--draw"],
        ["evaluate", "--count", "1", "--steps", "1", "--beta", "1", "--out", "evaluation"],
        ["convert", str(model_folder() / "gligen_adapter"), "--out", "adapter"],
        ["export", "--model", str(good), "--out", "exported"],
        ["prepare", "scenes", "--out", "shards", "--vae", "shapes", "--resolution", "64", "--workers", "0"],
        ["check", "shards"],
        ["show", "shards"],
        ["push", "adapter", "--repository", "a/b", "--license", "mit", "--base_model", "c/d", "--dry_run", "staged"],
    ]
    script = (
        "import json, sys, gligen_xl as g; g.StableDiffusionXLGLIGENPipeline, g.AdapterConfig, g.Layout\n"
        "print('imported'); import gligen_xl.cli.main as cli\n"
        "for words in json.loads(sys.argv[1]): assert cli.main(words) == 0, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", script, json.dumps(commands)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("imported\n")


def test_preparing_needs_no_bar(capsys, monkeypatch):
    """As where TQDM_DISABLE is set: a bar without a clock, and a line a minute in its place."""
    with tqdm(total=4, disable=True) as bar:
        progress = PrepareProgress(bar, lambda: None)
        progress(1, 0)
        progress(1, 5)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(PrepareProgress, "EVERY", 0.0)
        progress(1, 5)
    assert capsys.readouterr().err.endswith("/s, 75%\n")


def test_a_warning_of_ours_is_one_line(capsys, good, tmp_path):
    boxes = [word for _ in range(6) for word in ("--phrase", "a ring", "--box", "0.1,0.1,0.5,0.5")]
    code, _, error = run(capsys, "generate", "--model", good, "--out", tmp_path, *TINY, *boxes)
    assert code == 0
    says = "gligen-xl generate: warning: a layout has 7 objects, the adapter 4 slots; the first 4 are kept"
    assert error.startswith(says)
    assert len(error.splitlines()) == 1


# Odd model folders ----------------------------------------------------------------------------------------------------


def other(good, tmp_path, file, content):
    """A copy of the model folder with one file changed, None: removed; with another of its files' name: a folder."""
    folder = tmp_path / "bad"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    (folder / file).unlink()
    if content == "folder":
        (folder / file).mkdir()
    elif content is not None:
        (folder / file).write_bytes(content)
    return folder


CONTENTS = [b"", b"null", b"[]", b"5", b'"x"', b'{"a": ', b"[" * 10**5, bytes(range(256)), None, "folder"]


@pytest.mark.parametrize("file", [
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json",
])  # fmt: skip
def test_settings_that_are_none_are_named(file, good, tmp_path, capsys):
    for content in CONTENTS:
        line = fails(capsys, "generate", "--model", other(good, tmp_path, file, content), "--out", tmp_path, *TINY)
        assert str(tmp_path / "bad") in line, (content, line)
        assert content is None or file in line, (content, line)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_none_are_named(file, good, tmp_path, capsys):
    for content in (b"", b"12345678{", None, "folder"):
        line = fails(capsys, "generate", "--model", other(good, tmp_path, file, content), "--out", tmp_path, *TINY)
        assert str(tmp_path / "bad" / file.split("/")[0]) in line, (content, line)


def test_odd_settings_of_the_right_kind_name_their_part(good, tmp_path, capsys):
    for file, content, says in [
        ("model_index.json", b"{}", "model_index.json does not name a pipeline"),
        ("text_encoder/config.json", b"{}", "bad/text_encoder: "),
        ("tokenizer/tokenizer_config.json", b"{}", "model_max_length"),
        ("tokenizer/tokenizer.json", b'{"model": {"type": "BPE", "vocab": 5}}', "bad/tokenizer"),
        ("unet/config.json", b'{"block_out_channels": "x"}', "bad/unet"),
    ]:
        line = fails(capsys, "generate", "--model", other(good, tmp_path, file, content), "--out", tmp_path, *TINY)
        assert says in line, line


def test_a_run_with_odd_settings_has_no_report(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for content in (b"null", b"[]", b"{", b'{"config": {"samples": "x", "model": [1], "optimization": 5}}'):
        (folder / "config.json").write_bytes(content)
        assert str(folder) in fails(capsys, "report", folder)


# What generate says ---------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_that_were_used(good, tmp_path, capsys):
    boxes = [
        (0.1, 0.1, 0.3, 0.3),
        (0.4, 0.1, 0.6, 0.3),
        (0.1, 0.5, 0.3, 0.8),
        (0.5, 0.5, 0.6, 0.8),
        (0.7, 0.7, 0.9, 0.9),
    ]
    words = [w for box in boxes for w in ("--phrase", "a ring", "--box", ",".join(map(str, box)))]
    size = ("--steps", "1", "--width", "16", "--height", "16")
    code, _, error = run(
        capsys, "generate", "--model", good, "--out", tmp_path, "--draw", "--prompt", "grass", *words, *size
    )
    assert code == 0, error
    with Image.open(tmp_path / "0000.png") as image, Image.open(tmp_path / "0000-boxes.png") as drawn:
        used = SimpleNamespace(phrases=["a ring"] * 4, boxes=boxes[:4])
        assert np.array_equal(np.asarray(drawn), np.asarray(draw_boxes(image, used)))


def test_a_random_seed_is_written_down(good, tmp_path, capsys):
    seeds = []
    for name in ("a", "b"):
        code, output, error = run(
            capsys, "generate", "--model", good, "--out", tmp_path / name, *TINY, "--seed", -1, "--count", 2
        )
        assert code == 0, error
        with Image.open(tmp_path / name / "0001.png") as image:
            seed = json.loads(image.text[METADATA_KEY])["seed"] - 1
        assert f"seed {seed}, drawn at random" in output
        seeds.append(seed)
    assert seeds[0] != seeds[1]
    again = run(capsys, "generate", "--model", good, "--out", tmp_path / "c", *TINY, "--seed", seeds[0], "--count", 2)
    assert again[0] == 0
    with Image.open(tmp_path / "a" / "0001.png") as one, Image.open(tmp_path / "c" / "0001.png") as two:
        assert one.tobytes() == two.tobytes()


def test_the_seconds_of_an_image_in_a_batch_are_its_share(good, tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 6.0, 100.0, 101.0, 200.0])  # begin, first batch, saved, second batch, saved
    monkeypatch.setattr("gligen_xl.cli.generate.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(
        "gligen_xl.generate.generate_batches",
        lambda *_, **__: iter([[Image.new("RGB", (8, 8))] * 3, [Image.new("RGB", (8, 8))]]),
    )
    code, output, error = run(capsys, "generate", "--model", good, "--out", tmp_path, *TINY, "--count", 4)
    assert code == 0, error
    times = [line.split()[-2] for line in (output + error).splitlines() if ".png" in line]
    assert times == ["2.00", "2.00", "2.00", "1.00"]
