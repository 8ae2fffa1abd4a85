"""Inpainting in boxes: what lies outside of them stays the image's, with U-Nets of four channels and of nine."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from helpers.tiny import grounded as with_adapter
from helpers.tiny import new_scheduler, open_gates, sd15_unet, sd_pipeline, sdxl_pipeline, sdxl_unet
from PIL import Image

from gligen_xl import (
    StableDiffusionGLIGENInpaintPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
    StableDiffusionXLGLIGENControlNetPipeline,
    StableDiffusionXLGLIGENImg2ImgPipeline,
    StableDiffusionXLGLIGENInpaintPipeline,
)
from gligen_xl.adapter import (
    AdapterConfig,
    GligenAdapter,
    adapter_config,
    attach,
    detach,
    fusers,
    is_attached,
    reattach,
)
from gligen_xl.layout import box_iou
from gligen_xl.pipelines.inpaint import fit_images, mask_outside
from gligen_xl.toyworld.detector import detect
from gligen_xl.toyworld.world import COLOURS, HELD_OUT_SEED, sample_scene
from gligen_xl.toyworld.world import draw as draw_scene

PHRASES, BOXES = ["a red circle", "a blue star"], [[0.1, 0.1, 0.5, 0.5], [0.6, 0.4, 0.9, 0.8]]
LAYOUT = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 1.0}
SLOTS = 4


def photo(height=16, width=16, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(pipeline, prompt="an image of grass", seed=3, **kwargs):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "width": 16, "height": 16}
    settings["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(prompt, **(settings | kwargs)).images


@torch.no_grad()
def encoded(pipeline, image):
    """(1, 4, h, w), by hand."""
    pixels = torch.from_numpy(2 * (np.asarray(image, np.float32)[None] / 255) - 1).permute(0, 3, 1, 2)
    return pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor


def outside(boxes, height, width):
    """(height, width) bool, by hand: cells of which no part lies in a box."""
    free = torch.ones(height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            for x0, y0, x1, y1 in boxes:
                if x0 * width < column + 1 and x1 * width > column and y0 * height < row + 1 and y1 * height > row:
                    free[row, column] = False
    return free


def rounded_down(boxes, height, width):
    """(height, width), by hand: 0 in boxes whose ends are rounded down, as nine-channel models were trained."""
    mask = torch.ones(height, width)
    for x0, y0, x1, y1 in boxes:
        mask[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 0
    return mask


def differ(a, b):
    return float((a - b).abs().max()) > 1e-3


def refuse_to_run(pipeline, monkeypatch):
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "forward", lambda *_, name=name, **__: pytest.fail(f"{name} ran"))
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_, **__: pytest.fail("the VAE ran"))


# Images and masks -------------------------------------------------------------------------------------------------


def test_the_mask_leaves_every_cell_that_a_box_reaches_into():
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.25, 0.5, 0.26, 1.0], [0.9, 0.0, 1.0, 0.3]]
    for height, width in ((8, 8), (8, 12), (5, 16)):
        assert torch.equal(mask_outside([boxes], height, width)[0, 0].bool(), outside(boxes, height, width))


def test_images_are_cropped_at_the_centre_not_squeezed():
    stripes = np.zeros((16, 48, 3), np.uint8)
    stripes[:, :16], stripes[:, 16:32], stripes[:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    (square,) = fit_images(Image.fromarray(stripes), 1, 16, 16)
    assert square.size == (16, 16)
    assert np.asarray(square).reshape(-1, 3).mean(0).round().tolist() == [0, 255, 0]
    (tall,) = fit_images(Image.fromarray(stripes.transpose(1, 0, 2)), 1, 32, 8)
    assert (tall.size, np.asarray(tall)[16, 4].tolist()) == ((8, 32), [0, 255, 0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode(mode):
    (fitted,) = fit_images(photo().convert(mode), 1, 8, 24)
    assert (fitted.mode, fitted.size) == ("RGB", (24, 8))


def test_an_image_that_a_camera_turned_stands_upright(tmp_path):
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:, :16] = 255  # the left half, which after a quarter turn to the right is the upper one
    turned = Image.fromarray(flat)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    (fitted,) = fit_images(Image.open(tmp_path / "turned.png"), 1, 32, 16)
    assert np.asarray(fitted)[:14].min() > 200
    assert np.asarray(fitted)[18:].max() < 50


# Four channels ------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    # diffusers hands numpy 2 what torch does not yet say of itself
    pytest.param(KDPM2DiscreteScheduler, marks=pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")),
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    LCMScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
def test_the_outside_is_the_image_and_the_inside_is_not(make, scheduler):
    pipeline, image = with_adapter(make(), SLOTS), photo()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    got, original = draw(pipeline, gligen_inpaint_image=image, **LAYOUT), encoded(pipeline, image)
    keep = outside(BOXES, 8, 8)
    assert 0.2 < keep.float().mean() < 0.9
    assert torch.equal(got[..., keep], original[..., keep])
    inside = (got - original).abs()[..., ~keep]
    assert inside.isfinite().all()
    assert float(inside.min(dim=1).values.max()) > 1e-2
    assert differ(got, draw(pipeline, gligen_inpaint_image=image, **LAYOUT | {"gligen_phrases": ["a ring"] * 2}))
    assert torch.equal(got, draw(pipeline, gligen_inpaint_image=image, **LAYOUT))
    assert pipeline._grounding is None


@pytest.mark.parametrize("shape", [(16, 24), (32, 16), (8, 48)])
@pytest.mark.parametrize("of_image", [(16, 24), (37, 90), (200, 50)])
def test_any_size_and_any_image(shape, of_image):
    pipeline, image = with_adapter(sdxl_pipeline(), SLOTS), photo(*of_image)
    height, width = shape
    got = draw(pipeline, gligen_inpaint_image=image, height=height, width=width, num_inference_steps=2, **LAYOUT)
    (fitted,) = fit_images(image, 1, height, width)
    keep = outside(BOXES, height // 2, width // 2)
    assert torch.equal(got[..., keep], encoded(pipeline, fitted)[..., keep])


def test_the_models_own_size_is_the_default():
    pipeline = with_adapter(sdxl_pipeline(), SLOTS)
    got = draw(pipeline, gligen_inpaint_image=photo(64, 64), height=None, width=None, **LAYOUT)
    assert torch.equal(got, draw(pipeline, gligen_inpaint_image=photo(64, 64), **LAYOUT))


def test_one_image_for_all_or_one_for_each():
    pipeline = with_adapter(sdxl_pipeline(), SLOTS)
    photos, prompts = [photo(seed=k) for k in range(4)], ["grass", "sand"]
    boxes = [BOXES, [[0.0, 0.0, 0.25, 1.0]]]
    layout = {"gligen_phrases": [PHRASES, ["a ring"]], "gligen_boxes": boxes, "gligen_scheduled_sampling_beta": 1.0}
    layout["num_images_per_prompt"] = 2
    first = photos[:1] * 4
    for given, kept in ((photos, photos), (tuple(photos), photos), (photos[:1], first), (photos[0], first)):
        images = draw(pipeline, prompts, gligen_inpaint_image=given, **layout)
        for k, image in enumerate(images):
            keep = outside(boxes[k // 2], 8, 8)
            torch.testing.assert_close(image[:, keep], encoded(pipeline, kept[k])[0][:, keep], atol=1e-5, rtol=0)


@pytest.mark.parametrize("end", [0.25, 0.5])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_run_that_ends_early_keeps_the_image_at_its_noise_level(scheduler, end):
    """What follows, as a refiner, must find inside and outside equally noisy."""
    pipeline, image = with_adapter(sdxl_pipeline(), SLOTS), photo()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    ran = []
    call = {"num_inference_steps": 8, "denoising_end": end, "latents": noise}
    call["callback_on_step_end"] = lambda _, step, __, tensors: ran.append(step) or {}
    got = draw(pipeline, gligen_inpaint_image=image, **call, **LAYOUT)
    assert 0 < len(ran) < len(pipeline.scheduler.timesteps)
    time, alphas = float(pipeline.scheduler.timesteps[len(ran)]), pipeline.scheduler.alphas_cumprod
    original, keep = encoded(pipeline, image), outside(BOXES, 8, 8)
    if scheduler is DDIMScheduler:
        alpha = alphas[int(time)]
        expected = alpha.sqrt() * original + (1 - alpha).sqrt() * noise
    else:  # these hold latents in units of the image, and their times may lie between two of the training's
        expected = original + np.interp(time, np.arange(len(alphas)), ((1 - alphas) / alphas).sqrt()) * noise
    torch.testing.assert_close(got[..., keep], expected[..., keep], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler])
def test_within_a_step_of_two_evaluations_the_noise_level_stays_the_samplers(scheduler):
    """These two stop half-way, at a level that their `add_noise` does not know: nothing is put in there."""
    pipeline, image = with_adapter(sdxl_pipeline(), SLOTS), photo()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    keep, latents = outside(BOXES, 8, 8), {}
    for kept in (False, True):
        latents[kept] = []

        def record(_, step, timestep, tensors, seen=latents[kept]):
            seen.append(tensors["latents"].clone())
            return {}

        given = {"gligen_inpaint_image": image} if kept else {}
        got = draw(pipeline, callback_on_step_end=record, **given, **LAYOUT)
    assert torch.equal(latents[True][0], latents[False][0])
    assert differ(latents[True][1][..., keep], latents[False][1][..., keep])
    assert torch.equal(got[..., keep], encoded(pipeline, image)[..., keep])


@torch.no_grad()
def test_equal_to_a_sampling_loop_by_hand():
    """Four channels, the U-Net of diffusers itself."""
    pipeline, image, steps = with_adapter(sd_pipeline(), SLOTS), photo(), 4
    native = sd15_unet(attention_type="gated")
    native.load_state_dict(pipeline.unet.state_dict())
    got = draw(pipeline, "grass", gligen_inpaint_image=image, num_inference_steps=steps, **LAYOUT)
    expected = by_hand(pipeline, native, image, steps=steps, channels=4)
    assert float((got - expected).abs().max()) <= 1e-5


def by_hand(pipeline, unet, image, *, steps, channels, grounded_steps=None, guidance=3.0):
    """Latents of one image of 16 x 16 by SD 1.x, whose U-Net is diffusers' own; nothing of ours runs."""
    hidden = []
    for text in ("", "grass"):
        ids = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        hidden.append(pipeline.text_encoder(ids).last_hidden_state)
    ids = pipeline.tokenizer(PHRASES, padding="max_length", return_tensors="pt").input_ids
    tokens = {"boxes": torch.zeros(2, SLOTS, 4), "masks": torch.zeros(2, SLOTS)}
    tokens["positive_embeddings"] = torch.zeros(2, SLOTS, 24)
    tokens["boxes"][1, :2], tokens["masks"][1, :2] = torch.tensor(BOXES), 1
    tokens["positive_embeddings"][1, :2] = pipeline.text_encoder(ids).pooler_output
    mask, seen = outside(BOXES, 8, 8).float()[None, None], rounded_down(BOXES, 8, 8)[None, None]
    original = encoded(pipeline, image)
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    noise = latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for step, time in enumerate(scheduler.timesteps):
        given = torch.cat([latents, original * seen, seen], dim=1) if channels == 9 else latents
        on = grounded_steps is None or step < grounded_steps
        unguided, guided = unet(
            given.repeat(2, 1, 1, 1), time, torch.cat(hidden),
            cross_attention_kwargs={"gligen": tokens} if on else None,
        ).sample.chunk(2)  # fmt: skip
        latents = scheduler.step(unguided + guidance * (guided - unguided), time, latents).prev_sample
        kept = original
        if step + 1 < steps:
            alpha = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]]
            kept = alpha.sqrt() * original + (1 - alpha).sqrt() * noise
        latents = kept * mask + latents * (1 - mask)
    return latents


