"""Every kind of pipeline: diffusers' own without boxes, diffusers' own gated U-Net with them, and all of its arguments.

What boxes must give is computed by diffusers alone: its own pipeline over a U-Net made with `attention_type="gated"`,
which holds the same weights in diffusers' fusers and is handed tokens that are built here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, HeunDiscreteScheduler
from helpers.tiny import grounded, sd15_unet, sd_pipeline, sdxl_pipeline, sdxl_unet
from PIL import Image

import gligen_xl
from gligen_xl import Layout
from gligen_xl.adapter import GligenAdapter, adapter_config, fusers
from gligen_xl.layout import box_iou
from gligen_xl.toyworld.detector import detect

PHRASES, BOXES = ["a red circle", "a blue star"], [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]]
LAYOUT = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 1.0}
MOVED = {**LAYOUT, "gligen_boxes": [[0.5, 0.1, 0.9, 0.5], [0.0, 0.4, 0.4, 1.0]]}
SLOTS = 4


def image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def left_half():
    return Image.fromarray(np.repeat(np.array([[255] * 8 + [0] * 8], np.uint8), 16, axis=0))


def control_net():
    """Its outputs, which begin at zero, are opened."""
    torch.manual_seed(4)
    halving = {"conditioning_embedding_out_channels": (8, 8)}  # as the tiny VAE does
    net = ControlNetModel.from_unet(sdxl_unet(), **halving).eval()
    with torch.no_grad():
        for module in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(module.weight, std=0.2)
    return net


@dataclass(frozen=True)
class Kind:
    """A pipeline class of ours, what it is made of, and what a call of it needs beside the prompt, in its order."""

    name: str
    positional: dict[str, Any]
    sd: bool = False
    channels: int = 4
    extra: dict[str, Any] = field(default_factory=dict)  # without a place of their own behind the positional ones
    parts: Callable[[], dict[str, Any]] = dict

    @property
    def ours(self):
        return getattr(gligen_xl, self.name)

    @property
    def plain(self):
        return getattr(diffusers, self.name.replace("GLIGEN", ""))

    @property
    def call(self):
        return self.positional | self.extra

    def pipeline(self, cls, unet, scheduler=None):
        base = (sd_pipeline if self.sd else sdxl_pipeline)()
        settings = {"requires_safety_checker": False} if self.sd else {"add_watermarker": False}
        pipeline = cls(**base.components | {"unet": unet} | self.parts(), **settings)
        pipeline.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def new_unet(self, **settings):
        return (sd15_unet if self.sd else sdxl_unet)(in_channels=self.channels, **settings)

    def make_ours(self, scheduler=None):
        return grounded(self.pipeline(self.ours, self.new_unet(), scheduler), slots=SLOTS)

    def make_plain(self, scheduler=None):
        return self.pipeline(self.plain, self.new_unet(), scheduler)

    def make_native(self, scheduler=None):
        """diffusers' pipeline over diffusers' fusers, with the weights of `make_ours`."""
        unet = self.new_unet(attention_type="gated")
        unet.load_state_dict(self.make_ours().unet.state_dict())
        return self.pipeline(self.plain, unet, scheduler)


def control_parts():
    return {"controlnet": control_net()}


size = {"height": 16, "width": 16}
control = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8))
inpainting = {"image": image(), "mask_image": left_half()}
TEXT = Kind("StableDiffusionXLGLIGENPipeline", {"prompt_2": None, **size})
IMAGE = Kind("StableDiffusionXLGLIGENImg2ImgPipeline", {"prompt_2": None, "image": image(), "strength": 0.75})
CONTROL = Kind(
    "StableDiffusionXLGLIGENControlNetPipeline", {"prompt_2": None, "image": control, **size}, parts=control_parts
)
CONTROL_IMAGE = Kind(
    "StableDiffusionXLGLIGENControlNetImg2ImgPipeline",
    {"prompt_2": None, "image": image(), "control_image": control, **size, "strength": 0.75},
    parts=control_parts,
)
MASK = Kind("StableDiffusionXLGLIGENInpaintPipeline", {"prompt_2": None, **inpainting}, extra=size)
SD_TEXT = Kind("StableDiffusionGLIGENPipeline", size, sd=True)
SD_MASK = Kind("StableDiffusionGLIGENInpaintPipeline", inpainting, sd=True, extra=size)
KINDS = {
    "text": TEXT,
    "image": IMAGE,
    "mask": MASK,
    "mask of 9 channels": Kind(MASK.name, MASK.positional, channels=9, extra=size),
    "control": CONTROL,
    "control and image": CONTROL_IMAGE,
    "sd text": SD_TEXT,
    "sd mask": SD_MASK,
    "sd mask of 9 channels": Kind(SD_MASK.name, SD_MASK.positional, sd=True, channels=9, extra=size),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


PIL_IMAGE = Image.new("RGB", (16, 16), "grey")


def draw(pipeline, call, prompt="an image of grass", seed=3, **kwargs):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    settings["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(prompt, **(settings | call | kwargs)).images


def differ(a, b):
    return float((a - b).abs().max()) > 1e-3


@torch.no_grad()
def tokens_by_hand(pipeline, layouts=((PHRASES, BOXES),), guided=True):
    """The `gligen` argument of diffusers' U-Net for one image a layout, the unguided halves first."""
    rows = []
    for phrases, boxes in layouts:
        parts = []
        for number in ("", "_2"):
            if (encoder := getattr(pipeline, f"text_encoder{number}", None)) is not None:
                tokenizer = getattr(pipeline, f"tokenizer{number}")
                ids = tokenizer(phrases, padding="max_length", return_tensors="pt").input_ids
                found = encoder(ids)
                parts.append(found.text_embeds if "text_embeds" in found else found.pooler_output)
        embeddings = torch.cat(parts, dim=-1)
        tokens = {
            "boxes": torch.zeros(SLOTS, 4),
            "masks": torch.zeros(SLOTS),
            "positive_embeddings": torch.zeros(SLOTS, embeddings.shape[1]),
        }
        tokens["boxes"][: len(boxes)], tokens["masks"][: len(boxes)] = torch.tensor(boxes), 1
        tokens["positive_embeddings"][: len(boxes)] = embeddings
        rows.append(tokens)
    tokens = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if guided:
        tokens = {name: torch.cat([torch.zeros_like(value), value]) for name, value in tokens.items()}
    return {"gligen": tokens}


