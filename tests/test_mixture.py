"""Several datasets mixed by weight: their shares are exact, and a run can begin anywhere."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.flat import flat
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import final, train_until
from hypothesis import given
from hypothesis import strategies as st

from gligen_xl.data import sampler
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.loader import batches
from gligen_xl.data.sampler import BLOCK, MixtureOrder, SampleOrder, draws_per_block
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train import loop
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.options import Optimization


@pytest.fixture
def folders(tmp_path):
    for name, count, side in (("a", 30, 4), ("b", 10, 4), ("other", 12, 6)):
        write = [row(k % 3, image_id=f"{name}{k}", caption=f"{name} {k}") for k in range(count)]
        write_part(tmp_path / name, latents(count, side=side), write)
    return {name: tmp_path / name for name in ("a", "b", "other")}


def write_part(folder, values, rows):
    folder.mkdir()
    write_shard(folder / "x", values, rows, METADATA)


def drawn(order, count):
    return np.concatenate([order.batch(k) for k in range(count)])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_shares_are_exact_to_a_millionth(weights):
    turns = draws_per_block(weights)
    assert turns.sum() == BLOCK
    assert turns.min() >= 1
    exact = np.array(weights) / sum(weights) * BLOCK
    assert np.abs(turns - exact).max() <= len(weights)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_mean_nothing(weights):
    with pytest.raises(ValueError, match="expected positive numbers"):
        draws_per_block(weights)


def test_samples_come_in_their_shares_and_each_in_its_turn():
    order = MixtureOrder([SampleOrder([1000], 1, 3), SampleOrder([50], 1, 3)], [0.9, 0.1], 64, seed=3)
    numbers = drawn(order, 1000)
    small = numbers >= 1000
    assert abs(small.mean() - 0.1) < 0.005  # four standard deviations
    for which, size in ((~small, 1000), (small, 50)):  # epoch after epoch of each dataset
        for epoch in range(2):
            assert len(set(numbers[which][epoch * size : (epoch + 1) * size].tolist())) == size
    per_batch = small.reshape(1000, 64).sum(1)
    assert per_batch.min() < 6 < per_batch.max()  # mixed within batches, by chance


def test_over_a_block_the_share_is_the_weight(monkeypatch):
    monkeypatch.setattr(sampler, "BLOCK", 1000)
    order = MixtureOrder([SampleOrder([7], 1, 0), SampleOrder([9], 1, 0), SampleOrder([3], 1, 0)], [5, 3, 2], 20, 0)
    for block in range(3):
        numbers = np.concatenate([order.batch(k) for k in range(50 * block, 50 * block + 50)])
        assert [(numbers < 7).sum(), ((numbers >= 7) & (numbers < 16)).sum(), (numbers >= 16).sum()] == [500, 300, 200]


def test_any_batch_at_once(monkeypatch):
    monkeypatch.setattr(sampler, "BLOCK", 100)  # batches cross from one block to the next

    def new():
        return MixtureOrder([SampleOrder([17], 1, 1), SampleOrder([5], 1, 1)], [2, 1], 7, 1)

    in_turn = [new_batch.tolist() for order in [new()] for new_batch in map(order.batch, range(60))]
    assert [new().batch(k).tolist() for k in (59, 14, 13, 0)] == [in_turn[k] for k in (59, 14, 13, 0)]


def test_a_run_of_millions_resumes_at_once():
    orders = [SampleOrder([100_000], 1, 0), SampleOrder([2_000], 1, 0)]
    began = time.process_time()
    MixtureOrder(orders, [0.7, 0.3], 64, 0).batch(500_000)
    assert time.process_time() - began < 3


def test_datasets_of_one_shape_mix_within_a_batch(folders):
    dataset = ShardDataset([folders["a"], folders["b"]], Augmentation(slots=2, drop_caption=0, drop_grounding=0), 1)
    order = dataset.order(8, 5, weights=[0.5, 0.5])
    captions = [batch.captions for batch in batches(dataset, order, start=0, stop=800)]
    from_b = np.array([[caption.startswith("b") for caption in batch] for batch in captions])
    assert abs(from_b.mean() - 0.5) < 0.08
    assert 0 < from_b.mean(1).min() + 0.3 < from_b.mean(1).max()
    assert dataset.groups == [30, 10]


def test_datasets_of_unlike_shapes_give_whole_batches(folders):
    dataset = ShardDataset([folders["a"], folders["other"]], Augmentation(slots=2, drop_caption=0, drop_grounding=0), 1)
    order = dataset.order(4, 5, weights=[1, 3])
    sides = [batch.latents.shape[-1] for batch in batches(dataset, order, start=0, stop=1600)]
    assert abs(np.mean(np.array(sides) == 6) - 0.75) < 0.09
    by_size = dataset.order(4, 5)
    sides = [batch.latents.shape[-1] for batch in batches(dataset, by_size, start=0, stop=1600)]
    assert abs(np.mean(np.array(sides) == 6) - 12 / 42) < 0.09


@pytest.mark.parametrize("second", ["b", "other"])
def test_resumed_and_on_other_ranks_and_workers(folders, second):
    dataset = ShardDataset([folders["a"], folders[second]], Augmentation(slots=2), 1)

    def part(start, **where):
        order = dataset.order(4, 5, weights=[2, 1], windows=[None, 1])
        return batches(dataset, order, start=start, stop=80, **where)

    whole = flat(part(0))
    assert flat(part(44)) == whole[11:]
    assert flat(part(0, workers=2)) == whole
    halves = [list(part(0, rank=rank, ranks=2)) for rank in range(2)]
    together = [first.captions + other.captions for first, other in zip(*halves, strict=True)]
    assert together == [batch.captions for batch in part(0)]


def test_weights_and_windows_are_of_the_sources(folders):
    dataset = ShardDataset([folders["a"], folders["b"]], Augmentation(), 1)
    with pytest.raises(ValueError, match="3 weights for 2 datasets"):
        dataset.order(4, 5, weights=[1, 1, 1])
    with pytest.raises(ValueError, match="1 windows for 2 sources"):
        dataset.order(4, 5, windows=[None])
    with pytest.raises(ValueError, match="one by one, or in batches of 4"):
        MixtureOrder([SampleOrder([9], 2, 0)], [1], 4, 0)


# Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "cache"))
    sdxl_pipeline().save_pretrained(tmp_path / "base")
    data = {str(folders["a"]): 2, f"file://{folders['b']}": 1}
    return TrainConfig(
        model=str(tmp_path / "base"), data=data, out=str(tmp_path / "run"),
        samples=24, batch_size=4, seed=3, checkpoint_every=8, track=[], augmentation=Augmentation(slots=3),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8),
    )  # fmt: skip


def test_a_run_on_two_sources_resumed_equals_uninterrupted(config, folders, tmp_path):
    finished = loop.train(replace(config, out=str(tmp_path / "whole")))
    train_until(16, config)
    again = loop.train(replace(config, cache_gb=0.0001, workers=1))  # another window by default: the run keeps its own
    name = "gligen_adapter.safetensors"
    assert (again / name).read_bytes() == (finished / name).read_bytes()
    _, state = final(config.out)
    assert state["windows"] == [None, 16]
    with pytest.raises(ValueError, match=r"weights \[2, 1\], not \[1, 1\]"):
        loop.train(replace(config, data=dict.fromkeys(config.sources, 1)))


def test_data_of_another_vae_among_the_others_is_refused(config, folders, tmp_path):
    write_part(tmp_path / "c", latents(4), [row(1)] * 4)
    write_shard(tmp_path / "c" / "y", latents(4), [row(1)] * 4, METADATA | {"scaling_factor": "0.5"})
    mixed = replace(config, data={str(folders["a"]): 1, str(tmp_path / "c"): 1})
    with pytest.raises(ValueError, match=r"c/y holds latents scaled by 0\.5"):
        loop.train(mixed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": {}}, "data names no folder"),
        ({"data": {"a": 0.0}}, "expected positive numbers"),
        ({"window": 0}, "at least 1"),
        ({"cache_gb": 0}, "cache_gb is 0"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**({"data": "a", "out": "b"} | settings))
    assert TrainConfig(data="a", out="b").sources == {"a": 1.0}


def test_latents_travel_as_they_are(folders):
    """Half the bytes of float32 to the device."""
    dataset = ShardDataset(folders["a"], Augmentation(), 1)
    (batch,) = batches(dataset, dataset.order(4, 5), start=0, stop=4, workers=1)
    assert batch.latents.dtype == torch.float16