def test_the_inside_begins_with_the_noise_of_the_plain_call():
    pipeline, first = with_adapter(sdxl_pipeline(), SLOTS), []
    pipeline.unet.register_forward_pre_hook(lambda _, given: first.append(given[0].clone()))
    draw(pipeline)
    draw(pipeline, gligen_inpaint_image=photo(), **LAYOUT)
    assert torch.equal(first[0], first[4])


@pytest.mark.parametrize("asked", [["prompt_embeds"], [], ["latents", "add_time_ids"], None])
def test_the_users_callback_gets_what_it_asked_for(asked):
    pipeline, seen = with_adapter(sdxl_pipeline(), SLOTS), []

    def callback(_, step, timestep, tensors):
        seen.append(sorted(tensors))
        return {}

    tensors = {} if asked is None else {"callback_on_step_end_tensor_inputs": asked}
    call = {"gligen_inpaint_image": photo(), **LAYOUT}
    got = draw(pipeline, callback_on_step_end=callback, **tensors, **call)
    assert seen == [sorted(["latents"] if asked is None else asked)] * 4
    assert torch.equal(got, draw(pipeline, **call))


def test_the_users_callback_sees_what_is_kept_and_has_the_last_word():
    pipeline, image, seen = with_adapter(sdxl_pipeline(), SLOTS), photo(), []
    keep = outside(BOXES, 8, 8)

    def callback(_, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {"latents": tensors["latents"] + 1} if step == 3 else {}

    got = draw(pipeline, gligen_inpaint_image=image, callback_on_step_end=callback, **LAYOUT)
    assert torch.equal(seen[-1][..., keep], encoded(pipeline, image)[..., keep])
    assert torch.equal(got, seen[-1] + 1)


def test_a_callback_of_diffusers_that_cuts_the_guidance():
    pipeline, image = with_adapter(sdxl_pipeline(), SLOTS), photo()
    got = draw(
        pipeline,
        gligen_inpaint_image=image,
        callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5),
        **LAYOUT,
    )
    keep = outside(BOXES, 8, 8)
    assert torch.equal(got[..., keep], encoded(pipeline, image)[..., keep])
    assert differ(got, draw(pipeline, gligen_inpaint_image=image, **LAYOUT))


