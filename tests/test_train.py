"""The trainer on a tiny base: only the adapter changes, the loss falls, resumed equals uninterrupted."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from helpers.phrase_models import phrase_models
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import final, first_batch, lines, loaded, noised, train_until, write_data

from gligen_xl.adapter import adapter_state_dict, is_adapter_key, load_adapter
from gligen_xl.data.dataset import Augmentation
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.text_embeddings import embed_phrases
from gligen_xl.train import loop, setup, step
from gligen_xl.train.base import load_base
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.conditioning import Conditioner
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.objective import denoising_loss, timesteps_of
from gligen_xl.train.options import AdapterOptions, Optimization, Validation
from gligen_xl.train.resume import check_same_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(base, data, tmp_path):
    return TrainConfig(
        model=str(base), data=str(data), out=str(tmp_path / "run"), samples=48, batch_size=4, log_every=2, seed=3,
        checkpoint_every=16, track=[], augmentation=Augmentation(slots=3), adapter=AdapterOptions(),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8, decay_share=0.5, ema_decay=0.9),
    )  # fmt: skip


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    train_until(40, config)
    assert [path.name for path in list_checkpoints(config.out)] == ["checkpoint-00000016", "checkpoint-00000032"]
    train(config)
    (expected, state), (got, state_again) = final(whole.out), final(config.out)
    assert state["position"] == state_again["position"] == 48
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    adapters = [(tmp_path / name / "adapter" / "gligen_adapter.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1]


def test_only_the_adapter_changes_is_averaged_and_saved(config, base):
    finished = train(config)
    before, after = sdxl_pipeline(), sdxl_pipeline()
    load_adapter(after.unet, finished)
    weights = after.unet.state_dict()
    for name, value in before.unet.state_dict().items():
        assert torch.equal(weights[name], value)
    tensors, _ = load_checkpoint(list_checkpoints(config.out)[-1])
    assert tensors["weights"].keys() == tensors["gligen_adapter"].keys()
    assert all(is_adapter_key(name) for name in tensors["weights"])
    gates = [value for name, value in tensors["gligen_adapter"].items() if ".alpha_" in name]
    assert all(value.abs() > 0 for value in gates)
    description = json.loads((finished / "gligen_adapter.json").read_text())
    assert description["base_model"] == base.name  # its folder stays on the machine
    assert description["samples"] == 48
    assert description["config"]["slots"] == 3
    assert lines(finished.parent)[-1]["gate_mean"] > 0


def test_the_base_in_memory_is_never_touched(config, monkeypatch):
    """Also those parts of the base that are not in the adapter's file: the U-Net that was trained on itself."""
    kept = {}
    real = setup.load_base

    def load(*args, **settings):
        kept["pipeline"] = real(*args, **settings)
        return kept["pipeline"]

    monkeypatch.setattr(setup, "load_base", load)
    train(config)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        now = getattr(kept["pipeline"], part).state_dict()
        for name, value in getattr(sdxl_pipeline(), part).state_dict().items():
            assert torch.equal(now[name], value), name


