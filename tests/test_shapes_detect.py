"""The exact detector and its own error: on drawn images, and on images that went through the VAE."""

import numpy as np
import pytest
import torch
from PIL import Image

from gligen_xl.evaluate import point_metrics
from gligen_xl.toyworld.data import images
from gligen_xl.toyworld.detector import detect
from gligen_xl.toyworld.detectors import ShapesDetector
from gligen_xl.toyworld.world import BACKGROUNDS, HELD_OUT_SEED, Scene, draw, sample_scene, scene_layout


def measured(images, seed):
    detector = ShapesDetector()
    scores = [detector.score(image, scene_layout(sample_scene(seed, k))) for k, image in enumerate(images)]
    return point_metrics([score for of_image in scores for score in of_image])


def test_its_error_on_drawn_images():
    metrics = measured([draw(sample_scene(HELD_OUT_SEED, k)) for k in range(200)], HELD_OUT_SEED)
    assert metrics["mean_iou"] > 0.9
    assert metrics["recall_50"] > 0.99
    assert metrics["colour"] > 0.99
    assert metrics["shape"] > 0.98


def test_it_finds_nothing_where_nothing_is():
    for background in BACKGROUNDS:
        for seed in range(8):
            horizon = 0.4 if seed % 2 else None
            scene = Scene(background=background, horizon=horizon, objects=(), texture_seed=seed)
            assert detect(draw(scene)) == []


@torch.no_grad()
def test_its_error_on_vae_round_trips(shapes_pipeline):
    vae = shapes_pipeline.vae
    decoded = vae.decode(vae.encode(images(HELD_OUT_SEED, 0, 64)).latent_dist.mean).sample
    decoded_images = shapes_pipeline.image_processor.postprocess(decoded)
    metrics = measured(decoded_images, HELD_OUT_SEED)
    assert metrics["mean_iou"] > 0.8
    assert metrics["recall_50"] > 0.93
    assert metrics["colour"] > 0.93
    assert metrics["shape_of_found"] > 0.85


def test_images_of_any_size_and_mode():
    scene = sample_scene(3, 1, num_objects=2)
    large = detect(draw(scene, size=256))
    assert {item.label for item in large} == {f"{item.colour} {item.shape}" for item in scene.objects}
    assert detect(draw(scene).convert("RGBA")) == detect(draw(scene))
    assert detect(np.asarray(draw(scene))) == detect(draw(scene))
    assert detect(Image.new("RGB", (3, 2))) is not None
    with pytest.raises(ValueError, match="expected an image of shape"):
        detect(np.zeros((3, 64, 64)))
