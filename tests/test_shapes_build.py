"""Building the embedded model, in miniature: every stage, resumed after a kill, to a folder that loads."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.data.shards import find_shards
from gligen_xl.toyworld import build as stages
from gligen_xl.toyworld.data import encode, images, write_shards
from gligen_xl.toyworld.model import new_vae
from gligen_xl.toyworld.stage import StageConfig, run_stage
from gligen_xl.toyworld.text import attributes
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture
def small(monkeypatch):
    def smaller(name, **changes):
        config = replace(getattr(stages, name), batch_size=2, log_every=1, checkpoint_every=2, **changes)
        function = getattr(stages, f"train_{name.lower()}")
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], config))

    for name in ("VAE", "DECODER", "TEXT", "BASE", "UNET"):
        smaller(name, samples=8)


def test_every_stage_and_the_second_time_none(small, tmp_path, monkeypatch):
    folder = stages.build(tmp_path, shard_images=6)
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("grass with a red circle", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    for stage in ("vae", "decoder", "text", "base", "unet"):
        names = [path.name for path in list_checkpoints(tmp_path / stage)]
        assert names == ["checkpoint-00000004", "checkpoint-00000008"]  # the one before, should the last be damaged
        assert len((tmp_path / stage / "log.jsonl").read_text().splitlines()) == 4

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("a finished stage was trained again"))
    again = StableDiffusionXLGLIGENPipeline.from_pretrained(stages.build(tmp_path, shard_images=6))
    assert all(torch.equal(value, weights[name]) for name, value in again.unet.state_dict().items())


def test_a_stage_that_was_killed_ends_the_same(tmp_path):
    config = StageConfig(samples=12, batch_size=2, learning_rate=0.1, checkpoint_every=2, log_every=2)

    def run(folder, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)

        def loss(first, count):
            if first == stop:
                raise KeyboardInterrupt
            return {"loss": (layer(torch.randn(count, 3)) - first).square().mean()}

        run_stage(folder, layer, config, loss, seed=3)
        return layer

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=6)
    resumed = run(tmp_path / "killed")
    assert torch.equal(resumed.weight, whole.weight)


def test_two_processes_share_a_stage(tmp_path):
    """Each gets half of every batch; both end with the weights of one process that had all of it."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from gligen_xl.toyworld.stage import StageConfig, run_stage\n"
        "torch.manual_seed(0)\n"
        "layer = torch.nn.Linear(1, 1)\n"
        "def loss(first, count):\n"
        "    x = torch.arange(first, first + count).float()[:, None]\n"
        "    return {'loss': (layer(x) - 3 * x).square().mean()}\n"
        "config = StageConfig(samples=40, batch_size=4, learning_rate=0.1, checkpoint_every=5, log_every=5)\n"
        "run_stage(Path(sys.argv[1]), layer, config, loss, seed=3)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for ranks in (1, 2):
        command = [*torchrun, str(ranks), script, tmp_path / str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    (_, alone), (_, shared) = (list_checkpoints(tmp_path / ranks) for ranks in "12")
    one, two = load_checkpoint(alone)[0]["model"], load_checkpoint(shared)[0]["model"]
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_shards_of_the_world(tmp_path):
    vae = new_vae().eval()
    write_shards(vae, tmp_path, 5, seed=7, captions="plain")
    (shard,) = find_shards(tmp_path)
    assert shard.latent_shape == (4, 16, 16)
    assert shard.metadata["downsampling"] == "4"
    expected = encode(vae, images(7, 0, 5))
    assert abs(shard.latents.astype("f4") - expected.astype("f4")).max() < 2e-2
    stamp = shard.stem.with_name(shard.stem.name + ".arrow").stat().st_mtime_ns
    write_shards(vae, tmp_path, 5, seed=7, captions="plain")
    assert shard.stem.with_name(shard.stem.name + ".arrow").stat().st_mtime_ns == stamp


def test_captions_for_a_base_and_for_an_adapter(tmp_path):
    vae = new_vae().eval()
    said = {}
    for captions in ("places", "ground", "plain"):
        write_shards(vae, tmp_path / captions, 40, seed=7, captions=captions)
        (shard,) = find_shards(tmp_path / captions)
        said[captions] = [attributes(entry["caption"]) for entry in shard.rows("caption")]
    counts = {name: (sum(any(s) for _, s, _ in rows), sum(any(p) for *_, p in rows)) for name, rows in said.items()}
    assert counts["plain"] == (40, 0)  # (say an object, say a place)
    assert counts["ground"] == (20, 0)
    assert counts["places"][0] == 40
    assert 10 < counts["places"][1] < 30
    assert all(ground >= 0 for rows in said.values() for ground, *_ in rows)