def test_the_loss_of_a_fixed_batch_falls(config):
    pipeline, batch = loaded(config), first_batch(config, drop_grounding=0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    conditioning = Conditioner(pipeline)(batch)
    optimizer = torch.optim.AdamW([p for p in pipeline.unet.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = denoising_loss(pipeline.unet, scheduler, batch, conditioning).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_the_objective_is_the_schedulers(config):
    pipeline, batch = loaded(config), first_batch(config)
    conditioning = Conditioner(pipeline)(batch)
    time = (batch.time * 1000).long()
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
        noisy, target = noised(scheduler, batch.latents, batch.noise, time)
        with torch.no_grad():
            expected = (pipeline.unet(noisy, time, **conditioning).sample - target).square().mean((1, 2, 3))
            torch.testing.assert_close(denoising_loss(pipeline.unet, scheduler, batch, conditioning), expected)
    with pytest.raises(ValueError, match="'sample'"):
        denoising_loss(
            pipeline.unet, DDPMScheduler.from_config(scheduler.config, prediction_type="sample"), batch, conditioning
        )


def test_captions_and_phrases_are_those_of_the_pipeline(config):
    pipeline = load_base(config, torch.device("cpu"))
    conditioner = Conditioner(pipeline, cache_size=2)
    hidden, pooled = conditioner.captions(["grass with a ring", None])
    expected, empty, expected_pooled, empty_pooled = pipeline.encode_prompt("grass with a ring")
    torch.testing.assert_close(hidden[:1], expected)
    torch.testing.assert_close(pooled[:1], expected_pooled)
    assert torch.equal(hidden[1:], empty)  # a dropped caption is what guidance meets
    assert torch.equal(pooled[1:], empty_pooled)


def test_a_request_to_stop_saves_and_the_same_command_continues(config, tmp_path, monkeypatch):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    real = step.denoising_loss

    def interrupted(unet, scheduler, batch, *rest):
        if batch.position == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(unet, scheduler, batch, *rest)

    monkeypatch.setattr(step, "denoising_loss", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    assert train(config).name == "checkpoint-00000024"
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(step, "denoising_loss", real)
    train(config)
    expected, got = final(whole.out)[0], final(config.out)[0]
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_finished_run_is_finished(config):
    first = train(config)
    stamp = (first / "gligen_adapter.safetensors").read_bytes()
    assert train(config) == first
    assert (first / "gligen_adapter.safetensors").read_bytes() == stamp


def test_another_run_in_the_same_folder_is_refused(config):
    train(config)
    for change, says in (
        ({"seed": 4}, "seed 3, now it is 4"),
        ({"optimization": replace(config.optimization, learning_rate=1.0)}, r"optimization\.learning_rate"),
        ({"adapter": AdapterOptions(every=2)}, r"adapter\.every"),
    ):
        with pytest.raises(ValueError, match=says):
            train(replace(config, **change))
    check_same_run(config.to_dict(), replace(config, workers=3, log_every=7))


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(config, caplog, file):
    adapter = train(replace(config, keep_checkpoints=2)) / "gligen_adapter.safetensors"
    expected = adapter.read_bytes()
    first, last = list_checkpoints(config.out)
    (last / file).write_bytes(b"")
    adapter.unlink()
    train(replace(config, keep_checkpoints=2))
    assert adapter.read_bytes() == expected
    assert f"goes on from {first}" in caplog.text
    assert (last.parent / f"damaged-{last.name}").is_dir()
    for path in list_checkpoints(config.out):
        (path / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="no whole checkpoint before it"):
        train(config)


def test_validation_says_what_the_boxes_are_worth(config, data):
    settings = Validation(data=str(data), every=24, loss_samples=10, pictures=2, steps=2)
    out = train(replace(config, validation=settings)).parent
    rows = lines(out, "validation")
    assert [entry["samples"] for entry in rows] == [24, 48]
    for entry in rows:
        assert entry["grounding_gain"] == pytest.approx(1 - entry["loss"] / entry["loss_no_boxes"], abs=1e-6)
        assert {"grounding_gain_q1", "grounding_gain_q4", "gate_mean", "gate_largest"} <= entry.keys()
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["00000024.png", "00000048.png"]


def test_looking_changes_nothing(config, data, tmp_path):
    settings = Validation(data=str(data), every=8, loss_samples=4, pictures=1, steps=2)
    train(config)
    train(replace(config, out=str(tmp_path / "looked"), validation=settings))
    expected, got = final(config.out)[0], final(tmp_path / "looked")[0]
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_training_starts_from_an_adapter(config, tmp_path):
    first = train(config)
    second = replace(config, out=str(tmp_path / "second"), init_adapter=str(first), samples=4, seed=8)
    pipeline = loaded(second)
    expected = sdxl_pipeline().unet
    load_adapter(expected, first)
    state = pipeline.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    train(second)


def test_trackers(config, tmp_path):
    pytest.importorskip("tensorboard")
    train(replace(config, track=["tensorboard"], samples=8))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(ValueError, match="comet_ml is not installed"):
        train(replace(config, out=str(tmp_path / "other"), track=["comet_ml"]))


def test_two_processes_equal_one(config, tmp_path):
    """Each takes half of every batch; noise and dropouts go with the position, so only rounding differs."""
    recipe = tmp_path / "recipe.yaml"
    short = replace(config, samples=16, log_every=1, optimization=replace(config.optimization, max_grad_norm=100.0))
    recipe.write_text(yaml.safe_dump(short.to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, "-m", "gligen_xl.cli", "train", str(recipe), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command], capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    train(short)
    (expected, _), (got, _) = final(short.out), final(tmp_path / "two")
    assert expected.keys() == got.keys()
    adapter = [name for name in expected if name.startswith("weights.")]
    assert all(torch.allclose(expected[name], got[name], atol=2e-3) for name in adapter)
    losses = [[entry["loss"] for entry in lines(tmp_path / run)] for run in ("run", "two")]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_outside_the_main_thread_training_works_too(config):
    errors = []

    def run():
        try:
            train(replace(config, samples=4))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 3}, "less than one batch"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"data": "shapes:many"}, "shapes:COUNT"),
        ({"data": "nowhere"}, "not a folder of shards"),
    ],
)
def test_wrong_settings(config, settings, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        train(replace(config, **settings))
    with pytest.raises(ValueError, match="learning_rate is 0"):
        Optimization(learning_rate=0)


def test_the_learning_rate_over_a_run():
    options = Optimization(warmup_samples=100, decay_share=0.25)
    rates = [options.rate(position, 1000) for position in (0, 49, 99, 500, 750, 875, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0])
    constant = Optimization(warmup_samples=0)
    assert [constant.rate(p, 1000) for p in (0, 999)] == [1, 1]


def test_phrases_of_a_batch_are_padded_to_its_slots_and_kept(config):
    pipeline = load_base(config, torch.device("cpu"))
    conditioner = Conditioner(pipeline, cache_size=1)
    batch = first_batch(config, drop_grounding=0)
    batch = replace(batch, phrases=[[f"a {name} ring" for name in "abc"[: len(p)]] for p in batch.phrases])
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    for _ in range(2):  # the second time some come from the cache and some do not
        got = conditioner.phrases(batch)
        assert got.shape == (4, 3, 40)
        for k, phrases in enumerate(batch.phrases):
            expected = embed_phrases(phrases, [pipeline.tokenizer, pipeline.tokenizer_2], encoders)
            torch.testing.assert_close(got[k, : len(phrases)], expected, atol=1e-5, rtol=0)
            assert not got[k, len(phrases) :].any()


@pytest.mark.usefixtures("own_precision")
def test_in_mixed_precision_with_validation(config, data):
    """bfloat16 stands for float16 too: base and text encoders in half, adapter and VAE in float32."""
    settings = Validation(data=str(data), every=24, loss_samples=8, pictures=2, steps=2)
    out = train(replace(config, precision="bf16", validation=settings)).parent
    assert len(lines(out, "validation")) == 2
    tensors, _ = load_checkpoint(list_checkpoints(out)[-1])
    assert {value.dtype for value in tensors["weights"].values()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in tensors["weights"].items() if ".alpha_" in name)


def test_a_time_just_below_one_is_the_last_timestep():
    scheduler = DDPMScheduler()
    batch = type("Batch", (), {"time": torch.tensor([0.0, 0.5, 1 - 1e-9, 1.0])})
    assert timesteps_of(scheduler, batch).tolist() == [0, 500, 999, 999]


def test_a_checkpoint_is_an_adapter(config, tmp_path):
    """What a run has reached can be used, and another run begun from it, before it has ended."""
    train(replace(config, samples=16))
    (checkpoint,) = list_checkpoints(config.out)
    pipeline = sdxl_pipeline()
    pipeline.load_gligen_adapter(checkpoint)
    average = load_checkpoint(checkpoint)[0]["gligen_adapter"]
    assert all(torch.equal(value, average[name]) for name, value in adapter_state_dict(pipeline.unet).items())
    train(replace(config, samples=4, out=str(tmp_path / "next"), init_adapter=str(checkpoint)))


def test_gradient_checkpointing_changes_no_gradient(config, tmp_path):
    """Also with attention supervision, which looks into the fusers that run a second time."""
    optimization = replace(config.optimization, attention_weight=0.1)
    runs = []
    for name, checkpointing in (("without", False), ("with", True)):
        out = str(tmp_path / name)
        train(replace(config, out=out, samples=8, gradient_checkpointing=checkpointing, optimization=optimization))
        runs.append(final(out)[0])
    assert all(torch.allclose(value, runs[1][name], atol=1e-5) for name, value in runs[0].items())


def test_a_run_keeps_to_its_base(config, tmp_path):
    train(replace(config, samples=16))
    sdxl_pipeline(seed=7).save_pretrained(config.model)
    try:
        with pytest.raises(ValueError, match="begun on another base"):
            train(replace(config, samples=16))
    finally:
        sdxl_pipeline().save_pretrained(config.model)


def test_latents_of_another_vae_are_refused(config, tmp_path):
    write_shard(tmp_path / "scale" / "a", latents(4, side=8), [row(1)] * 4, {**METADATA, "scaling_factor": "0.13025"})
    with pytest.raises(ValueError, match=r"scaled by 0\.13025, the base's VAE by 0\.18215"):
        train(replace(config, data=str(tmp_path / "scale")))
    sixteen = np.zeros((4, 16, 8, 8), np.float16)
    write_shard(tmp_path / "channels" / "a", sixteen, [row(1)] * 4, METADATA)
    with pytest.raises(ValueError, match="latents of 16 channels, the base has 4"):
        train(replace(config, data=str(tmp_path / "channels")))


def test_a_detector_that_does_not_know_the_phrases_says_so_at_once(config, data):
    settings = Validation(data=str(data), pictures=2, detector="shapes")
    with pytest.raises(ValueError, match="cannot look for"):
        train(replace(config, validation=settings))
    assert not (Path(config.out) / "metrics.jsonl").exists()


def test_a_detector_by_name_measures_the_images(config, data, tmp_path):
    """A network of free phrases, tiny and random, which finds something in most images."""
    torch.manual_seed(0)
    model, processor = phrase_models()["grounding-dino"]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "dino")
    settings = Validation(data=str(data), pictures=2, every=8, steps=2, loss_samples=4, detector=str(tmp_path / "dino"))
    train(replace(config, samples=16, validation=settings))
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if "on_recall_50" in row]
    assert [row["samples"] for row in looks] == [8, 16]
    assert all(0 <= row[f"{side}_mean_iou"] <= 1 for row in looks for side in ("on", "off"))
    with pytest.raises(ValueError, match="no detector 'nowhere'"):
        train(replace(config, out=str(tmp_path / "b"), validation=replace(settings, detector="nowhere")))


