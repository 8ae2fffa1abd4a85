"""Boxes found by zero-shot detectors: what their outputs mean, and that an image's boxes do not depend on others."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from helpers.detectors import (
    TEXT_LIMIT,
    Crafted,
    bert_tokenizer,
    candidate_model,
    clip_tokenizer,
    logit,
    word_model,
)
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from gligen_xl.detect.detection import CaptionGrounder
from gligen_xl.detect.grounder import find_grounder
from gligen_xl.detect.outputs import Tokens, candidates, collect
from gligen_xl.layout import box_iou, xyxy_from_cxcywh
from gligen_xl.toyworld.world import draw, sample_scene

# Tiny models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random detectors, with their processors."""
    root = tmp_path_factory.mktemp("detectors")
    side = {"height": 32, "width": 32}
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    parts = {
        "grounding-dino": (
            word_model(GroundingDinoConfig, GroundingDinoForObjectDetection),
            GroundingDinoProcessor(images, bert_tokenizer()),
        ),
        "mm-grounding-dino": (
            word_model(MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
            GroundingDinoProcessor(images, bert_tokenizer()),
        ),
        "owlvit": (
            candidate_model(OwlViTConfig, OwlViTForObjectDetection),
            OwlViTProcessor(OwlViTImageProcessorPil(size=side), clip_tokenizer()),
        ),
        "owlv2": (
            candidate_model(Owlv2Config, Owlv2ForObjectDetection),
            Owlv2Processor(Owlv2ImageProcessorPil(size=side), clip_tokenizer()),
        ),
    }
    for name, (model, processor) in parts.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def noise(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def boxes_of(detections):
    return [detection.box for detection in detections]


def scores_of(detections):
    return [detection.score for detection in detections]


def phrases_of(detections):
    return [detection.label for detection in detections]


def close(a, b):
    assert phrases_of(a) == phrases_of(b)
    np.testing.assert_allclose(scores_of(a), scores_of(b), atol=1e-4)
    np.testing.assert_allclose(np.reshape(boxes_of(a), (-1, 4)), np.reshape(boxes_of(b), (-1, 4)), atol=1e-4)


# Phrases ------------------------------------------------------------------------------------------------------------


def tokens_of(text):
    encoding = bert_tokenizer()(text).encodings[0]
    return encoding.tokens, Tokens(text, tuple(encoding.offsets), tuple(encoding.word_ids))


def phrase(text, scores, threshold=0.2):
    """Scores by token; those of others are 0.05."""
    names, tokens = tokens_of(text)
    found = [scores.get(name, 0.05) if isinstance(scores, dict) else scores[k] for k, name in enumerate(names)]
    return tokens.phrase(np.array([*found, 0.0, 0.0]), threshold)  # the model's output is longer than the text


@pytest.mark.parametrize(
    ("text", "scores", "expected"),
    [
        ("a man rides a bicycle. trees stand behind him.", {"man": 0.9, "trees": 0.6}, "man"),
        ("a man rides a bicycle. trees stand behind him.", {"man": 0.3, "trees": 0.6, "him": 0.25}, "trees him"),
        ("a man! trees? him.", {"man": 0.3, "trees": 0.6, "him": 0.5}, "trees"),
        ("a red t-shirt.", {"t": 0.5, "-": 0.4, "shirt": 0.6, "red": 0.3}, "red t-shirt"),
        ("a red t-shirt.", {"t": 0.5, "shirt": 0.6}, "t shirt"),
        ("a lamppost.", {"##post": 0.5}, "lamppost"),
        ("a man's shirt.", {"man": 0.5, "'": 0.3, "s": 0.3, "shirt": 0.3}, "man's shirt"),
        ("a man, trees.", {"man": 0.5, ",": 0.4}, "man"),
        ("a man. trees.", {".": 0.9, "man": 0.5, "trees": 0.5}, "man"),  # a mark ends its sentence
        ("a man.", {"[CLS]": 0.9, "man": 0.5}, ""),
        ("a man.", {"[SEP]": 0.9, "man": 0.5}, ""),
        ("a man.", {"man": 0.2}, ""),  # not above
        ("trees", {"trees": 0.9}, "trees"),
        ("a zebra. trees.", {"[UNK]": 0.9}, "zebra"),  # as it is spelt, known or not
    ],
)
def test_a_phrase_is_the_words_of_one_sentence(text, scores, expected):
    assert phrase(text, scores) == expected


def test_the_highest_token_is_looked_for_in_the_text_only():
    _, tokens = tokens_of("a man.")
    assert tokens.phrase(np.array([0, 0.3, 0.5, 0, 0, 0.9]), 0.2) == "a man"


def test_candidates_are_the_parts_between_marks():
    assert candidates(" A cat, a Dog. a cat!  Two birds?? ") == ("a cat", "a dog", "two birds")
    assert candidates(" ., ") == ()


def test_boxes_are_clipped_and_sorted_and_the_useless_dropped():
    boxes = np.array(
        [[-0.1, 0.2, 0.5, 1.2], [0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.3, 0.5], [1.1, 0, 1.4, 1], [0, 0, 1, 1],
         [0, 0, 1, 1], [0, 0, np.nan, 1], [0, 0, 1, np.inf]], np.float32,
    )  # fmt: skip
    scores = np.array([0.3, 0.8, 0.9, 0.9, np.nan, 0.7, 0.9, 0.9], np.float32)
    found = collect(boxes, scores, ["one", "two", "thin", "outside", "nan", "", "nan", "inf"])
    assert phrases_of(found) == ["two", "one"]
    assert scores_of(found) == pytest.approx([0.8, 0.3])
    np.testing.assert_allclose(boxes_of(found), [[0.1, 0.1, 0.2, 0.2], [0, 0.2, 0.5, 1]])


# Detectors ----------------------------------------------------------------------------------------------------------


def test_thresholds_phrases_and_corners(models):
    detector = find_grounder(models / "grounding-dino", box_threshold=0.4, text_threshold=0.3)
    logits = torch.full((1, 4, TEXT_LIMIT), -torch.inf)  # [CLS] a man . trees . [SEP]
    logits[0, :, :7] = logit(0.01)
    logits[0, 0, 1:3] = torch.tensor([logit(0.35), logit(0.5)])
    logits[0, 1, 4] = logit(0.9)
    logits[0, 2, 2] = logit(0.39)  # under the threshold of boxes
    logits[0, 3, 0] = logit(0.6)  # no phrase
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.25, 0.4, 0.5], [0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 1, 1]]])
    detector.model = Crafted(detector.model, logits, boxes)
    (found,) = detector.ground(noise((40, 60)), [" A man. TREES "])
    assert phrases_of(found) == ["trees", "a man"]
    assert scores_of(found) == pytest.approx([0.9, 0.5])
    np.testing.assert_allclose(boxes_of(found), [[0.7, 0, 1, 0.5], [0.4, 0.3, 0.6, 0.7]], atol=1e-6)
    (inputs,) = detector.model.inputs
    assert detector.processor.tokenizer.decode(inputs["input_ids"][0]) == "[CLS] a man. trees. [SEP]"


