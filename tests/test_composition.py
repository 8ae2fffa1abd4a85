"""What composes with grounding: LoRA, ControlNet, IP-Adapter, textual inversion, few-step models, every scheduler, and
diffusers' switches. Each part must act, and taking one away must leave what was there without it."""

import copy
import functools
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from helpers.tiny import grounded, sdxl_pipeline, sdxl_unet
from peft import LoHaConfig, LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gligen_xl import StableDiffusionXLGLIGENControlNetPipeline, StableDiffusionXLGLIGENImg2ImgPipeline
from gligen_xl.adapter import adapter_parameters, detached, is_adapter_key, load_adapter_state_dict, lora_targets
from gligen_xl.pipelines.encoders import text_parts
from gligen_xl.text_embeddings import embed_phrases

LAYOUT = {
    "gligen_phrases": ["a red circle", "a blue star"],
    "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]],
    "gligen_scheduled_sampling_beta": 0.7,
}
MOVED = {**LAYOUT, "gligen_boxes": [[0.5, 0.1, 0.9, 0.5], [0.0, 0.4, 0.4, 1.0]]}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(autouse=True)
def _no_notes_of_what_a_lora_does_not_hold():
    logger = logging.getLogger("diffusers")
    former = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(former)


def tiny_unet(**overrides):
    """SDXL's form in two levels, the lower one with attention."""
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (1, 2),
    }
    return sdxl_unet(**settings | overrides)


def tiny_pipeline():
    pipeline = sdxl_pipeline()
    pipeline.register_modules(unet=tiny_unet())
    return pipeline


def plain_pipeline(cls=StableDiffusionXLPipeline, unet=None, **parts):
    """diffusers' own pipeline over the same weights; nothing of ours is in it."""
    components = tiny_pipeline().components | ({"unet": unet} if unet is not None else {}) | parts
    pipeline = cls(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt="an image of grass", seed=3, **kwargs):
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt", "width": 16, "height": 16}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **(settings | kwargs)).images


def differ(a, b):
    return float((a - b).abs().max()) > 1e-4


def check_grounded(pipeline, plain, **call):
    """Without boxes the plain pipeline's image, bit for bit; with them another, which depends on where they are.

    Returns:
        The image with boxes, and that without.
    """
    without = draw(pipeline, **call)
    assert torch.equal(without, draw(plain, **call))
    image = draw(pipeline, **LAYOUT, **call)
    assert image.isfinite().all()
    assert differ(image, without)
    assert differ(image, draw(pipeline, **MOVED, **call))
    return image, without


# LoRA ---------------------------------------------------------------------------------------------------------------


