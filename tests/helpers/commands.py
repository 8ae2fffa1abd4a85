"""Commands, run in this process as a user runs them."""

import json

import pytest

from gligen_xl.adapter import AdapterConfig, attach
from gligen_xl.cli.main import main
from helpers.tiny import open_gates, sdxl_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline = sdxl_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=40, slots=4))
    open_gates(pipeline.unet)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def layouts(tmp_path):
    path = tmp_path / "layouts.jsonl"
    lines = [
        {"prompt": "grass", "phrases": ["a red circle"], "boxes": [[0.1, 0.1, 0.5, 0.5]], "id": "one/../x", "seed": 7},
        {"prompt": "sand with a ring", "phrases": ["a blue ring"], "boxes": [[0.2, 0.3, 0.9, 0.9]]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys, *words):
    code = main([str(word) for word in words])
    output = capsys.readouterr()
    return code, output.out, output.err


def succeeds(capsys, *words):
    code, output, error = run(capsys, *words)
    assert code == 0, error
    return output


def fails(capsys, *words):
    """Runs a command that has to fail; returns its one line."""
    code, _, error = run(capsys, *words)
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("gligen-xl")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


FAST = ("--steps", 2, "--width", 16, "--height", 16)
