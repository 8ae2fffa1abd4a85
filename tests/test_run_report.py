"""The report of a run: whole from whatever stands in the folder, safe to open, alone in one file."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.commands import fails, run
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from PIL import Image

from gligen_xl.data.shard_writer import write_shard
from gligen_xl.io import write_json
from gligen_xl.train.config import Augmentation, TrainConfig
from gligen_xl.train.curves import Curve, chart, heat_strip, short
from gligen_xl.train.loop import train
from gligen_xl.train.options import AdapterOptions, Optimization, Validation
from gligen_xl.train.record import evenly, read_run, series
from gligen_xl.train.report import refresh_report, report_page, write_report
from gligen_xl.train.summary import duration, percent, plain

BLOCKS = ["down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"]


def write_run(folder, *, lines=20, validations=3, settings=None):
    """The folder of a run as training leaves it."""
    config = TrainConfig(data="shapes:100", out=str(folder), samples=64 * lines, model="shapes", **(settings or {}))
    write_json(folder / "config.json", {"config": config.to_dict(), "versions": {"torch": "2.13"}})
    rows = []
    for k in range(1, lines + 1):
        rows.append(
            {
                "kind": "train", "samples": 64 * k, "loss": 1 / k, "grad_norm": 0.1 * k, "learning_rate": 1e-3,
                "gate_mean": k / 100, "samples_per_s": 32.0, "waiting": 0.01, "skipped": 0,
                "gates": dict.fromkeys(BLOCKS, k / 100), **{f"loss_q{q}": q / k for q in range(1, 5)},
            }
        )  # fmt: skip
    for k in range(1, validations + 1):
        gains = {f"grounding_gain_q{q}": 0.01 * q * k for q in range(1, 5)}
        boxes = {"on_mean_iou": 0.2 * k, "off_mean_iou": 0.1, "on_recall_50": 0.25 * k, "off_recall_50": 0.0}
        rows.append(
            {"kind": "validation", "samples": 320 * k, "loss": 0.2, "grounding_gain": 0.02 * k, **gains, **boxes}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation").mkdir()
    for k in range(1, validations + 1):
        Image.new("RGB", (600, 900), (40 * k, 90, 120)).save(folder / "validation" / f"{320 * k:08d}.png")
    return folder


class Page(HTMLParser):
    """What a browser would fetch, the figures' titles, and all text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_one_file_that_fetches_nothing(tmp_path):
    path = write_report(write_run(tmp_path))
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("img") == 3
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_curve_is_there_and_every_svg_is_whole(tmp_path):
    text = report_page(read_run(write_run(tmp_path)))
    for title in (
        "Grounding gain", "Grounding gain by noise", "Mean IoU", "Recall@0.5", "Held-out loss", "Loss", "Loss by noise",
        "Gradient norm", "Learning rate", "Gates", "Gates by block", "Speed", "Waiting for data",
    ):  # fmt: skip
        assert f"<b>{title}</b>" in text, title
    assert "Skipped steps" not in text  # there was none
    drawings = re.findall(r"<svg viewBox=.*?</svg>(?=</figure>)", text, re.DOTALL)
    assert len(drawings) == 13
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
    for words in (
        "1,280 of 1,280 samples",
        "batches of 64",
        "0.6",
        "shapes:100",
        "torch 2.13",
        "learning_rate: 5.0e-05",
    ):
        assert words in text, words


