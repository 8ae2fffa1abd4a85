"""Order, noise and dropouts follow from (seed, position), whatever the ranks, workers and interruptions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_shards import METADATA, latents, row

from gligen_xl.data.batch import Augmentation, ShardDataset, batches
from gligen_xl.data.order import SampleOrder
from gligen_xl.data.shards import write_shard


@pytest.fixture
def dataset(tmp_path):
    write_shard(tmp_path / "a", latents(13), [row(k % 4, image_id=str(k)) for k in range(13)], METADATA)
    write_shard(tmp_path / "b", latents(7, side=6), [row(k % 4, image_id=str(k)) for k in range(7)], METADATA)
    write_shard(tmp_path / "c", latents(5), [row(k % 4, image_id=str(k)) for k in range(5)], METADATA)
    return ShardDataset(tmp_path, Augmentation(slots=3), seed=9)


def flat(loader):
    return [
        (batch.position, batch.latents.numpy().tobytes(), batch.noise.numpy().tobytes(), tuple(batch.time.tolist()),
         tuple(batch.captions), batch.boxes.numpy().tobytes(), batch.mask.numpy().tobytes())
        for batch in loader
    ]  # fmt: skip


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
    batch = dataset.collate([dataset[3, 0], dataset[7, 5]])
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