def test_half_precision_that_overflows_is_repeated(models):
    detector = find_grounder(models / "grounding-dino", dtype=torch.bfloat16)
    image, caption = noise((40, 60)), ["a man."]
    logits = torch.full((1, 1, TEXT_LIMIT), -torch.inf)
    logits[0, 0, :5] = torch.tensor([logit(0.01), logit(0.3), logit(0.5), logit(0.01), logit(0.01)])
    real = Crafted(detector.model, logits, torch.full((1, 1, 4), 0.5))

    class Overflows(torch.nn.Module):
        config = real.config

        def forward(self, **inputs):
            outputs = real(**inputs)
            if torch.is_autocast_enabled("cpu"):
                outputs["logits"] = torch.full_like(outputs["logits"], torch.nan)
            return outputs

    detector.model = Overflows()
    (found,) = detector.ground(image, caption)
    assert phrases_of(found) == ["a man"]
    assert len(real.inputs) == 2
    real.logits = torch.full_like(logits, torch.nan)  # in float32 too: dropped
    assert detector.ground(image, caption) == [[]]


def test_the_scores_are_those_of_the_model(models):
    """Against the library's own post-processing, which knows no sentences."""
    detector = find_grounder(models / "grounding-dino", box_threshold=0.0, text_threshold=0.0)
    (image,) = noise((40, 60))
    inputs = detector.processor(images=image, text="a man rides.", return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    (expected,) = detector.processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=0.0, text_threshold=0.0
    )
    (found,) = detector.ground([image], ["a man rides"])
    assert len(boxes_of(found)) > 5
    for box, score in zip(boxes_of(found), scores_of(found), strict=True):
        near = (expected["boxes"].clip(0, 1) - torch.tensor(box)).abs().max(-1).values
        assert near.min() < 1e-5
        assert abs(expected["scores"][near.argmin()] - score) < 1e-5
    assert scores_of(found) == sorted(scores_of(found), reverse=True)