def same(got, expected):
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1e-5


def watch(pipeline):
    """A list, filled as it draws, of what the U-Net is handed."""
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    return seen


def was_grounded(seen):
    return ["gligen" in (given["cross_attention_kwargs"] or {}) for given in seen]


def refuse_to_run(pipeline, monkeypatch):
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "forward", lambda *_, name=name, **__: pytest.fail(f"{name} ran"))
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_, **__: pytest.fail("the VAE ran"))


# What is drawn ------------------------------------------------------------------------------------------------------


@every_kind
def test_without_boxes_it_is_diffusers_own_and_with_them_it_follows_them(kind):
    ours, plain = kind.make_ours(), kind.make_plain()
    expected = draw(plain, kind.call)
    assert torch.equal(draw(ours, kind.call), expected)
    assert torch.equal(draw(ours, kind.call, gligen_phrases=[], gligen_boxes=[]), expected)
    with_boxes = draw(ours, kind.call, **LAYOUT)
    assert differ(with_boxes, expected)
    assert differ(with_boxes, draw(ours, kind.call, **MOVED))
    assert torch.equal(draw(ours, kind.call, **LAYOUT), with_boxes)
    assert torch.equal(draw(ours, kind.call), expected)


@every_kind
def test_with_boxes_it_is_diffusers_gated_unet_in_diffusers_pipeline(kind):
    native = kind.make_native()
    expected = draw(native, kind.call, cross_attention_kwargs=tokens_by_hand(native))
    same(draw(kind.make_ours(), kind.call, **LAYOUT), expected)


@every_kind
def test_a_gated_unet_of_diffusers_given_to_it_is_taken_over(kind):
    native = kind.make_native()
    expected = draw(native, kind.call, cross_attention_kwargs=tokens_by_hand(native))
    taken = kind.pipeline(kind.ours, native.unet)
    assert adapter_config(taken.unet).slots == 30  # what published weights are used with; these are for 4
    GligenAdapter.of(taken.unet).set_slots(SLOTS)
    same(draw(taken, kind.call, **LAYOUT), expected)


@pytest.mark.parametrize("kind", [TEXT, SD_TEXT, CONTROL], ids=["text", "sd text", "control"])
def test_a_share_of_the_steps_is_that_of_tokens_taken_away_in_time(kind):
    native = kind.make_native()

    def stop_after_two(pipeline, step, timestep, tensors):
        if step == 1:
            pipeline._cross_attention_kwargs["gligen"] = None
        return tensors

    call = kind.call | {"num_inference_steps": 5}
    gligen = tokens_by_hand(native)
    expected = draw(native, call, cross_attention_kwargs=gligen, callback_on_step_end=stop_after_two)
    ours = kind.make_ours()
    got = draw(ours, call, **LAYOUT | {"gligen_scheduled_sampling_beta": 0.4})
    same(got, expected)
    assert differ(got, draw(ours, call, **LAYOUT))


