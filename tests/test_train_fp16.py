"""Training in float16, with its loss scaler: steps, steps left out, growth, and going on with the same bits.

A CPU has the same scaler and the same float16 as a GPU; only the kernels are others.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import final, lines, train_until, write_data

from gligen_xl.data.dataset import Augmentation
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train import loop, step
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import Optimization, Validation

FIRST_SCALE = 2.0**16  # torch's

pytestmark = pytest.mark.usefixtures("own_precision")


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
        model=str(base), data=str(data), out=str(tmp_path / "run"), samples=48, batch_size=4, log_every=1, seed=3,
        checkpoint_every=4, keep_checkpoints=20, track=[], augmentation=Augmentation(slots=3), precision="fp16",
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8, ema_decay=0.9),
    )  # fmt: skip


@pytest.fixture
def growing(monkeypatch):
    """The scale grows after three steps in place of two thousand."""
    real = loop.make_accelerator

    def make(config):
        accelerator = real(config)
        accelerator.scaler.set_growth_interval(3)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make)


def spoil(monkeypatch, spoilt):
    real = step.denoising_loss
    monkeypatch.setattr(step, "denoising_loss", lambda *rest: spoilt(rest[2], real(*rest)))


def scales(out):
    """Of the loss, at each checkpoint."""
    return [load_checkpoint(path)[1]["scaler"]["scale"] for path in list_checkpoints(out)]


def weights(path):
    return load_checkpoint(path)[0]["weights"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_base_computes_in_half_and_the_adapter_is_kept_whole(config, monkeypatch):
    seen = {}

    def look(unet, scheduler, batch, conditioning, objective):
        hook = dict(unet.named_modules())["mid_block.attentions.0.transformer_blocks.0.fuser.attn.to_q"]
        handle = hook.register_forward_hook(lambda module, inputs, output: seen.update(fuser=output.dtype))
        losses = real(unet, scheduler, batch, conditioning, objective)
        handle.remove()
        seen["base"] = {value.dtype for value in unet.parameters() if not value.requires_grad}
        seen["adapter"] = {value.dtype for value in unet.parameters() if value.requires_grad}
        seen["loss"] = losses.dtype
        return losses

    real = step.denoising_loss
    monkeypatch.setattr(step, "denoising_loss", look)
    train(replace(config, samples=8))
    half, whole = torch.float16, torch.float32
    assert seen == {"fuser": half, "base": {half}, "adapter": {whole}, "loss": whole}
    assert {value.dtype for value in final(config.out)[0].values()} == {whole}


def test_its_steps_are_those_of_float32_but_for_the_rounding(config, tmp_path):
    config = replace(config, samples=24)
    train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(replace(config, out=str(tmp_path / "whole"), precision="no"))
    half, whole = ([entry["loss"] for entry in lines(out)] for out in (config.out, tmp_path / "whole"))
    assert half == pytest.approx(whole, rel=0.02)
    assert half != whole
    norms = [[entry["grad_norm"] for entry in lines(out)] for out in (config.out, tmp_path / "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)  # unscaled, before they are clipped
    assert set(scales(config.out)) == {FIRST_SCALE}


def test_a_step_that_overflows_changes_nothing_but_the_scale(config, monkeypatch):
    overflow = {20, 24}
    spoil(monkeypatch, lambda batch, losses: losses * (torch.inf if batch.position in overflow else 1))
    train(config)
    paths = list_checkpoints(config.out)
    assert scales(config.out) == [FIRST_SCALE] * 5 + [FIRST_SCALE / 2] + [FIRST_SCALE / 4] * 6
    for k in range(len(paths) - 1):
        assert same(weights(paths[k]), weights(paths[k + 1])) == (4 * (k + 1) in overflow)
    assert load_checkpoint(paths[-1])[1]["ema_steps"] == final(config.out)[0]["optimizer.0.step"] == 10
    assert [entry["samples"] for entry in lines(config.out, "skipped")] == [24, 28]
    assert lines(config.out)[-1]["skipped"] == 2


def test_gradients_that_overflow_are_no_fault_of_an_image(config, monkeypatch, capsys):
    """The losses are finite; half's largest number, 65504, is passed on the way down."""

    def steep(batch, losses):
        return losses + (losses - losses.detach()) * (1e36 if batch.position == 20 else 0)

    spoil(monkeypatch, steep)
    train(config)
    (skipped,) = lines(config.out, "skipped")
    assert skipped["image_ids"] == skipped["of_batch"] == []
    assert "left out the last step, as its gradients overflowed in fp16" in capsys.readouterr().out
    assert scales(config.out)[-1] == FIRST_SCALE / 2


def test_the_scale_grows_again(config, growing):
    train(replace(config, samples=24))
    assert scales(config.out)[:4] == [FIRST_SCALE, FIRST_SCALE, FIRST_SCALE * 2, FIRST_SCALE * 2]
    assert max(scales(config.out)) > FIRST_SCALE


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_resumed_equals_uninterrupted(config, growing, monkeypatch, tmp_path, micro_batch):
    """At any place between two growths, and after a step that was left out."""
    spoil(monkeypatch, lambda batch, losses: losses * (torch.inf if 12 <= batch.position < 16 else 1))
    config = replace(config, micro_batch=micro_batch)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    for position in (8, 20, 32):
        train_until(position, config)
    train(config)
    (expected, state), (got, state_again) = final(whole.out), final(config.out)
    assert same(expected, got)
    assert state["scaler"] == state_again["scaler"]
    assert state["ema_steps"] == state_again["ema_steps"] == 11
    assert scales(whole.out) == scales(config.out)
    assert lines(whole.out) == lines(config.out)
    adapters = [(Path(run.out) / "adapter" / "gligen_adapter.safetensors").read_bytes() for run in (whole, config)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("change", [{"offload_optimizer": True}, {"gradient_checkpointing": True}])
def test_other_ways_to_the_same_steps(config, tmp_path, change):
    config = replace(config, samples=16)
    train(config)
    other = replace(config, out=str(tmp_path / "other"), **change)
    train(other)
    assert same(final(config.out)[0], final(other.out)[0])
    assert scales(config.out) == scales(other.out)


def test_so_many_overflows_that_the_run_ends(config, monkeypatch):
    spoil(monkeypatch, lambda batch, losses: losses * (torch.inf if batch.position >= 20 else 1))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* bf16 in place of fp16"):
        train(replace(config, skip_limit=3))


def test_validation_and_its_images_in_half(config, data):
    looks = Validation(data=str(data), every=8, loss_samples=4, pictures=1, steps=2)
    train(replace(config, samples=8, validation=looks))
    (entry,) = lines(config.out, "validation")
    assert entry["loss"] > 0
    assert (Path(config.out) / "validation" / "00000008.png").is_file()
    assert json.loads((Path(config.out) / "adapter" / "gligen_adapter.json").read_text())["samples"] == 8


def test_an_image_that_is_not_finite_is_named(config, tmp_path, monkeypatch):
    rows = [replace(row(1), image_id=f"sa_{k}") for k in range(40)]
    write_shard(tmp_path / "named" / "a", latents(40, side=8), rows, METADATA)
    spoil(monkeypatch, lambda batch, losses: losses.where(torch.tensor(batch.positions) != 21, torch.nan))
    train(replace(config, data=str(tmp_path / "named"), samples=28))
    (skipped,) = lines(config.out, "skipped")
    assert skipped["of_batch"] == [1]
    assert skipped["image_ids"][0].startswith("sa_")