def test_beside_a_controlnet():
    net = ControlNetModel.from_unet(sdxl_unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    parts = with_adapter(sdxl_pipeline(), SLOTS).components
    pipeline = StableDiffusionXLGLIGENControlNetPipeline(**parts, controlnet=net, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image, keep = photo(), outside(BOXES, 8, 8)
    got = draw(pipeline, image=torch.rand(1, 3, 16, 16), gligen_inpaint_image=image, **LAYOUT)
    assert torch.equal(got[..., keep], encoded(pipeline, image)[..., keep])


# Nine channels ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """A folder in the form of `masterful/gligen-1-4-inpainting-text-box`, and diffusers' U-Net of it."""
    folder = tmp_path_factory.mktemp("nine")
    pipeline = sd_pipeline()
    unet = sd15_unet(in_channels=9, attention_type="gated")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if ".fuser." in name or name.startswith("position_net."):
                value.copy_(torch.randn(value.shape, generator=generator) * (1.0 if ".alpha_" in name else 0.2))
    pipeline.unet = None
    plain = StableDiffusionPipeline(**pipeline.components | {"unet": unet}, requires_safety_checker=False)
    plain.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionGLIGENPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


def load_nine(folder):
    pipeline = StableDiffusionGLIGENPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert adapter_config(pipeline.unet).inpaint
    GligenAdapter.of(pipeline.unet).set_slots(SLOTS)
    return pipeline


@pytest.mark.parametrize(("beta", "grounded_steps"), [(1.0, None), (0.5, 2)])
@torch.no_grad()
def test_a_model_of_nine_channels_is_given_the_image_and_the_mask(nine, beta, grounded_steps):
    folder, native = nine
    pipeline, image = load_nine(folder), photo()
    layout = LAYOUT | {"gligen_scheduled_sampling_beta": beta}
    got = draw(pipeline, "grass", gligen_inpaint_image=image, **layout)
    expected = by_hand(pipeline, native, image, steps=4, channels=9, grounded_steps=grounded_steps)
    assert float((got - expected).abs().max()) <= 1e-5


@torch.no_grad()
def test_a_model_of_nine_channels_without_an_image_to_keep(nine):
    """Then nothing is kept: the further channels are zero, as GLIGEN trains them beside an empty mask."""
    folder, native = nine
    pipeline = load_nine(folder)
    noise = torch.randn(2, 4, 8, 8)
    hidden = torch.randn(2, 16, 24)
    got = pipeline.unet(noise, 500, hidden).sample
    expected = native(torch.cat([noise, torch.zeros(2, 5, 8, 8)], dim=1), 500, hidden).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert draw(pipeline, **LAYOUT).isfinite().all()
    assert draw(pipeline).shape == (1, 4, 8, 8)


def test_a_model_of_nine_channels_is_saved_and_comes_back(nine, tmp_path):
    pipeline, call = load_nine(nine[0]), {"gligen_inpaint_image": photo(), **LAYOUT}
    expected = draw(pipeline, **call)
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionGLIGENPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert adapter_config(again.unet) == adapter_config(pipeline.unet)
    assert torch.equal(draw(again, **call), expected)


def inpainting_adapter(make=sdxl_pipeline):
    """A pipeline of four channels with an adapter that brings nine; all of its weights are random."""
    pipeline = make()
    width = pipeline.unet.config.cross_attention_dim
    config = AdapterConfig(cross_attention_dim=width, phrase_dim=width, slots=SLOTS, inpaint=True)
    attach(pipeline.unet, config)
    open_gates(pipeline.unet)
    return pipeline


both = pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])