def lora_state(model, prefix, suffixes=ATTENTION, seed=7, rank=2):
    """Weights of a LoRA as in a file, in the names of diffusers and peft."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(suffixes) and not is_adapter_key(name):
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                state[f"{prefix}.{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    return state


def text_lora_state(pipeline):
    return lora_state(pipeline.text_encoder, "text_encoder.text_model", ("q_proj", "v_proj")) | lora_state(
        pipeline.text_encoder_2, "text_encoder_2", ("q_proj", "v_proj")
    )


def test_a_lora_and_boxes_each_change_the_image_and_come_in_either_order():
    state = lora_state(tiny_unet(), "unet")
    plain, after, before = plain_pipeline(), grounded(tiny_pipeline()), tiny_pipeline()
    bare, boxes = draw(after), draw(after, **LAYOUT)
    for pipeline in (plain, after, before):
        pipeline.load_lora_weights(dict(state), adapter_name="style")
    image, without = check_grounded(after, plain)
    assert differ(image, boxes)
    assert differ(without, bare)
    assert torch.equal(draw(grounded(before), **LAYOUT), image)
    assert not any("lora" in name for name, _ in after.unet.named_parameters() if is_adapter_key(name))
    after.unload_gligen_adapter()
    assert torch.equal(draw(after), without)


def test_the_scale_of_a_lora_counts_beside_boxes():
    pipeline, state = grounded(tiny_pipeline()), lora_state(tiny_unet(), "unet")
    boxes = draw(pipeline, **LAYOUT)
    pipeline.load_lora_weights(dict(state), adapter_name="style")
    full = draw(pipeline, **LAYOUT)
    own = {"scale": 0.5}
    half = draw(pipeline, cross_attention_kwargs=own, **LAYOUT)
    assert own == {"scale": 0.5}
    assert differ(half, full)
    assert differ(half, boxes)
    assert torch.equal(draw(pipeline, cross_attention_kwargs={"scale": 0.0}, **LAYOUT), boxes)
    assert torch.equal(draw(pipeline, **LAYOUT), full)
    pipeline.set_adapters("style", 0.5)
    assert torch.equal(draw(pipeline, **LAYOUT), half)
    pipeline.set_adapters("style", 0.0)
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)
    pipeline.set_adapters("style")
    pipeline.disable_lora()
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)
    pipeline.enable_lora()
    assert torch.equal(draw(pipeline, **LAYOUT), full)


def test_two_loras_mix_beside_boxes():
    pipeline = grounded(tiny_pipeline())
    boxes = draw(pipeline, **LAYOUT)
    images = {}
    for seed, name in ((7, "one"), (8, "other")):
        pipeline.load_lora_weights(lora_state(tiny_unet(), "unet", seed=seed), adapter_name=name)
        pipeline.set_adapters(name)
        images[name] = draw(pipeline, **LAYOUT)
    pipeline.set_adapters(["one", "other"], [0.5, 0.5])
    both = draw(pipeline, **LAYOUT)
    assert all(differ(both, image) for image in (boxes, *images.values()))
    assert differ(both, draw(pipeline, **MOVED))
    pipeline.delete_adapters("other")
    pipeline.set_adapters("one")
    assert torch.equal(draw(pipeline, **LAYOUT), images["one"])


def test_a_lora_can_be_fused_and_taken_off_beneath_the_adapter():
    pipeline, state = grounded(tiny_pipeline()), lora_state(tiny_unet(), "unet")
    weights = {name: value.clone() for name, value in adapter_parameters(pipeline.unet).items()}
    plain, boxes = draw(pipeline), draw(pipeline, **LAYOUT)
    pipeline.load_lora_weights(dict(state), adapter_name="style")
    full = draw(pipeline, **LAYOUT)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)
    pipeline.load_lora_weights(dict(state), adapter_name="style")
    pipeline.fuse_lora()
    assert not differ(draw(pipeline, **LAYOUT), full)
    assert differ(draw(pipeline, **LAYOUT), draw(pipeline, **MOVED))
    for name, value in adapter_parameters(pipeline.unet).items():
        assert torch.equal(value, weights[name]), name
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()  # unfusing subtracts what fusing added, so the last bits may be others
    assert not differ(draw(pipeline), plain)
    assert not differ(draw(pipeline, **LAYOUT), boxes)


def test_a_lora_on_the_text_encoders_reaches_the_phrases_and_obeys_its_scale():
    pipeline = grounded(tiny_pipeline())
    embeds = dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
            pipeline.encode_prompt("an image of grass"),
            strict=True,
        )
    )  # the prompt is held still: only phrases can change the image

    def image(**kwargs):
        return draw(pipeline, None, **embeds, **LAYOUT, **kwargs)

    boxes, without = image(), draw(pipeline, None, **embeds)
    pipeline.load_lora_weights(text_lora_state(pipeline), adapter_name="style")
    assert torch.equal(draw(pipeline, None, **embeds), without)
    full = image()
    half = image(cross_attention_kwargs={"scale": 0.5})
    assert differ(full, boxes)
    assert differ(half, full)
    assert differ(half, boxes)
    assert torch.equal(image(cross_attention_kwargs={"scale": 0.0}), boxes)
    assert torch.equal(image(), full)
    plain = plain_pipeline()
    plain.load_lora_weights(text_lora_state(plain), adapter_name="style")
    check_grounded(pipeline, plain, cross_attention_kwargs={"scale": 0.5})
    pipeline.unload_lora_weights()
    assert torch.equal(image(), boxes)


def test_a_lora_that_lists_bare_suffixes_leaves_the_image_to_its_own_weights(tmp_path):
    """Files with peft's settings in them may name `to_q` alone, which fits fusers too: they get a LoRA of zeros."""
    plain = plain_pipeline()
    plain.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(ATTENTION)), adapter_name="style")
    state = {
        name.removeprefix("unet."): value
        for name, value in lora_state(tiny_unet(), "unet").items()  # of the same modules
    }
    plain.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=plain.unet.peft_config["style"].to_dict()
    )
    plain.unet.delete_adapters("style")
    pipeline = grounded(tiny_pipeline())
    own = {name: value.clone() for name, value in adapter_parameters(pipeline.unet).items()}
    plain.load_lora_weights(tmp_path, adapter_name="style")
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    check_grounded(pipeline, plain)
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "gligen_adapter.safetensors")
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_a_lora_trained_over_fusers_is_no_part_of_the_adapter(kind, tmp_path):
    pipeline = grounded(tiny_pipeline())
    own = {name: value.clone() for name, value in adapter_parameters(pipeline.unet).items()}
    boxes = draw(pipeline, **LAYOUT)
    pipeline.unet.add_adapter(kind(r=2, target_modules=list(ATTENTION)), adapter_name="trained")
    covered = [name for name, _ in pipeline.unet.named_parameters() if ".fuser." in name and ".base_layer." in name]
    assert covered  # suffixes do hit fusers
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            if "trained" in name:
                value.normal_(0, 0.3)
    assert differ(draw(pipeline, **LAYOUT), boxes)
    assert adapter_parameters(pipeline.unet).keys() == own.keys()
    pipeline.save_gligen_adapter(tmp_path)
    saved = load_file(tmp_path / "gligen_adapter.safetensors")
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in own)
    if kind is LoraConfig:  # diffusers takes no others off
        pipeline.unet.unload_lora()
        assert torch.equal(draw(pipeline, **LAYOUT), boxes)
    load_adapter_state_dict(pipeline.unet, {name: value + 1 for name, value in own.items()})
    assert all(torch.equal(value, own[name] + 1) for name, value in adapter_parameters(pipeline.unet).items())
    other = tiny_pipeline()
    other.load_gligen_adapter(tmp_path)
    assert torch.equal(draw(other, **LAYOUT), boxes)


