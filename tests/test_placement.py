"""Where fusers stand: on all transformer blocks, on the first of each group, on every k-th."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.adapters import config_for, run
from helpers.tiny import open_gates, sd15_unet, sdxl_unet

from gligen_xl.adapter import (
    AdapterConfig,
    adapter_parameters,
    attach,
    detach,
    fusers,
    load_adapter,
    lora_targets,
    save_adapter,
)
from gligen_xl.adapter.unet import transformer_blocks
from gligen_xl.train.known_bases import SDXL_UNET


def size(width: int) -> int:
    """Parameters of a fuser on SDXL: linear, attention, GEGLU of four times the width, two norms, two gates."""
    linear = 2048 * width + width
    attention = 4 * width * width + width
    feed_forward = width * 8 * width + 8 * width + 4 * width * width + width
    return linear + attention + feed_forward + 4 * width + 2


@pytest.mark.parametrize(
    ("settings", "narrow", "wide"),
    [
        ({}, 10, 60),
        ({"every": 2}, 5, 30),
        ({"blocks": "first"}, 5, 6),  # two transformers on the way down and three up; two, three, and the middle's
        ({"blocks": "first", "every": 3}, 2, 2),
    ],
)
def test_on_sdxl(settings, narrow, wide):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    attach(unet, AdapterConfig(cross_attention_dim=2048, phrase_dim=2048, **settings))
    there = fusers(unet)
    assert {fuser.norm1.normalized_shape[0] // fuser.attn.heads for fuser in there.values()} == {64}
    assert [fuser.norm1.normalized_shape[0] for fuser in there.values()].count(640) == narrow
    assert len(there) == narrow + wide
    adapter = sum(value.numel() for value in adapter_parameters(unet).values())
    assert adapter == narrow * size(640) + wide * size(1280) + 2_397_248
    if not settings:
        assert adapter == 1_812_438_988


def test_the_first_of_each_group():
    unet = sdxl_unet(transformer_layers_per_block=(1, 2, 3))
    attach(unet, config_for(unet, blocks="first"))
    names = {name.removesuffix(".fuser") for name in fusers(unet)}
    groups = {name.rpartition(".")[0] for name in transformer_blocks(unet)}
    assert names == {f"{group}.0" for group in groups}
    assert len(names) < len(transformer_blocks(unet))


@pytest.mark.parametrize("make", [sdxl_unet, sd15_unet])
@pytest.mark.parametrize("settings", [{"blocks": "first"}, {"blocks": "first", "every": 2}, {"every": 2}])
def test_saved_loaded_and_taken_off(make, settings, tmp_path):
    unet = make()
    plain, names = run(unet, grounded=False), set(unet.state_dict())
    attach(unet, config_for(unet, **settings))
    assert torch.equal(run(unet), plain)  # gates are at 0
    open_gates(unet)
    grounded = run(unet)
    assert (grounded - plain).abs().max() > 1e-4
    save_adapter(unet, tmp_path)
    assert not any(".fuser." in name for name in lora_targets(unet))
    detach(unet)
    assert set(unet.state_dict()) == names
    assert torch.equal(run(unet, grounded=False), plain)
    assert load_adapter(unet, tmp_path) == config_for(unet, **settings)
    assert torch.equal(run(unet), grounded)


def test_a_file_that_says_nothing_of_blocks_has_fusers_on_all(tmp_path):
    """As all were written before there was a choice; a variant can still be saved beside it."""
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    save_adapter(unet, tmp_path)
    about = json.loads((tmp_path / "gligen_adapter.json").read_text())
    del about["config"]["blocks"]
    (tmp_path / "gligen_adapter.json").write_text(json.dumps(about))
    save_adapter(unet, tmp_path, variant="fp16", dtype=torch.float16)
    detach(unet)
    assert load_adapter(unet, tmp_path).published_form
    assert len(fusers(unet)) == len(transformer_blocks(unet))


def test_only_all_of_them_are_the_published_form():
    sizes = {"cross_attention_dim": 8, "phrase_dim": 8}
    assert AdapterConfig(**sizes).published_form
    assert not AdapterConfig(**sizes, blocks="first").published_form
    with pytest.raises(ValueError, match="blocks is 'last'; expected one of all, first"):
        AdapterConfig(**sizes, blocks="last")