# Arguments ----------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "negative_prompt": {"negative_prompt": "a ring"},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "eta": {"eta": 0.5},
    "no guidance": {"guidance_scale": 1.0},
    "timesteps": {"timesteps": [700, 250]},
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))},
}
XL_ARGUMENTS = ARGUMENTS | {
    "clip_skip": {"clip_skip": 1},  # that of SD 1.x fails in diffusers itself, beside transformers 5
    "second prompts": {"prompt_2": "sand", "negative_prompt_2": "the sea"},
    "denoising_end": {"denoising_end": 0.6},
    "sizes": {"original_size": (32, 48), "crops_coords_top_left": (4, 0), "target_size": (64, 64)},
    "negative sizes": {
        "negative_original_size": (8, 8), "negative_crops_coords_top_left": (2, 2), "negative_target_size": (64, 8)
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(SD_TEXT, value) for value in ARGUMENTS.values()] + [(TEXT, value) for value in XL_ARGUMENTS.values()],
    ids=[f"sd {name}" for name in ARGUMENTS] + list(XL_ARGUMENTS),
)
def test_arguments_of_diffusers_act_beside_boxes(kind, arguments):
    native, ours = kind.make_native(), kind.make_ours()
    if "timesteps" in arguments:  # of which DDIM knows nothing; two steps, since Euler's latents grow with each
        for pipeline in (native, ours):
            pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    call = kind.call | arguments
    guided = arguments.get("guidance_scale") != 1.0
    expected = draw(native, call, cross_attention_kwargs=tokens_by_hand(native, guided=guided))
    got = draw(ours, call, **LAYOUT)
    same(got, expected)
    assert differ(got, draw(ours, kind.call, **LAYOUT))


@every_kind
def test_arguments_by_their_place(kind):
    ours = kind.make_ours()
    expected = draw(ours, kind.call, **LAYOUT)
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "generator": generator}
    got = ours("an image of grass", *kind.positional.values(), **settings, **kind.extra, **LAYOUT).images
    assert torch.equal(got, expected)


@every_kind
def test_embeddings_in_place_of_the_prompt(kind):
    ours = kind.make_ours()
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    if kind.sd:
        embeds = ours.encode_prompt("an image of grass", torch.device("cpu"), 1, True)
    else:
        embeds = ours.encode_prompt("an image of grass")
    given = dict(zip(names, embeds, strict=False))
    assert torch.equal(draw(ours, kind.call, prompt=None, **given, **LAYOUT), draw(ours, kind.call, **LAYOUT))


@every_kind
def test_several_images_a_prompt_each_with_its_generator(kind):
    native, ours = kind.make_native(), kind.make_ours()
    seeds, prompts = (3, 4, 5, 6), ["an image of grass", "sand with a ring"]
    layouts = [(PHRASES, BOXES), (["a ring"], [[0.2, 0.3, 0.6, 0.9]])]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    call = kind.call | {"num_images_per_prompt": 2}
    gligen = tokens_by_hand(native, [layouts[0]] * 2 + [layouts[1]] * 2)
    expected = draw(native, call, prompts, cross_attention_kwargs=gligen, generator=generators())
    phrases, boxes = zip(*layouts, strict=True)
    beta = {"gligen_scheduled_sampling_beta": 1.0}
    got = draw(ours, call, prompts, gligen_phrases=phrases, gligen_boxes=boxes, generator=generators(), **beta)
    assert len(got) == 4
    same(got, expected)


@every_kind
def test_a_callback_may_change_tensors(kind):
    native, ours = kind.make_native(), kind.make_ours()
    asked = ["latents", "prompt_embeds"]

    def change(_, step, timestep, tensors):
        assert sorted(tensors) == asked
        return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * 0.5}

    callback = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": asked}
    expected = draw(native, kind.call, cross_attention_kwargs=tokens_by_hand(native), **callback)
    same(draw(ours, kind.call, **callback, **LAYOUT), expected)


def test_a_callback_of_the_former_kind_still_runs():
    ours, seen = TEXT.make_ours(), []
    with pytest.warns(FutureWarning, match="callback"):
        got = draw(ours, TEXT.call, callback=lambda step, *_: seen.append(step), callback_steps=2, **LAYOUT)
    assert seen == [0, 2]
    assert torch.equal(got, draw(ours, TEXT.call, **LAYOUT))