@both
def test_an_inpainting_adapter_changes_no_plain_image(make):
    pipeline = inpainting_adapter(make)
    assert pipeline.unet.config.in_channels == 4
    assert torch.equal(draw(pipeline), draw(make()))
    assert torch.equal(draw(pipeline, gligen_phrases=[], gligen_boxes=[]), draw(make()))


@both
def test_its_nine_channels_serve_on_every_step_of_a_call_with_boxes_and_read_the_image(make):
    pipeline, image, keep = inpainting_adapter(make), photo(), outside(BOXES, 8, 8)
    conv, kept = GligenAdapter.of(pipeline.unet).inpaint_conv, []
    pipeline.unet.register_forward_pre_hook(lambda *_: kept.append(conv.kept))
    got = draw(pipeline, gligen_inpaint_image=image, **LAYOUT | {"gligen_scheduled_sampling_beta": 0.5})
    mask = rounded_down(BOXES, 8, 8)[None, None]
    expected = torch.cat([encoded(pipeline, image) * mask, mask], dim=1)
    assert [torch.equal(value, expected) for value in kept] == [True] * 4
    assert torch.equal(got[..., keep], encoded(pipeline, image)[..., keep])
    assert conv.kept is None
    del kept[:]
    other = draw(pipeline, gligen_inpaint_image=photo(seed=1), **LAYOUT | {"gligen_scheduled_sampling_beta": 0.5})
    assert differ(got[..., ~keep], other[..., ~keep])  # the inside is painted to fit the outside
    del kept[:]
    conv.plain.forward = lambda *_: pytest.fail("the base's own convolution ran")
    draw(pipeline, **LAYOUT)  # no image to keep: the further channels are zero
    assert kept == [None] * 4


