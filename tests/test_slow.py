"""Proofs that take minutes: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_onset_of_learning(tmp_path):
    """`gligen-xl train shapes --quick`: a fresh adapter begins to use its boxes."""
    words = [sys.executable, "-m", "gligen_xl.cli", "train", "shapes", "--quick", "--out", str(tmp_path / "run")]
    subprocess.run(words, check=True, timeout=15 * 60)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if row["kind"] == "validation"]
    assert validation[-1]["grounding_gain"] >= 0.03
    assert validation[-1]["gate_mean"] > 0.01
    assert (tmp_path / "run" / "adapter" / "gligen_adapter.safetensors").is_file()


def test_a_wheel_works_elsewhere(tmp_path):
    """Built, installed into an empty environment beside the libraries of this one, and used from another folder."""
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, root], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = (
        "import sys; sys.path.insert(0, 'site'); import gligen_xl.cli as cli; "
        "assert '/site/' in cli.__file__, cli.__file__; "
        "sys.exit(cli.main(['generate', '--prompt', 'grass with a red circle', '--phrase', 'a red circle', "
        "'--box', '0.1', '0.5', '0.5', '0.9', '--steps', '3', '--draw']) or cli.main(['train', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000-boxes.png", "0000.png"]
    assert "shapes" in done.stdout