@pytest.mark.parametrize("name", ["grounding-dino", "mm-grounding-dino", "owlvit"])
def test_an_image_gives_the_same_whatever_is_beside_it(models, name):
    images = noise((40, 60), (60, 40), (40, 60), (40, 60), (64, 64))
    captions = ["A man rides a bicycle. Trees stand behind him.", "a red shirt", "trees", "", "a lamp, trees. a man"]
    settings = {"box_threshold": 0.0, "text_threshold": 0.0}
    together = find_grounder(models / name, batch_size=3, **settings).ground(images, captions)
    alone = find_grounder(models / name, batch_size=1, **settings)
    for image, caption, found in zip(images, captions, together, strict=True):
        close(found, alone.ground([image], [caption])[0])
    assert [bool(boxes_of(found)) for found in together] == [True, True, True, False, True]
    assert alone.ground(images, captions) == alone.ground(images, captions)
    assert alone.ground([], []) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grounding-dino", "mm-grounding-dino", "owlvit"])
def test_half_precision_stays_near(models, name, dtype):
    images, captions = noise((40, 60)), ["a man rides a bicycle."]
    settings = {"box_threshold": 0.0, "text_threshold": 0.0}
    (full,) = find_grounder(models / name, **settings).ground(images, captions)
    detector, passes = find_grounder(models / name, dtype=dtype, **settings), []
    detector.model.register_forward_hook(lambda *_: passes.append(1))
    (half,) = detector.ground(images, captions)
    assert len(passes) == 1
    assert abs(len(boxes_of(full)) - len(boxes_of(half))) <= 2
    assert scores_of(half)[0] == pytest.approx(scores_of(full)[0], abs=0.05)
    assert box_iou(np.array(boxes_of(full)), np.array(boxes_of(half))).max(1).mean() > 0.8


def test_a_long_caption_is_cut_before_a_word_and_counted(models):
    detector = find_grounder(models / "grounding-dino")
    seen = Crafted(detector.model, torch.full((2, 1, TEXT_LIMIT), -1.0), torch.full((2, 1, 4), 0.5))
    detector.model = seen
    reds = "a man. " + " ".join(["red"] * 17)  # 20 tokens, and there come those of begin and end, and a full stop
    detector.ground(noise((40, 60)), [f"{reds} man"])
    assert detector.cut_texts == 0
    assert seen.inputs[-1]["input_ids"].shape[1] == TEXT_LIMIT
    detector.ground(noise((40, 60)), [f"{reds} lamppost trees"])  # the first word too much has two parts
    assert detector.processor.tokenizer.decode(seen.inputs[-1]["input_ids"][0]) == f"[CLS] {reds}. [SEP]"
    assert detector.cut_texts == 1


@pytest.mark.parametrize(
    ("name", "phrases"), [("owlvit", {"a man", "trees", "red"}), ("grounding-dino", {"a man", "trees, red"})]
)
def test_a_given_text_takes_the_place_of_captions(models, name, phrases):
    detector = find_grounder(models / name, box_threshold=0.0, text_threshold=0.0, text="a man. trees, red")
    for found in detector.ground(noise((40, 60), (60, 40)), ["a bicycle", ""]):
        assert phrases_of(found)
        assert set(phrases_of(found)) <= phrases


