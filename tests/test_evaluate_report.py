"""The report of an evaluation: whole from whatever was scored, the same in every file, safe to open, alone in one."""

import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from gligen_xl import Layout
from gligen_xl.detect.detection import Detection, Query
from gligen_xl.detect.matching import score_image
from gligen_xl.evaluate.compare import Comparison
from gligen_xl.evaluate.metrics import paired_difference, summarize
from gligen_xl.evaluate.protocol import Protocol
from gligen_xl.evaluate.protocols import find_protocol, grey
from gligen_xl.evaluate.report import Report
from gligen_xl.evaluate.report_files import SCHEMA_VERSION, write_report
from gligen_xl.evaluate.report_page import ranked, swept_conditions
from gligen_xl.evaluate.report_words import interval, markdown_table, markdown_text, stacked_table, terminal_text, value
from gligen_xl.evaluate.run import MISSING, Condition, shuffled
from gligen_xl.evaluate.sampling import keyed
from gligen_xl.toyworld.detectors import ShapesDetector

VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass(frozen=True)
class Words:
    """A detector of free phrases: any phrase is a label."""

    name: str = "words"
    settings: dict = field(default_factory=lambda: {"threshold": 0.25})
    attributes: tuple = ()
    labels_decide: bool = True

    def query(self, phrase):
        return Query(phrase)


def found_near(layout, detector, noise, share, random):
    """Each object with the chance `share`, its box moved by `noise` of the image, and sometimes one more."""
    found = []
    for phrase, box in zip(layout.phrases, layout.boxes, strict=True):
        if random.random() < share:
            moved = np.clip(np.array(box) + random.normal(0, noise, 4), 0, 1)
            x0, x1, y0, y1 = *sorted(moved[::2]), *sorted(moved[1::2])
            wanted = detector.query(phrase)
            seen = {name: said if random.random() < 0.9 else "green" for name, said in wanted.attributes.items()}
            found.append(
                Detection((x0, y0, x1 + 0.01, y1 + 0.01), wanted.label, round(random.uniform(0.3, 1), 3), seen)
            )
    if random.random() < 0.2:
        found.append(Detection((0.4, 0.4, 0.6, 0.7), found[0].label if found else "thing", 0.4, {}))
    unsure = Detection((0, 0, 1, 1), "unsure", 0.06)
    return [*found, unsure] if "threshold" in detector.settings else found


def condition(protocol, detector, folder, name, kind="grounded", settings=None, *, noise=0.02, share=0.9, lost=()):
    """Scored without looking; images are written, those of `lost` are not."""
    layouts = keyed(protocol.layouts)
    random = np.random.default_rng(len(name))
    against = shuffled(layouts) if kind == "shuffled" else layouts
    draw = protocol.empty if kind in ("off", "empty") or protocol.real is None else protocol.real
    scores, paths = [], {}
    for key, layout in layouts.items():
        if key in lost:
            continue
        paths[key] = folder / "pictures" / name / f"{key}.png"
        paths[key].parent.mkdir(parents=True, exist_ok=True)
        draw(layout).save(paths[key])
        found = [] if kind == "empty" else found_near(layout, detector, noise, share, random)
        scores.append(score_image(against[key], key, found, detector))
    return Condition(name, kind, settings or {}, tuple(scores), paths, dict.fromkeys(lost, MISSING))


def whole_report(folder, count=16, lost=(), **settings):
    protocol, detector = find_protocol("shapes", count=count), ShapesDetector()

    def made(*words, **options):
        return condition(protocol, detector, folder, *words, **options)

    conditions = [
        made("beta-1", "grounded", {"beta": 1.0, "guidance_scale": 2.0}, noise=0.03, lost=lost),
        made("beta-0.4", "grounded", {"beta": 0.4, "guidance_scale": 2.0}, noise=0.06, share=0.7),
        made("guidance_scale-5", "grounded", {"beta": 1.0, "guidance_scale": 5.0}, noise=0.04, share=0.8),
        made("off", "off", {"guidance_scale": 2.0}, noise=0.3, share=0.4),
        *([made("shuffled", "shuffled", noise=0.3, share=0.5)] if count > 1 else []),
        made("real", "real", noise=0.01, share=0.98),
        made("empty", "empty"),
    ]
    other = made("beta-1", noise=0.05, share=0.6)
    compared = [Comparison("beta-1", "beta-1", paired_difference(conditions[0].images, other.images, ap=False))]
    about = {"model": "shapes", "adapter": "runs/mine/adapter", "steps": 20, **settings}
    return Report(protocol, detector, conditions, about, compared)