def test_text_of_the_data_is_no_markup(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    write_run(tmp_path, settings={"init_adapter": evil.replace("</script>", "")})  # no path, of which a part is shown
    with (tmp_path / "metrics.jsonl").open("a") as file:
        names = {"first": 64, "of_batch": [0], "image_ids": [evil]}
        file.write(json.dumps({"kind": "skipped", "samples": 640, **names}) + "\n")
        file.write(json.dumps({"kind": "validation", "samples": 1216, "loss": 0.1, evil: 0.5}) + "\n")
        file.write(json.dumps({"kind": "train", "samples": 1344, "loss": 0.1, "gates": {evil: 0.5}}) + "\n")
    page = report_page(read_run(tmp_path))
    assert "<script" not in page
    assert "Skipped steps" in page
    assert "".join(Page(page).text).count("alert(1)") >= 4


def test_broken_lines_and_missing_files_are_no_hindrance(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"kind": "train", "samples": 64, "loss": null, "gate_mean": 0.1}\n'
        b'{"kind": "train", "samples": 128, "loss": 0.5, "gates": 7}\n'
        b'{"kind": "train", "samples": 192, "loss": NaN, "grad_norm": Infinity}\n'
        b'[1, 2]\n"text"\n{"samples": 9}\n{"kind": "train", "samples": "many"}\n\xff\xfe\n'
        b'{"kind": "other", "samples": 200, "loss": 3}\n'
        b'{"kind": "train", "sam'
    )
    record = read_run(tmp_path)
    assert record.unread == 6
    assert series(record.training, "loss") == [(128, 0.5)]
    assert (record.samples, record.finished, record.images) == (192, False, {})
    page = report_page(record)
    assert "6 broken lines" in page
    assert "config.json) are missing" in page
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        read_run(tmp_path)
    write_json(tmp_path / "config.json", {"config": {"samples": 64}})
    assert "0 of 64 samples" in report_page(read_run(tmp_path))
    write_json(tmp_path / "config.json", [1])
    with pytest.raises(ValueError, match="does not hold the settings"):
        read_run(tmp_path)


def test_half_an_image_is_left_out(tmp_path):
    write_run(tmp_path)
    first = tmp_path / "validation" / "00000320.png"
    first.write_bytes(first.read_bytes()[:40])
    (tmp_path / "validation" / "notes.png").write_bytes(b"")
    assert report_page(read_run(tmp_path)).count("<img ") == 2


def test_the_size_is_bounded(tmp_path):
    write_run(tmp_path, lines=4000, validations=12)
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 1000, 3), dtype=np.uint8)
    first, *others = sorted((tmp_path / "validation").iterdir())
    Image.fromarray(pixels).save(first, compress_level=0)
    for path in others:
        shutil.copy(first, path)
    page = report_page(read_run(tmp_path))
    assert page.count("<img ") == 4
    assert len(page) < 4e6  # pure noise: the worst that an image can be
    charts = re.sub(r'src="data:[^"]*"', "", page)
    assert len(charts) < 400_000