@every_kind
def test_forms_of_the_result(kind):
    ours = kind.make_ours()
    array = draw(ours, kind.call, output_type="np", **LAYOUT)
    assert array.shape == (1, 16, 16, 3)
    images = draw(ours, kind.call, output_type="pil", **LAYOUT)
    assert np.abs(np.asarray(images[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
    pair = ours("an image of grass", output_type="np", return_dict=False, **settings, **kind.call, **LAYOUT)
    assert isinstance(pair, tuple)
    assert np.array_equal(pair[0], array)


@every_kind
def test_the_users_cross_attention_kwargs_reach_the_unet_and_stay_as_they_are(kind):
    ours, own = kind.make_ours(), {"ip_adapter_masks": None}
    seen = watch(ours)
    draw(ours, kind.call, cross_attention_kwargs=own, **LAYOUT)
    assert own == {"ip_adapter_masks": None}
    assert seen
    assert all(set(given["cross_attention_kwargs"]) == {"ip_adapter_masks", "gligen"} for given in seen)


@every_kind
@pytest.mark.parametrize("unknown", [{"gligen_box": BOXES}, {"guidance": 3.0}], ids=["gligen_box", "guidance"])
def test_an_unknown_argument_stops_before_a_model_runs(kind, unknown, monkeypatch):
    ours = kind.make_ours()
    refuse_to_run(ours, monkeypatch)
    with pytest.raises(TypeError, match=next(iter(unknown))):
        draw(ours, kind.call, **unknown, **LAYOUT)


@pytest.mark.parametrize("kind", [MASK, SD_MASK], ids=["xl", "sd"])
def test_a_crop_that_boxes_do_not_know_of_is_refused(kind, monkeypatch):
    ours = kind.make_ours()
    refuse_to_run(ours, monkeypatch)
    call = kind.call | {"image": PIL_IMAGE, "mask_image": PIL_IMAGE, "output_type": "pil", "padding_mask_crop": 4}
    with pytest.raises(ValueError, match="crop it yourself"):
        draw(ours, call, **LAYOUT)


@every_kind
def test_an_interrupt_leaves_nothing_behind(kind):
    ours = kind.make_ours()
    plain, seen = draw(ours, kind.call), watch(ours)

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return {}

    beta = {"gligen_scheduled_sampling_beta": (0.0, 1.0, 0.0)}
    draw(ours, kind.call, callback_on_step_end=interrupt, **LAYOUT | beta)
    assert was_grounded(seen) == [True, True]
    assert ours._grounding is None
    assert "gligen" not in (ours.cross_attention_kwargs or {})
    assert all(float(fuser.scale) == 1 for fuser in fusers(ours.unet).values())
    assert torch.equal(draw(ours, kind.call), plain)


# Layouts ------------------------------------------------------------------------------------------------------------

FIRST = Layout(prompt="an image of grass", phrases=PHRASES, boxes=BOXES)
SECOND = Layout(prompt="sand with a ring", phrases=["a ring"], boxes=[[0.2, 0.3, 0.6, 0.9]])
BETA = {"gligen_scheduled_sampling_beta": 1.0}


@every_kind
def test_a_layout_for_all_brings_its_prompt(kind):
    ours = kind.make_ours()
    expected = draw(ours, kind.call, **LAYOUT)
    assert torch.equal(draw(ours, kind.call, prompt=None, gligen_layouts=FIRST, **BETA), expected)
    other = draw(ours, kind.call, "the sea", **LAYOUT)
    assert torch.equal(draw(ours, kind.call, "the sea", gligen_layouts=FIRST, **BETA), other)
    assert differ(other, expected)


@every_kind
def test_a_layout_for_each_prompt_and_for_each_image(kind):
    ours = kind.make_ours()
    prompts = [FIRST.prompt, SECOND.prompt]
    taken_apart = {
        "gligen_phrases": [list(FIRST.phrases), list(SECOND.phrases)],
        "gligen_boxes": [list(FIRST.boxes), list(SECOND.boxes)],
    }

    def call(number):
        generators = [torch.Generator().manual_seed(seed) for seed in range(number)]
        return kind.call | BETA | {"generator": generators}

    expected = draw(ours, call(2), prompts, **taken_apart)
    assert torch.equal(draw(ours, call(2), None, gligen_layouts=[FIRST, SECOND]), expected)
    two = {"num_images_per_prompt": 2}
    expected = draw(ours, call(4), prompts, **taken_apart, **two)
    assert torch.equal(draw(ours, call(4), None, gligen_layouts=[FIRST, SECOND], **two), expected)
    each = {name: value[::-1] * 2 for name, value in taken_apart.items()}
    expected = draw(ours, call(4), prompts, **each, **two)
    assert torch.equal(draw(ours, call(4), prompts, gligen_layouts=[SECOND, FIRST] * 2, **two), expected)


def test_layouts_beside_embeddings_or_phrases(monkeypatch):
    ours = TEXT.make_ours()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, ours.encode_prompt("the sea"), strict=True))
    got = draw(ours, TEXT.call, None, gligen_layouts=FIRST, **embeds, **BETA)
    assert torch.equal(got, draw(ours, TEXT.call, "the sea", **LAYOUT))
    refuse_to_run(ours, monkeypatch)
    with pytest.raises(ValueError, match="in place of gligen_phrases"):
        draw(ours, TEXT.call, gligen_layouts=FIRST, gligen_phrases=PHRASES)
    for wrong in ([], {"phrases": []}, [FIRST, "second"]):
        with pytest.raises(ValueError, match="expected a Layout or a list of them"):
            draw(ours, TEXT.call, gligen_layouts=wrong)


# Shares of the steps that run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (TEXT, {"denoising_end": 0.5}, "1100"),
        (CONTROL, {"denoising_end": 0.5}, "1100"),
        (CONTROL, {"denoising_end": 0.25}, "10"),
        (CONTROL, {"denoising_end": 1.0}, "11110000"),
        (IMAGE, {"strength": 0.5}, "1100"),
        (IMAGE, {"strength": 0.5, "denoising_end": 0.75}, "10"),
        (IMAGE, {"denoising_start": 0.5}, "1100"),
        (IMAGE, {"denoising_start": 0.5, "denoising_end": 0.75}, "10"),
        (MASK, {"strength": 0.5}, "1100"),
        (MASK, {"denoising_start": 0.25, "denoising_end": 0.75}, "1100"),
        (CONTROL_IMAGE, {"strength": 0.5}, "1100"),
        (SD_MASK, {"strength": 0.5}, "1100"),
        (SD_TEXT, {}, "11110000"),
    ],
)  # fmt: skip
def test_half_of_the_steps_is_half_of_those_that_run(kind, arguments, expected):
    ours = kind.make_ours()
    if "denoising_start" in arguments:
        arguments = arguments | {"image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    call = kind.call | arguments | {"num_inference_steps": 8}
    beta = {"gligen_scheduled_sampling_beta": 0.5}
    draw(ours, kind.call | {"num_inference_steps": 3}, **LAYOUT)  # what a former call counted does not matter
    seen = watch(ours)
    draw(ours, call, **LAYOUT | beta)
    assert was_grounded(seen) == [letter == "1" for letter in expected]


def test_fading_under_a_controlnet_that_is_cut_ends_with_the_steps_that_run():
    ours, scales = CONTROL.make_ours(), []
    fuser = next(iter(fusers(ours.unet).values()))
    ours.unet.register_forward_pre_hook(lambda *_: scales.append(float(fuser.scale)))
    call = CONTROL.call | {"num_inference_steps": 8, "denoising_end": 0.5}
    draw(ours, call, **LAYOUT | {"gligen_scheduled_sampling_beta": (0.25, 0.75, 0.0)})
    assert scales[:3] == pytest.approx([1, 2 / 3, 1 / 3])
    assert len(scales) == 4


def test_steps_of_two_evaluations_under_a_controlnet_that_is_cut():
    ours = CONTROL.make_ours(HeunDiscreteScheduler)
    seen = watch(ours)
    call = CONTROL.call | {"num_inference_steps": 8, "denoising_end": 0.5}
    draw(ours, call, **LAYOUT | {"gligen_scheduled_sampling_beta": 0.5})
    on = was_grounded(seen)
    assert on == [True] * 4 + [False] * (len(on) - 4)
    assert len(on) in (7, 8)


@pytest.mark.parametrize("boxes", [True, False])
def test_two_halves_of_a_run_are_the_whole(boxes):
    """As base and refiner share a run: text-to-image until the middle, image-to-image from there on."""
    text, image = TEXT.make_ours(), IMAGE.make_ours()
    layout = LAYOUT if boxes else {}
    call = {"num_inference_steps": 8, **layout}
    whole = draw(text, TEXT.call | call)
    half = draw(text, TEXT.call | call, denoising_end=0.5)
    seen = watch(image)
    second = {"image": half, "denoising_start": 0.5, "original_size": (16, 16), "target_size": (16, 16)}
    got = draw(image, call | second)
    assert was_grounded(seen) == [boxes] * 4
    assert differ(half, whole)
    same(got, whole)


def test_two_halves_in_diffusers_pipelines():
    """Each half is the native model's too."""
    native, native_image = TEXT.make_native(), IMAGE.make_native()
    call, gligen = {"num_inference_steps": 6}, tokens_by_hand(TEXT.make_native())
    half = draw(native, TEXT.call | call, denoising_end=0.5, cross_attention_kwargs=gligen)
    second = {"image": half, "denoising_start": 0.5}
    expected = draw(native_image, call | second, cross_attention_kwargs=gligen)
    got_half = draw(TEXT.make_ours(), TEXT.call | call, denoising_end=0.5, **LAYOUT)
    same(got_half, half)
    same(draw(IMAGE.make_ours(), call | second, **LAYOUT), expected)


# Other shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 24), (32, 16), (16, 48)])
def test_boxes_and_sizes_mean_the_same_in_every_shape(shape):
    """The U-Net is told the boxes as they are; of the image's size it is told what the user says, or the truth."""
    height, width = shape
    ours = TEXT.make_ours()
    seen = watch(ours)
    draw(ours, TEXT.call, **LAYOUT)
    draw(ours, TEXT.call | {"height": height, "width": width}, **LAYOUT)
    square, other = (seen[k]["cross_attention_kwargs"]["gligen"] for k in (0, 4))
    for name in square:
        assert torch.equal(square[name], other[name])
    assert seen[4]["added_cond_kwargs"]["time_ids"][1].tolist() == [height, width, 0, 0, height, width]
    own = {"original_size": (640, 480), "crops_coords_top_left": (8, 16), "target_size": (100, 200)}
    draw(ours, TEXT.call | {"height": height, "width": width} | own, **LAYOUT)
    assert seen[-1]["added_cond_kwargs"]["time_ids"][1].tolist() == [640, 480, 8, 16, 100, 200]


@pytest.mark.parametrize("kind", [TEXT, SD_TEXT, MASK, CONTROL], ids=["text", "sd text", "mask", "control"])
def test_other_shapes_are_those_of_diffusers_too(kind):
    native = kind.make_native()
    call = kind.call | {"height": 16, "width": 32}
    if kind is CONTROL:
        call["image"] = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(8))
    expected = draw(native, call, cross_attention_kwargs=tokens_by_hand(native))
    assert expected.shape[2:] == (8, 16)
    same(draw(kind.make_ours(), call, **LAYOUT), expected)