def test_other_data_under_a_run_is_refused(config, tmp_path):
    train(replace(config, samples=16))
    write_shard(tmp_path / "more" / "a", latents(41, side=8), [row(1) for _ in range(41)], METADATA)
    with pytest.raises(ValueError, match=r"begun on 40 samples, .* now holds 41"):
        train(replace(config, samples=16, data=str(tmp_path / "more")))


def test_an_adapter_to_start_from_has_to_be_of_the_form_asked_for(config, tmp_path):
    first = train(replace(config, samples=4))
    other = replace(config, out=str(tmp_path / "b"), init_adapter=str(first), adapter=AdapterOptions(every=2))
    with pytest.raises(ValueError, match=r"has every 1, the run adapter\.every 2"):
        train(other)


def test_the_gates_may_be_held_shut(config):
    optimization = replace(config.optimization, gate_learning_rate=0.0)
    train(replace(config, samples=8, optimization=optimization))
    assert lines(Path(config.out))[-1]["gate_mean"] == 0


def test_two_runs_in_one_folder_are_refused(config, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 0.1)
    with (
        loop.only_run_in(Path(config.out)),
        pytest.raises(ValueError, match="another run is at work"),
    ):
        train(config)
    assert not list_checkpoints(config.out)
    train(config)


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(config, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    train(replace(config, samples=8))
    assert "cannot be locked" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be made or written"):
        train(replace(config, out=str(tmp_path / "file" / "run")))
