"""Box metrics on cases counted by hand, and the report."""

import json

import numpy as np
import pytest
from PIL import Image

from gligen_xl import Layout
from gligen_xl.evaluate import (
    ObjectScore,
    ShapesDetector,
    evaluate_layouts,
    find_detector,
    held_out_layouts,
    match,
    summarize,
    write_report,
)
from gligen_xl.shapes.world import draw, sample_scene, scene_layout


def test_each_request_gets_one_detection_and_none_twice():
    requested = np.array([[0, 0, 0.4, 0.4], [0.05, 0, 0.45, 0.4], [0.8, 0.8, 1, 1]])
    detected = np.array([[0.05, 0, 0.45, 0.4], [0.0, 0.0, 0.2, 0.4]])
    assigned = match(requested, detected)
    assert [number for number, _ in assigned] == [1, 0, None]
    assert [iou for _, iou in assigned] == pytest.approx([0.5, 1.0, 0.0])
    assert match(requested, np.empty((0, 4))) == [(None, 0.0)] * 3


def test_metrics_by_hand():
    scores = [
        ObjectScore(0.9, {"colour": True, "shape": True}),
        ObjectScore(0.6, {"colour": True, "shape": False}),
        ObjectScore(0.3, {"colour": True, "shape": True}),
        ObjectScore(0.0, {"colour": False, "shape": False}),
    ]
    assert summarize(scores) == pytest.approx(
        {
            "objects": 4, "mean_iou": 0.45, "recall_50": 0.5, "recall_75": 0.25, "colour": 0.75,
            "colour_of_found": 1.0, "shape": 0.5, "shape_of_found": 0.5, "success": 0.25,
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="no objects"):
        summarize([])


def test_the_detector_scores_right_and_wrong_pictures():
    scene, other = sample_scene(0, 4, num_objects=3), sample_scene(0, 2, num_objects=3)
    layout = scene_layout(scene)  # of objects that do not cover one another
    right = ShapesDetector().score(draw(scene), layout)
    assert all(score.iou > 0.8 and all(score.attributes.values()) for score in right)
    assert summarize(ShapesDetector().score(draw(other), layout))["success"] < 1


@pytest.mark.parametrize("phrase", ["a dog", "a red thing", "a red blue circle", "circle"])
def test_phrases_that_the_detector_does_not_know(phrase):
    with pytest.raises(ValueError, match="cannot look for"):
        ShapesDetector.parse(phrase)
    assert ShapesDetector.parse("A Large RED circle!") == ("red", "circle")


class Painter:
    """In place of a pipeline: draws exactly what is asked when it is given boxes, and nothing otherwise."""

    def __call__(self, prompts, *, gligen_boxes=None, generator, **_):
        pictures = [self.scenes[int(g.initial_seed())] if gligen_boxes else self.empty for g in generator]
        return type("Output", (), {"images": pictures})


def painter(count):
    made = Painter()
    made.scenes = [draw(sample_scene(0, k)) for k in range(count)]
    made.empty = Image.new("RGB", (64, 64), (108, 158, 84))
    return made


def test_a_perfect_painter_scores_perfectly_and_the_controls_do_not(tmp_path):
    layouts = [scene_layout(sample_scene(0, k), index=k) for k in range(12)]
    report = evaluate_layouts(painter(12), layouts, find_detector("shapes"), batch_size=5)
    metrics = report.metrics()
    assert list(metrics) == ["beta 1", "beta 0.4", "off", "shuffled"]
    assert metrics["beta 1"]["recall_50"] == 1
    assert metrics["off"]["mean_iou"] == 0
    assert metrics["shuffled"]["recall_50"] < 0.3
    write_report(report, tmp_path, model="painter")
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["metrics"] == metrics
    assert said["model"] == "painter"
    assert len(said["pictures"]) == 12
    assert "| beta 1 |" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 256


def test_what_cannot_be_evaluated_is_refused_before_anything_is_generated():
    class Never:
        def __call__(self, *_, **__):
            pytest.fail("the pipeline was called")

    good = held_out_layouts(1)
    for bad, says in (
        (Layout(prompt="grass", id="x"), "layout x has no boxes"),
        (Layout(phrases=["a dog"], boxes=[[0, 0, 1, 1]]), "cannot look for 'a dog'"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate_layouts(Never(), [*good, bad], find_detector("shapes"))
    with pytest.raises(ValueError, match="no beta"):
        evaluate_layouts(Never(), good, find_detector("shapes"), betas=[])
    with pytest.raises(ValueError, match="no detector 'yolo'"):
        find_detector("yolo")
    with pytest.raises(ValueError, match="0 layouts"):
        held_out_layouts(0)
