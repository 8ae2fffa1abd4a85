"""One step of training: in parts, over processes, compiled, in 8 bits; and what is done when it is not finite."""

import importlib.util
import json
import logging
import os
import resource
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline, sdxl_unet
from helpers.tiny_run import train_until
from torch.utils._python_dispatch import TorchDispatchMode

from gligen_xl.data.dataset import Augmentation
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train import checkpoint, optimizer, setup, step
from gligen_xl.train.base import load_base
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.log import CLOCKED
from gligen_xl.train.loop import train
from gligen_xl.train.objective import denoising_loss
from gligen_xl.train.options import AdapterOptions, Objective, Optimization, Validation
from gligen_xl.train.zero import ZeroPartition


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of one to three boxes, each with an id of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows = [replace(row(1 + k % 3), image_id=f"sa_{k}") for k in range(40)]
    write_shard(folder / "a", latents(40, side=8), rows, METADATA)
    return folder


@pytest.fixture
def config(base, data, tmp_path):
    return TrainConfig(
        model=str(base), data=str(data), out=str(tmp_path / "run"), samples=48, batch_size=4, log_every=2, seed=3,
        checkpoint_every=16, track=[], augmentation=Augmentation(slots=3, drop_grounding=0.3),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8, ema_decay=0.9),
    )  # fmt: skip


BIASED = AdapterOptions(grounding_logit_bias=1.0, bias_share=0.5)


def final(folder):
    tensors, _ = load_checkpoint(list_checkpoints(folder)[-1])
    return {f"{group}.{name}": value for group, of_group in tensors.items() for name, value in of_group.items()}


def lines(folder, kind="train"):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in CLOCKED} for entry in rows if entry["kind"] == kind]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def close(first, second, **tolerances):
    weights = [name for name in first if name.startswith("weights.")]
    return weights and all(torch.allclose(first[name], second[name], **tolerances) for name in weights)


def spoil(monkeypatch, spoilt):
    """The losses that `spoilt(batch, losses)` gives, in place of those of the objective."""
    real = step.denoising_loss
    monkeypatch.setattr(
        step, "denoising_loss", lambda unet, scheduler, batch, *rest: spoilt(batch, real(unet, scheduler, batch, *rest))
    )


def not_a_number(*positions):
    """Loss of the samples of these positions."""
    return lambda batch, losses: losses + torch.tensor([float("nan") if p in positions else 0 for p in batch.positions])


# In parts -----------------------------------------------------------------------------------------------------------


def gradients(config, monkeypatch):
    """Of the first step."""
    taken, real = {}, optimizer.AdapterOptimizer.step

    def step(self):
        taken.setdefault("all", [value.grad.clone() for value in self.parameters])
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.AdapterOptimizer, "step", step)
        train(replace(config, samples=4, adapter=AdapterOptions(gate_init=0.5)))
    return taken["all"]