@torch.no_grad()
def test_its_first_convolution_is_that_of_diffusers():
    pipeline, image = inpainting_adapter(sd_pipeline), photo()
    native = sd15_unet(in_channels=9, attention_type="gated")
    state = {name: value for name, value in pipeline.unet.state_dict().items() if ".plain." not in name}
    native.load_state_dict(state)
    got = draw(pipeline, "grass", gligen_inpaint_image=image, **LAYOUT)
    expected = by_hand(pipeline, native, image, steps=4, channels=9)
    assert float((got - expected).abs().max()) <= 1e-5


@both
def test_it_is_saved_loaded_taken_off_and_put_back(make, tmp_path):
    pipeline, call = inpainting_adapter(make), {"gligen_inpaint_image": photo(), **LAYOUT}
    expected, plain = draw(pipeline, **call), draw(make())
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    pipeline.save_pretrained(tmp_path / "pipeline")
    former = make().unet
    carried = detach(pipeline.unet)
    assert type(pipeline.unet.conv_in) is torch.nn.Conv2d
    settings = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    assert settings.items() <= former.config.items()
    assert pipeline.unet.state_dict().keys() == former.state_dict().keys()
    assert torch.equal(draw(pipeline), plain)
    reattach(pipeline.unet, carried)
    assert torch.equal(draw(pipeline, **call), expected)
    other = make()
    assert other.load_gligen_adapter(tmp_path / "adapter").inpaint
    assert torch.equal(draw(other, **call), expected)
    other.unload_gligen_adapter()
    assert torch.equal(draw(other), plain)
    loaded = type(pipeline).from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, **call), expected)
    assert torch.equal(draw(loaded), plain)


