"""CLIP scores of images and of boxes: against the model itself, in batches, of the smallest boxes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gligen_xl.detect.weights import checksum
from gligen_xl.evaluate.clip import ClipScore, ClipScorer
from gligen_xl.layout import Layout

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random CLIP."""
    torch.manual_seed(0)
    letters = [chr(k) for k in range(33, 127)] + [f"{chr(k)}</w>" for k in range(33, 127)]
    vocabulary = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 190, "pad_token_id": 189, "bos_token_id": 188, "eos_token_id": 189}
    text |= {"max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": SIDE, "patch_size": 8}, projection_dim=8)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    root = tmp_path_factory.mktemp("clip") / "tiny-clip"
    model.save_pretrained(root)
    CLIPProcessor(images, CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)).save_pretrained(root)
    return root


def images():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (64, 32), (32, 32))
    ]


LAYOUTS = [
    Layout(prompt="a cat", phrases=["cat", "dog"], boxes=[[0, 0, 0.5, 0.5], [0.5, 0.2, 1, 1]]),
    Layout(prompt="two dogs", phrases=["dog"], boxes=[[0.25, 0.25, 0.75, 1]]),
    Layout(phrases=["a bird", "cat"], boxes=[[0.5, 0.5, 0.501, 0.501], [0, 0, 1, 0.01]]),
]


def cosine(scorer, image, text):
    inputs = scorer.processor(text=[text], images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = scorer.model(**inputs)
    return torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item()


def flat(scores):
    return [value for score in scores for value in (score.clip or 0.0, *score.clip_objects)]


def test_scores_are_a_hundred_times_the_cosine_and_not_below_0(folder):
    scorer = ClipScorer.load(folder)
    scores = scorer.score(images(), LAYOUTS)
    for image, layout, score in zip(images(), LAYOUTS, scores, strict=True):
        if layout.prompt:
            value = cosine(scorer, image, layout.prompt)
            assert 0 < value < 1
            assert score.clip == pytest.approx(100 * value, abs=1e-3)
        width, height = image.size
        for box, phrase, found in zip(layout.boxes, layout.phrases, score.clip_objects, strict=True):
            left, top = int(box[0] * width), int(box[1] * height)
            right, bottom = int(np.ceil(box[2] * width)), int(np.ceil(box[3] * height))
            part = image.crop((left, top, right, bottom)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            assert found == pytest.approx(100 * cosine(scorer, part, phrase), abs=1e-3)
    assert scores[2].clip is None  # there is no prompt
    assert scorer.settings == {
        "clip": "tiny-clip", "clip_checksum": checksum(folder), "clip_scale": "100 * max(cosine, 0)"
    }  # fmt: skip
    assert len(set(flat(scores))) == 8
    scorer.model.visual_projection.weight.data.neg_()
    assert set(flat(scorer.score(images(), LAYOUTS))) == {0.0}


def test_an_image_gives_the_same_whatever_is_beside_it(folder):
    together = ClipScorer.load(folder, batch_size=3).score(images(), LAYOUTS)
    alone = [ClipScorer.load(folder).score([p], [of])[0] for p, of in zip(images(), LAYOUTS, strict=True)]
    np.testing.assert_allclose(flat(together), flat(alone), atol=1e-3)
    assert ClipScorer.load(folder).score(images()[:1], [Layout()]) == [ClipScore(None, ())]
    assert ClipScorer.load(folder).score([], []) == []


def test_each_text_is_embedded_once(folder, monkeypatch):
    scorer, seen = ClipScorer.load(folder), []
    embed = scorer.model.get_text_features
    monkeypatch.setattr(
        scorer.model, "get_text_features", lambda **inputs: seen.append(len(inputs["input_ids"])) or embed(**inputs)
    )
    first = scorer.score(images(), LAYOUTS)
    assert sum(seen) == 5  # a cat, cat, dog, two dogs, a bird
    assert scorer.score(images(), LAYOUTS) == first
    assert sum(seen) == 5


def test_long_texts_are_cut_and_counted(folder):
    scorer = ClipScorer.load(folder)
    scorer.score(images()[:1], [Layout(prompt="a prompt that is much too long", phrases=["cat"], boxes=[[0, 0, 1, 1]])])
    assert scorer.cut_texts == 1


def test_other_weights_in_a_folder_of_that_name_are_told_apart(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert ClipScorer.load(copy).settings == ClipScorer.load(folder).settings
    model = CLIPModel.from_pretrained(copy)
    model.logit_scale.data += 1
    model.save_pretrained(copy)
    assert ClipScorer.load(copy).settings != ClipScorer.load(folder).settings


def test_a_tokenizer_that_does_not_say_how_much_the_model_reads(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "clip")
    said = json.loads((copy / "tokenizer_config.json").read_text())
    del said["model_max_length"]
    (copy / "tokenizer_config.json").write_text(json.dumps(said))
    long = [Layout(prompt="a prompt that is much too long", phrases=["cat"], boxes=[[0, 0, 1, 1]])]
    scorer, expected = ClipScorer.load(copy), ClipScorer.load(folder).score(images()[:1], long)
    assert scorer.score(images()[:1], long) == expected
    assert scorer.cut_texts == 1


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    """transformers would make one that knows no word."""
    copy = shutil.copytree(folder, tmp_path / "clip")
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"clip holds no tokenizer \(tokenizer\.json, "):
        ClipScorer.load(copy)


def test_what_is_no_clip_says_what_it_is(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CLIP model folder .*nowhere"):
        ClipScorer.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is of model_type 'siglip', no CLIP model; expected clip"):
        ClipScorer.load(tmp_path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ClipScorer.load(folder, batch_size=0)
