"""Order, noise and dropouts follow from (seed, position), whatever the ranks, workers and interruptions."""

import io
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import psutil
import pytest
import torch
from helpers.flat import flat
from helpers.rows import METADATA, latents, row
from hypothesis import given
from hypothesis import strategies as st

from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.loader import batches
from gligen_xl.data.rng import noise_of, noise_seed, uniforms
from gligen_xl.data.sampler import SampleOrder
from gligen_xl.data.shard_writer import write_shard

pytestmark = pytest.mark.usefixtures("nothing_hangs")


@pytest.fixture
def dataset(tmp_path):
    write_shard(tmp_path / "a", latents(13), [row(k % 4, image_id=str(k)) for k in range(13)], METADATA)
    write_shard(tmp_path / "b", latents(7, side=6), [row(k % 4, image_id=str(k)) for k in range(7)], METADATA)
    write_shard(tmp_path / "c", latents(5), [row(k % 4, image_id=str(k)) for k in range(5)], METADATA)
    return ShardDataset(tmp_path, Augmentation(slots=3), seed=9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_meets_every_sample_once_but_for_remainders(groups, batch_size, seed):
    order = SampleOrder(groups, batch_size, seed)
    first = np.cumsum([0, *groups])
    epoch = [order.batch(k) for k in range(order.batches_per_epoch)]
    for batch in epoch:
        group = np.searchsorted(first, batch, side="right")
        assert len(set(group.tolist())) == 1  # one latent shape a batch
    counts = np.bincount(np.concatenate(epoch), minlength=first[-1])
    for k, size in enumerate(groups):
        part = counts[first[k] : first[k + 1]]
        if size >= batch_size:
            assert part.max() == 1
            assert part.sum() == size // batch_size * batch_size
        else:
            assert part.sum() == batch_size
    again = SampleOrder(groups, batch_size, seed)
    np.testing.assert_array_equal(again.batch(order.batches_per_epoch + 1), order.batch(order.batches_per_epoch + 1))


def test_epochs_differ(dataset):
    order = SampleOrder([50], 10, 0)
    assert not np.array_equal(np.concatenate([order.batch(k) for k in range(5)]), np.arange(50))
    assert not np.array_equal(order.batch(0), order.batch(5))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 5),
)  # fmt: skip
def test_an_epoch_in_windows_meets_every_sample_once_too(parts, window, batch_size, seed):
    sizes, groups = zip(*parts, strict=True)
    order = SampleOrder(sizes, batch_size, seed, groups=groups, window=window)
    epoch = [order.batch(order.batches_per_epoch + k) for k in range(order.batches_per_epoch)]
    group_of = np.repeat(groups, sizes)
    counts = np.bincount(np.concatenate(epoch), minlength=len(group_of))
    for batch in epoch:
        assert len(batch) == batch_size
        assert len(set(group_of[batch].tolist())) == 1
    for group in set(groups):
        part = counts[group_of == group]
        if len(part) >= batch_size:
            assert part.max() == 1
            assert part.sum() == len(part) // batch_size * batch_size
        else:
            assert part.sum() == batch_size
    again = SampleOrder(sizes, batch_size, seed, groups=groups, window=window)
    for k in reversed(range(len(epoch))):  # any batch at once, without those before it
        np.testing.assert_array_equal(again.batch(order.batches_per_epoch + k), epoch[k])


