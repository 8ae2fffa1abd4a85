"""Settings of a run: what is refused and how it is said, what may change in a run, and the words of its report."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from helpers.commands import fails

from gligen_xl.adapter import AdapterConfig
from gligen_xl.cli import train as command
from gligen_xl.cli.main import main
from gligen_xl.train.card import CardFacts, model_card
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.log import RunLog
from gligen_xl.train.options import AdapterOptions, Objective, Optimization, Validation
from gligen_xl.train.resume import check_same_run
from gligen_xl.train.step_stats import Skipped
from gligen_xl.train.summary import percent, plain, recipe_in_words

NAN, INF = math.nan, math.inf
CONFIG = TrainConfig(data="d", out="o")


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (Optimization, "learning_rate", (0, -1, NAN, INF)),
        (Optimization, "gate_learning_rate", (-1, NAN, INF)),
        (Optimization, "beta1", (-0.1, 1, NAN)),
        (Optimization, "beta2", (-0.1, 1, NAN)),
        (Optimization, "weight_decay", (-1, NAN, INF)),
        (Optimization, "max_grad_norm", (0, NAN, INF)),
        (Optimization, "warmup_samples", (-1,)),
        (Optimization, "decay_share", (-0.1, 1.1, NAN)),
        (Optimization, "ema_decay", (-0.1, 1, NAN)),
        (Optimization, "attention_weight", (-1, NAN, INF)),
        (Optimization, "attention_share", (0, 1.1, NAN)),
        (AdapterOptions, "every", (0,)),
        (AdapterOptions, "grounding_logit_bias", (NAN, INF)),
        (AdapterOptions, "gate_init", (1, NAN)),
        (AdapterOptions, "grounding_share", (0, 1, NAN)),
        (Objective, "snr_gamma", (0, NAN, INF)),
        (Objective, "noisy_bias", (-1, NAN, INF)),
        (Objective, "box_weight", (0, NAN, INF)),
        (Validation, "guidance_scale", (NAN, INF)),
        (Validation, "pictures", (-1,)),
    ],
)
def test_values_that_make_no_run(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"\.{name} is {value}; expected "):
            kind(**{name: value})


def test_values_at_the_edge():
    Optimization(gate_learning_rate=0, beta1=0, beta2=0, weight_decay=0, warmup_samples=0, ema_decay=0)
    Optimization(attention_share=1, decay_share=1)
    AdapterOptions(grounding_logit_bias=-1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"resolution": 500}, "resolution is 500; expected a positive multiple of 8"),
        ({"resolution": 0}, "resolution is 0"),
        ({"cache_gb": NAN}, "cache_gb is nan"),
        ({"cache_gb": INF}, "cache_gb is inf"),
        ({"keep_every": 0}, "keep_every is 0"),
        ({"samples": None}, "samples is None"),
        ({"data": "shapes:many"}, "data is 'shapes:many'"),
        ({"data": {"d": NAN}}, "weights"),
    ],
)
def test_settings_that_make_no_run(settings, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"detector": "shapes"}, "validation.detector is shapes, but validation.data is not set"),
        ({"gain_every": 5}, "validation.gain_every is 5, but validation.data is not set"),
        ({"data": "d", "detector": "shapes", "pictures": 0}, "validation.detector is shapes, but validation.pictures"),
        ({"data": "shapes:0"}, "validation.data is 'shapes:0'"),
    ],
)
def test_settings_of_a_validation_without_effect(settings, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, validation=Validation(**settings))


# The same run -------------------------------------------------------------------------------------------------------


def test_a_setting_that_the_program_did_not_know_then_had_its_default():
    former = CONFIG.to_dict()
    del former["gradient_compression"], former["objective"], former["optimization"]["attention_share"]
    check_same_run(former, CONFIG)
    with pytest.raises(ValueError, match="begun with gradient_compression 'no', now it is 'bf16'"):
        check_same_run(former, replace(CONFIG, gradient_compression="bf16"))
    with pytest.raises(ValueError, match=r"objective\.box_weight 1\.0"):
        check_same_run(former, replace(CONFIG, objective=Objective(box_weight=2)))
    with pytest.raises(ValueError, match=r"optimization\.attention_share 0\.5"):
        check_same_run(former, replace(CONFIG, optimization=Optimization(attention_share=0.4)))


def test_the_base_may_move_and_what_a_run_began_from_is_past():
    check_same_run(CONFIG.to_dict(), replace(CONFIG, model="elsewhere", init_adapter="other"))


# Files and the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 1", "mine.yaml has learning_rate, which is no setting of a run; did you mean "
         "optimization.learning_rate?"),
        ("optimization: {learning_rat: 1}", "optimization.learning_rat, which is no setting of a run; did you mean "
         "optimization.learning_rate?"),
        ("sample: 5", "did you mean samples"),
        ("zebra: 5", "mine.yaml has zebra, which is no setting of a run (see"),
        ("validation:", "mine.yaml holds a setting of the wrong kind: validation is empty"),
        ("seed: 1\nseed: 2", "mine.yaml has seed (line 4) twice"),
        ("optimization:\n  beta1: 0.1\n  beta1: 0.2", "mine.yaml has beta1 (line 5) twice"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_are_none(capsys, tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: d\nout: o\n{text}\n")
    assert says in fails(capsys, "train", path, "--dry-run")
    assert says in fails(capsys, "train", "shapes", "--settings", path, "--dry-run")
    assert says in fails(capsys, "train", "shapes", f"--settings={path}", "--dry-run")


@pytest.mark.parametrize("ending", [".json", ".txt"])
def test_a_file_with_another_ending_is_read(capsys, tmp_path, ending):
    path = tmp_path / f"mine{ending}"
    path.write_text(json.dumps({"data": "d", "out": "o", "model": "shapes", "seed": 5}))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "seed: 5" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--samp", "--optimization.learning_rat", "--validation.pict"])
def test_options_are_written_out(capsys, word):
    assert word in fails(capsys, "train", "shapes", word, "64", "--dry-run")


def test_errors_come_without_the_settings_and_only_one_process_shows_these(capsys, tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    recipe = {"data": str(tmp_path), "out": str(tmp_path / "run"), "model": "shapes", "init_adapter": "./missing"}
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "init_adapter ./missing is not there" in captured.err
    monkeypatch.setattr("gligen_xl.train.loop.train", lambda config: tmp_path / "run" / "adapter")
    monkeypatch.setattr(command, "_check_paths", lambda config: None)  # its data is not there
    config = replace(CONFIG, out=str(tmp_path / "run"))
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert command.run(config, None) == 0
        assert ("learning_rate: 5.0e-05" in capsys.readouterr().out) is shown


def test_a_finished_run_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.train.loop.train", lambda config: tmp_path / "adapter")
    monkeypatch.setattr(command, "_check_paths", lambda config: None)  # its data is not there
    config = replace(CONFIG, out=str(tmp_path), samples=100, batch_size=8)
    state = tmp_path / "checkpoint-00000096" / "state.json"
    state.parent.mkdir()
    for position, said in ((96, True), (88, False)):
        form = {"cross_attention_dim": 8, "phrase_dim": 8}
        about = {"adapter": form, "base": "", "ema_steps": 1, "groups": [100], "scaler": None}
        state.write_text(json.dumps({"position": position, "sha256": {}, "config": config.to_dict(), **about}))
        command.run(config, None)
        assert ("is finished, 96 samples seen" in capsys.readouterr().out) is said


# What is said -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "every", "words"),
    [
        ("all", 1, "every {}"),
        ("all", 3, "one {} in 3"),
        ("first", 1, "the first {} of each group"),
    ],
)
def test_where_the_fusers_stand(blocks, every, words):
    config = replace(CONFIG, adapter=AdapterOptions(blocks=blocks, every=every)).to_dict()
    assert f"fuser on {words.format('block')}," in recipe_in_words(config)
    form = AdapterConfig(cross_attention_dim=40, phrase_dim=40, blocks=blocks, every=every)
    facts = CardFacts(repository="a/b", license="mit", form=form, parameters=1, about={}, images={})
    assert f"a fuser on {words.format('transformer block')} of the U-Net" in model_card(facts)


def test_numbers_for_people():
    shares = (-1.19e-7, 0.0, 0.00004, 0.0012345, -0.0123, 0.298, 0.12345, 1, 15.2)
    texts = ["0 %", "0 %", "0 %", "0.12 %", "-1.23 %", "29.8 %", "12.3 %", "100 %", "1520 %"]
    assert [percent(share) for share in shares] == texts
    assert plain(-0.0) == "0"


class Silent:
    """As accelerate's Accelerator, on one process, reporting to nobody."""

    is_main_process, trackers = True, ()

    def init_trackers(self, name):
        pass

    def end_training(self):
        pass

    def log(self, values, step):
        pass


@pytest.mark.parametrize(
    ("precision", "samples", "says", "named"),
    [
        ("fp16", [], "the loss scaler is finding its range", []),
        ("fp16", [1], "a loss was not finite (images b)", ["b"]),
        ("bf16", [], "gradients were not finite (images a, b)", ["a", "b"]),
    ],
)
def test_an_overflow_in_fp16_is_the_loss_scaler_at_work(tmp_path, capsys, precision, samples, says, named):
    config = replace(CONFIG, out=str(tmp_path), batch_size=2, precision=precision)
    steps = SimpleNamespace(fetch=lambda: [Skipped(4, samples, 1)])
    with RunLog(Silent(), config, 0, steps, lambda position: ["a", "b"]) as log:
        log.look()
    assert says in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["image_ids"] == named


def test_the_progress_bar_is_seldom_written_into_a_file(tmp_path, capsys):
    config = replace(CONFIG, out=str(tmp_path), batch_size=2)
    with RunLog(Silent(), config, 0, SimpleNamespace(), lambda position: []) as log:
        assert not sys.stderr.isatty()
        assert log.bar.mininterval == log.bar.maxinterval == 30
