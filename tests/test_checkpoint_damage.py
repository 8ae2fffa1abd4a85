"""A checkpoint of which anything is damaged is not gone on from: the one before serves, whichever byte it is."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import final, write_data

from gligen_xl import manifest
from gligen_xl.adapter.io import read_adapter
from gligen_xl.cli.main import main
from gligen_xl.toyworld.stage import StageConfig, run_stage
from gligen_xl.train.checkpoint import last_whole, list_checkpoints, load_checkpoint
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import Optimization
from gligen_xl.train.precheck import check_before, samples_seen_by_run
from gligen_xl.train.publish import find_source
from gligen_xl.train.resume import check_state

FILES = (
    "gligen_adapter.json", "gligen_adapter.safetensors", "log.safetensors", "manifest.json", "optimizer.safetensors",
    "state.json", "weights.safetensors",
)  # fmt: skip
KEYS = ("adapter", "base", "ema_steps", "groups", "config", "scaler")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two checkpoints, 16 and 32."""
    folder = tmp_path_factory.mktemp("trained")
    sdxl_pipeline().save_pretrained(folder / "base")
    write_data(folder / "data")
    config = TrainConfig(
        model=str(folder / "base"), data=str(folder / "data"), out=str(folder / "run"), samples=32, batch_size=4,
        checkpoint_every=16, track=[], optimization=Optimization(warmup_samples=0, ema_decay=0.5),
    )  # fmt: skip
    train(config)
    return config