# Objects of the embedded world, which has only been trained on squares, in boxes that stretch with the image.
STRETCHED = [
    ("a red circle", [0.1, 0.05, 0.6, 0.4]),
    ("a blue square", [0.4, 0.55, 0.95, 0.9]),
    ("a yellow triangle", [0.3, 0.3, 0.85, 0.65]),
    ("a cyan star", [0.05, 0.6, 0.55, 0.95]),
    ("a purple ring", [0.45, 0.1, 0.95, 0.45]),
    ("a pink cross", [0.05, 0.35, 0.55, 0.7]),
]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_objects_stand_in_their_boxes_in_other_shapes(height, width, shapes_pipeline):
    layouts = [
        Layout(prompt="grass", phrases=[phrase], boxes=[box if width > height else [box[k] for k in (1, 0, 3, 2)]])
        for phrase, box in STRETCHED
    ]
    images = shapes_pipeline(
        gligen_layouts=layouts, **BETA, height=height, width=width, num_inference_steps=12, guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(layouts))],
    ).images  # fmt: skip
    overlap, elsewhere = [], []
    for image, layout in zip(images, layouts, strict=True):
        assert image.size == (width, height)
        colour, (x0, y0, x1, y1) = layout.phrases[0].split()[1], layout.boxes[0]
        found = [item.box for item in detect(image) if item.attributes["colour"] == colour]
        turned = (1 - x1, 1 - y1, 1 - x0, 1 - y0)
        best = [max(box_iou(found, [box]).ravel(), default=0.0) for box in (layout.boxes[0], turned)]
        overlap.append(best[0])
        elsewhere.append(best[1])
    assert np.mean(overlap) >= 0.4
    assert np.mean(elsewhere) <= 0.2
