"""The commands and the lines of Python that the README and the guide to own images print: they are understood, and
those that need neither a network nor hours are run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.commands import run
from PIL import Image

from gligen_xl.cli.common import Parser
from gligen_xl.cli.main import COMMANDS
from gligen_xl.layout import Layout, box_iou, write_layouts
from gligen_xl.toyworld.detectors import ShapesDetector

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "own-pictures.md"]
LAYOUT = Layout(prompt="grass", phrases=["a red circle"], boxes=[[0.1, 0.45, 0.55, 0.9]])


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(document):
    """Words of each line that calls the program, as a shell gives them."""
    lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["gligen-xl"]] + [
        line[line.index("gligen_xl.cli") + 1 :] for line in words if "gligen_xl.cli" in line
    ]


EVERY = [(document.name, words) for document in DOCUMENTS for words in commands(document)]


def test_there_are_commands():
    assert len(EVERY) > 30
    assert {words[0] for name, words in EVERY if name == "README.md"} == set(COMMANDS) - {"import", "version"}


@pytest.mark.parametrize(("name", "words"), EVERY, ids=[" ".join(words) for _, words in EVERY])
def test_every_command_is_understood(name, words, tmp_path, monkeypatch):
    """Its options are those of the program; files that it reads at once, and words in capitals, are given here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    for file in ("LAYOUTS", "scenes/layouts.jsonl"):
        write_layouts(tmp_path / file, [LAYOUT])
    for word in words:
        if re.fullmatch(r"[A-Z_]+(=[\d.]+)?|shards|runs/[\w-]+", word) and word not in ("RECIPE", "LAYOUTS"):
            (tmp_path / word.partition("=")[0]).mkdir(parents=True, exist_ok=True)
    words = ["sdxl-512" if word == "RECIPE" else word for word in words]
    if words[0] == "train":
        words += ["--data", "SHARDS"] if "--data" not in words else []
        words += ["--out", "RUN"] if "--out" not in words else []
    command = COMMANDS[words[0]]
    assert command.parse(Parser(prog=f"gligen-xl {words[0]}", default_env=False), list(words[1:]))


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    """The first block as it stands: the circle stands in its box."""
    first, *others = blocks(DOCUMENTS[0], "python")
    for block in others:
        compile(block, "README.md", "exec")
    monkeypatch.chdir(tmp_path)
    exec(compile(first, "README.md", "exec"), {})
    with Image.open(tmp_path / "circle.png") as image:
        (found,) = ShapesDetector().detect([image.convert("RGB")], [LAYOUT])
    assert len(found) == 1
    assert box_iou([LAYOUT.boxes[0]], [found[0].box])[0, 0] > 0.8


def printed(document, *beginnings):
    """The commands that begin so, in their order."""
    chosen = [words for words in commands(document) if " ".join(words).startswith(beginnings)]
    assert len(chosen) >= len(beginnings)
    return chosen


def test_commands_of_the_readme_run_in_order(capsys, tmp_path, monkeypatch):
    """As printed, with fewer images; then what they made is there."""
    monkeypatch.chdir(tmp_path)
    ran = printed(
        DOCUMENTS[0], "generate --prompt", "shapes draw", "generate --layout scenes", "prepare scenes", "check", "show"
    )
    for words in ran:
        if words[:2] == ["shapes", "draw"]:
            words = [*words, "--count", "3"]
        if words[0] == "generate":
            words = [*words, "--steps", "2"]
        code, _, error = run(capsys, *words)
        assert code == 0, (words, error)
    assert len(list(Path("pictures").glob("*.png"))) == 2 + 3
    assert Path("samples.png").is_file()


def test_commands_of_the_guide_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = [shlex.split(line)[1:] for line in blocks(DOCUMENTS[1], "sh")[0].splitlines()]
    assert [words[0] for words in first] == ["shapes", "prepare", "check", "show", "train"]
    shorter = {"--count": "8", "--samples": "64"}
    for words in first:
        words = [shorter.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if words[0] == "train":
            words += ["--batch_size", "8", "--checkpoint_every", "64", "--validation.data", "shapes:8"]
            words += ["--validation.every", "64", "--validation.pictures", "0", "--validation.detector", "null"]
        code, _, error = run(capsys, *words)
        assert code == 0, (words, error)
    assert Path("runs/mine/adapter/gligen_adapter.safetensors").is_file()
