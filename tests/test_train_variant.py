"""A base whose files are of a variant, as fp16: said before anything is loaded, and trained where it is asked for."""

import pytest
from helpers.tiny import sdxl_pipeline
from helpers.tiny_run import write_data

from gligen_xl.cli.common import Parser
from gligen_xl.cli.main import main
from gligen_xl.cli.train import parse
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.estimate import estimate
from gligen_xl.train.loop import train
from gligen_xl.train.options import Optimization
from gligen_xl.train.precheck import check_before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bases as diffusers writes them: plain, and of fp16 files alone."""
    folder = tmp_path_factory.mktemp("bases")
    sdxl_pipeline().save_pretrained(folder / "plain")
    sdxl_pipeline().save_pretrained(folder / "half", variant="fp16")
    write_data(folder / "data")
    return folder


def config(folders, base, tmp_path, **settings):
    return TrainConfig(
        model=str(folders / base), data=str(folders / "data"), out=str(tmp_path / "run"), samples=4, batch_size=4,
        track=[], optimization=Optimization(warmup_samples=0), **settings,
    )  # fmt: skip


def test_a_base_of_fp16_files_alone_says_so_and_trains_with_them(folders, tmp_path):
    for look in (check_before, estimate, train):
        with pytest.raises(
            ValueError, match=r"half holds the weights of .* as fp16 only; load it with .*--variant fp16"
        ):
            look(config(folders, "half", tmp_path))
    assert not (tmp_path / "run" / "adapter").exists()
    asked = config(folders, "half", tmp_path, variant="fp16")
    estimate(asked)
    assert (train(asked) / "gligen_adapter.safetensors").is_file()


def test_a_variant_that_is_not_there_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.train.base.load_pipeline", None)
    for base, variant, says in (
        ("plain", "fp16", "has no files of the variant 'fp16'; its files are of no variant, so name none"),
        ("half", "bf16", "has no files of the variant 'bf16'; there are fp16"),
    ):
        for look in (check_before, estimate, train):
            with pytest.raises(ValueError, match=says):
                look(config(folders, base, tmp_path, variant=variant))


def test_the_embedded_model_has_no_variants(folders, tmp_path, capsys):
    words = ["train", "shapes", "--out", str(tmp_path / "run"), "--variant", "fp16", "--dry-run"]
    assert main(words) == 2
    assert "variant is fp16, but shapes has no variants; leave it out" in capsys.readouterr().err


def test_help_shows_what_most_runs_set_first(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    names = ["--data", "--out", "--model", "--resolution", "--batch_size", "--samples", "--optimization.learning_rate",
             "--precision", "--variant", "--without_boxes", "--compile ", "--adapter.blocks"]  # fmt: skip
    places = [text.index(f"\n  {name}") for name in names]
    assert places == sorted(places)
    assert text.count("--optimization.learning_rate") == 1


@pytest.mark.parametrize(
    "text", ["--without-boxes --compile", "--compile --without_boxes true", "--without-boxes=true --compile"]
)
def test_a_switch_may_be_named_alone(folders, tmp_path, text):
    settings = tmp_path / "recipe.yaml"
    settings.write_text(f"model: {folders / 'plain'}\ndata: {folders / 'data'}\nout: {tmp_path / 'run'}\n")
    config, _ = parse(Parser(prog="train"), [str(settings), *text.split()])
    assert (config.without_boxes, config.compile, config.deterministic) == (True, True, False)