@pytest.mark.parametrize("attention", [0.0, 0.5])
def test_the_gradients_of_the_parts_are_those_of_the_whole(config, tmp_path, monkeypatch, attention):
    config = replace(config, optimization=replace(config.optimization, attention_weight=attention))
    whole = gradients(replace(config, out=str(tmp_path / "whole")), monkeypatch)
    assert all(value.abs().max() > 0 for value in whole)
    for size in (1, 3):  # 3 and 1 make the batch of 4
        parts = gradients(replace(config, out=str(tmp_path / str(size)), micro_batch=size), monkeypatch)
        for expected, got in zip(whole, parts, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_a_run_may_go_on_in_other_parts(config, tmp_path):
    train(replace(config, samples=48))
    parts = replace(config, out=str(tmp_path / "parts"), micro_batch=2)
    train(parts)
    losses = [[entry["loss"] for entry in lines(run.out)] for run in (config, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    train(replace(parts, micro_batch=1))


# Over processes -----------------------------------------------------------------------------------------------------


def words(config, tmp_path):
    recipe = tmp_path / f"{Path(config.out).name}.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    return ["train", str(recipe)]


def logs(tmp_path, name="log"):
    return "\n".join(path.read_text() for path in tmp_path.glob(f"{name}.*"))


def on_two(server, config, tmp_path, patch=""):
    ranks = server.begin_ranks(words(config, tmp_path), tmp_path / "log", patch=patch)
    assert [server.end(pid) for pid in ranks] == [0, 0], logs(tmp_path)


# Counts the exchanges of gradients in a file of each process.
COUNT = """
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
real = default_hooks.bf16_compress_hook
def counted(state, bucket):
    with open({path!r} + os.environ["RANK"], "a") as file:
        file.write("x")
    return real(state, bucket)
default_hooks.bf16_compress_hook = counted
"""


def test_two_processes_in_parts_equal_one_and_exchange_gradients_once_a_step(config, server, tmp_path):
    config = replace(config, samples=16, log_every=1, optimization=replace(config.optimization, max_grad_norm=100.0))
    train(config)
    two = replace(config, out=str(tmp_path / "two"), micro_batch=1)
    on_two(server, two, tmp_path)
    losses = [[entry["loss"] for entry in lines(run.out)] for run in (config, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert close(final(config.out), final(two.out), atol=2e-3)

    counts = []
    for name, size in (("whole", None), ("parts", 1)):
        compressed = replace(config, out=str(tmp_path / name), micro_batch=size, gradient_compression="bf16")
        on_two(server, compressed, tmp_path, COUNT.format(path=str(tmp_path / f"{name}-")))
        counts.append([(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)])
        found = [entry["loss"] for entry in lines(compressed.out)]
        assert found == pytest.approx(losses[0], rel=2e-2)
        assert found != losses[1]
        assert close(final(config.out), final(compressed.out), atol=5e-2)
    assert counts[0] == counts[1]
    assert 4 <= len(counts[0][0]) <= 8  # steps, by at most two buckets


# Writes how many numbers a process keeps in moments and average.
KEPT = """
import gligen_xl.train.zero as zero
real = zero.ZeroPartition.gather
def counted(self, tensors):
    with open({path!r} + os.environ["RANK"], "a") as file:
        file.write(str(sum(value.numel() for value in tensors.values())) + " ")
    return real(self, tensors)
zero.ZeroPartition.gather = counted
"""


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_processes_that_share_moments_and_average_end_with_the_same_bits(config, server, tmp_path, data, kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = replace(
        config, samples=32, validation=Validation(data=str(data), every=16, loss_samples=4, pictures=0),
        optimization=replace(config.optimization, optimizer=kind),
    )  # fmt: skip
    whole = replace(config, out=str(tmp_path / "whole"))
    shared = replace(config, out=str(tmp_path / "shared"), shard_optimizer=True)
    on_two(server, whole, tmp_path, KEPT.format(path=str(tmp_path / "whole-")))
    on_two(server, replace(shared), tmp_path, KEPT.format(path=str(tmp_path / "shared-")))
    assert same(final(whole.out), final(shared.out))
    assert lines(whole.out) == lines(shared.out)
    assert lines(whole.out, "validation") == lines(shared.out, "validation")
    adapters = [(Path(run.out) / "adapter" / "gligen_adapter.safetensors").read_bytes() for run in (whole, shared)]
    assert adapters[0] == adapters[1]
    kept = [[int(n) for n in (tmp_path / f"{name}-{rank}").read_text().split()]
            for name in ("whole", "shared") for rank in (0, 1)]  # fmt: skip
    assert kept[0] == kept[1]
    assert all(0.45 * n < part < 0.55 * n for part, n in zip(kept[2], kept[0], strict=True))
    assert all(0.45 * n < part < 0.55 * n for part, n in zip(kept[3], kept[0], strict=True))


def test_a_run_may_go_on_with_shared_moments_and_without(config, server, tmp_path):
    config = replace(config, samples=32)
    whole = replace(config, out=str(tmp_path / "whole"))
    on_two(server, whole, tmp_path)
    for position, shared in ((8, True), (16, False), (24, True)):
        patch = "import gligen_xl.train.step as step\n" + STOP.format(position=position)
        part = replace(config, shard_optimizer=shared)
        ranks = server.begin_ranks(words(part, tmp_path), tmp_path / "log", patch=patch)
        assert [server.end(pid) for pid in ranks] == [75, 75], logs(tmp_path)
    on_two(server, config, tmp_path)
    assert same(final(config.out), final(whole.out))


def test_a_run_with_the_optimizer_in_main_memory_ends_with_the_same_bits(config, data, tmp_path):
    """And may go on without. Main memory is where all is here; what the GPU's part in it does cannot be seen."""
    looks = Validation(data=str(data), every=16, loss_samples=4, pictures=0)
    plain = replace(config, out=str(tmp_path / "plain"), validation=looks)
    train(plain)
    for position, offloaded in ((16, True), (32, False), (48, True)):
        part = replace(config, out=str(tmp_path / "run"), validation=looks, offload_optimizer=offloaded)
        if position < 48:
            train_until(position, part)
    train(part)
    assert same(final(tmp_path / "run"), final(plain.out))
    assert lines(tmp_path / "run", "validation") == lines(plain.out, "validation")


def test_what_is_offloaded_is_a_copy(config, monkeypatch):
    """Of the weights as they are after the checkpoint is loaded; it is stepped, and the weights follow."""
    kept = []

    class Watched(ZeroPartition):
        def __init__(self, parameters, processes, **settings):
            super().__init__(parameters, processes, **settings)
            kept[:] = [(parameters[name], copy) for name, copy in self.own.items()]
            assert all(torch.equal(value, copy) for value, copy in kept)

    monkeypatch.setattr(setup, "ZeroPartition", Watched)
    offloaded = replace(config, offload_optimizer=True)
    train_until(32, offloaded)
    train(offloaded)
    assert len({value.data_ptr() for pair in kept for value in pair}) == 2 * len(kept)
    assert all(torch.equal(value, copy) for value, copy in kept)
    with pytest.raises(ValueError, match="offload_optimizer is on beside optimizer adamw8bit"):
        replace(offloaded, optimization=Optimization(optimizer="adamw8bit"))


def test_processes_share_what_is_in_main_memory(config, server, tmp_path):
    config = replace(config, samples=32)
    whole = replace(config, out=str(tmp_path / "whole"))
    shared = replace(config, out=str(tmp_path / "shared"), shard_optimizer=True, offload_optimizer=True)
    for run in (whole, shared):
        on_two(server, run, tmp_path)
    assert same(final(whole.out), final(shared.out))


def test_processes_that_see_other_folders_end(config, server, tmp_path):
    train(replace(config, out=str(tmp_path / "here" / "run"), samples=16))
    patch = f"os.chdir({str(tmp_path / 'here')!r} if os.environ['RANK'] == '0' else {str(tmp_path)!r})\n"
    elsewhere = replace(config, out="run", samples=16)
    ranks = server.begin_ranks(words(elsewhere, tmp_path), tmp_path / "log", patch=patch)
    assert [server.end(pid) for pid in ranks] == [2, 2], logs(tmp_path)
    assert "process 1 does not see run/checkpoint-" in (tmp_path / "log.1").read_text()


def test_another_number_of_processes_sees_the_same_batches(config, server, tmp_path):
    config = replace(config, log_every=1, samples=32, micro_batch=2)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    patch = "import gligen_xl.train.step as step\n" + STOP.format(position=16)
    ranks = server.begin_ranks(words(config, tmp_path), tmp_path / "log", patch=patch)
    assert [server.end(pid) for pid in ranks] == [75, 75], logs(tmp_path)
    position = int(list_checkpoints(config.out)[-1].name.split("-")[1])
    assert position == 20
    train(config)
    expected, got = lines(whole.out), lines(config.out)
    assert [entry["samples"] for entry in got] == [entry["samples"] for entry in expected]
    assert [entry["loss"] for entry in got] == pytest.approx([entry["loss"] for entry in expected], rel=1e-3)


# The first process is asked to stop in the step that begins at a position; the other one hears of it.
STOP = """
import signal
real = step.denoising_loss
def asked(unet, scheduler, batch, *rest):
    if batch.position == {position} and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(unet, scheduler, batch, *rest)
step.denoising_loss = asked
"""

# In one of the processes, a sample's loss is no number.
SPOIL = """
import gligen_xl.train.step as step
real = step.denoising_loss
def spoilt(unet, scheduler, batch, *rest):
    losses = real(unet, scheduler, batch, *rest)
    return losses * float("nan") if 7 in batch.positions else losses
step.denoising_loss = spoilt
"""


def test_what_is_not_finite_in_one_process_is_left_out_in_all(config, server, tmp_path, monkeypatch):
    config = replace(config, log_every=1, samples=16, micro_batch=1)
    on_two(server, replace(config, out=str(tmp_path / "two")), tmp_path, SPOIL)
    spoil(monkeypatch, not_a_number(7))
    train(config)
    assert lines(tmp_path / "two", "skipped") == lines(config.out, "skipped")
    assert [entry["of_batch"] for entry in lines(config.out, "skipped")] == [[3]]
    assert close(final(config.out), final(tmp_path / "two"), atol=2e-3)
    assert [entry["skipped"] for entry in lines(tmp_path / "two")] == [0, 1, 1, 1]


@pytest.mark.parametrize("ending", ["killed", "stopped"])
def test_a_process_that_is_gone_ends_the_others(config, server, tmp_path, ending):
    config = replace(config, samples=40_000, process_timeout=60 if ending == "killed" else 5)
    first, second = server.begin_ranks(words(config, tmp_path), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list_checkpoints(config.out):
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.05)
    os.kill(second, signal.SIGKILL if ending == "killed" else signal.SIGSTOP)
    began = time.monotonic()
    assert server.end(first) == 2, logs(tmp_path)
    assert time.monotonic() - began < 30
    assert "error: " in (tmp_path / "log.0").read_text().splitlines()[-1]
    os.kill(second, signal.SIGKILL)
    server.end(second)
    load_checkpoint(list_checkpoints(config.out)[-1])


# Not finite ---------------------------------------------------------------------------------------------------------


def infinite_gradient(batch, losses):
    """The loss is a number, its gradient is none."""
    return losses + (losses - losses.detach()).clamp_min(0).sqrt() if 21 in batch.positions else losses


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
    config, monkeypatch, capsys, what, micro_batch, tmp_path
):
    spoil(monkeypatch, not_a_number(21) if what == "loss" else infinite_gradient)
    config = replace(config, checkpoint_every=4, keep_checkpoints=20, samples=32, log_every=4, micro_batch=micro_batch)
    train(config)
    states = [load_checkpoint(path)[0] for path in list_checkpoints(config.out)]
    for k in range(7):
        for group in ("weights", "gligen_adapter", "optimizer"):
            assert same(states[k][group], states[k + 1][group]) == (k == 4)
    (skipped,) = lines(config.out, "skipped")
    assert skipped["samples"] == 24
    assert skipped["first"] == 20
    assert skipped["of_batch"] == ([1] if what == "loss" else [])
    assert len(skipped["image_ids"]) == (1 if what == "loss" else 4)
    assert all(name.startswith("sa_") for name in skipped["image_ids"])
    rows = lines(config.out)
    assert [entry["skipped"] for entry in rows] == [0, 1]
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in rows)
    assert "24 samples: left out the last step" in capsys.readouterr().out


def test_the_run_goes_on_as_if_the_step_had_not_been(config, monkeypatch, tmp_path):
    """What is left out does not count in the average's nor in the optimizer's number of steps."""
    spoil(monkeypatch, not_a_number(20))
    train(config)
    _, state = load_checkpoint(list_checkpoints(config.out)[-1])
    assert state["ema_steps"] == 11
    assert final(config.out)["optimizer.0.step"] == 11
    assert state["log"] == {"skipped": 1, "in_a_row": 0}


def test_many_in_a_row_end_the_run(config, monkeypatch):
    spoil(monkeypatch, not_a_number(*range(28, 48)))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* that of 36 samples"):
        train(replace(config, skip_limit=3, log_every=12))
    assert [path.name for path in list_checkpoints(config.out)] == ["checkpoint-00000016", "checkpoint-00000032"]
    assert load_checkpoint(list_checkpoints(config.out)[-1])[1]["log"] == {"skipped": 1, "in_a_row": 1}
    with pytest.raises(FloatingPointError, match="3 steps in a row"):  # the row goes on after a resume
        train(replace(config, skip_limit=3, log_every=12))
    train(replace(config, skip_limit=6))
    assert lines(config.out)[-1]["skipped"] == 5
    assert lines(config.out)[-1]["loss"] is None
    assert len(lines(config.out, "skipped")) == 5


def test_so_with_8_bits(config, monkeypatch):
    """Where the host decides."""
    pytest.importorskip("bitsandbytes")
    spoil(monkeypatch, not_a_number(20))
    config = replace(config, checkpoint_every=4, keep_checkpoints=20, samples=28)
    train(replace(config, optimization=replace(config.optimization, optimizer="adamw8bit")))
    states = [load_checkpoint(path)[0] for path in list_checkpoints(config.out)]
    for group in ("weights", "gligen_adapter", "optimizer"):
        assert same(states[4][group], states[5][group])
        assert not same(states[5][group], states[6][group])


# Optimizers, compilation --------------------------------------------------------------------------------------------


def test_8_bit_moments_are_kept_and_gone_on_with_to_the_bit(config, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    config = replace(config, optimization=replace(config.optimization, optimizer="adamw8bit"))
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)

    def stop(batch, losses):
        if batch.position == 40:
            raise InterruptedError
        return losses

    with monkeypatch.context() as patch:
        spoil(patch, stop)
        with pytest.raises(InterruptedError):
            train(config)
    train(config)
    expected = final(whole.out)
    assert same(expected, final(config.out))
    assert lines(config.out) == lines(whole.out)
    moments = {name: value for name, value in expected.items() if name.endswith("state1")}
    assert {value.dtype for value in moments.values()} == {torch.uint8, torch.float32}
    size = sum(value.numel() * value.element_size() for value in moments.values())
    assert size < 0.6 * 4 * sum(value.numel() for value in moments.values())  # tiny: many tensors are below the limit


def test_8_bit_moments_where_bitsandbytes_is_missing(config, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'gligen-xl\[8bit\]'"):
        train(replace(config, optimization=replace(config.optimization, optimizer="adamw8bit")))


def test_the_optimizer_takes_no_frozen_parameters():
    frozen = {"a.alpha_attn": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1), False)}
    with pytest.raises(ValueError, match="1 parameters are frozen, as b"):
        optimizer.AdapterOptimizer(frozen, Optimization())


def test_a_compiled_run_is_the_same_run(config, data, tmp_path, monkeypatch):
    """Traced by the "eager" backend, on a U-Net of few blocks. Names are the same: it may go on uncompiled."""
    pipeline = sdxl_pipeline()
    pipeline.unet = sdxl_unet(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=1, attention_head_dim=2,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "small")
    settings = Validation(data=str(data), every=8, loss_samples=4, pictures=0)
    plain = replace(config, model=str(tmp_path / "small"), samples=8, validation=settings)
    compiled = replace(plain, out=str(tmp_path / "compiled"), compile=True, compile_backend="eager")
    train(plain)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # pytest would keep all it says
    train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    expected, got = final(plain.out), final(compiled.out)
    assert expected.keys() == got.keys()
    assert close(expected, got, atol=1e-5)
    gains = [lines(run.out, "validation")[0]["loss"] for run in (plain, compiled)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-4)
    train(replace(compiled, compile=False))
    for change in ({"optimization": Optimization(attention_weight=0.1)}, {"adapter": BIASED}):
        with pytest.raises(ValueError, match="each would be compiled anew"):
            replace(compiled, **change)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: a value that is read, a size that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "by_mask")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(getattr(index, "dtype", None) == torch.bool for index in indices)
        self.seen["by_mask" if by_mask else name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "in parts", "8 bits"])
def test_between_lines_the_host_reads_nothing_from_the_device(config, tmp_path, kind):
    """But with 8-bit moments, once a step."""
    config = replace(config, log_every=100, checkpoint_every=1000, micro_batch=2 if kind == "in parts" else None)
    if kind == "8 bits":
        pytest.importorskip("bitsandbytes")
        config = replace(config, optimization=replace(config.optimization, optimizer="adamw8bit"))
    counts = []
    for samples in (8, 48):
        with Reads() as reads:
            train(replace(config, out=str(tmp_path / str(samples)), samples=samples))
        counts.append({name: reads.seen[name] for name in Reads.WAITS})
    more = {name: counts[1][name] - counts[0][name] for name in Reads.WAITS}
    assert sum(more.values()) == (10 if kind == "8 bits" else 0), more


# What is written ----------------------------------------------------------------------------------------------------


def test_a_line_says_how_it_goes(config):
    train(replace(config, samples=16, adapter=AdapterOptions(gate_init=0.5)))
    for entry in (json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()):
        quarters = [entry[f"loss_q{k}"] for k in range(1, 5)]
        known = [value for value in quarters if value is not None]
        assert min(known) <= entry["loss"] <= max(known)
        assert entry["gate_mean"] == pytest.approx(sum(entry["gates"].values()) / len(entry["gates"]), rel=1e-4)
        assert entry["gate_mean"] == pytest.approx(0.5, abs=0.1)
        assert all(".transformer_blocks." in name and ".fuser" not in name for name in entry["gates"])
        assert 0 < entry["waiting"] < 1
        assert entry["samples_per_s"] > 0
        assert entry["grad_norm"] > 0
        assert entry["skipped"] == 0


def test_the_gain_may_be_looked_at_more_often_than_images(config, data):
    settings = Validation(data=str(data), every=32, gain_every=8, loss_samples=8, pictures=1, steps=2)
    train(replace(config, validation=settings, samples=32))
    rows = lines(config.out, "validation")
    assert [entry["samples"] for entry in rows] == [8, 16, 24, 32]
    assert all("grounding_gain_q4" in entry and "gate_mean" in entry for entry in rows)
    assert [path.name for path in (Path(config.out) / "validation").iterdir()] == ["00000032.png"]


def test_a_full_disk_leaves_the_former_checkpoint(config, monkeypatch):
    real, (_, most) = checkpoint.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(root, position, *rest, **settings):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if position == 32 else most, most))
        try:
            return real(root, position, *rest, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"checkpoint-00000032 could not be .*checkpoint-00000016 is whole"):
        train(config)
    assert [path.name for path in Path(config.out).glob("*checkpoint*")] == ["checkpoint-00000016"]
    monkeypatch.setattr(checkpoint, "save_checkpoint", real)
    train(config)