def test_of_a_continued_run_the_later_lines_count(tmp_path):
    lines = [{"kind": "train", "samples": samples, "loss": samples / 64} for samples in (64, 128, 192)]
    again = [{"kind": "train", "samples": 128, "loss": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    assert series(read_run(tmp_path).training, "loss") == [(64, 1.0), (128, 7.0), (192, 3.0)]


def test_a_run_up_to_a_checkpoint(tmp_path):
    record = read_run(write_run(tmp_path))
    before = record.until(640)
    assert before.samples == 640
    assert [line["samples"] for line in before.validations] == [320, 640]
    assert list(before.images) == [320, 640]
    assert before.seconds == pytest.approx(640 / 32)
    assert record.measured["on_mean_iou"] == pytest.approx(0.6)
    assert before.measured["on_mean_iou"] == pytest.approx(0.4)


def points(svg, kind="line"):
    """The corners of the lines of a drawing, in its units."""
    found = re.findall(rf'<polyline class="{kind} [^"]*" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def test_a_line_lies_where_its_values_are():
    (line,) = points(chart([Curve("x", [(0, 0), (50, 5), (100, 10)])], end=100, write=plain))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2
    assert y0 > y2  # upwards
    logarithmic = chart([Curve("x", [(0, 1), (50, 10), (100, 100)])], end=100, write=plain, log=True)
    (_, y0), (_, y1), (_, y2) = points(logarithmic)[0]
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_noisy_values_are_smoothed_and_their_range_is_kept():
    values = [(k, 1.0 + (-1) ** k) for k in range(1, 2001)]
    svg = chart([Curve("", values, noisy=True)], end=2000, write=plain, zero=True)
    (line,) = points(svg)
    heights = [y for _, y in line]
    assert max(heights) - min(heights) < 12  # of 178: the mean over 50 of them, which is 1
    shade = re.search(r'<polygon class="range c1" points="([^"]*)"', svg)[1].split()
    shade_heights = [float(pair.split(",")[1]) for pair in shade]
    assert max(shade_heights) - min(shade_heights) > 170
    assert len(line) <= 200


def test_one_wild_value_does_not_flatten_the_rest():
    values = [(k, 1.0 + k / 1000) for k in range(1000)]
    calm = points(chart([Curve("", values, noisy=True)], end=1000, write=plain))[0]
    values[500] = (500, 1e9)
    wild = points(chart([Curve("", [*values], noisy=True)], end=1000, write=plain, log=True))[0]
    assert max(y for _, y in calm) - min(y for _, y in calm) > 150
    assert all(math.isfinite(y) for _, y in wild)


@pytest.mark.parametrize("values", [[(64, 0.3)], [(64, 0.0), (128, 0.0)], [(64, -2.0), (128, -2.0)], [(64, 1e-9)]])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_few_and_equal_values_are_drawn_too(values, noisy, log):
    svg = chart([Curve("a < b", values, noisy=noisy)], end=128, write=plain, log=log)
    ElementTree.fromstring(svg)
    assert "a &lt; b" in svg
    assert "nan" not in svg
    assert chart([Curve("", [])], end=128, write=plain) == ""


def test_names_at_the_ends_do_not_lie_on_each_other():
    curves = [Curve(name, [(0, 1.0), (100, 1.0 + k / 1000)]) for k, name in enumerate("abcd")]
    svg = chart([*curves, Curve("e", [(0, 5.0), (100, 0.0)])], end=100, write=plain)
    heights = sorted(float(y) for y in re.findall(r'<text class="name [^"]*" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(heights) == 5
    assert min(b - a for a, b in pairwise(heights)) >= 13.9


def test_the_strip_of_gates_groups_the_blocks():
    columns = [(64 * k, {name: k * (1 + row) / 20 for row, name in enumerate(BLOCKS)}) for k in range(1, 11)]
    svg, largest = heat_strip(columns, end=640)
    assert largest == pytest.approx(1.0)
    assert re.findall(r'text-anchor="end">(down 1|mid)<', svg) == ["down 1", "mid"]
    ElementTree.fromstring(svg)
    assert heat_strip([(64, dict.fromkeys(BLOCKS, 0.0))], end=640)[1] == 0


def test_figures_in_words():
    assert [duration(s) for s in (41, 192, 19_200, 532_800)] == ["41 s", "3 min 12 s", "5 h 20 min", "6 d 4 h"]
    assert [short(x) for x in (640, 12_800, 32_000_000)] == ["640", "12.8 k", "32 M"]
    assert [percent(x) for x in (0, 0.004, 0.298, 1)] == ["0 %", "0.4 %", "29.8 %", "100 %"]
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly([1, 2], 4) == [1, 2]
    assert evenly([1, 2], 1) == [2]


def test_a_report_that_fails_does_not_end_the_run(tmp_path):
    with pytest.warns(UserWarning, match=r"the report of .* was not written: .* not the folder of a run"):
        refresh_report(tmp_path / "nowhere")


def test_the_command(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder)
    code, output, _ = run(capsys, "report", folder)
    assert code == 0
    assert output.strip() == str(folder / "report.html")
    assert "is not the folder of a run" in fails(capsys, "report", tmp_path / "nothing")


def test_training_leaves_a_report(tmp_path):
    """With whatever the trainer writes today: its curves and its images are found."""
    sdxl_pipeline().save_pretrained(tmp_path / "base")
    write_shard(tmp_path / "data" / "a", latents(24, side=8), [row(1 + k % 3) for k in range(24)], METADATA)
    config = TrainConfig(
        model=str(tmp_path / "base"), data=str(tmp_path / "data"), out=str(tmp_path / "run"), samples=16, batch_size=4,
        log_every=1, checkpoint_every=16, track=[], augmentation=Augmentation(slots=3), adapter=AdapterOptions(),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8),
        validation=Validation(data=str(tmp_path / "data"), every=8, loss_samples=8, pictures=2, steps=2),
    )  # fmt: skip
    train(config)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 2
    for title in ("Grounding gain", "Loss", "Loss by noise", "Gradient norm", "Gates by block", "Waiting for data"):
        assert f"<b>{title}</b>" in page, title
    assert "finished" in page
    assert "unfinished" not in page