def test_lora_targets_are_the_bases_layers_alone():
    unet = tiny_unet()
    expected = lora_targets(unet)
    assert expected == [name for name, _ in unet.named_modules() if name.endswith(tuple(f".{s}" for s in ATTENTION))]
    pipeline = grounded(tiny_pipeline())
    assert lora_targets(pipeline.unet) == expected
    assert lora_targets(torch.compile(pipeline.unet, backend="eager")) == expected
    assert lora_targets(pipeline.unet, ["to_q"]) == [name for name in expected if name.endswith(".to_q")]
    assert not any("fuser" in name for name in lora_targets(pipeline.unet, ["ff.net.2", "to_k"]))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=lora_targets(pipeline.unet)))
    over = {name.split(".lora_A")[0] for name, _ in pipeline.unet.named_parameters() if ".lora_A." in name}
    assert over == set(expected)
    assert lora_targets(pipeline.unet) == expected


# ControlNet ---------------------------------------------------------------------------------------------------------


def control_net(seed=0):
    """One made from the plain U-Net, whose outputs, which begin at zero, are opened."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(8, 16)).eval()
    with torch.no_grad():
        for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(module.weight, std=0.2)
    return net


def control_image(seed=0):
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def control_pipelines(controlnet):
    """Ours with an adapter, and diffusers' own without."""
    plain = plain_pipeline(StableDiffusionXLControlNetPipeline, controlnet=controlnet)
    components = grounded(tiny_pipeline()).components
    ours = StableDiffusionXLGLIGENControlNetPipeline(**components, controlnet=controlnet, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    return ours, plain


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_and_boxes_each_change_the_image(guess_mode):
    pipeline, plain = control_pipelines(control_net())
    call = {"image": control_image(), "guess_mode": guess_mode}
    image, _ = check_grounded(pipeline, plain, **call)
    assert differ(image, draw(pipeline, **LAYOUT, **call | {"image": control_image(1)}))
    off = draw(pipeline, **LAYOUT, **call, controlnet_conditioning_scale=0.0)
    assert differ(image, off)
    assert torch.equal(off, draw(grounded(tiny_pipeline()), **LAYOUT))


def test_two_controlnets_and_boxes():
    pipeline, plain = control_pipelines([control_net(0), control_net(1)])
    images = [control_image(0), control_image(1)]
    call = {"image": images, "controlnet_conditioning_scale": [1.0, 0.5]}
    image, _ = check_grounded(pipeline, plain, **call)
    assert differ(image, draw(pipeline, **LAYOUT, **call | {"image": images[::-1]}))
    alone, _ = control_pipelines(control_net(0))
    expected = draw(alone, **LAYOUT, image=images[0])
    second_off = call | {"controlnet_conditioning_scale": [1.0, 0.0]}
    assert torch.equal(draw(pipeline, **LAYOUT, **second_off), expected)


def test_a_controlnet_is_made_of_a_unet_whose_adapter_is_detached_for_the_while():
    pipeline = grounded(tiny_pipeline())
    boxes = draw(pipeline, **LAYOUT)
    with detached(pipeline.unet):
        net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    assert not any(is_adapter_key(name) for name in net.state_dict())
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)
    ours = StableDiffusionXLGLIGENControlNetPipeline(**pipeline.components, controlnet=net, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours, image=control_image(), **LAYOUT), boxes)  # a new one says nothing yet


