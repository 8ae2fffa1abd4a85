"""Checkpoints and averages: whole or not at all, verified when read, pruned."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gligen_xl.io import whole_file, whole_folder
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from gligen_xl.train.ema import EMA
from gligen_xl.train.optimizer import load_optimizer_tensors, optimizer_tensors


def some(value=1.0):
    return {"adapter": {"a": torch.full((3,), value), "b.c": torch.eye(2)}, "ema": {"a": torch.zeros(3)}}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path, 128, some(), {"seed": 3}, keep=2)
    tensors, state = load_checkpoint(path)
    assert state["position"] == 128
    assert state["seed"] == 3
    assert torch.equal(tensors["adapter"]["b.c"], torch.eye(2))
    assert path.name == "checkpoint-00000128"


def test_the_newest_are_kept_in_order_of_position(tmp_path):
    for position in (64, 1000, 99_999_999, 100_000_064):
        save_checkpoint(tmp_path, position, some(), {}, keep=3)
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)] == [1000, 99_999_999, 100_000_064]


def test_some_stay_for_good(tmp_path):
    """The first at or after every multiple, however many come between and are removed."""
    for position in (60, 120, 180, 200, 240, 300, 360, 420, 480, 540):
        save_checkpoint(tmp_path, position, some(), {}, keep=1, keep_every=200)
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)] == [200, 420, 540]


def test_half_written_ones_are_not_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 64, some(), {}, keep=3)
    (tmp_path / ".checkpoint-00000128.99.partial").mkdir()
    assert len(list_checkpoints(tmp_path)) == 1


def test_damage_is_found(tmp_path):
    path = save_checkpoint(tmp_path, 64, some(), {}, keep=3)
    file = path / "adapter.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"adapter\.safetensors is damaged"):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter\.safetensors"):
        load_checkpoint(path)
    (path / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_failure_while_saving_keeps_the_former(tmp_path):
    save_checkpoint(tmp_path, 64, some(), {}, keep=1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 128, some(), {"not json": object()}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000064"]


def test_what_a_kill_left_half_written_is_cleared(tmp_path):
    half = tmp_path / ".checkpoint-00000032.12345.partial"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 64, some(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000064"]


def test_a_kill_while_an_old_one_is_removed_leaves_none_by_halves(tmp_path, monkeypatch):
    real = shutil.rmtree

    def interrupted(path, *rest, **named):
        if not Path(path).is_dir() or not any(Path(path).iterdir()):
            return real(path, *rest, **named)
        next(Path(path).glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, 64, some(), {}, keep=1)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 128, some(), {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000128"]
    save_checkpoint(tmp_path, 192, some(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000192"]


def test_whole_files_and_folders(tmp_path):
    target = tmp_path / "deep" / "file.json"
    with whole_file(target) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as partial:
        raise RuntimeError
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "b").write_text("2")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    (tmp_path / "folder").rename(tmp_path / ".folder.former")  # killed after the old one was moved aside
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]


def test_the_optimizer_goes_through_a_file_bit_for_bit(tmp_path):
    def made():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        return layers, torch.optim.AdamW(layers.parameters(), lr=0.1)

    def step(layers, optimizer, k):
        layers(torch.full((1, 4), float(k))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layers, optimizer = made()
    for k in range(3):
        step(layers, optimizer, k)
    groups = {"model": dict(layers.state_dict()), "optimizer": optimizer_tensors(optimizer)}
    path = save_checkpoint(tmp_path, 3, groups, {}, keep=1)
    step(layers, optimizer, 3)

    again, optimizer_again = made()
    tensors, _ = load_checkpoint(path)
    again.load_state_dict(tensors["model"])
    load_optimizer_tensors(optimizer_again, tensors["optimizer"])
    step(again, optimizer_again, 3)
    assert all(torch.equal(a, b) for a, b in zip(layers.parameters(), again.parameters(), strict=True))


def test_the_average_follows_its_formula_and_steps_aside():
    value = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = EMA({"v": value}, decay=0.5), value.detach().clone()
    for k in range(1, 6):
        with torch.no_grad():
            value.add_(k)
        ema.update()
        decay = min(0.5, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * value.detach()
    torch.testing.assert_close(ema.average["v"], expected)
    average = ema.average["v"].clone()
    with torch.no_grad():
        value.add_(1)
    ema.update(torch.tensor(False))
    assert torch.equal(ema.average["v"], average)
    assert ema.steps == 5
    own = value.detach().clone()
    with ema.applied():
        torch.testing.assert_close(value.detach(), expected)
    assert torch.equal(value.detach(), own)
    torch.testing.assert_close(ema.average["v"], expected)
    with pytest.raises(ValueError, match="decay is 1"):
        EMA({"v": value}, decay=1)


def test_without_an_average_no_memory_is_taken():
    value = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA({"v": value}, decay=0)
    with torch.no_grad():
        value.add_(1)
    ema.update()
    with ema.applied():
        assert value.tolist() == [2.0, -1.0]
    assert ema.average["v"].data_ptr() == value.data_ptr()
    assert ema.average["v"].tolist() == [2.0, -1.0]


def test_state_is_json(tmp_path):
    path = save_checkpoint(tmp_path, 64, some(), {"config": {"seed": 1}}, keep=1)
    state = json.loads((path / "state.json").read_text())
    assert set(state) == {"config", "position"}
