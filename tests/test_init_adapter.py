"""Training begins from an adapter in whatever form: its weights are taken over exactly, or the error says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.published import original_name
from helpers.rows import METADATA, latents, row
from helpers.tiny import grounded, open_gates, sd_pipeline, sdxl_pipeline
from safetensors.torch import save_file

from gligen_xl.adapter import AdapterConfig, adapter_config, adapter_state_dict, attach
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train.base import fresh_adapter, load_base
from gligen_xl.train.config import Augmentation, TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import AdapterOptions, Optimization


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return folder


def begun(base, source, **settings):
    """The U-Net of a run on `base` that begins from `source`."""
    config = TrainConfig(
        model=str(base), data="nowhere", out="nowhere", init_adapter=str(source), augmentation=Augmentation(slots=3),
        **settings,
    )  # fmt: skip
    pipeline = load_base(config, torch.device("cpu"))
    fresh_adapter(pipeline, config)
    return pipeline.unet


def is_begun_from(unet, expected, *, half=False):
    got = adapter_state_dict(unet)
    assert got.keys() == expected.keys()
    assert all(value.dtype == torch.float32 for value in got.values())
    return all(torch.equal(got[name], value.half().float() if half else value) for name, value in expected.items())


def write_forms(folder):
    """One adapter in every form of SDXL's kind; form -> where it lies."""
    pipeline = grounded(sdxl_pipeline(), slots=30)
    state = adapter_state_dict(pipeline.unet)
    pipeline.save_gligen_adapter(folder / "adapter-folder")
    pipeline.save_gligen_adapter(folder / "half", dtype=torch.float16)
    pipeline.save_gligen_adapter(folder / "run" / "adapter")
    pipeline.save_pretrained(folder / "pipeline")
    StableDiffusionXLPipeline.save_pretrained(pipeline, folder / "gated", max_shard_size="60KB")
    StableDiffusionXLPipeline.save_pretrained(pipeline, folder / "pickled", safe_serialization=False)
    save_file({f"unet.{name}": value for name, value in state.items()}, folder / "adapter.safetensors")
    torch.save({"state_dict": dict(pipeline.unet.state_dict())}, folder / "whole.ckpt")
    return state


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    return folder, write_forms(folder)


@pytest.mark.parametrize(
    "name",
    [
        "adapter-folder",
        "half",
        "run",
        "pipeline",
        "gated",
        "gated/unet",
        "pickled",
        "adapter.safetensors",
        "whole.ckpt",
    ],
)
def test_every_form_is_taken_over_exactly(base, forms, name):
    folder, expected = forms
    unet = begun(base, folder / name)
    assert is_begun_from(unet, expected, half=name == "half")
    assert adapter_config(unet).slots == 3  # the run's own


def test_a_repository_of_the_hub(base, forms, monkeypatch):
    folder, expected = forms
    asked = []

    def snapshot(name, *, allow_patterns, **_):
        asked.append(name)
        return str(folder / "gated")

    monkeypatch.setattr("gligen_xl.hub.snapshot_download", snapshot)
    assert is_begun_from(begun(base, "someone/gligen-xl-512"), expected)
    assert set(asked) == {"someone/gligen-xl-512"}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_file_of_gligens_own_code_under_stable_diffusion(tmp_path, ending):
    sd_pipeline(layers_per_block=2).save_pretrained(tmp_path / "base")
    unet = grounded(sd_pipeline(layers_per_block=2)).unet
    names = {f"model.diffusion_model.{original_name(name)}": value for name, value in unet.state_dict().items()}
    path = tmp_path / f"gligen.{ending}"
    if ending == "bin":
        torch.save({"model": names}, path)
    else:
        save_file({name: value.contiguous() for name, value in names.items()}, path)
    assert is_begun_from(begun(tmp_path / "base", path), adapter_state_dict(unet))


def test_a_run_from_a_published_folder(base, forms, tmp_path):
    """Nothing but its gates' and weights' values goes on: the steps are the run's own, and it resumes without it."""
    folder, expected = forms
    shutil.copytree(folder / "gated", tmp_path / "published")
    write_shard(tmp_path / "data" / "a", latents(8, side=8), [row(1 + k % 3) for k in range(8)], METADATA)
    config = TrainConfig(
        model=str(base), data=str(tmp_path / "data"), out=str(tmp_path / "run"), samples=8, batch_size=4, track=[],
        init_adapter=str(tmp_path / "published"), augmentation=Augmentation(slots=3),
        optimization=Optimization(learning_rate=1e-9, warmup_samples=0, ema_decay=0.0),
    )  # fmt: skip
    finished = train(config)
    pipeline = sdxl_pipeline()
    pipeline.load_gligen_adapter(finished)
    got = adapter_state_dict(pipeline.unet)
    assert all(torch.allclose(got[name], value, atol=1e-6) for name, value in expected.items())
    description = json.loads((finished / "gligen_adapter.json").read_text())
    assert description["training"]["init_adapter"] == "published"  # its folder stays on the machine
    shutil.rmtree(tmp_path / "published")
    assert train(config) == finished


def write_strange(folder):
    inpainting = sdxl_pipeline()
    attach(inpainting.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=40, slots=4, inpaint=True))
    open_gates(inpainting.unet)
    inpainting.save_gligen_adapter(folder / "inpainting")
    grounded(sd_pipeline()).save_gligen_adapter(folder / "sd")
    sdxl_pipeline().save_pretrained(folder / "plain")
    (folder / "text.safetensors").write_text("no weights")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("inpainting", "is an inpainting adapter"),
        ("sd", "width 24, the base's text encoders give 40: it is for another base model"),
        ("plain", "holds no GLIGEN adapter: it has no fusers"),
        ("text.safetensors", r"text\.safetensors is damaged or not a safetensors file"),
        ("empty", "holds no weights"),
        ("nowhere", "no adapter folder .*nowhere"),
    ],
)
def test_what_training_cannot_begin_from(base, tmp_path, name, says):
    write_strange(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        begun(base, tmp_path / name)


def test_the_form_of_a_published_adapter_is_what_the_run_has_to_ask_for(base, forms):
    with pytest.raises(ValueError, match=r"has every 1, the run adapter\.every 2; set them alike"):
        begun(base, forms[0] / "gated", adapter=AdapterOptions(every=2))


def test_a_pickle_that_asks_for_more_than_tensors_is_not_run(base, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path(tmp_path / "ran").touch, ()

    torch.save({"model": {"position_net.x": torch.zeros(1)}, "evil": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="nothing of it ran"):
        begun(base, tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()
