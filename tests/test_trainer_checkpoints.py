"""Checkpoints as trainers write them: weights beside settings, averages, optimizers and callbacks."""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import sys
import types

import numpy as np
import omegaconf
import pytest
import torch
from helpers.published import grounded_unet, original_name, same
from omegaconf import OmegaConf

from gligen_xl.adapter import adapter_state_dict
from gligen_xl.adapter.convert import read_published
from gligen_xl.adapter.pickles import read_checkpoint

# Seen in files of omegaconf 2.1.1, 2.3.0 and 2.4.0 alike.
GLOBALS = {
    "builtins.dict", "builtins.int", "builtins.list", "collections.defaultdict", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode", "typing.Any",
}  # fmt: skip
SETTINGS = """
model: {target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {channels: [1, 2, 4], fuser: gatedSA}}
train_dataset_names: {Grounding: [{prob: 0.5}, {name: flickr}]}
resume: false
gamma: 0.5
ckpt: null
again: ${gamma}
"""


@pytest.fixture(scope="module")
def state():
    return adapter_state_dict(grounded_unet())


def original(state, factor=1.0):
    return {original_name(name): value * factor for name, value in state.items()}


def optimizer_state(state):
    parameters = [torch.nn.Parameter(value.clone()) for value in list(state.values())[:3]]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def read(path, expected):
    _, got, about = read_published(path)
    same(got, expected)
    assert about["converted_from"] == path.name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt"])
def test_as_gligens_trainer_writes_them(tmp_path, state, zipped, ending):
    config = OmegaConf.create(SETTINGS)
    file = tmp_path / f"checkpoint_00012345.{ending}"
    content = {
        "model": original(state),
        "ema": original(state, 2.0),
        "text_encoder": {"transformer.text_model.final_layer_norm.weight": torch.zeros(3)},
        "autoencoder": {"encoder.conv_in.weight": torch.zeros(2)},
        "diffusion": {"betas": torch.zeros(4)},
        "opt": optimizer_state(state),
        "scheduler": {"base_lrs": [5e-5], "last_epoch": 7},
        "iters": np.int64(7),
        "config_dict": vars(config),
    }
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        assert set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) >= GLOBALS, omegaconf.__version__
    read(file, state)


@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("/data/out")),
        {"path": pathlib.PosixPath("/data"), "pure": pathlib.PurePosixPath("a/b")},
        {"loss": np.float64(0.5), "seen": np.int64(3), "curve": np.arange(4.0), "kind": np.dtype("float32")},
        {"when": datetime.datetime(2024, 5, 1), "took": datetime.timedelta(seconds=3)},
        collections.defaultdict(list, {"a": [1], "b": [2, 3]}),
        collections.deque([1, 2], maxlen=5),
        {"names": {"a", "b"}, "frozen": frozenset((1, 2)), "complex": 1j, "slice": slice(3), "range": range(4)},
        types.SimpleNamespace(a=1),
        OmegaConf.create({"a": ["x", 1.5, None, True, b"bytes"]}),
        vars(OmegaConf.create([1, {"b": 2}])),
        torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)]), lambda step: 1.0).state_dict(),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_settings_beside_the_weights(tmp_path, state, extra, zipped):
    torch.save({"args": extra, "state_dict": original(state)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read(tmp_path / "a.pt", state)


def test_as_lightning_writes_them(tmp_path, state, monkeypatch):
    """A class of a callback is a key, hyperparameters are of a class of its own; tried with lightning 2 by hand."""

    def module(name, *kinds):
        made = types.ModuleType(name)
        for kind in kinds:
            kind.__module__, kind.__qualname__ = name, kind.__name__
            setattr(made, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, made)

    class ModelCheckpoint:
        pass

    class AttributeDict(dict):
        pass

    module("pytorch_lightning")
    module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint)
    module("pytorch_lightning.utilities.parsing", AttributeDict)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in original(state).items()}
    torch.save(
        {
            "epoch": 3,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": prefixed | {"model_ema.decay": torch.tensor(0.9), "cond_stage_model.x": torch.zeros(1)},
            "callbacks": {ModelCheckpoint: {"monitor": None, "best_model_path": "x"}},
            "optimizer_states": [optimizer_state(state)],
            "hyper_parameters": AttributeDict(),
        },
        tmp_path / "last.ckpt",
    )
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    read(tmp_path / "last.ckpt", state)


