"""Training on Stable Diffusion 1.x and 2.x: one text encoder, no sizes, the noise or the velocity predicted."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from helpers.rows import METADATA, latents, row
from helpers.tiny import new_scheduler, sd_pipeline, sdxl_pipeline
from helpers.tiny_run import final, first_batch, loaded, noised, train_until, write_data

from gligen_xl import StableDiffusionGLIGENPipeline
from gligen_xl.adapter import adapter_state_dict, is_attached
from gligen_xl.data.dataset import Augmentation
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.text_embeddings import embed_phrases
from gligen_xl.train.base import load_base
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.conditioning import Conditioner
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.objective import denoising_loss
from gligen_xl.train.options import Optimization, Validation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def velocity_base(tmp_path_factory):
    """As SD 2.x at 768: linear projections and the velocity."""
    folder = tmp_path_factory.mktemp("velocity")
    pipeline = sd_pipeline(use_linear_projection=True)
    pipeline.scheduler = new_scheduler().from_config(new_scheduler().config, prediction_type="v_prediction")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(base, data, tmp_path):
    return TrainConfig(
        model=str(base), data=str(data), out=str(tmp_path / "run"), samples=24, batch_size=4, log_every=2, seed=3,
        checkpoint_every=8, track=[], augmentation=Augmentation(slots=3),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8, ema_decay=0.9),
    )  # fmt: skip


def test_the_finished_adapter_goes_onto_the_base(config, base):
    finished = train(config)
    description = json.loads((finished / "gligen_adapter.json").read_text())
    assert description["base_model"] == base.name  # its folder stays on the machine
    assert description["config"]["phrase_dim"] == description["config"]["cross_attention_dim"] == 24
    pipeline = StableDiffusionGLIGENPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    layout = {"gligen_phrases": ["a ring"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    plain = pipeline("grass", generator=torch.Generator().manual_seed(0), **settings).images
    pipeline.load_gligen_adapter(finished)
    average = load_checkpoint(list_checkpoints(config.out)[-1])[0]["gligen_adapter"]
    assert all(torch.equal(value, average[name]) for name, value in adapter_state_dict(pipeline.unet).items())
    grounded = pipeline("grass", generator=torch.Generator().manual_seed(0), **layout, **settings).images
    assert not torch.equal(plain, grounded)


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    train_until(20, config)
    train(config)
    (expected, state), (got, again) = final(whole.out), final(config.out)
    assert state["position"] == again["position"] == 24
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_run_keeps_to_its_base(config, base, tmp_path):
    """Also where another one lies in its place."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    run = replace(config, model=str(copy), samples=8)
    train(run)
    sd_pipeline(seed=7).save_pretrained(copy)
    with pytest.raises(ValueError, match="begun on another base"):
        train(run)


def test_latents_of_another_vae_are_refused(config, tmp_path):
    write_shard(tmp_path / "data" / "a", latents(4, side=8), [row(1)] * 4, {**METADATA, "scaling_factor": "0.13025"})
    with pytest.raises(ValueError, match=r"scaled by 0\.13025, the base's VAE by 0\.18215"):
        train(replace(config, data=str(tmp_path / "data")))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_objective_is_the_bases(config, velocity_base, kind):
    """Against the formulas of the papers, with diffusers' own encoding of the captions."""
    config = config if kind == "epsilon" else replace(config, model=str(velocity_base))
    pipeline = loaded(config)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert scheduler.config["prediction_type"] == kind
    batch = first_batch(config, drop_caption=0)
    prompts = [caption or "" for caption in batch.captions]
    hidden, _ = pipeline.encode_prompt(prompts, CPU, 1, False)
    conditioning = Conditioner(pipeline)(batch)
    assert conditioning.keys() == {"encoder_hidden_states", "cross_attention_kwargs"}
    time = (batch.time * 1000).long()
    noisy, target = noised(scheduler, batch.latents, batch.noise, time)
    with torch.no_grad():
        predicted = pipeline.unet(
            noisy, time, hidden, cross_attention_kwargs=conditioning["cross_attention_kwargs"]
        ).sample
        expected = (predicted - target).square().mean((1, 2, 3))
        torch.testing.assert_close(denoising_loss(pipeline.unet, scheduler, batch, conditioning), expected)


def test_training_on_the_velocity(config, velocity_base):
    config = replace(config, model=str(velocity_base), samples=8)
    train(config)
    weights = load_checkpoint(list_checkpoints(config.out)[-1])[0]["weights"]
    assert any(value.abs() > 0 for name, value in weights.items() if ".alpha_" in name)


def test_captions_and_phrases_are_those_of_the_pipeline(config):
    pipeline = loaded(config)
    conditioner = Conditioner(pipeline)
    captions = ["grass with a ring", None, "sand", "grass with a ring"]
    hidden, empty = pipeline.encode_prompt("grass with a ring", CPU, 1, True)
    got = conditioner.captions(captions).hidden
    torch.testing.assert_close(got[:1], hidden)
    assert torch.equal(got[1:2], empty)  # a dropped caption is what guidance meets
    assert torch.equal(got[0], got[3])
    batch = first_batch(config, drop_grounding=0)
    rows = conditioner.phrases(batch)
    for k, phrases in enumerate(batch.phrases):
        expected = embed_phrases(phrases, [pipeline.tokenizer], [pipeline.text_encoder])
        torch.testing.assert_close(rows[k, : len(phrases)], expected)


@pytest.mark.usefixtures("own_precision")
def test_with_validation_in_half_precision(config, data):
    settings = Validation(data=str(data), every=24, loss_samples=8, pictures=2, steps=2)
    out = train(replace(config, precision="bf16", validation=settings)).parent
    assert (out / "validation" / "00000024.png").is_file()
    weights = load_checkpoint(list_checkpoints(out)[-1])[0]["weights"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_base_that_comes_with_an_adapter_is_trained_without_it(config, base, tmp_path):
    """As GLIGEN's own folders do, which diffusers calls StableDiffusionGLIGENPipeline."""
    finished = train(replace(config, samples=4))
    pipeline = StableDiffusionGLIGENPipeline.from_pretrained(base)
    pipeline.load_gligen_adapter(finished)
    pipeline.save_pretrained(tmp_path / "published")
    loaded_base = load_base(replace(config, model=str(tmp_path / "published")), CPU)
    assert not is_attached(loaded_base.unet)
    expected = sd_pipeline().unet.state_dict()
    got = loaded_base.unet.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_the_safety_checker_stays_out(config, tmp_path):
    """It would black out validation images."""
    folder = tmp_path / "checked"
    pipeline = sd_pipeline()
    StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False).save_pretrained(folder)
    assert load_base(replace(config, model=str(folder)), CPU).safety_checker is None


def test_an_adapter_of_sdxl_is_no_start(config, data, tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "xl")
    other = replace(config, model=str(tmp_path / "xl"), out=str(tmp_path / "xl-run"), samples=4)
    finished = train(other)
    with pytest.raises(ValueError, match="for another base model"):
        train(replace(config, init_adapter=str(finished)))


def test_a_base_that_lacks_a_text_encoder_is_refused(config, tmp_path):
    """As SDXL's refiner, which is none to be trained."""
    pipeline = sdxl_pipeline()
    pipeline.text_encoder = pipeline.tokenizer = None
    pipeline.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ValueError, match="has no text_encoder, which training needs"):
        load_base(replace(config, model=str(tmp_path / "refiner")), CPU)
