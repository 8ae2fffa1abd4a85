"""Detectors for evaluation: what a phrase asks for, boxes of the image, batches, colours, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.detectors import TEXT_LIMIT, Crafted, logit
from helpers.phrase_models import phrase_models
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SamConfig,
    SamModel,
    SamProcessor,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.conditional_detr.image_processing_pil_conditional_detr import ConditionalDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from gligen_xl.detect.colour import RANGES, ColourJudge, Segmenter, colour_shares, hsv, pixel_box, split_colour
from gligen_xl.detect.detection import Detection, Query
from gligen_xl.detect.detectors import ColourDetector, find_detector
from gligen_xl.detect.matching import score_image
from gligen_xl.detect.network_detectors import _distinct, plain
from gligen_xl.layout import Layout, xyxy_from_cxcywh
from gligen_xl.toyworld.detectors import ShapesDetector
from gligen_xl.toyworld.world import draw, sample_scene, scene_layout

CLASSES = ["person", "car", "bus", "knife", "skis", "sofa", "pottedplant", "teddy bear", "N/A"]
CLASS_DETECTORS = ["detr", "conditional-detr", "rt-detr", "d-fine", "yolos"]
PHRASE_DETECTORS = ["grounding-dino", "mm-grounding-dino", "owlvit"]


# Tiny models --------------------------------------------------------------------------------------------------------


def class_models():
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: k for k, name in enumerate(CLASSES)}}
    size = {"shortest_edge": 64, "longest_edge": 128}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    of_detr = {
        "num_queries": 12, "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **names,
        "backbone_config": ResNetConfig(**resnet, out_features=["stage4"]),
    }  # fmt: skip
    three = {"out_features": ["stage2", "stage3", "stage4"]}
    of_rt_detr = {
        "num_queries": 12, "d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16],
        "decoder_in_channels": [16, 16, 16], "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_denoising": 0, **names,
    }  # fmt: skip
    hgnet = HGNetV2Config(
        embedding_size=8, stem_channels=[3, 4, 8], hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[4, 4, 4, 4], stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], **three,
    )  # fmt: skip
    yolos = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 96],
        patch_size=8, num_detection_tokens=12, **names,
    )  # fmt: skip
    square = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    return {
        "detr": (DetrForObjectDetection(DetrConfig(**of_detr)), DetrImageProcessorPil(size=size)),
        "conditional-detr": (
            ConditionalDetrForObjectDetection(ConditionalDetrConfig(**of_detr)),
            ConditionalDetrImageProcessorPil(size=size),
        ),
        "rt-detr": (
            RTDetrForObjectDetection(RTDetrConfig(**of_rt_detr, backbone_config=RTDetrResNetConfig(**resnet, **three))),
            square,
        ),
        "d-fine": (DFineForObjectDetection(DFineConfig(**of_rt_detr, backbone_config=hgnet)), square),
        "yolos": (YolosForObjectDetection(yolos), YolosImageProcessorPil(size=size)),
    }


def sam_model():
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 8, "mlp_dim": 16, "num_pos_feats": 8, "window_size": 4}
    vision |= {"global_attn_indexes": [0]}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "image_embedding_size": 8}
    masks = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masks |= {"iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    longest, padded = {"longest_edge": 64}, {"height": 64, "width": 64}
    return SamModel(config), SamProcessor(SamImageProcessorPil(size=longest, pad_size=padded))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    for name, (model, processor) in (class_models() | phrase_models() | {"sam": sam_model()}).items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


def noise(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def layout(*phrases):
    return Layout(phrases=phrases, boxes=[[0, 0, 0.5, 0.5]] * len(phrases))


# All networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_DETECTORS + PHRASE_DETECTORS)
def test_an_image_gives_the_same_whatever_is_beside_it(models, name):
    images = noise((40, 60), (60, 40), (40, 60), (64, 64), (40, 60))
    layouts = [layout("a person"), layout("a car", "the person"), layout("a bus"), layout("a person"), Layout()]
    together = find_detector(models / name, threshold=0.0, batch_size=2).detect(images, layouts)
    detector = find_detector(models / name, threshold=0.0, batch_size=1)
    assert all(together[:4])
    for image, of_image, found in zip(images, layouts, together, strict=True):
        (alone,) = detector.detect([image], [of_image])
        assert [item.label for item in alone] == [item.label for item in found]
        np.testing.assert_allclose([item.score for item in alone], [item.score for item in found], atol=1e-4)
        boxes = np.reshape([item.box for item in found], (-1, 4))
        np.testing.assert_allclose(np.reshape([item.box for item in alone], (-1, 4)), boxes, atol=1e-4)
        assert (boxes >= 0).all()
        assert (boxes <= 1).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
        if name in PHRASE_DETECTORS:
            assert {item.label for item in found} <= {plain(phrase) for phrase in of_image.phrases}
        else:
            assert {item.label for item in found} <= set(CLASSES)


@pytest.mark.parametrize("name", ["rt-detr", "detr", "owlvit"])
def test_less_sure_detections_are_kept_for_ap(models, name):
    images, layouts = noise((40, 60)), [layout("a person", "a car")]
    (every,) = find_detector(models / name, threshold=0.0).detect(images, layouts)
    detector = find_detector(models / name)
    (found,) = detector.detect(images, layouts)
    assert found == [item for item in every if item.score > 0.05]
    assert detector.settings["threshold"] == (0.25 if name == "owlvit" else 0.5)
    assert detector.settings["kept_from"] == 0.05
    lower = find_detector(models / name, threshold=0.01)
    assert (lower.settings["threshold"], lower.settings["kept_from"]) == (0.01, 0.01)


@pytest.mark.parametrize("name", ["rt-detr", "grounding-dino"])
def test_other_weights_in_a_folder_of_that_name_are_told_apart(models, tmp_path, name):
    """What was found is kept by the settings, and may not be taken for what another training of it finds."""
    copy = shutil.copytree(models / name, tmp_path / name)
    assert find_detector(copy).settings == find_detector(models / name).settings
    other = torch.nn.init.normal_(torch.empty(8))
    weights = load_file(copy / "model.safetensors")
    key = next(key for key, value in weights.items() if value.numel() >= 8 and value.is_floating_point())
    weights[key].view(-1)[:8] += other
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert find_detector(copy).name == find_detector(models / name).name
    assert find_detector(copy).settings["checksum"] != find_detector(models / name).settings["checksum"]


@pytest.mark.parametrize("name", ["owlvit", "grounding-dino"])
def test_a_folder_without_a_tokenizer_is_refused(models, tmp_path, name):
    """transformers would make one that knows no word, and nothing would be found."""
    copy = shutil.copytree(models / name, tmp_path / name)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{name} holds no tokenizer"):
        find_detector(copy)


# Fixed classes ------------------------------------------------------------------------------------------------------


def test_boxes_and_classes_are_those_of_the_outputs(models):
    detector = find_detector(models / "rt-detr")
    logits = torch.full((1, 3, len(CLASSES)), logit(0.01))
    logits[0, 0, 1], logits[0, 1, 7], logits[0, 2, 0] = logit(0.6), logit(0.9), logit(0.04)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.25, 0.4, 0.5], [0.5, 0.5, 1, 1]]])
    made = type("Outputs", (dict,), {"__getattr__": dict.__getitem__})
    network = detector.network
    network.model.forward = lambda **_: made(logits=logits, pred_boxes=boxes)
    (found,) = detector.detect(noise((40, 60)), [layout()])
    assert [item.label for item in found] == ["teddy bear", "car"]
    assert [item.score for item in found] == pytest.approx([0.9, 0.6])
    np.testing.assert_allclose([item.box for item in found], [[0.7, 0, 1, 0.5], [0.4, 0.3, 0.6, 0.7]], atol=1e-6)


@pytest.mark.parametrize(
    ("phrase", "label"),
    [
        ("person", "person"), ("A Person.", "person"), ("people", "person"), ("the cars", "car"), ("buses", "bus"),
        ("some knives", "knife"), ("skis", "skis"), ("a potted plant", "pottedplant"), ("couch", "sofa"),
        ("two-teddy bears", None), ("teddy bears", "teddy bear"), ("a red car", None), ("N/A", None), ("dog", None),
    ],
)  # fmt: skip
def test_a_phrase_names_a_class(models, phrase, label):
    detector = find_detector(models / "detr")
    if label:
        assert detector.query(phrase) == Query(label)
    else:
        with pytest.raises(ValueError, match=r"the detector detr cannot look for .*none of its 8 classes"):
            detector.query(phrase)


def test_the_error_names_near_classes(models):
    detector = find_detector(models / "detr")
    with pytest.raises(ValueError, match=r"near are teddy bear\. For free phrases"):
        detector.query("a tedy bear")
    with pytest.raises(ValueError, match=r"near are car\. For free"):
        detector.query("the shiny car outside")
    with pytest.raises(ValueError, match=r"it has person, car, bus, .*For free phrases take OWLv2"):
        detector.query("zzz")


# Free phrases -------------------------------------------------------------------------------------------------------


def test_equal_phrases_share_a_label(models):
    for name in PHRASE_DETECTORS:
        detector = find_detector(models / name)
        for phrase in ("a Red  man", "the red man.", "red man"):
            assert detector.query(phrase) == Query("red man")
        with pytest.raises(ValueError, match="holds no word"):
            detector.query("?!")
        with pytest.raises(ValueError, match=r"cannot look for .* tokens too long"):
            detector.query("red man " * 20)


def test_words_are_mapped_back_to_their_phrase(models):
    detector = find_detector(models / "grounding-dino")
    logits = torch.full((1, 4, TEXT_LIMIT), -torch.inf)  # [CLS] red man . t - shirt . [SEP]
    logits[0, :, :9] = logit(0.01)
    logits[0, 0, 2] = logit(0.5)
    logits[0, 1, 6] = logit(0.9)
    logits[0, 2, 5] = logit(0.04)
    logits[0, 3, 0] = logit(0.8)  # of no phrase
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.25, 0.4, 0.5], [0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 1, 1]]])
    model = detector.network.model = Crafted(detector.network.model, logits, boxes)
    (found,) = detector.detect(noise((40, 60)), [layout("A red man", "the T-shirt.", "a t-shirt")])
    assert [(item.label, round(item.score, 4)) for item in found] == [("t-shirt", 0.9), ("red man", 0.5)]
    np.testing.assert_allclose([item.box for item in found], [[0.7, 0, 1, 0.5], [0.4, 0.3, 0.6, 0.7]], atol=1e-6)
    (inputs,) = model.inputs
    assert detector.network.processor.tokenizer.decode(inputs["input_ids"][0]) == "[CLS] red man. t - shirt. [SEP]"


def test_more_phrases_than_are_read_at_once_become_several_texts(models):
    detector = find_detector(models / "grounding-dino", threshold=0.0)
    phrases = [f"{a} {b}" for a in ("red", "man", "lamp") for b in ("trees", "shirt", "bicycle", "him")]
    texts = detector._queries(phrases)
    assert len(texts) > 1
    assert " ".join(texts) == " . ".join(phrases) + " ."
    assert all(detector.network.excess(text) <= 0 for text in texts)
    (found,) = detector.detect(noise((40, 60)), [layout(*phrases)])
    assert {item.label for item in found} <= set(phrases)
    assert {item.label for item in found} & set(phrases[:4])
    assert {item.label for item in found} & set(phrases[-4:])


def test_of_boxes_that_are_the_same_object_the_best_is_kept():
    one, near, far = (0, 0, 0.5, 1), (0, 0, 0.49, 1), (0, 0, 0.3, 1)
    best, other, apart = Detection(one, "a", 0.9), Detection(near, "b", 0.7), Detection(far, "a", 0.6)
    assert _distinct([best, Detection(near, "a", 0.8), other, apart]) == [best, other, apart]


def test_a_candidate_s_score_is_the_model_s(models):
    detector = find_detector(models / "owlvit", threshold=0.0)
    (image,) = noise((40, 60))
    network = detector.network
    inputs = network.processor(text=[["man", "red lamp"]], images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = network.model(**inputs)
    (found,) = detector.detect([image], [layout("a man", "a red lamp")])
    best = outputs.logits[0].max(-1)
    corners = xyxy_from_cxcywh(outputs.pred_boxes[0].numpy()).clip(0, 1)
    expected = np.concatenate([corners, best.values.sigmoid()[:, None], best.indices[:, None]], axis=1)
    for item in found:
        row = [*item.box, item.score, ["man", "red lamp"].index(item.label)]
        assert np.abs(expected - row).max(-1).min() < 1e-5
    assert found


# Colours ------------------------------------------------------------------------------------------------------------


def test_hue_saturation_and_value_are_opencv_s():
    """Known values of cv2.cvtColor(..., COLOR_RGB2HSV)."""
    rgb = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [128, 64, 32], [9, 9, 9]])
    expected = [[0, 255, 255], [60, 255, 255], [120, 255, 255], [30, 255, 255], [150, 255, 255], [10, 191, 128]]
    np.testing.assert_array_equal(hsv(rgb), [*expected, [0, 0, 9]])


PAINT = {
    "red": (220, 20, 30), "brown": (120, 70, 30), "yellow": (240, 230, 20), "green": (30, 160, 40),
    "blue": (30, 60, 220), "black": (10, 10, 10), "white": (250, 250, 250),
}  # fmt: skip


@pytest.mark.parametrize("colour", RANGES)
def test_each_colour_is_told_from_the_others(colour):
    shares = colour_shares(np.full((5, 3), PAINT[colour], np.uint8))
    assert shares == {name: float(name == colour) for name in RANGES}


def test_what_is_none_of_the_colours():
    for rgb in ((128, 128, 128), (130, 30, 200)):  # grey, purple
        assert set(colour_shares(np.full((4, 3), rgb, np.uint8)).values()) == {0.0}
    assert set(colour_shares(np.zeros((0, 3), np.uint8)).values()) == {0.0}


def test_a_fifth_of_the_pixels_in_the_ellipse_decides():
    image = Image.new("RGB", (100, 50), PAINT["white"])
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 100, 4), fill=PAINT["red"])  # a tenth of the box, and less of its ellipse
    assert ColourJudge().colours(image, [(0, 0, 1, 1)]) == [("white",)]
    pen.rectangle((0, 0, 100, 16), fill=PAINT["red"])  # a third
    assert ColourJudge().colours(image, [(0, 0, 1, 1), (0, 0, 0.5, 0.2)]) == [("white", "red"), ("red",)]
    assert ColourJudge(share=0.4).colours(image, [(0, 0, 1, 1)]) == [("white",)]
    assert ColourJudge().colours(image, []) == []
    # Only the corners are blue.
    corners = Image.new("RGB", (40, 40), PAINT["blue"])
    ImageDraw.Draw(corners).ellipse((0, 0, 39, 39), fill=PAINT["green"])
    assert ColourJudge(share=0.1).colours(corners, [(0, 0, 1, 1)]) == [("green",)]


def test_the_smallest_box_has_a_pixel():
    assert pixel_box((0.999, 0.5, 1, 0.5001), 10, 10) == (9, 5, 10, 6)
    assert pixel_box((0, 0, 1, 1), 7, 5) == (0, 0, 7, 5)
    image = Image.new("RGB", (8, 8), PAINT["blue"])
    assert ColourJudge().colours(image, [(0.5, 0.5, 0.501, 0.501)]) == [("blue",)]


def test_a_phrase_is_split_into_colour_and_object():
    assert split_colour("a red car") == ("red", "a car")
    assert split_colour("Brown, old dog") == ("brown", "old dog")
    for phrase in ("a car", "a red and white car", "red", "a purple car"):
        with pytest.raises(ValueError, match=r"no colour can be judged of .*'a red car'"):
            split_colour(phrase)


class Boxes:
    """Finds what it is told, and keeps the layouts."""

    name, settings, attributes, labels_decide, reads_layouts = "boxes", {"detector": "boxes"}, (), True, False

    def __init__(self, *found):
        self.found, self.layouts = list(found), []

    def query(self, phrase):
        return Query(plain(phrase))

    def detect(self, images, layouts):
        self.layouts += layouts
        return [self.found for _ in images]


def test_what_is_found_is_judged_for_its_colours():
    image = Image.new("RGB", (40, 40), PAINT["white"])
    ImageDraw.Draw(image).rectangle((0, 0, 19, 20), fill=PAINT["red"])
    ImageDraw.Draw(image).rectangle((0, 12, 19, 39), fill=PAINT["green"])  # on the left red above, green below
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    inner = Boxes(Detection(left, "car"), Detection(right, "car"))
    detector = ColourDetector(inner, ColourJudge())
    (found,) = detector.detect([image], [Layout(phrases=["a red car", "a blue car"], boxes=[left, right])])
    assert [item.attributes for item in found] == [{"colour": ("green", "red")}, {"colour": ("white",)}]
    assert [item.box for item in found] == [left, right]
    assert inner.layouts[0].phrases == ("a car", "a car")
    assert detector.query("a red car") == Query("car", {"colour": "red"})
    assert detector.name == "boxes-colour"
    assert detector.settings["colour_mask"] == "ellipse inside the box"
    score = score_image(Layout(phrases=["a red car", "a blue car"], boxes=[left, right]), "0", found, detector)
    assert [item.attributes["colour"] for item in score.objects] == [True, False]


def test_masks_of_sam(models):
    segmenter = Segmenter.load(models / "sam")
    pixels = np.asarray(noise((40, 60))[0])
    boxes = [(0.1, 0.1, 0.5, 0.5), (0.5, 0.2, 1, 0.9)]
    masks = segmenter.masks(pixels, boxes)
    assert masks.shape == (2, 40, 60)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks[1:], segmenter.masks(pixels, boxes[1:]))

    class Given:
        name, checksum = "given", "0123"

        def masks(self, pixels, boxes):
            mask = np.zeros((len(boxes), *pixels.shape[:2]), bool)
            mask[0, :4, :4] = True  # the second object has no pixels
            return mask

    image = Image.new("RGB", (8, 8), PAINT["blue"])
    ImageDraw.Draw(image).rectangle((0, 0, 3, 3), fill=PAINT["red"])
    judge = ColourJudge(segmenter=Given())
    assert judge.colours(image, [(0, 0, 1, 1), (0, 0, 1, 1)]) == [("red",), ()]
    assert judge.settings["colour_mask"] == "given"


def test_colours_by_name(models):
    detector = find_detector(models / "rt-detr", colour=True, threshold=0.0, segmenter=models / "sam")
    assert detector.attributes == ("colour",)
    assert detector.name == "rt-detr-colour"
    assert detector.settings["colour_mask"] == "sam"
    (found,) = detector.detect(noise((40, 60)), [layout("a red car", "a white bus")])
    assert found
    assert {name for item in found for name in item.attributes["colour"]} <= set(RANGES)
    with pytest.raises(ValueError, match="no colour can be judged of 'a car'"):
        detector.query("a car")
    with pytest.raises(ValueError, match="none of its 8 classes; near are"):
        detector.query("a red cart")


# The shapes world ---------------------------------------------------------------------------------------------------


def test_the_shapes_detector_finds_what_it_scores():
    detector = find_detector("shapes")
    assert detector.query("a red circle") == Query("red circle", {"colour": "red", "shape": "circle"})
    scenes = [sample_scene(0, k, num_objects=2) for k in range(8)]
    layouts = [scene_layout(scene, seed=0, index=k) for k, scene in enumerate(scenes)]
    every = detector.detect([draw(scene) for scene in scenes], layouts)
    right = sum(
        any(item.label == detector.query(phrase).label for item in found)
        for of_scene, found in zip(layouts, every, strict=True)
        for phrase in of_scene.phrases
    )
    assert right >= 14  # of 16; some stand behind others
    scores = ShapesDetector().score(draw(scenes[0]), layouts[0])
    assert [set(score.attributes) for score in scores] == [{"colour", "shape"}] * 2


# Errors -------------------------------------------------------------------------------------------------------------


def test_what_is_no_detector_says_what_it_is(models, tmp_path):
    with pytest.raises(ValueError, match="no detector 'yolo'; expected 'shapes', a folder"):
        find_detector("yolo")
    with pytest.raises(FileNotFoundError, match=r"no detector folder .*nowhere"):
        find_detector(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such repository was reached"):
        find_detector("some/detector", local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        find_detector(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"is of model_type 'bert', no object detector; expected .*rt_detr.*owlv2"):
        find_detector(tmp_path)
    (tmp_path / "config.json").write_bytes((models / "detr" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded; expected config\.json, preprocessor_config\.json and"):
        find_detector(tmp_path)
    with pytest.raises(ValueError, match="model_type 'detr', no SAM"):
        find_detector(models / "detr", colour=True, segmenter=models / "detr")
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        find_detector(models / "detr", threshold=1.5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        find_detector(models / "detr", batch_size=0)
    with pytest.raises(ValueError, match="no colours are judged"):
        find_detector(models / "detr", segmenter=models / "sam")
    with pytest.raises(ValueError, match="the shapes detector has no threshold"):
        find_detector("shapes", threshold=0.5)


def test_weights_are_safetensors_and_code_is_not_run(models, tmp_path):
    for file in (models / "detr").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForObjectDetection": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    find_detector(tmp_path)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        find_detector(tmp_path)
