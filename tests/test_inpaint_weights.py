"""The same inpainting weights of GLIGEN give the same latents, however they came onto the base."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.published import original_name
from helpers.tiny import sd15_unet, sd_pipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from gligen_xl import StableDiffusionGLIGENPipeline
from gligen_xl.adapter import (
    AdapterConfig,
    GligenAdapter,
    adapter_config,
    adapter_parameters,
    attach,
    is_attached,
    lora_targets,
    write_adapter,
)
from gligen_xl.adapter.convert import read_published
from gligen_xl.pipelines.inpaint import mask_as_trained, mask_outside

PHRASES, BOXES = ["a red circle", "a blue star"], [[0.1, 0.1, 0.5, 0.5], [0.6, 0.4, 0.9, 0.8]]
LAYOUT = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
WAYS = ["native folder", "folder converted", "checkpoint converted", "safetensors converted"]


def image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def draw(pipeline, **kwargs):
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent", "height": 16, "width": 16}
    settings["generator"] = torch.Generator().manual_seed(3)
    return pipeline("an image of grass", **(settings | kwargs)).images


def base():
    """Stable Diffusion 1.x of four channels."""
    return sd_pipeline(layers_per_block=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One inpainting model of GLIGEN in every form: a gated folder, and files with the original names."""
    folder = tmp_path_factory.mktemp("inpainting")
    unet = sd15_unet(in_channels=9, layers_per_block=2, attention_type="gated")
    state = base().unet.state_dict()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if ".fuser." in name or name.startswith(("position_net.", "conv_in.")):
                value.copy_(torch.randn(value.shape, generator=generator) * (1.0 if ".alpha_" in name else 0.2))
            else:
                value.copy_(state[name])
    parts = base().components | {"unet": unet}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "native")
    index = json.loads((folder / "native" / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionGLIGENPipeline"
    (folder / "native" / "model_index.json").write_text(json.dumps(index))
    named = {original_name(name): value.clone() for name, value in unet.state_dict().items()}
    torch.save({"model": named, "iters": 7}, folder / "gligen.ckpt")
    save_file(named, folder / "gligen.safetensors")
    return folder


def load(weights, way, tmp_path):
    if way == "native folder":
        pipeline = StableDiffusionGLIGENPipeline.from_pretrained(weights / "native")
        pipeline.set_progress_bar_config(disable=True)
    else:
        names = {"folder converted": "native", "checkpoint converted": "gligen.ckpt"}
        source = weights / names.get(way, "gligen.safetensors")
        config, state, about = read_published(source)
        write_adapter(tmp_path / way, config, state, about)
        pipeline = base()
        pipeline.load_gligen_adapter(tmp_path / way)
    assert adapter_config(pipeline.unet).inpaint
    return pipeline


def channels_of_each_step(pipeline):
    """Filled as it draws: input channels of the first convolution that computes."""
    seen = []
    conv = GligenAdapter.of(pipeline.unet).inpaint_conv
    own, plain = type(conv).forward, conv.plain

    def forward(given):
        used_plain = []
        handle = plain.register_forward_hook(lambda *_: used_plain.append(True)) if plain is not None else None
        result = own(conv, given)
        if handle is not None:
            handle.remove()
        seen.append(4 if used_plain else given.shape[1] + (conv.kept.shape[1] if conv.kept is not None else 0))
        return result

    conv.forward = forward
    return seen


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, (0.3, 0.3, 0.4)])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_all_ways_give_the_same_latents(weights, tmp_path, beta, scale):
    results = {}
    for way in WAYS:
        pipeline = load(weights, way, tmp_path)
        pipeline.set_gligen_adapter_scale(scale)
        seen = channels_of_each_step(pipeline)
        call = LAYOUT | {"gligen_scheduled_sampling_beta": beta}
        kept = draw(pipeline, gligen_inpaint_image=image(), **call)
        assert seen == [9] * 10
        results[way] = kept, draw(pipeline, gligen_inpaint_image=image(1), **call), draw(pipeline, **call)
        assert not torch.equal(kept, results[way][1])
    for way in WAYS[1:]:
        for got, expected in zip(results[way], results[WAYS[0]], strict=True):
            assert torch.equal(got, expected)