@both
@pytest.mark.parametrize("beta", [1.0, (0.25, 0.5, 0.25)])
def test_an_exception_or_an_interrupt_leaves_nothing_behind(make, beta):
    pipeline, plain = inpainting_adapter(make), draw(make())
    call = {"gligen_inpaint_image": photo(), **LAYOUT, "gligen_scheduled_sampling_beta": beta}
    expected = draw(pipeline, **call)

    def fail(*_):
        raise RuntimeError("the user's callback")

    def interrupt(running, step, timestep, tensors):
        running._interrupt = True
        return {}

    with pytest.raises(RuntimeError, match="the user's"):
        draw(pipeline, callback_on_step_end=fail, **call)
    for _ in range(2):
        assert GligenAdapter.of(pipeline.unet).inpaint_conv.kept is None
        assert pipeline._grounding is None
        assert all(float(fuser.scale) == 1 for fuser in fusers(pipeline.unet).values())
        assert torch.equal(draw(pipeline), plain)
        assert torch.equal(draw(pipeline, **call), expected)
        draw(pipeline, callback_on_step_end=interrupt, **call)


def test_an_inpainting_adapter_in_half_precision():
    pipeline, image = inpainting_adapter(sdxl_pipeline).to(torch.bfloat16), photo()
    got = draw(pipeline, gligen_inpaint_image=image, **LAYOUT)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    assert GligenAdapter.of(pipeline.unet).inpaint_conv.weight.dtype == torch.bfloat16


def test_an_inpainting_adapter_under_a_pipeline_of_masks():
    """It is drawn with the base's own channels; the mask is the pipeline's affair."""
    pipeline = StableDiffusionXLGLIGENInpaintPipeline(**inpainting_adapter().components, add_watermarker=False)
    plain = StableDiffusionXLGLIGENInpaintPipeline(**sdxl_pipeline().components, add_watermarker=False)
    mask = Image.fromarray(np.repeat(np.array([[255] * 8 + [0] * 8], np.uint8), 16, axis=0))
    for one in (pipeline, plain):
        one.set_progress_bar_config(disable=True)
    call = {"image": photo(), "mask_image": mask}
    assert torch.equal(draw(pipeline, **call), draw(plain, **call))
    assert differ(draw(pipeline, **call, **LAYOUT), draw(plain, **call))


# Errors -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gligen_inpaint_image": "photo.png", **LAYOUT}, "is a str; expected a PIL image"),
        ({"gligen_inpaint_image": np.zeros((16, 16, 3)), **LAYOUT}, "is a ndarray; expected a PIL image"),
        ({"gligen_inpaint_image": [photo(), None], "num_images_per_prompt": 2, **LAYOUT}, "is a NoneType"),
        ({"gligen_inpaint_image": [photo()] * 3, **LAYOUT}, "holds 3 images; expected one for all, or 1"),
        ({"gligen_inpaint_image": [], **LAYOUT}, "holds 0 images"),
        ({"gligen_inpaint_image": photo()}, "every image needs one or more"),
        ({"gligen_inpaint_image": photo(), "gligen_phrases": [], "gligen_boxes": []}, "needs one or more"),
        (
            {
                "prompt": ["grass"] * 2, "gligen_inpaint_image": photo(),
                "gligen_phrases": [PHRASES, []], "gligen_boxes": [BOXES, []],
            },
            "every image needs one or more",
        ),
        ({"gligen_inpaint_image": photo(), "height": 20, **LAYOUT}, "20 and 16; expected multiples of 8"),
        (
            {"gligen_inpaint_image": photo(), "generator": [torch.Generator()], "num_images_per_prompt": 2, **LAYOUT},
            "1 generators for 2 images",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_stops_before_a_model_runs(make, arguments, says, monkeypatch):
    pipeline = with_adapter(make(), SLOTS)
    refuse_to_run(pipeline, monkeypatch)
    with pytest.raises(ValueError, match=says):
        draw(pipeline, **{"prompt": "grass"} | arguments)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (StableDiffusionXLGLIGENImg2ImgPipeline, {"image": photo()}),
        (StableDiffusionXLGLIGENInpaintPipeline, {"image": photo(), "mask_image": photo().convert("L")}),
        (StableDiffusionXLGLIGENControlNetImg2ImgPipeline, {"image": photo(), "control_image": photo()}),
        (StableDiffusionGLIGENInpaintPipeline, {"image": photo(), "mask_image": photo().convert("L")}),
    ],
)
def test_pipelines_that_start_from_an_image_have_their_own_ways(kind, call, monkeypatch):
    sd = kind is StableDiffusionGLIGENInpaintPipeline
    parts = with_adapter((sd_pipeline if sd else sdxl_pipeline)(), SLOTS).components
    settings = {"requires_safety_checker": False} if sd else {"add_watermarker": False}
    if "control_image" in call:
        settings["controlnet"] = ControlNetModel.from_unet(sdxl_unet())
    pipeline = kind(**parts, **settings)
    refuse_to_run(pipeline, monkeypatch)
    with pytest.raises(ValueError, match=f"{kind.__name__} starts from its own image"):
        pipeline("grass", gligen_inpaint_image=photo(), **call, **LAYOUT)