# IP-Adapter ---------------------------------------------------------------------------------------------------------

IMAGE_DIM = 12


def image_encoder():
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=IMAGE_DIM, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def load_ip_adapter(pipeline, seed=3, tokens=4):
    """A made-up IP-Adapter in the published form: keys count the attentions, self (even) and cross (odd)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    unet = pipeline.unet
    width = unet.config["cross_attention_dim"]
    attention = {}
    for k, name in enumerate(name for name in unet.attn_processors if name.endswith("attn2.processor")):
        dim = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        attention |= {f"{2 * k + 1}.to_{part}_ip.weight": random(dim, width) for part in "kv"}
    projection = {
        "proj.weight": random(tokens * width, IMAGE_DIM),
        "proj.bias": random(tokens * width),
        "norm.weight": 1 + random(width),
        "norm.bias": random(width),
    }
    pipeline.register_modules(image_encoder=image_encoder())
    pipeline.load_ip_adapter({"image_proj": projection, "ip_adapter": attention}, subfolder="", weight_name="")
    return pipeline


def example_image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def test_an_ip_adapter_and_boxes_each_change_the_image_and_come_in_either_order():
    call = {"ip_adapter_image": example_image()}
    plain = load_ip_adapter(plain_pipeline())
    after = load_ip_adapter(grounded(tiny_pipeline()))
    image, _ = check_grounded(after, plain, **call)
    assert differ(image, draw(after, **LAYOUT, ip_adapter_image=example_image(1)))
    before = grounded(load_ip_adapter(tiny_pipeline()))
    assert torch.equal(check_grounded(before, plain, **call)[0], image)
    for pipeline in (after, before):
        pipeline.unload_gligen_adapter()
        assert torch.equal(draw(pipeline, **call), draw(plain, **call))


def test_the_scale_of_an_ip_adapter_counts_beside_boxes_and_it_can_be_taken_off():
    call = {"ip_adapter_image": example_image()}
    boxes = draw(grounded(tiny_pipeline()), **LAYOUT)
    pipeline = load_ip_adapter(grounded(tiny_pipeline()))
    full = draw(pipeline, **LAYOUT, **call)
    pipeline.set_ip_adapter_scale(0.5)
    half = draw(pipeline, **LAYOUT, **call)
    pipeline.set_ip_adapter_scale(0.0)
    assert torch.equal(draw(pipeline, **LAYOUT, **call), boxes)
    assert all(differ(*pair) for pair in ((half, full), (half, boxes), (full, boxes)))
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :8] = 0
    pipeline.set_ip_adapter_scale(1.0)
    masks, always = {"ip_adapter_masks": [mask]}, LAYOUT | {"gligen_scheduled_sampling_beta": 1.0}
    assert differ(draw(pipeline, cross_attention_kwargs=masks, **always, **call), draw(pipeline, **always, **call))
    pipeline.unload_ip_adapter()
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)


def test_an_ip_adapter_a_lora_and_a_controlnet_stand_together_beside_boxes():
    net, state = control_net(), lora_state(tiny_unet(), "unet")
    call = {"image": control_image(), "ip_adapter_image": example_image()}
    pipelines = control_pipelines(net)
    for pipeline in pipelines:
        load_ip_adapter(pipeline)
        pipeline.load_lora_weights(dict(state), adapter_name="style")
    pipeline, plain = pipelines
    image, _ = check_grounded(pipeline, plain, **call)
    for other in (
        {"image": control_image(1)},
        {"ip_adapter_image": example_image(1)},
        {"cross_attention_kwargs": {"scale": 0.3}},
    ):
        assert differ(image, draw(pipeline, **LAYOUT, **call | other))


# Textual inversion --------------------------------------------------------------------------------------------------


def own_tokenizers(pipeline):
    """The tiny pipelines share a tokenizer; who adds words to it needs one's own."""
    pipeline.tokenizer, pipeline.tokenizer_2 = copy.deepcopy(pipeline.tokenizer), copy.deepcopy(pipeline.tokenizer_2)
    return pipeline