def test_a_call_without_boxes_is_that_of_the_base_where_there_is_one(weights, tmp_path):
    plain = draw(base())
    for way in WAYS[1:]:
        pipeline = load(weights, way, tmp_path)
        draw(pipeline, gligen_inpaint_image=image(), **LAYOUT)
        assert torch.equal(draw(pipeline), plain)


def test_with_a_lora(weights, tmp_path):
    results = []
    for way in WAYS:
        pipeline = load(weights, way, tmp_path)
        torch.manual_seed(1)
        targets = sorted(lora_targets(pipeline.unet))
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        results.append(draw(pipeline, gligen_inpaint_image=image(), **LAYOUT))
        pipeline.unet.delete_adapters("default")
        assert not torch.equal(results[-1], draw(pipeline, gligen_inpaint_image=image(), **LAYOUT))
    for got in results[1:]:
        assert float((got - results[0]).abs().max()) <= 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_unloaded_and_loaded_again(weights, tmp_path, way):
    pipeline = load(weights, way, tmp_path)
    call = {"gligen_inpaint_image": image(), **LAYOUT}
    expected = draw(pipeline, **call)
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    pipeline.unload_gligen_adapter()
    assert not is_attached(pipeline.unet)
    pipeline.load_gligen_adapter(tmp_path / "adapter")
    assert torch.equal(draw(pipeline, **call), expected)


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded(weights, tmp_path, way):
    pipeline = load(weights, way, tmp_path)
    call = {"gligen_inpaint_image": image(), **LAYOUT}
    expected = draw(pipeline, **call)
    pipeline.save_pretrained(tmp_path / "whole")
    again = StableDiffusionGLIGENPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, **call), expected)
    other = StableDiffusionGLIGENPipeline.from_pipe(again)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, **call), expected)


def test_what_is_left_of_a_native_one_without_its_adapter_says_so(weights, tmp_path):
    """Its U-Net has nine channels and no other first convolution: no plain image can be drawn."""
    pipeline = load(weights, "native folder", tmp_path)
    pipeline.unload_gligen_adapter()
    with pytest.raises(ValueError, match=r"reads 9 channels, .* gives it 4; .*load_gligen_adapter"):
        draw(pipeline)


# Masks --------------------------------------------------------------------------------------------------------------


def test_the_model_sees_a_box_rounded_down_at_both_ends_and_blending_covers_it():
    boxes = [[0.1, 0.2, 0.49, 0.51]]
    seen, blended = mask_as_trained([boxes], 8, 16)[0, 0], mask_outside([boxes], 8, 16)[0, 0]
    expected = torch.ones(8, 16)
    expected[1:4, 1:7] = 0
    assert torch.equal(seen, expected)
    expected[1:5, 1:8] = 0
    assert torch.equal(blended, expected)


def test_the_nine_channels_hold_the_mask_as_trained(weights, tmp_path):
    pipeline, kept = load(weights, WAYS[1], tmp_path), []
    conv = GligenAdapter.of(pipeline.unet).inpaint_conv
    pipeline.unet.register_forward_pre_hook(lambda *_: kept.append(conv.kept))
    boxes = [[0.1, 0.1, 0.45, 0.6]]
    draw(pipeline, gligen_inpaint_image=image(), gligen_phrases=["a ring"], gligen_boxes=boxes)
    mask = torch.ones(8, 8)
    mask[0:4, 0:3] = 0
    assert len(kept) == 10
    for channels in kept:
        assert torch.equal(channels[0, 4], mask)
        assert torch.equal(channels[0, :4] == 0, (mask == 0).expand(4, 8, 8))


def test_an_inpainting_adapter_does_not_go_over_a_lora_on_the_first_convolution():
    unet = sd15_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv_in"]))
    with pytest.raises(ValueError, match=r"LoRA .* first convolution"):
        attach(unet, AdapterConfig(cross_attention_dim=24, phrase_dim=24, inpaint=True))
    unet.delete_adapters("default")
    assert not is_attached(unet)
    assert not hasattr(unet, "position_net")


def test_every_tensor_of_the_adapter_came_along(weights, tmp_path):
    ways = [dict(adapter_parameters(load(weights, way, tmp_path).unet)) for way in WAYS]
    for state in ways[1:]:
        assert state.keys() == ways[0].keys()
        assert all(torch.equal(state[name], value) for name, value in ways[0].items())
