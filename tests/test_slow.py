"""Proofs that take minutes: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gligen_xl.evaluate import evaluate_layouts, find_detector, held_out_layouts

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


def test_the_bars(shapes_pipeline):
    """What the embedded model is to reach on held-out layouts. Not reached yet: see docs/LOG.md."""
    report = evaluate_layouts(shapes_pipeline, held_out_layouts(256), find_detector("shapes"), batch_size=32)
    on, partly = report.metrics()["beta 1"], report.metrics()["beta 0.4"]
    assert on["mean_iou"] >= 0.65
    assert on["recall_50"] >= 0.85
    assert on["colour"] >= 0.90
    assert on["shape_of_found"] >= 0.80
    assert partly["recall_50"] >= on["recall_50"] / 2
    assert max(report.metrics()[control]["recall_50"] for control in ("off", "shuffled")) <= 0.15


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