def learned(width, vectors, seed=4):
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))


def load_inversion(pipeline, vectors=2):
    for number, width in (("", 24), ("_2", 16)):
        pipeline.load_textual_inversion(
            learned(width, vectors), token="<cat>", tokenizer=getattr(pipeline, f"tokenizer{number}"),
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
        )  # fmt: skip
    return pipeline


def test_a_learned_word_serves_in_the_prompt_and_in_phrases():
    pipeline, plain = own_tokenizers(grounded(tiny_pipeline())), own_tokenizers(plain_pipeline())
    boxes = draw(pipeline, **LAYOUT)
    load_inversion(pipeline)
    load_inversion(plain)
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)  # who does not say it is not touched
    prompted, _ = check_grounded(pipeline, plain, prompt="an image of <cat>")
    assert differ(prompted, boxes)
    phrased = LAYOUT | {"gligen_phrases": ["a red <cat>", "a blue star"]}
    image = draw(pipeline, **phrased)
    assert differ(image, boxes)
    with torch.no_grad():  # of both vectors: the second is written out too
        for encoder in text_parts(pipeline)[1]:
            encoder.get_input_embeddings().weight[-1] *= -1
    assert differ(draw(pipeline, **phrased), image)
    for number in ("", "_2"):
        pipeline.unload_textual_inversion(
            tokenizer=getattr(pipeline, f"tokenizer{number}"), text_encoder=getattr(pipeline, f"text_encoder{number}")
        )
    assert torch.equal(draw(pipeline, **LAYOUT), boxes)


@pytest.mark.parametrize("vectors", [1, 3])
@torch.no_grad()
def test_a_phrase_with_a_learned_word_is_embedded_at_the_end_of_its_text(vectors):
    """Also by encoders with the `eos_token_id` 2 of old settings, which look for the highest token instead."""
    pipeline = load_inversion(own_tokenizers(grounded(tiny_pipeline())), vectors)
    tokenizers, encoders = text_parts(pipeline)
    expected = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        words = " ".join(["<cat>", "<cat>_1", "<cat>_2"][:vectors])
        ids = tokenizer(f"a red {words} here", return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        assert ids[0, 3 : 3 + vectors].tolist() == list(range(len(tokenizer) - vectors, len(tokenizer)))
        last = encoder(ids).last_hidden_state[:, -1]
        expected.append(encoder.text_projection(last) if hasattr(encoder, "text_projection") else last)
    got = embed_phrases(["a red <cat> here", "ring"], tokenizers, encoders, expand=pipeline.maybe_convert_prompt)
    torch.testing.assert_close(got[:1], torch.cat(expected, dim=-1), atol=1e-5, rtol=0)
    for encoder in encoders:
        encoder.config.eos_token_id = encoder.eos_token_id = 2
    again = embed_phrases(["a red <cat> here", "ring"], tokenizers, encoders, expand=pipeline.maybe_convert_prompt)
    assert torch.equal(again, got)


# Few-step models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_few_steps_by_a_lora(scheduler):
    pipeline, plain, state = grounded(tiny_pipeline()), plain_pipeline(), lora_state(tiny_unet(), "unet")
    for each in (pipeline, plain):
        each.scheduler = scheduler.from_config(each.scheduler.config)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    bare, _ = check_grounded(pipeline, plain, **call)
    for each in (pipeline, plain):
        each.load_lora_weights(dict(state), adapter_name="fast")
    image, _ = check_grounded(pipeline, plain, **call)
    assert differ(image, bare)
    assert differ(image, draw(pipeline, **call, **LAYOUT | {"gligen_scheduled_sampling_beta": 1.0}))


def test_few_steps_by_a_unet_that_is_told_the_guidance():
    """A distilled U-Net reads the guidance as a number and is asked without the negative half."""
    unets = [tiny_unet(time_cond_proj_dim=8) for _ in range(2)]
    plain = plain_pipeline(unet=unets[0])
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=unets[1])
    grounded(pipeline)
    for each in (pipeline, plain):
        each.scheduler = LCMScheduler.from_config(each.scheduler.config)
    call = {"num_inference_steps": 4, "guidance_scale": 8.0}
    sizes = []
    pipeline.unet.position_net.register_forward_hook(lambda _, __, tokens: sizes.append(len(tokens)))
    image, without = check_grounded(pipeline, plain, **call)
    assert set(sizes) == {1}
    weak = call | {"guidance_scale": 2.0}
    assert differ(image, draw(pipeline, **LAYOUT, **weak))
    assert differ(without, draw(pipeline, **weak))