@pytest.mark.parametrize("places", [("ema",), ("module",), ("model_state_dict",), ("state_dict", "model"), ("unet",)])
def test_weights_lie_where_trainers_put_them(tmp_path, state, places):
    content = original(state)
    for place in reversed(places):
        content = {place: content, "step": 3}
    torch.save(content, tmp_path / "a.pth")
    read(tmp_path / "a.pth", state)


def test_the_weights_go_before_their_average(tmp_path, state):
    torch.save({"ema": original(state, 3.0), "model": original(state)}, tmp_path / "a.pth")
    read(tmp_path / "a.pth", state)
    torch.save({"ema": original(state, 3.0), "model": {"other": torch.zeros(2)}}, tmp_path / "b.pth")
    read(tmp_path / "b.pth", {name: value * 3 for name, value in state.items()})


class Evil:
    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_runs_beside_settings_either(tmp_path, state, zipped):
    import os
    import subprocess

    ran = str(tmp_path / "ran")
    for k, (evil, name) in enumerate(
        [
            (Evil(open, ran, "w"), r"\w*\.open"),
            (Evil(os.system, f"touch {ran}"), r"posix\.system"),
            (Evil(subprocess.check_output, ["touch", ran]), r"\w+\.check_output"),
            (Evil(eval, f"open({ran!r}, 'w')"), r"builtins\.eval"),
            (Evil(getattr, OmegaConf, "create"), r"builtins\.getattr"),
            (Evil(torch.load, ran), r"torch\.serialization\.load"),
        ]
    ):
        file = tmp_path / f"{k}.pth"
        content = {"config_dict": vars(OmegaConf.create(SETTINGS)), "x": evil, "model": original(state)}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=f"{file.name} asks for {name}, and not only for tensors; nothing of it"):
            read_published(file)
    # Classes that are known to be settings are not made either.
    file = tmp_path / "settings.pth"
    torch.save({"x": Evil(OmegaConf.save, OmegaConf.create({}), ran), "model": original(state)}, file)
    with pytest.raises(ValueError, match="asks for"):
        read_published(file)
    torch.save({"x": Evil(pathlib.Path, ran), "y": Evil(np.save, ran, [1]), "model": original(state)}, file)
    read(file, state)
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("ran*"))


def test_no_class_of_a_file_is_imported(tmp_path, state, monkeypatch):
    torch.save({"model": original(state), "config_dict": vars(OmegaConf.create(SETTINGS))}, tmp_path / "a.pth")
    for name in [name for name in sys.modules if name.partition(".")[0] == "omegaconf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    read(tmp_path / "a.pth", state)


class Refuses:
    def find_spec(self, name, *_):
        assert not name.startswith("omegaconf"), "imported"


def test_a_whole_module_and_other_things_are_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module.pt asks for torch.nn.modules.linear.Linear, and not only for tens"):
        read_published(tmp_path / "module.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list; expected names and tensors"):
        read_published(tmp_path / "list.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"model": {"a": 1}}))
    with pytest.raises(ValueError, match=r"plain.bin is damaged"):
        read_published(tmp_path / "plain.bin")


def test_a_file_cut_anywhere_is_one_line(tmp_path, state):
    buffer = io.BytesIO()
    content = {"config_dict": vars(OmegaConf.create(SETTINGS)), "model": original(state)}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        whole = buffer.getvalue()
        for length in (0, 1, 40, 300, 2000, len(whole) // 2, len(whole) - 30):
            (tmp_path / "cut.pth").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"^[^\n]*cut\.pth[^\n]*$"):
                read_published(tmp_path / "cut.pth")


def test_the_tensors_are_those_of_the_file(tmp_path):
    torch.save({"a": torch.arange(3), "args": argparse.Namespace(b=torch.zeros(2))}, tmp_path / "x.pt")
    loaded = read_checkpoint(tmp_path / "x.pt")
    assert torch.equal(loaded["a"], torch.arange(3))
    assert list(loaded) == ["a", "args"]