def test_a_window_keeps_to_few_shards_at_a_time():
    order = SampleOrder([50] * 40, 8, seed=3, groups=[0] * 40, window=4)
    shards = [set((order.batch(k) // 50).tolist()) for k in range(order.batches_per_epoch)]
    in_a_row = [set.union(*shards[k : k + 20]) for k in range(len(shards) - 20)]
    assert max(map(len, in_a_row)) <= 8  # two windows
    assert len(set.union(*shards[:25])) in (4, 5)
    assert not np.array_equal(np.sort(order.batch(0)), np.sort(order.batch(order.batches_per_epoch)))
    with pytest.raises(ValueError, match="at least 1 shard"):
        SampleOrder([5], 1, 0, window=0)


def test_an_epoch_costs_few_bytes_a_sample():
    order = SampleOrder([1000] * 1000, 64, 0, groups=[0] * 1000)
    tracemalloc.start()
    order.batch(0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 9e6  # of a million: 11 million take 100 MB


def test_chances_are_even_and_independent():
    numbers = np.array([uniforms(seed, position, 3) for seed in range(4) for position in range(5000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-square of 19 degrees, 1 in 1000
    neighbours = np.concatenate([numbers[:-1], numbers[1:]], axis=1)
    off = np.corrcoef(neighbours.T) - np.eye(6)
    assert np.abs(off).max() < 0.03  # four standard deviations
    assert uniforms(3, 17, 2) == uniforms(3, 17, 3)[:2]


def test_noise_is_normal_and_belongs_to_its_position():
    noise = noise_of(5, range(100, 164), (4, 8, 8))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert abs(np.corrcoef(noise.flatten(1))[~np.eye(64, dtype=bool)]).max() < 0.3
    assert torch.equal(noise_of(5, [150, 101], (4, 8, 8)), noise[[50, 1]])
    assert not torch.equal(noise_of(6, [100], (4, 8, 8))[0], noise[0])
    assert len({noise_seed(5, position) & 0xFFFFFFFF for position in range(200_000)}) == 200_000


def test_resumed_equals_uninterrupted(dataset):
    order = SampleOrder(dataset.groups, 4, seed=2)
    whole = flat(batches(dataset, order, start=0, stop=40))
    assert len(whole) == 10
    assert flat(batches(dataset, order, start=24, stop=40)) == whole[6:]
    assert len({entry[2] for entry in whole}) == 10  # noise never repeats


def test_workers_change_nothing(dataset):
    order = SampleOrder(dataset.groups, 4, seed=2)
    alone = flat(batches(dataset, order, start=0, stop=24))
    assert flat(batches(dataset, order, start=0, stop=24, workers=2)) == alone


def test_two_ranks_make_the_batch_of_one(dataset):
    order = SampleOrder(dataset.groups, 4, seed=2)
    whole = list(batches(dataset, order, start=0, stop=20))
    halves = [list(batches(dataset, order, start=0, stop=20, rank=rank, ranks=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        for name in ("latents", "noise", "time", "boxes", "mask", "size"):
            joined = torch.cat([getattr(first, name), getattr(second, name)])
            assert torch.equal(getattr(batch, name), joined)
        assert batch.captions == first.captions + second.captions


def test_what_a_sample_says(dataset):
    batch = dataset.batch([(3, 0), (7, 5)])
    assert batch.latents.dtype == torch.float16
    assert torch.equal(batch.noise, noise_of(9, [0, 5], (4, 4, 4)))
    for k, sample in enumerate((dataset[3, 0], dataset[7, 5])):
        np.testing.assert_array_equal(batch.latents[k], sample.latents)
        np.testing.assert_array_equal(batch.boxes[k, : len(sample.boxes)], sample.boxes)
        said = (batch.positions[k], batch.captions[k], batch.phrases[k], tuple(batch.size[k].tolist()))
        assert said == (sample.position, sample.caption, sample.phrases, sample.size)
    assert batch.boxes.shape == (2, 3, 4)
    assert batch.size.tolist() == [[480, 640, 0, 3, 32, 32]] * 2
    for k in range(2):
        used = int(batch.mask[k].sum())
        assert len(batch.phrases[k]) == used
        assert not batch.boxes[k, used:].any()


def test_dropouts_come_as_often_as_asked(tmp_path):
    write_shard(tmp_path / "a", latents(1), [row(2)], METADATA)
    dataset = ShardDataset(tmp_path, Augmentation(drop_grounding=0.1, drop_caption=0.5), seed=0)
    samples = [dataset[0, position] for position in range(4000)]
    grounded = np.array([len(sample.boxes) > 0 for sample in samples])
    said = np.array([sample.caption is not None for sample in samples])
    assert abs(grounded.mean() - 0.9) < 0.02
    assert abs(said[grounded].mean() - 0.5) < 0.03
    assert not said[~grounded].any()  # without boxes, the caption goes too
    assert abs(np.mean([sample.time for sample in samples]) - 0.5) < 0.02


def test_the_best_boxes_are_kept():
    augmentation = Augmentation(slots=2, min_score=0.25)
    assert augmentation.choose([0.3, 0.2, 0.9, 0.5]) == [2, 3]
    assert augmentation.choose([0.25]) == []


@pytest.mark.parametrize("settings", [{"drop_caption": 1.5}, {"min_score": -1}, {"slots": 0}])
def test_wrong_augmentation(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Augmentation(**settings)


def test_batches_that_cannot_be_shared(dataset):
    order = SampleOrder(dataset.groups, 4, seed=2)
    with pytest.raises(ValueError, match="shared by 3"):
        batches(dataset, order, start=0, stop=8, ranks=3)
    with pytest.raises(ValueError, match="not a multiple"):
        batches(dataset, order, start=3, stop=8)


# Whatever the shapes of data and machine ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_less_data_than_workers_ranks_and_batch(tmp_path, workers):
    write_shard(tmp_path / "a", latents(0), [], METADATA)
    write_shard(tmp_path / "b", latents(1), [row(1)], METADATA)
    write_shard(tmp_path / "c", latents(0), [], METADATA)
    dataset = ShardDataset(tmp_path, Augmentation(slots=3), seed=9)
    assert dataset.groups == [1]
    order = dataset.order(6, seed=0)
    for rank in (0, 5):
        got = list(batches(dataset, order, start=6, stop=18, rank=rank, ranks=6, workers=workers))
        assert [batch.position for batch in got] == [6 + rank, 12 + rank]
        assert torch.equal(got[0].latents, torch.from_numpy(latents(1)))


def test_no_data_at_all(tmp_path):
    write_shard(tmp_path / "a", latents(0), [], METADATA)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no samples"):
        ShardDataset(tmp_path, Augmentation(), seed=0)


def test_a_dead_worker_is_an_error_and_no_wait(dataset):
    order, former = dataset.order(4, seed=2), psutil.Process().children()
    loader = iter(batches(dataset, order, start=0, stop=40_000, workers=1))
    next(loader)
    (worker,) = set(psutil.Process().children()) - set(former)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker .*(killed|exited)"):
        for _ in loader:
            pass


def test_more_workers_than_places_change_nothing(dataset):
    """Latents wait in shared memory while several workers read ahead of a slow trainer."""
    order = dataset.order(4, seed=2)
    alone = flat(batches(dataset, order, start=0, stop=400))
    kept = list(batches(dataset, order, start=0, stop=400, workers=3))
    assert flat(kept) == alone


def test_workers_may_be_spawned(dataset, tmp_path):
    code = """
import io, pickle, sys, torch
from gligen_xl.data.loader import batches
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    dataset = pickle.load(sys.stdin.buffer)
    loader = batches(dataset, dataset.order(4, 2), start=0, stop=8, workers=1)
    pickle.dump([batch.latents.numpy().tobytes() for batch in loader], sys.stdout.buffer)
"""
    (tmp_path / "spawn.py").write_text(code)
    run = subprocess.run([sys.executable, tmp_path / "spawn.py"], input=pickle.dumps(dataset), capture_output=True)
    expected = [batch.latents.numpy().tobytes() for batch in batches(dataset, dataset.order(4, 2), start=0, stop=8)]
    assert run.returncode == 0, run.stderr.decode()
    assert pickle.load(io.BytesIO(run.stdout)) == expected


def test_a_shard_that_shrinks_under_the_training_is_named(dataset, tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(OSError, match=r"c\.safetensors has become shorter"):
        dataset.batch([(17, 0)])
