"""Proofs that take minutes: `make test-slow`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "gligen_xl.cli"]


def test_the_onset_of_learning(tmp_path):
    """`gligen-xl train shapes --quick`: a fresh adapter begins to use its boxes."""
    subprocess.run([*CLI, "train", "shapes", "--quick", "--out", tmp_path / "run"], check=True, timeout=15 * 60)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if row["kind"] == "validation"]
    assert validation[-1]["grounding_gain"] >= 0.03
    assert validation[-1]["gate_mean"] > 0.01
    assert (tmp_path / "run" / "adapter" / "gligen_adapter.safetensors").is_file()


def test_a_wheel_works_elsewhere(tmp_path):
    """Built, installed into an empty environment beside the libraries of this one, and used from another folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = (
        "import sys; sys.path.insert(0, 'site'); import gligen_xl.cli.main as cli; "
        "assert '/site/' in cli.__file__, cli.__file__; "
        "sys.exit(cli.main(['generate', '--prompt', 'grass with a red circle', '--phrase', 'a red circle', "
        "'--box', '0.1', '0.5', '0.5', '0.9', '--steps', '3', '--draw']) or cli.main(['train', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000-boxes.png", "0000.png"]
    assert "shapes" in done.stdout


def test_the_full_report_of_the_embedded_adapter(tmp_path):
    """At beta 0, 0.4 and 1: boxes are followed, the controls do not follow them, and the documents say what comes out,
    as near as machines agree."""
    subprocess.run([*CLI, "evaluate", "--sweep", "beta=0,0.4,1", "--out", tmp_path], check=True, timeout=30 * 60)
    report = json.loads((tmp_path / "report.json").read_text())
    measured = {condition["name"]: condition["metrics"] for condition in report["conditions"]}
    assert list(measured) == ["beta-1", "beta-0.4", "off", "shuffled", "real", "empty"]
    assert all(of_one.pop("pictures") == 256 for of_one in measured.values())
    assert all(of_one.pop("objects") == 552 for of_one in measured.values())
    value = {name: {key: metric["value"] for key, metric in of_one.items()} for name, of_one in measured.items()}
    falling = [value[name]["success"] for name in ("real", "beta-1", "beta-0.4", "off", "shuffled", "empty")]
    assert falling == sorted(falling, reverse=True)
    assert (falling[0], falling[-1]) == (1, 0)
    assert measured["beta-1"]["success"]["low"] > measured["beta-0.4"]["success"]["high"]
    assert measured["beta-0.4"]["success"]["low"] > 5 * measured["off"]["success"]["high"]

    columns = ["success", "mean_iou", "recall_50", "recall_75", "picture_success", "colour", "shape_of_found"]
    rows = table_of(ROOT / "docs" / "evaluate.md", r"`(beta-1|beta-0\.4|off|shuffled|real|empty)`.*")
    assert rows.keys() == value.keys()
    for name, row in rows.items():
        assert_near(row, value[name], columns, name)
    columns = [column for column in columns if column not in ("success", "picture_success")]
    rows = table_of(ROOT / "README.md", r"(with boxes for|with boxes, scored|with boxes|without boxes).*")
    for row, name in zip(rows.values(), ("beta-1", "beta-0.4", "off", "shuffled"), strict=True):
        assert_near(row, value[name], columns, name)

    page = (tmp_path / "report.html").read_text()
    fetched = re.findall(r"""(?:src|href)=(?!["']?(?:data:|#))[^\s>]{1,80}""", page)
    assert fetched == []
    assert page.count("<img") >= 2
    assert "<svg" in page


def assert_near(row, values, columns, name):
    """A row of a document says what was measured, to 0.02; or three objects more or less, of the few that are found."""
    for told, column in zip(row, columns, strict=True):
        few = 3 / (552 * values["recall_50"]) if column == "shape_of_found" and values["recall_50"] else 0
        assert told == pytest.approx(values.get(column), abs=max(0.02, few)), (name, column)


def table_of(document, first):
    """Rows whose first cell matches, by the group in it: their figures as shares, without the intervals."""
    rows = {}
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and (found := re.fullmatch(first, cells[0])):
            figures = [re.fullmatch(r"([\d.]+)( %)?( \[.*\])?", cell) for cell in cells[1:] if cell != "-"]
            if all(figures):
                shares = iter(float(number[1]) / (100 if number[2] else 1) for number in figures)
                rows[found[1]] = [None if cell == "-" else next(shares) for cell in cells[1:]]
    return rows