@pytest.fixture
def run(trained, tmp_path):
    """The same run in a folder that may be damaged, without its finished adapter."""
    shutil.copytree(trained.out, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    return replace(trained, out=str(tmp_path / "run"))


def first_and_last(run):
    first, last = list_checkpoints(run.out)
    return first, last


def check(path, tensors, state):
    check_state(path, state)


def test_every_file_stands_in_the_manifest(run):
    last = first_and_last(run)[1]
    assert sorted(path.name for path in last.iterdir()) == sorted(FILES)
    listed = json.loads((last / "manifest.json").read_text())["files"]
    assert sorted(listed) == sorted({*FILES} - {"manifest.json"})
    for name, entry in listed.items():
        content = (last / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.5, 0.77, 0.93, 1.0])
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_anywhere_falls_back(run, file, place, caplog):
    first, last = first_and_last(run)
    content = bytearray((last / file).read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    (last / file).write_bytes(content)
    path, _, state = last_whole(run.out, check)
    assert (path, state["position"]) == (first, 16)
    assert (last.parent / f"damaged-{last.name}" / file).is_file()
    assert f"goes on from {first}" in caplog.text


@pytest.mark.parametrize("how", ["missing", "shorter", "longer", "empty"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_or_of_another_length_falls_back(run, file, how):
    first, last = first_and_last(run)
    content = (last / file).read_bytes()
    (last / file).unlink()
    if how != "missing":
        (last / file).write_bytes({"shorter": content[:-1], "longer": content + b"\n", "empty": b""}[how])
    assert samples_seen_by_run(run) == 16
    assert last_whole(run.out, check)[0] == first


@pytest.mark.parametrize("name", [*KEYS, "weights", "windows", "log", "position"])
def test_a_key_that_is_removed_or_of_another_kind_falls_back(run, name):
    first, last = first_and_last(run)
    state = json.loads((last / "state.json").read_text())
    del state[name]
    (last / "state.json").write_text(json.dumps(state))
    assert samples_seen_by_run(run) == 16
    assert last_whole(run.out, check)[0] == first


@pytest.mark.parametrize(("name", "value"), [("ema_steps", 3), ("config", {"samples": 7})])
def test_a_changed_value_is_noticed_and_the_run_ends_with_the_same_bits(run, trained, name, value):
    last = first_and_last(run)[1]
    state = json.loads((last / "state.json").read_text())
    state[name] = value
    (last / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    train(run)
    (expected, _), (got, state) = final(trained.out), final(run.out)
    assert state["position"] == 32
    assert all(value.equal(got[name]) for name, value in expected.items())


def sealed(last):
    """The manifest is written anew, as somebody may who edits by hand and knows how."""
    (last / "manifest.json").unlink()
    manifest.write_manifest(last)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", ["missing", 1.5, [None], "x"])
def test_also_behind_a_good_manifest_wrong_keys_are_no_traceback(run, name, value):
    if (name, value) == ("base", "x"):
        return  # a fingerprint; of another base
    first, last = first_and_last(run)
    state = json.loads((last / "state.json").read_text())
    state[name] = value
    if value == "missing":
        del state[name]
    (last / "state.json").write_text(json.dumps(state))
    sealed(last)
    assert samples_seen_by_run(run) == 16
    with pytest.raises(ValueError, match=rf"state\.json is damaged: .*{name}"):
        check_state(last, state)
    assert last_whole(run.out, check)[0] == first


def test_a_manifest_that_names_files_elsewhere_is_none(run):
    last = first_and_last(run)[1]
    for text in ("[]", "{}", '{"files": []}', '{"files": {"../x": {"size": 1, "sha256": ""}}}', "[" * 100_000):
        (last / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            load_checkpoint(last)


def test_where_none_is_whole_it_is_one_line_and_nothing_moves(run, trained, capsys):
    for path in list_checkpoints(run.out):
        (path / "gligen_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gligen_adapter\.json is damaged .*; there is no whole checkpoint before it"):
        train(run)
    assert len(list_checkpoints(run.out)) == 2
    assert samples_seen_by_run(run) is None


def to_version_01(path):
    """A checkpoint as version 0.1 wrote it."""
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.safetensors")}
    for name in ("held_out",):
        state.pop(name, None)
    (path / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    (path / "manifest.json").unlink()


def test_checkpoints_of_version_01_are_gone_on_from(run, trained):
    first, last = first_and_last(run)
    to_version_01(first)
    shutil.rmtree(last)
    assert samples_seen_by_run(run) == 16
    train(run)
    expected, got = final(trained.out)[0], final(run.out)[0]
    assert all(value.equal(got[name]) for name, value in expected.items())


@pytest.mark.parametrize("name", [*KEYS, "position", "sha256"])
def test_of_version_01_too_a_missing_key_falls_back(run, name):
    first, last = first_and_last(run)
    to_version_01(last)
    state = json.loads((last / "state.json").read_text())
    del state[name]
    (last / "state.json").write_text(json.dumps(state))
    assert samples_seen_by_run(run) == 16
    assert last_whole(run.out, check)[0] == first


# Other readers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["gligen_adapter.json", "gligen_adapter.safetensors"])
def test_a_damaged_average_is_no_adapter_and_is_not_shared(run, file, caplog):
    first, last = first_and_last(run)
    content = bytearray((last / file).read_bytes())
    content[-3] ^= 1
    (last / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        read_adapter(last)
    assert find_source(run.out).adapter == first
    assert f"{last} is passed over" in caplog.text
    other = replace(run, out=f"{run.out}-other", init_adapter=str(last))
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        train(other)
    if file.endswith(".json"):
        with pytest.raises(ValueError, match="is damaged"):
            check_before(other)


@pytest.mark.parametrize("text", ["[]", "3", '{"samples": []}', '{"config": []}', "[" * 100_000])
def test_a_description_of_another_kind_is_one_line(run, text, capsys):
    last = first_and_last(run)[1]
    (last / "manifest.json").unlink()
    (last / "gligen_adapter.json").write_text(text)
    for words in (["push", str(last), "--repository", "a/b", "--license", "mit", "--dry_run", f"{run.out}-push"],):
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"config": {"samples": "many"}}', "samples is 'many'; expected a number"),
        ('{"config": {"optimization": {"learning_rate": []}}}', "optimization.learning_rate is []"),
        ('{"config": {"augmentation": 3}}', "augmentation is 3; expected settings"),
        ('{"config": []}', "does not hold the settings of a run"),
        ('{"config": {}, "versions": []}', "does not hold the settings of a run"),
        ("[]", "does not hold the settings of a run"),
        ("\x00", "is not valid JSON"),
    ],
)
def test_a_report_of_damaged_settings_is_one_line(run, text, says, capsys):
    (Path(run.out) / "config.json").write_text(text)
    assert main(["report", run.out]) == 2
    assert says in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_damaged_lines_of_the_log_are_left_out_and_the_run_goes_on(run, trained, caplog):
    shutil.rmtree(first_and_last(run)[1])
    path = Path(run.out) / "metrics.jsonl"
    odd = (
        b'\xff\xfe{\n{"kind": "train", "samples": "x"}\n'
        + b"[" * 100_000
        + b'\n{"kind": "train", "samples": 8, "samples_per_s": "x"}\n'
    )
    path.write_bytes(odd + path.read_bytes())
    train(run)
    assert "metrics.jsonl: 3 lines are broken and were left out" in caplog.text
    assert main(["report", run.out]) == 0
    expected, got = final(trained.out)[0], final(run.out)[0]
    assert all(value.equal(got[name]) for name, value in expected.items())


def test_a_stage_of_the_embedded_model_falls_back_too(tmp_path):
    def loss(first, count):
        return {"loss": module(torch.ones(1, 2)).square().mean()}

    def new():
        torch.manual_seed(0)
        return torch.nn.Linear(2, 2)

    config = StageConfig(samples=8, batch_size=2, learning_rate=0.1, checkpoint_every=2)
    module = new()
    run_stage(tmp_path / "whole", module, config, loss, seed=1)
    expected = module.weight.detach().clone()
    last = list_checkpoints(tmp_path / "whole")[-1]
    for change in ({"ema_steps": 1}, {}):
        state = json.loads((last / "state.json").read_text())
        state.pop("ema_steps")
        (last / "state.json").write_text(json.dumps(state | change))
        module = new()
        run_stage(tmp_path / "whole", module, config, loss, seed=1)
        assert torch.equal(module.weight, expected)
    for path in list_checkpoints(tmp_path / "whole"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*no whole checkpoint before it"):
        run_stage(tmp_path / "whole", new(), config, loss, seed=1)