def free_report(folder, layouts, **options):
    """Of a file of layouts: one condition, no controls."""
    metrics = ("success", "mean_iou", "ap", "wrong_count", "clip")
    protocol, detector = Protocol("mine", "", {"file": "mine.jsonl"}, layouts, "words", metrics, None, grey), Words()
    return Report(protocol, detector, [condition(protocol, detector, folder, "pictures", **options)], {})


class Page(HTMLParser):
    """What a browser would fetch, tags, texts by tag, and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.links, self.tags, self.open, self.styles, self.alts = [], [], [], [], []
        self.cells = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href", "xlink:href", "action", "data") if name in values]
        self.styles += [values["style"]] if "style" in values else []
        assert not any(name.startswith("on") for name in values)
        if tag == "img":
            self.alts.append(values["alt"])
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        if tag == "p" and self.open[-1] != "p":
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(folder):
    """The page and the JSON."""
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return (folder / "report.html").read_text(encoding="utf-8"), document


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    report = whole_report(folder, lost=("shapes-1000003-2",))
    write_report(report, folder, versions={"gligen-xl": "1"})
    return folder, report


def test_every_file_is_there_and_the_page_fetches_nothing(whole):
    folder, _ = whole
    text, document = read(folder)
    page = Page(text)
    assert {"report.json", "report.md", "report.html", "grid.png"} <= {path.name for path in folder.iterdir()}
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert page.tags.count("img") == len(page.links) == 10
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert all("url(" not in style for style in [text, *page.styles])
    assert "@import" not in text
    assert not re.findall(r"https?://", text)
    for words in ('name="viewport"', "prefers-color-scheme: dark", "@media print", "<html lang="):
        assert words in text
    assert all(page.alts)
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["versions"] == {"gligen-xl": "1"}
    for drawing in re.findall(r"<svg viewBox=.*?</svg>(?=</figure>)", text, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing


def test_the_page_and_the_table_say_what_the_json_says(whole):
    folder, report = whole
    text, document = read(folder)
    cells = Page(text).cells
    start, width = cells.index("beta-1") - 1, 1 + len(report.conditions)
    table = (folder / "report.md").read_text(encoding="utf-8").split("\n\n")[-5]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for column, condition in enumerate(document["conditions"], 1):
        page = cells[start + column :: width]
        written = [line[column] for line in lines if not line[column].startswith("--")]
        assert written[0] == page[0] == condition["name"]
        assert written[-1] == page[1 + len(report.names)] == str(condition["metrics"]["pictures"])
        for k, name in enumerate(report.names, 1):
            if (estimate := condition["metrics"].get(name)) is None:  # as the colour of the found, where none is
                assert (page[k], written[k]) == ("-", "-")
                continue
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            digits = 3 if name == "mean_iou" else 2 if name == "extra_objects" else 1
            factor = 1 if digits > 1 else 100
            unit = " %" if factor == 100 else ""
            numbers = [f"{factor * estimate[end]:.{digits}f}" for end in ("value", "low", "high")]
            assert page[k] == "{}{}[{}, {}]".format(numbers[0], unit, *numbers[1:])
            assert written[k] == "{}{} [{}, {}]".format(numbers[0], unit, *numbers[1:])


def test_the_figures_are_those_of_the_scores(whole):
    folder, report = whole
    _, document = read(folder)
    assert [condition["kind"] for condition in document["conditions"]] == [c.kind for c in report.conditions]
    for condition, saved in zip(report.conditions, document["conditions"], strict=True):
        expected = summarize(condition.images, ap=False)
        for name in ("success", "mean_iou", "wrong_count"):
            assert saved["metrics"][name]["value"] == pytest.approx(expected[name].value, abs=1e-6)
        assert len(saved["pictures"]) == len(condition.images)
        for image, score in zip(saved["pictures"], condition.images, strict=True):
            assert image["key"] == score.key
            assert (folder / image["path"]).is_file()
            assert Layout.from_dict(image["layout"]).phrases == score.layout.phrases
            for item, k in zip(image["objects"], range(len(score.objects)), strict=True):
                assert item["iou"] == pytest.approx(score.objects[k].iou, abs=1e-6)
                if item["assigned"] is not None:
                    assert image["found"][item["assigned"]]["box"] == pytest.approx(
                        score.detections[score.objects[k].assigned].box, abs=1e-6
                    )
    first, *others = document["conditions"]
    for parts in first["slices"].values():
        assert sum(part["objects"] for part in parts) == first["metrics"]["objects"]
    assert {c["name"] for c in others if c["slices"]} == {"off", "real"}


def test_what_a_reader_must_know_comes_first(whole):
    folder, _ = whole
    text, document = read(folder)
    head = text[: text.index("</header>")]
    table = (folder / "report.md").read_text(encoding="utf-8")
    real, empty = (next(c for c in document["conditions"] if c["kind"] == kind) for kind in ("real", "empty"))
    for start in (head, table[: table.index("| beta-1 ")]):
        assert "beta-1: 1 of 16 images: shapes-1000003-2 (missing)" in start
        assert "are in no figure" in start
        assert f"{100 * real['metrics']['success']['value']:.1f} %" in start
        assert "upper bound" in start
        assert f"{100 * empty['metrics']['success']['value']:.1f} %" in start
        assert "lower bound" in start
    assert document["conditions"][0]["unread"] == {"shapes-1000003-2": "missing"}
    for kind in ("off", "shuffled", "real", "empty"):
        assert f"key {kind}" in head


def test_every_section_is_there(whole):
    text, document = read(whole[0])
    (compared,) = document["compared"]
    difference = compared["difference"]["success"]
    assert (
        "<td>{:+.1f}</td><td>[{:+.1f}, {:+.1f}]</td>".format(*(100 * number for number in difference.values())) in text
    )
    for words in (
        "All conditions", "Difference from the other evaluation", "Over beta", "Over guidance scale", "<h3>Best",
        "<h3>Worst", "By size of the box", "By position", "By number of objects", "By frequency of the phrase",
        "By colour", "By shape", "Settings", "adapter on shapes", "beta-1 less the other's beta-1",
        "beyond chance",
    ):  # fmt: skip
        assert words in text, words


def test_a_curve_begins_with_what_is_without_grounding(whole):
    _, report = whole
    assert [c.name for c in swept_conditions(report.conditions, "beta")] == ["beta-0.4", "beta-1"]
    assert [c.name for c in swept_conditions(report.conditions, "guidance_scale")] == ["beta-1", "guidance_scale-5"]
    assert swept_conditions(report.conditions[:1], "beta") == []
    beta_1, off = (next(c for c in report.conditions if c.name == name) for name in ("beta-1", "off"))
    assert swept_conditions([beta_1, off], "beta") == [beta_1]  # a curve from beta 0 to 1
    assert swept_conditions([beta_1, off], "guidance_scale") == []
    text, _ = read(whole[0])
    values = [report.metrics[name]["success"].value for name in ("off", "beta-0.4", "beta-1")]
    said = ", ".join(f"{100 * one:.1f} % at {at}" for one, at in zip(values, ("0", "0.4", "1"), strict=True))
    assert f'aria-label="success over beta: {said}"' in text
    over_beta, over_guidance = text[text.index("Over beta") :].split("Over guidance scale")
    assert "c2 dashed" in over_beta
    assert "c2 dashed" not in over_guidance.split("<h2")[0]  # off was made at one guidance scale


def test_the_best_come_first(whole):
    _, report = whole
    order = ranked(report.conditions[0].images)
    shares = [np.mean([score.success for score in image.objects]) for image in order]
    assert shares == sorted(shares, reverse=True)
    assert len({image.key for image in order}) == len(report.conditions[0].images)
    equal = [np.mean([s.iou for s in p.objects]) for p, share in zip(order, shares, strict=True) if share == 1]
    assert equal == sorted(equal, reverse=True)
    text, _ = read(whole[0])
    assert text.index(f"<b>{order[0].key}</b>") < text.index(f"<b>{order[-1].key}</b>")


def test_the_grid_shows_what_it_has(whole):
    folder, _ = whole
    with Image.open(folder / "grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 6 * 256  # six conditions: all but the shuffled
    assert (pixels == 128).all(-1).sum() > 20_000  # the image that is missing


def test_text_of_the_data_is_no_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'&|\n`*"
    layouts = [
        Layout(prompt=evil, phrases=[evil, "x"], boxes=[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], id=f"{k}") for k in "ab"
    ]
    report = free_report(tmp_path, layouts, share=1.0)
    odd = Condition(
        evil,
        "grounded",
        {},
        report.conditions[0].images,
        report.conditions[0].paths,
        {evil: evil, "\udcff": "\udcff"},
    )
    report = Report(report.protocol, report.detector, [odd], {"model": evil, "path": "\udcff"})
    write_report(report, tmp_path, versions={evil: evil})
    text, document = read(tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert sum(alt.startswith(evil.split("\n")[0]) for alt in page.alts) == 2
    assert document["conditions"][0]["pictures"][0]["layout"]["phrases"][0] == evil
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(report.names) + 1


def test_one_image_and_no_controls(tmp_path):
    layouts = [Layout(prompt="a dog", phrases=["a dog"], boxes=[[0.2, 0.2, 0.8, 0.8]], width=320, height=192)]
    write_report(free_report(tmp_path, layouts, share=1.0), tmp_path)
    text, document = read(tmp_path)
    page = Page(text)
    assert page.tags.count("img") == 1
    assert "<h3>Worst" not in text
    assert "No real images were scored" in text
    assert "No empty images were scored" in text
    assert "1 image a condition are few" in text
    assert "Not measured, as it was not asked for: CLIP." in text
    assert document["conditions"][0]["metrics"]["pictures"] == 1
    assert [part["name"] for part in document["conditions"][0]["slices"]["position"]] == ["middle"]
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > image.height


def test_all_images_unread(tmp_path):
    layouts = [Layout(prompt="a dog", phrases=["a dog"], boxes=[[0.2, 0.2, 0.8, 0.8]], id=f"dog{k}") for k in range(9)]
    write_report(free_report(tmp_path, layouts, lost=[f"dog{k}" for k in range(9)]), tmp_path)
    text, document = read(tmp_path)
    assert Page(text).tags.count("img") == 0
    (only,) = document["conditions"]
    assert only["metrics"] == {}
    assert only["pictures"] == []
    assert len(only["unread"]) == 9
    assert "pictures: 9 of 9 images: dog0 (missing)" in text
    assert "and 4 more" in text
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 0 " not in table.split("pictures", 1)[0]
    assert "0.0 %" not in table


def test_an_image_that_is_gone_by_then(tmp_path):
    layouts = [Layout(prompt="a dog", phrases=["a dog"], boxes=[[0.2, 0.2, 0.8, 0.8]], id=f"dog{k}") for k in range(2)]
    report = free_report(tmp_path, layouts)
    report.conditions[0].paths["dog0"].write_bytes(b"\x89PNG half")
    report.conditions[0].paths["dog1"].unlink()
    write_report(report, tmp_path)
    text, _ = read(tmp_path)
    assert text.count("The image is no longer there.") == 2


def test_distances_stand_beside_the_metrics(tmp_path):
    distance = {
        "fid": 31.26,
        "fid_low": 29.0,
        "fid_high": 33.52,
        "kid": 0.01234,
        "kid_low": 0.01,
        "kid_high": 0.02,
        "pictures": 8,
        "real_pictures": 9,
    }
    report = whole_report(tmp_path, count=2, distances={"beta-1": distance})
    assert report.names[-2:] == ["fid", "kid"]
    saved = report.to_dict()["conditions"][0]["metrics"]
    assert saved["fid"] == {"value": 31.26, "low": 29.0, "high": 33.52}
    assert saved["kid"] == {"value": 0.01234, "low": 0.01, "high": 0.02}
    assert "31.3 [29.0, 33.5]" in markdown_text(report)
    assert "0.0123 [0.0100, 0.0200]" in markdown_text(report)
    assert re.search(r"^KID .* 0.0123 .*\n *less is better .*\[0.0100, 0.0200\]", terminal_text(report), re.MULTILINE)


def test_the_terminal_shows_the_same_figures_in_120_columns(whole):
    """Whatever is compared: seven conditions, of which the last stand in a second table."""
    folder, report = whole
    table, markdown = terminal_text(report), (folder / "report.md").read_text(encoding="utf-8")
    lines = table.splitlines()
    assert max(map(len, lines)) <= 120
    heads = [line for line in lines if "beta-0.4" in line or line.split() == ["empty"]]
    assert [line.split() for line in heads] == [
        ["beta-1", "beta-0.4", "guidance_scale-5", "off", "shuffled", "real"],
        ["empty"],
    ]
    at = lines.index(heads[0])
    assert re.findall(r"\d+ images", lines[at + 1]) == ["15 images"] + 5 * ["16 images"]
    (success,) = [k for k, line in enumerate(lines[: lines.index(heads[1])]) if line.startswith("success ")]
    for k, condition in enumerate(report.conditions[:-1]):
        estimate = report.metrics[condition.name]["success"]
        written = value("success", estimate.value), interval("success", estimate)
        ends = [re.finditer(r"\S+( %)?", lines[success]), re.finditer(r"\[.*?\]", lines[success + 1])]
        columns = [[(found.group(), found.end()) for found in of_line] for of_line in ends]
        assert (columns[0][k + 1][0], columns[1][k][0]) == written
        assert columns[0][k + 1][1] == columns[1][k][1] == re.search(rf"{condition.name}(?= |$)", heads[0]).end()
    for said in ("upper bound", "beta-1: 1 of 16 images: shapes-1000003-2 (missing)", "are in no figure"):
        assert said in " ".join(table.split())
        assert said in " ".join(markdown.split())
    difference = report.compared[0].difference["success"]
    start = table.index("Differences from the other evaluation")
    assert value("success", difference.value, sign=True) in table[start:]
    assert interval("success", difference, sign=True) in table[start:]
    assert "|" not in table


def test_columns_that_do_not_fit_stand_below():
    cells = [[(), ("one",), ("two", "2")], [("a", "b"), ("1 %", "[0, 1]"), ("-",)]]
    assert stacked_table(cells) == "      one  two\n             2\n--------------\na     1 %    -\nb  [0, 1]\n"
    first, second = "      one\n---------\na     1 %\nb  [0, 1]\n", "   two\n     2\n------\na    -\nb\n"
    assert stacked_table(cells, 11) == f"{first}\n{second}"
    assert stacked_table(cells, 12) == "     one two\n           2\n------------\na    1 %   -\nb [0, 1]\n"


def test_the_terminal_is_sent_text_alone(tmp_path):
    layouts = [Layout(prompt="a dog", phrases=["a dog"], boxes=[[0.2, 0.2, 0.8, 0.8]], id="0")]
    report = free_report(tmp_path, layouts)
    (only,) = report.conditions
    name = "name-of-a-folder-that-is-longer-than-a-column-\udcff"
    odd = Condition(name, "grounded", {}, only.images, only.paths, {"key|\x1b[31m": "<no\nfile>"})
    table = terminal_text(Report(report.protocol, report.detector, [odd], {}))
    assert "key|\\x1b[31m (<no file>)" in table
    assert "\\udcff: 1 of 2 images" in table
    table.encode()
    assert max(map(len, table.splitlines())) <= 120


def test_what_is_measured_is_shown_whatever_the_protocol(tmp_path):
    """Of a file of layouts seen by a detector of colours, and of CLIP beside the shapes world's metrics."""
    layouts = [Layout(phrases=["a red circle"], boxes=[[0, 0, 0.5, 0.5]])]
    report = free_report(tmp_path, layouts)
    shapes = replace(report.conditions[0], images=tuple(replace(one, clip=31.0) for one in one_score()))
    report = Report(report.protocol, ShapesDetector(), [shapes], {})
    assert [name for name in report.names if name != "ap"] == [
        "success", "mean_iou", "wrong_count", "clip", "colour", "shape"
    ]  # fmt: skip
    report = Report(find_protocol("shapes", count=1), ShapesDetector(), [shapes], {})
    assert report.names[-1] == "clip"


def test_figures_in_words():
    estimate = summarize(one_score(), ap=False)["success"]
    assert value("success", 0.7123) == "71.2 %"
    assert value("success", -0.00001, sign=True) == "+0.0"
    assert value("mean_iou", 0.6434) == "0.643"
    assert value("ap", 0.217) == "21.7"
    assert interval("success", estimate) == "[100.0, 100.0]"
    lines = markdown_table([["", "a|b"], ["<x>", "1"]]).splitlines()
    assert lines == ["|        | a\\|b |", "|--------|-----:|", "| &lt;x> |    1 |"]


def one_score():
    layout = Layout(phrases=["a red circle"], boxes=[[0, 0, 0.5, 0.5]])
    found = [Detection((0, 0, 0.5, 0.5), "red circle", 1.0, {"colour": "red", "shape": "circle"})]
    return [score_image(layout, "0", found, ShapesDetector())]