# Schedulers ---------------------------------------------------------------------------------------------------------

# Those of diffusers' list for this pipeline that need another package: torchsde, scipy.
NEED_MORE = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}
SCHEDULERS = {cls.__name__: cls for cls in DDIMScheduler().compatibles if cls.__name__ not in NEED_MORE}
# Some of diffusers' schedulers hand tensors to numpy in a way that is about to end.
of_schedulers = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
ASK_TWICE = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def watch(pipeline, monkeypatch):
    """Lists, filled as it draws: whether each evaluation of the U-Net was grounded, and where its step begins.

    A step is told by the scheduler alone. Heun's and the two KDPM2 say of themselves when they stand at the beginning
    of one; PNDM's every transition names the noise level it begins at; of all others every evaluation is a step.
    """
    was_grounded, begins = [], []
    unet, scheduler = pipeline.unet, pipeline.scheduler
    forward = unet.forward

    def watched_forward(*args, **kwargs):
        was_grounded.append("gligen" in (kwargs["cross_attention_kwargs"] or {}))
        return forward(*args, **kwargs)

    monkeypatch.setattr(unet, "forward", watched_forward)
    if isinstance(scheduler, PNDMScheduler):
        transition = scheduler._get_prev_sample

        def watched_transition(sample, timestep, *args):
            begins.append(int(timestep) not in levels)
            levels.append(int(timestep))
            return transition(sample, timestep, *args)

        levels = []
        monkeypatch.setattr(scheduler, "_get_prev_sample", watched_transition)
    else:
        step = scheduler.step

        @functools.wraps(step)  # pipelines read from its signature whether it takes a generator
        def watched_step(*args, **kwargs):
            begins.append(getattr(scheduler, "state_in_first_order", True))
            return step(*args, **kwargs)

        monkeypatch.setattr(scheduler, "step", watched_step)
    return was_grounded, begins


def expected_grounding(begins, beta):
    """For each evaluation, whether it belongs to the first int(beta * steps) steps."""
    steps = np.cumsum(begins) - 1
    return [bool(step < int(beta * sum(begins))) for step in steps]


@of_schedulers
@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in sorted(SCHEDULERS)] + [("PNDMScheduler", {"skip_prk_steps": True})],
)
def test_every_scheduler_draws_the_boxes_and_lets_go_in_time(name, settings, monkeypatch):
    pipeline, steps, beta = grounded(tiny_pipeline()), 5, {"gligen_scheduled_sampling_beta": 0.4}
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config, **settings)
    plain = plain_pipeline(scheduler=SCHEDULERS[name].from_config(pipeline.scheduler.config))
    was_grounded, begins = watch(pipeline, monkeypatch)
    call = {"num_inference_steps": steps}
    image = draw(pipeline, **call, **LAYOUT | beta)
    assert was_grounded == expected_grounding(begins, 0.4)
    assert (sum(begins), sum(was_grounded) > 0, was_grounded[-1]) == (steps, True, False)
    number = len(was_grounded)
    if name in ASK_TWICE:
        assert number == 2 * steps - 1
        assert sum(was_grounded) == 4
    elif name == "PNDMScheduler":
        assert number == (steps + 1 if settings else 4 * 3 + 2)
        assert sum(was_grounded) == (3 if settings else 8)
    else:
        assert (number, sum(was_grounded)) == (steps, 2)
    assert image.isfinite().all()
    assert differ(image, draw(pipeline, **call, **MOVED | beta))
    without = draw(pipeline, **call)
    assert differ(image, without)
    assert torch.equal(without, draw(plain, **call))