@pytest.mark.parametrize("given", [{}, {"height": 16}, {"width": 16}])
def test_a_controlnet_needs_to_be_told_the_size(given, monkeypatch):
    parts = with_adapter(sdxl_pipeline(), SLOTS).components
    net = ControlNetModel.from_unet(sdxl_unet())
    pipeline = StableDiffusionXLGLIGENControlNetPipeline(**parts, controlnet=net, add_watermarker=False)
    refuse_to_run(pipeline, monkeypatch)
    with pytest.raises(ValueError, match="needs height and width"):
        pipeline("grass", image=photo(), gligen_inpaint_image=photo(), **given, **LAYOUT)


def test_an_image_to_keep_without_an_adapter(monkeypatch):
    pipeline = sdxl_pipeline()
    refuse_to_run(pipeline, monkeypatch)
    assert not is_attached(pipeline.unet)
    with pytest.raises(ValueError, match="load_gligen_adapter"):
        draw(pipeline, gligen_inpaint_image=photo(), **LAYOUT)


# The embedded world -------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_trip(pipeline, image):
    """What the VAE makes of an image, (height, width, 3) in 0-1."""
    latents = pipeline.vae.encode(pipeline.image_processor.preprocess([image])).latent_dist.mode()
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="np")[0]


def psnr(a, b):
    return float(-10 * np.log10(np.square(a - b).mean()))


def test_an_object_is_painted_into_a_scene_and_the_scene_stays(shapes_pipeline):
    scenes = [sample_scene(HELD_OUT_SEED, index, num_objects=1) for index in range(6)]
    images, phrases, boxes, colours = [draw_scene(scene) for scene in scenes], [], [], []
    for k, scene in enumerate(scenes):  # into the corner across from the object that is there
        x0, y0, x1, y1 = scene.objects[0].box
        left, top = 0.08 if x0 + x1 > 1 else 0.56, 0.08 if y0 + y1 > 1 else 0.56
        boxes.append([left, top, left + 0.36, top + 0.36])
        colours.append([colour for colour in COLOURS if colour != scene.objects[0].colour][k])
        phrases.append(f"a {colours[k]} {('circle', 'square', 'star', 'triangle')[k % 4]}")
    results = shapes_pipeline(
        [scene.background for scene in scenes], gligen_inpaint_image=images,
        gligen_phrases=[[phrase] for phrase in phrases], gligen_boxes=[[box] for box in boxes],
        gligen_scheduled_sampling_beta=1.0, num_inference_steps=8, guidance_scale=4.0, output_type="np",
        generator=[torch.Generator().manual_seed(k) for k in range(len(scenes))],
    ).images  # fmt: skip
    overlap, kept, fidelity = [], [], []
    for scene, before, after, box, colour in zip(scenes, images, results, boxes, colours, strict=True):
        found = detect((after * 255).round().astype(np.uint8))

        def best(colour, box, found=found):
            return max(
                box_iou([item.box for item in found if item.attributes["colour"] == colour], [box]).ravel(), default=0.0
            )

        overlap.append(best(colour, box))
        kept.append(best(scene.objects[0].colour, scene.objects[0].box))
        # the decoder looks around: four pixels away from the cells that were painted
        around = [box[0] - 8 / 64, box[1] - 8 / 64, box[2] + 8 / 64, box[3] + 8 / 64]
        away = outside([around], 64, 64).numpy()
        fidelity.append(psnr(after[away], round_trip(shapes_pipeline, before)[away]))
    assert np.mean(overlap) >= 0.5
    assert min(kept) >= 0.75
    assert min(fidelity) >= 29
    assert np.mean(fidelity) >= 34
