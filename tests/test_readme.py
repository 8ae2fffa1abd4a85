"""What README.md and docs/ print is true: commands are understood, the first ones run as they stand, links lead
somewhere, and files and functions that are named exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from helpers.commands import run
from PIL import Image

from gligen_xl.cli.common import Parser
from gligen_xl.cli.main import COMMANDS
from gligen_xl.layout import Layout, box_iou, write_layouts
from gligen_xl.recipes import recipe_names
from gligen_xl.toyworld.detectors import ShapesDetector

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gligen_xl"
README, PREPARE = ROOT / "README.md", ROOT / "docs" / "prepare.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"]
LAYOUT = Layout(prompt="grass", phrases=["a red circle"], boxes=[[0.1, 0.45, 0.55, 0.9]])


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(document):
    """The words of each line that calls the program, as a shell passes them; "..." stands for more of them."""
    lines = [line for block in blocks(document, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for words in (shlex.split(line, comments=True) for line in lines):
        for program in ("gligen-xl", "gligen_xl.cli"):
            if program in words and "--help" not in words:
                yield [word for word in words[words.index(program) + 1 :] if word != "..."]


EVERY = [(document.name, words) for document in DOCUMENTS if document.name != "LOG.md" for words in commands(document)]


def test_there_are_commands():
    assert len(EVERY) > 60
    assert {words[0] for name, words in EVERY if name == "README.md"} == set(COMMANDS) - {"import", "version"}


@pytest.mark.parametrize(("name", "words"), EVERY, ids=[f"{name} {' '.join(words)}" for name, words in EVERY])
def test_every_command_is_understood(name, words, tmp_path, monkeypatch):
    """The program has its options. Files and folders that it would read exist, as far as a name tells."""
    monkeypatch.chdir(tmp_path)
    stand_ins = {"RECIPE": "sdxl-512", "cuda": "cpu", "$SLURM_ARRAY_TASK_ID/16": "3/16"}
    words = [stand_ins.get(word, word) for word in words]
    words = [re.sub(r"\$\(\(.*\)\)", "3", word) for word in words]
    defaults = ["runs/shapes/model", "runs/shapes-adapter/adapter"]  # of shapes pack
    for word in [*defaults, *words[1:]]:
        path = tmp_path / word.partition("=")[0]
        if word.endswith((".jsonl", "LAYOUTS")):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_layouts(path, [LAYOUT])
        elif path.suffix in (".json", ".yaml", ".gz"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif re.fullmatch(r"[\w/-]+(=[\d.]+)?", word) and word not in recipe_names():
            path.mkdir(parents=True, exist_ok=True)
    if words[0] == "train":
        words += ["--data", "SHARDS"] if "--data" not in words else []
        words += ["--out", "RUN"] if "--out" not in words else []
    assert COMMANDS[words[0]].parse(Parser(prog=f"gligen-xl {words[0]}", default_env=False), list(words[1:]))


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    """The first block of the README as it stands: the circle is in its box."""
    first, *others = blocks(README, "python")
    for block in (*others, *(block for document in DOCUMENTS[1:] for block in blocks(document, "python"))):
        compile(block, "document", "exec")
    monkeypatch.chdir(tmp_path)
    exec(compile(first, "README.md", "exec"), {})
    with Image.open(tmp_path / "circle.png") as image:
        (found,) = ShapesDetector().detect([image.convert("RGB")], [LAYOUT])
    assert len(found) == 1
    assert box_iou([LAYOUT.boxes[0]], [found[0].box])[0, 0] > 0.8


def test_commands_of_the_readme_run_in_order(capsys, tmp_path, monkeypatch):
    """As printed, with fewer images and steps."""
    monkeypatch.chdir(tmp_path)
    beginnings = (
        "generate --prompt", "shapes draw", "generate --layout scenes", "prepare scenes", "check shards", "show shards"
    )  # fmt: skip
    printed = [words for words in commands(README) if " ".join(words).startswith(beginnings)]
    assert len(printed) == len(beginnings)
    fewer = {"shapes": ["--count", "3"], "generate": ["--steps", "2"]}
    for words in printed:
        code, _, error = run(capsys, *words, *fewer.get(words[0], []))
        assert code == 0, (words, error)
    assert len(list(Path("images").glob("*.png"))) == 2 + 3
    assert Path("samples.png").is_file()


def test_commands_of_the_guide_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = [shlex.split(line)[1:] for line in blocks(PREPARE, "sh")[0].splitlines()]
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


# What is named --------------------------------------------------------------------------------------------------------


def anchors(document):
    """The names that a page's headings have in a link, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            target = (document.parent / file).resolve() if file else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def names_in(file):
    """Names that a module defines or takes from elsewhere, methods as Class.method."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


ROWS = re.findall(r"^\|.*?\| `([\w/]+\.py)` \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("file", "names"), ROWS, ids=[" ".join(row) for row in ROWS])
def test_functions_of_the_architecture_exist(file, names):
    assert set(re.findall(r"`([\w.]+)`", names)) <= set(names_in(SOURCE / file))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_files_of_the_documents_exist(document):
    if document.name != "LOG.md":  # which tells of files as they were
        for file in set(re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml))`", document.read_text(encoding="utf-8"))):
            places = [ROOT, SOURCE, ROOT / "tests", SOURCE / "prepare", ROOT / "src"]
            assert any((place / file).exists() for place in places), file