@pytest.mark.parametrize(("beta", "evaluations"), [(0.3, 2), (0.5, 4), (0.75, 6), (1.0, 7)])
def test_a_part_of_a_step_is_never_grounded_alone(beta, evaluations, monkeypatch):
    pipeline = grounded(tiny_pipeline())
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    was_grounded, begins = watch(pipeline, monkeypatch)
    draw(pipeline, num_inference_steps=4, **LAYOUT | {"gligen_scheduled_sampling_beta": beta})
    assert was_grounded == expected_grounding(begins, beta) == [True] * evaluations + [False] * (7 - evaluations)


@of_schedulers
@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_share_is_of_the_steps_that_run(name, monkeypatch):
    """Image-to-image at strength 0.5 runs the second half of the steps; half of those are grounded."""
    components = grounded(tiny_pipeline()).components
    pipeline = StableDiffusionXLGLIGENImg2ImgPipeline(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config)
    was_grounded, begins = watch(pipeline, monkeypatch)
    pipeline(
        "grass", image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=8, output_type="latent",
        **LAYOUT | {"gligen_scheduled_sampling_beta": 0.5},
    )  # fmt: skip
    assert sum(begins) == 4
    assert was_grounded == expected_grounding(begins, 0.5)
    assert sum(was_grounded) == (4 if name in ASK_TWICE else 2)


# diffusers' switches ------------------------------------------------------------------------------------------------


def test_freeu():
    pipeline, plain = grounded(tiny_pipeline()), plain_pipeline()
    former, _ = check_grounded(pipeline, plain)
    for each in (pipeline, plain):
        each.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    image, _ = check_grounded(pipeline, plain)
    assert differ(image, former)
    pipeline.disable_freeu()
    assert torch.equal(draw(pipeline, **LAYOUT), former)


def test_attention_slicing():
    pipeline, plain = grounded(tiny_pipeline()), plain_pipeline()
    former, _ = check_grounded(pipeline, plain)
    for each in (pipeline, plain):
        each.enable_attention_slicing(1)
    assert any("Sliced" in type(one).__name__ for one in pipeline.unet.attn_processors.values())
    image, _ = check_grounded(pipeline, plain)
    torch.testing.assert_close(image, former, atol=1e-4, rtol=0)
    pipeline.disable_attention_slicing()
    torch.testing.assert_close(draw(pipeline, **LAYOUT), former, atol=1e-4, rtol=0)


def test_fused_projections():
    pipeline, plain = grounded(tiny_pipeline()), plain_pipeline()
    former, _ = check_grounded(pipeline, plain)
    names = set(adapter_parameters(pipeline.unet))
    for each in (pipeline, plain):
        each.fuse_qkv_projections()
    assert any("Fused" in type(one).__name__ for one in pipeline.unet.attn_processors.values())
    image, _ = check_grounded(pipeline, plain)
    torch.testing.assert_close(image, former, atol=1e-4, rtol=0)
    assert set(adapter_parameters(pipeline.unet)) == names
    pipeline.unfuse_qkv_projections()
    assert torch.equal(draw(pipeline, **LAYOUT), former)


def test_tiles_and_slices_of_the_vae():
    pipeline, plain = grounded(tiny_pipeline()), plain_pipeline()
    call = {"width": 32, "height": 32}
    former, _ = check_grounded(pipeline, plain, **call)
    for each in (pipeline, plain):
        each.vae.enable_tiling()
    tiled, _ = check_grounded(pipeline, plain, **call)
    assert not torch.equal(tiled, former)
    for each in (pipeline, plain):
        each.vae.disable_tiling()
        each.vae.enable_slicing()
    pair = call | {"num_images_per_prompt": 2}
    sliced, _ = check_grounded(pipeline, plain, **pair)
    for each in (pipeline, plain):
        each.vae.disable_slicing()
    torch.testing.assert_close(draw(pipeline, **LAYOUT, **pair), sliced, atol=1e-5, rtol=0)
    assert torch.equal(draw(pipeline, **LAYOUT, **call), former)