def test_candidates_have_their_own_scores_and_boxes(models):
    """Against the outputs of the model itself."""
    detector = find_grounder(models / "owlvit", box_threshold=0.0)
    (image,) = noise((40, 60))
    parts = ["a man", "trees", "red"]
    inputs = detector.processor(text=[parts], images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    best = outputs.logits[0].max(-1)
    corners = xyxy_from_cxcywh(outputs.pred_boxes[0].numpy()).clip(0, 1)
    (found,) = detector.ground([image], ["A man. Trees, red"])
    order = best.values.argsort(descending=True).tolist()
    kept = [k for k in order if (corners[k, 2:] > corners[k, :2]).all()]
    assert phrases_of(found) == [parts[best.indices[k]] for k in kept]
    np.testing.assert_allclose(scores_of(found), best.values.sigmoid()[kept], atol=1e-5)
    np.testing.assert_allclose(boxes_of(found), corners[kept], atol=1e-5)
    detector.ground([image], ["a text that is much too long for it, red"])
    assert detector.cut_texts == 1


def test_owlv2_boxes_are_of_the_image_and_not_of_its_padded_square(models, monkeypatch):
    # Resizing is what scipy is needed for.
    monkeypatch.setattr(Owlv2ImageProcessorPil, "resize", lambda *_, **__: np.zeros((3, 32, 32), np.float32))
    detector = find_grounder(models / "owlv2", box_threshold=0.0)
    (found,) = detector.ground(noise((40, 80)), ["a man. trees"])
    assert boxes_of(found)
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.5, 0.75, 1, 0.2]]])  # the second is under the image
    detector.model = Crafted(detector.model, torch.zeros(1, 2, 1), boxes)
    (found,) = detector.ground(noise((40, 80)), ["a man"])
    np.testing.assert_allclose(boxes_of(found), [[0, 0, 0.5, 1]], atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="scipy is installed")
def test_a_missing_package_is_named_at_once(models):
    with pytest.raises(ValueError, match=r"owlv2 needs a package: .*pip install scipy"):
        find_grounder(models / "owlv2")


def test_shapes_are_found_exactly():
    scenes = [sample_scene(0, k, num_objects=2) for k in range(12)]
    images = [np.asarray(draw(scene)) for scene in scenes]
    every = find_grounder("shapes").ground(images, [""] * len(scenes))
    right = 0
    for scene, found in zip(scenes, every, strict=True):
        assert set(scores_of(found)) <= {1.0}
        for item in scene.objects:
            near = [
                k for k, box in enumerate(boxes_of(found)) if box_iou(np.array([item.box]), np.array([box]))[0, 0] > 0.8
            ]
            right += any(phrases_of(found)[k] == item.phrase for k in near)
    assert right >= 20  # of 24; some stand behind others


# Errors -------------------------------------------------------------------------------------------------------------


def test_what_is_no_detector_says_what_it_is(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no detector folder .*nowhere; expected a folder or a Hub repository"):
        find_grounder(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no detector folder some/detector, and no such repository was reached"
    ):
        find_grounder("some/detector", local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; expected config\.json"):
        find_grounder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"is of model_type 'bert', no zero-shot detector; expected grounding-dino"):
        find_grounder(tmp_path)
    (tmp_path / "config.json").write_bytes((models / "owlvit" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded; expected config\.json, preprocessor_config\.json"):
        find_grounder(tmp_path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        find_grounder(models / "owlvit", batch_size=0)


@pytest.mark.parametrize("name", ["shapes", "owlvit"])
def test_images_of_another_kind_are_refused(models, name):
    detector = find_grounder(name if name == "shapes" else models / name)
    (image,) = noise((8, 8))
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        detector.ground([image], ["a", "b"])
    for wrong in (image / 255, image[..., :1], image[:, :, 0], image[:0]):
        with pytest.raises(ValueError, match=r"image 1 is .*; expected uint8 \(height, width, 3\)"):
            detector.ground([image, wrong], ["a", "b"])


def test_code_beside_a_model_is_not_run(models, tmp_path):
    for file in (models / "owlvit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForZeroShotObjectDetection": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    assert isinstance(find_grounder(tmp_path), CaptionGrounder)
    assert not (tmp_path / "ran").exists()
