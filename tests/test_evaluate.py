"""A whole evaluation with painters in place of models: what is perfect scores perfectly, and what is not does not."""

import pytest
from helpers.painters import Painter
from PIL import Image

from gligen_xl import Layout
from gligen_xl.evaluate import ObjectScore, evaluate_layouts, find_detector, find_protocol, point_metrics
from gligen_xl.toyworld.detectors import ShapesDetector
from gligen_xl.toyworld.layouts import held_out_layouts
from gligen_xl.toyworld.world import draw, sample_scene, scene_layout


def test_metrics_by_hand():
    scores = [
        ObjectScore(0.9, {"colour": True, "shape": True}),
        ObjectScore(0.6, {"colour": True, "shape": False}),
        ObjectScore(0.3, {"colour": True, "shape": True}),
        ObjectScore(0.0, {"colour": False, "shape": False}),
    ]
    assert point_metrics(scores) == pytest.approx(
        {
            "objects": 4, "mean_iou": 0.45, "recall_50": 0.5, "recall_75": 0.25, "colour": 0.75,
            "colour_of_found": 1.0, "shape": 0.5, "shape_of_found": 0.5, "mean_iou_right": 0.3, "success": 0.25,
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="no objects"):
        point_metrics([])


def test_the_detector_scores_right_and_wrong_images():
    scene, other = sample_scene(0, 4, num_objects=3), sample_scene(0, 2, num_objects=3)
    layout = scene_layout(scene)  # of objects that do not cover one another
    right = ShapesDetector().score(draw(scene), layout)
    assert all(score.iou > 0.8 and all(score.attributes.values()) for score in right)
    assert point_metrics(ShapesDetector().score(draw(other), layout))["success"] < 1


@pytest.mark.parametrize("phrase", ["a dog", "a red thing", "a red blue circle", "circle"])
def test_phrases_that_the_detector_does_not_know(phrase):
    with pytest.raises(ValueError, match="cannot look for"):
        ShapesDetector.parse(phrase)
    assert ShapesDetector.parse("A Large RED circle!") == ("red", "circle")


def point(condition):
    return point_metrics([score for image in condition.images for score in image.objects])


def test_a_perfect_painter_scores_perfectly_and_the_controls_do_not(tmp_path):
    protocol = find_protocol("shapes", count=12)
    conditions = evaluate_layouts(Painter(protocol), protocol, find_detector("shapes"), tmp_path, batch_size=5)
    assert [c.name for c in conditions] == ["beta-1", "beta-0.4", "off", "shuffled", "real", "empty"]
    assert [c.kind for c in conditions] == ["grounded", "grounded", "off", "shuffled", "real", "empty"]
    assert all(len(c.images) == len(c.paths) == 12 and not c.unread for c in conditions)
    metrics = {c.name: point(c) for c in conditions}
    assert metrics["beta-1"]["recall_50"] == metrics["real"]["recall_50"] == 1
    assert metrics["beta-1"] == metrics["real"]
    assert metrics["off"]["mean_iou"] == metrics["empty"]["mean_iou"] == 0
    assert metrics["shuffled"]["recall_50"] < 0.3
    assert conditions[0].settings == {"beta": 1, "guidance_scale": 2}


def test_what_cannot_be_evaluated_is_refused_before_anything_is_generated(tmp_path):
    class Never:
        unet = scheduler = None

        def __call__(self, *_, **__):
            pytest.fail("the pipeline was called")

    protocol, detector = find_protocol("shapes", count=1), find_detector("shapes")
    for bad, says in (
        (Layout(prompt="grass", id="x"), "layout x has no boxes"),
        (Layout(phrases=["a dog"], boxes=[[0, 0, 1, 1]]), "cannot look for 'a dog'"),
    ):
        protocol.layouts[1:] = [bad]
        with pytest.raises(ValueError, match=says):
            evaluate_layouts(Never(), protocol, detector, tmp_path)
    del protocol.layouts[1:]
    for betas, says in (([], "no beta"), ([1.5], "shares of the steps, 0 to 1")):
        with pytest.raises(ValueError, match=says):
            evaluate_layouts(Never(), protocol, detector, tmp_path, betas=betas)
    with pytest.raises(ValueError, match="no detector 'yolo'"):
        find_detector("yolo")
    with pytest.raises(ValueError, match="0 layouts"):
        held_out_layouts(0)
    assert not any(tmp_path.iterdir())


def test_one_layout_has_nothing_to_be_shuffled_with(tmp_path):
    protocol = find_protocol("shapes", count=1)
    conditions = evaluate_layouts(Painter(protocol), protocol, find_detector("shapes"), tmp_path, betas=[1])
    assert [c.name for c in conditions] == ["beta-1", "off", "real", "empty"]
    with Image.open(conditions[0].paths[conditions[0].images[0].key]) as image:
        assert image.size == (64, 64)