def test_the_vae_stays_in_main_memory_where_it_has_no_work(config, data):
    for settings, device in (
        (Validation(), "cpu"),
        (Validation(data=str(data), pictures=0), "cpu"),
        (Validation(data=str(data), pictures=1), "meta"),
        (Validation(data="shapes:8", pictures=0), "meta"),
    ):
        pipeline = load_base(replace(config, validation=settings), torch.device("meta"))
        assert pipeline.vae.device.type == device
        assert pipeline.unet.device.type == pipeline.text_encoder_2.device.type == "meta"
    config = replace(config, validation=Validation(data=str(data), pictures=1))
    assert load_base(config, torch.device("meta"), draws=False).vae.device.type == "cpu"


def test_the_bias_to_noise_follows_from_the_position(config, monkeypatch):
    seen = []

    def watched(unet, scheduler, batch, conditioning, objective):
        seen.append((batch.positions[0], objective.noisy_bias))
        return denoising_loss(unet, scheduler, batch, conditioning, objective)

    monkeypatch.setattr(step, "denoising_loss", watched)
    train(replace(config, objective=Objective(noisy_bias=2.0, noisy_share=0.5), adapter=AdapterOptions(gate_init=0.1)))
    assert dict(seen) == {position: 2 * max(0, 1 - position / 24) for position in range(0, 48, 4)}


def test_deterministic_kernels_where_they_are_asked_for(config, monkeypatch):
    """What a GPU makes of it cannot be seen here; that torch is told, in every step and no longer, can."""
    seen = []

    def watched(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return denoising_loss(*arguments)

    monkeypatch.setattr(step, "denoising_loss", watched)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train(replace(config, deterministic=True, samples=8, out=f"{config.out}-a"))
    assert set(seen) == {(True, ":4096:8")}
    assert not torch.are_deterministic_algorithms_enabled()
    seen.clear()
    train(replace(config, samples=8, out=f"{config.out}-b"))
    assert {enabled for enabled, _ in seen} == {False}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"micro_batch": 5}, "micro_batch is 5, more than the batch of 4"),
        ({"skip_limit": 0}, "skip_limit is 0"),
        ({"keep_every": 0}, "keep_every is 0"),
        ({"process_timeout": 0}, "process_timeout is 0"),
    ],
)
def test_wrong_settings(config, settings, says):
    with pytest.raises(ValueError, match=says):
        replace(config, **settings)
    with pytest.raises(ValueError, match=r"gain_every is 0"):
        Validation(gain_every=0)
