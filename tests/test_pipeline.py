"""The pipeline: contract 1 on images, layouts for all / prompts / images, the schedule, folders, errors."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from helpers.pipelines import SLOTS, grounded_pipeline
from helpers.tiny import sdxl_pipeline

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import AdapterConfig, attach, detach, fusers, is_attached, save_adapter
from gligen_xl.text_embeddings import embed_phrases

PHRASES, BOXES = ["a red circle", "a blue star"], [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]]


def draw(pipeline, prompt="an image of grass", seeds=(3,), **kwargs):
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt", "width": 16, "height": 16}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompt, generator=generators, **(settings | kwargs)).images


def test_without_boxes_it_is_the_plain_pipeline():
    pipeline = grounded_pipeline()
    plain = StableDiffusionXLPipeline(**sdxl_pipeline().components, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    expected = draw(plain)
    assert torch.equal(draw(pipeline), expected)
    assert torch.equal(draw(pipeline, gligen_phrases=[], gligen_boxes=[]), expected)
    assert torch.equal(
        draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES, gligen_scheduled_sampling_beta=0), expected
    )
    fresh = grounded_pipeline(open_=False)
    assert torch.equal(draw(fresh, gligen_phrases=PHRASES, gligen_boxes=BOXES), expected)
    assert (draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("beta", [1.0, 0.4])
@torch.no_grad()
def test_equal_to_a_sampling_loop_by_hand(guidance_scale, beta):
    pipeline, steps = grounded_pipeline(), 5
    got = draw(
        pipeline, "grass", gligen_phrases=PHRASES, gligen_boxes=BOXES, gligen_scheduled_sampling_beta=beta,
        guidance_scale=guidance_scale, output_type="latent",
    )  # fmt: skip
    positive, _, pooled, _ = pipeline.encode_prompt("grass", do_classifier_free_guidance=False)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    embeddings = embed_phrases(PHRASES, [pipeline.tokenizer, pipeline.tokenizer_2], encoders)
    tokens = {
        "boxes": torch.zeros(1, SLOTS, 4),
        "masks": torch.zeros(1, SLOTS),
        "positive_embeddings": torch.zeros(1, SLOTS, 40),
    }
    tokens["boxes"][0, :2], tokens["masks"][0, :2] = torch.tensor(BOXES), 1
    tokens["positive_embeddings"][0, :2] = embeddings
    null = {name: torch.zeros_like(value) for name, value in tokens.items()}
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def predict(hidden, text, gligen, grounded, time):
        return pipeline.unet(
            latents, time, encoder_hidden_states=hidden, added_cond_kwargs={"text_embeds": text, "time_ids": sizes},
            cross_attention_kwargs={"gligen": gligen} if grounded else None,
        ).sample  # fmt: skip

    for step, time in enumerate(scheduler.timesteps):
        grounded = step < int(beta * steps)
        noise = predict(positive, pooled, tokens, grounded, time)
        if guidance_scale > 1:
            empty = predict(torch.zeros_like(positive), torch.zeros_like(pooled), null, grounded, time)
            noise = empty + guidance_scale * (noise - empty)
        latents = scheduler.step(noise, time, latents).prev_sample
    torch.testing.assert_close(got, latents, atol=1e-4, rtol=1e-4)


def test_layouts_for_all_for_each_prompt_and_for_each_image():
    pipeline = grounded_pipeline()
    prompts = ["an image of grass", "sand with a ring"]
    first, second = (PHRASES, BOXES), (["a ring"], [[0.2, 0.3, 0.6, 0.9]])

    def alone(prompt, layout, seed):
        return draw(pipeline, prompt, [seed], gligen_phrases=layout[0], gligen_boxes=layout[1])[0]

    def check(got, expected):
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=0)

    got = draw(pipeline, prompts, [1, 2], gligen_phrases=first[0], gligen_boxes=first[1])
    check(got, [alone(prompts[0], first, 1), alone(prompts[1], first, 2)])
    nested = {"gligen_phrases": [first[0], second[0]], "gligen_boxes": [first[1], second[1]]}
    check(draw(pipeline, prompts, [1, 2], **nested), [alone(prompts[0], first, 1), alone(prompts[1], second, 2)])
    got = draw(pipeline, prompts, [1, 2, 3, 4], num_images_per_prompt=2, **nested)
    check(got, [alone(prompts[k // 2], (first, second)[k // 2], k + 1) for k in range(4)])
    each = {name: value * 2 for name, value in nested.items()}
    got = draw(pipeline, prompts, [1, 2, 3, 4], num_images_per_prompt=2, **each)
    check(got, [alone(prompts[k // 2], (first, second)[k % 2], k + 1) for k in range(4)])
    # an image may have none
    got = draw(pipeline, prompts, [1, 2], gligen_phrases=[[], second[0]], gligen_boxes=[[], second[1]])
    check(got[1:], [alone(prompts[1], second, 2)])


def test_prompt_embeddings_in_place_of_prompts():
    pipeline = grounded_pipeline()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipeline.encode_prompt("an image of grass"), strict=True))
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    assert torch.equal(draw(pipeline, None, **embeds, **layout), draw(pipeline, **layout))


def test_of_few_steps_the_first_is_grounded():
    """Distilled models take one to four; a share of them that comes to none would ignore the boxes in silence."""
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    for steps in (1, 2, 3):
        plain = draw(pipeline, num_inference_steps=steps)
        assert (draw(pipeline, num_inference_steps=steps, **layout) - plain).abs().max() > 1e-3
        off = draw(pipeline, num_inference_steps=steps, gligen_scheduled_sampling_beta=0, **layout)
        assert torch.equal(off, plain)


def test_a_call_leaves_nothing_behind():
    pipeline = grounded_pipeline()
    own = {"ip_adapter_masks": None}
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    once = draw(pipeline, gligen_scheduled_sampling_beta=(0.2, 0.6, 0.2), cross_attention_kwargs=own, **layout)
    assert own == {"ip_adapter_masks": None}
    assert pipeline.cross_attention_kwargs is None or "gligen" not in pipeline.cross_attention_kwargs
    assert all(float(fuser.scale) == 1 for fuser in fusers(pipeline.unet).values())
    again = draw(pipeline, gligen_scheduled_sampling_beta=(0.2, 0.6, 0.2), cross_attention_kwargs=own, **layout)
    assert torch.equal(once, again)

    def fail(*_):
        raise RuntimeError("the user's callback")

    plain = draw(pipeline)
    with pytest.raises(RuntimeError, match="the user's"):
        draw(pipeline, callback_on_step_end=fail, gligen_scheduled_sampling_beta=(0, 1, 0), **layout)
    assert torch.equal(draw(pipeline), plain)


def test_the_users_callback_still_runs():
    pipeline, seen = grounded_pipeline(), []

    def callback(_, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {"latents": tensors["latents"] * 0}

    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    draw(
        pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"],
        num_inference_steps=3, **layout,
    )  # fmt: skip
    assert seen == [(k, ["latents"]) for k in range(3)]
    latents = draw(pipeline, callback_on_step_end=callback, output_type="latent", **layout)
    assert not latents.any()


def test_the_adapter_scale():
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    plain, full = draw(pipeline), draw(pipeline, **layout)
    pipeline.set_gligen_adapter_scale(0)
    assert torch.equal(draw(pipeline, **layout), plain)
    pipeline.set_gligen_adapter_scale(0.5)
    half = draw(pipeline, **layout)
    assert (half - plain).abs().max() > 1e-3
    assert (half - full).abs().max() > 1e-3
    draw(pipeline, gligen_scheduled_sampling_beta=(0.4, 0.4, 0.2), **layout)
    assert torch.equal(draw(pipeline, **layout), half)  # the fading put back 0.5, not 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gligen_phrases": PHRASES}, "gligen_phrases without gligen_boxes"),
        ({"gligen_boxes": BOXES}, "gligen_boxes without gligen_phrases"),
        ({"gligen_phrases": PHRASES, "gligen_boxes": BOXES[:1]}, "2 phrases but 1 boxes"),
        ({"gligen_phrases": [PHRASES] * 2, "gligen_boxes": [BOXES] * 2}, "2 layouts for 1 prompts x 1 images"),
        ({"gligen_phrases": [PHRASES] * 2, "gligen_boxes": [BOXES]}, "for 2 images, gligen_boxes for 1"),
        ({"gligen_phrases": [PHRASES], "gligen_boxes": BOXES}, "nest alike"),
        ({"gligen_phrases": [PHRASES], "gligen_boxes": [[BOXES[0], [0, 0, 2, 9]]]}, "layout 0: .*pixels"),
        ({"gligen_phrases": PHRASES, "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 2}, "beta is 2"),
        ({"gligen_phrases": ["a"] * 5, "gligen_boxes": BOXES[:1] * 5, "strict": True}, "5 objects, the adapter 4"),
    ],
)
def test_wrong_layouts_stop_before_a_model_runs(arguments, says, monkeypatch):
    pipeline = grounded_pipeline()
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=says):
        draw(pipeline, **arguments)


def test_too_many_boxes_are_cut_with_a_warning():
    pipeline = grounded_pipeline()
    phrases, boxes = [*PHRASES * 2, "a ring"], [*BOXES * 2, [0.0, 0.0, 1.0, 1.0]]
    with pytest.warns(UserWarning, match="the first 4 are kept"):
        got = draw(pipeline, gligen_phrases=phrases, gligen_boxes=boxes)
    assert torch.equal(got, draw(pipeline, gligen_phrases=phrases[:4], gligen_boxes=boxes[:4]))


def test_boxes_without_an_adapter_or_with_that_of_another_base():
    pipeline = sdxl_pipeline()
    with pytest.raises(ValueError, match="load_gligen_adapter"):
        draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES)
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=32))
    with pytest.raises(ValueError, match="width 32, these text encoders give 40"):
        draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES)


def test_adapters_load_save_and_unload(tmp_path):
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    expected, plain = draw(pipeline, **layout), draw(pipeline)
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    pipeline.unload_gligen_adapter()
    assert torch.equal(draw(pipeline), plain)
    pipeline.load_gligen_adapter(tmp_path / "adapter")
    assert torch.equal(draw(pipeline, **layout), expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not an adapter folder"):
        pipeline.load_gligen_adapter(tmp_path / "empty")
    assert torch.equal(draw(pipeline, **layout), expected)  # the former one stays


def test_a_saved_pipeline_is_plain_with_an_adapter_beside_it(tmp_path):
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    expected, without = draw(pipeline, **layout), draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(pipeline, **layout), expected)  # saving does not disturb
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, **layout), expected)
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert not is_attached(plain.unet)
    assert torch.equal(draw(plain), without)


def test_a_folder_in_the_published_form_loads_and_its_code_does_not_run(tmp_path):
    """As `jiuntian/gligen-xl-1024`: a gated U-Net, a list of class names, and a .py beside it."""
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    expected = draw(pipeline, **layout)
    StableDiffusionXLPipeline.save_pretrained(pipeline, tmp_path)
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["attention_type"] == "gated"
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = ["pipeline_gligen_sdxl", "StableDiffusionXLGLIGENPipeline"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "pipeline_gligen_sdxl.py").write_text("raise SystemExit('code of a repository was run')\n")
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionXLGLIGENPipeline
    assert len(fusers(loaded.unet)) > 1
    with pytest.warns(UserWarning, match="code of a repository is never run"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    got = draw(loaded, **layout)  # 30 slots, as published; the tiny one was made for 4
    assert got.shape == expected.shape
    attach_form = loaded.unet.__dict__["_gligen"].config
    assert attach_form.slots == 30


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "far/off/nowhere"])
def test_a_missing_folder_says_so(name):
    with pytest.raises(FileNotFoundError, match=f"no pipeline folder {name}; expected a folder or a Hub repository"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(name)


def test_detached_adapters_of_other_models_can_be_put_on(tmp_path):
    """An adapter is for a family: it goes onto another model of the same shape."""
    pipeline = grounded_pipeline()
    save_adapter(pipeline.unet, tmp_path)
    other = sdxl_pipeline(seed=11)
    other.load_gligen_adapter(tmp_path)
    image = draw(other, gligen_phrases=PHRASES, gligen_boxes=BOXES)
    assert np.isfinite(image.numpy()).all()
    detach(other.unet)


def test_a_callback_may_cut_the_guidance():
    from diffusers.callbacks import SDXLCFGCutoffCallback

    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 1.0}
    cut = draw(pipeline, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.4), **layout)
    assert np.isfinite(cut.numpy()).all()
    assert (cut - draw(pipeline, **layout)).abs().max() > 1e-4


def test_fading_begins_with_the_first_step():
    pipeline = grounded_pipeline()
    layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES}
    seen = []
    real = pipeline.unet.forward

    def forward(*args, **kwargs):
        seen.append(float(next(iter(fusers(pipeline.unet).values())).scale))
        return real(*args, **kwargs)

    pipeline.unet.forward = forward
    draw(pipeline, gligen_scheduled_sampling_beta=(0, 1, 0), **layout)
    assert seen[:4] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_arrays_and_tensors_of_boxes():
    pipeline = grounded_pipeline()
    expected = draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=BOXES)
    for boxes in (np.array(BOXES), torch.tensor(BOXES, dtype=torch.float64), [np.array(box) for box in BOXES]):
        assert torch.equal(draw(pipeline, gligen_phrases=PHRASES, gligen_boxes=boxes), expected)
    for boxes in (np.array([BOXES]), [torch.tensor(BOXES, dtype=torch.float64)]):
        assert torch.equal(draw(pipeline, gligen_phrases=[PHRASES], gligen_boxes=boxes), expected)


def test_saving_without_an_adapter_over_a_folder_with_one(tmp_path):
    pipeline = grounded_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.unload_gligen_adapter()
    with pytest.warns(UserWarning, match="is not this pipeline's; it stays"):
        pipeline.save_pretrained(tmp_path)
    assert not is_attached(StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path).unet)
    assert (tmp_path / "gligen_adapter" / "gligen_adapter.safetensors").is_file()  # no one's work is deleted


def test_what_an_adapter_says_of_itself_is_kept(tmp_path):
    pipeline = grounded_pipeline()
    save_adapter(pipeline.unet, tmp_path / "first", metadata={"base_model": "tiny", "samples": 7})
    pipeline.load_gligen_adapter(tmp_path / "first")
    pipeline.save_gligen_adapter(tmp_path / "second", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "third")
    for folder in ("first", "second", "third/gligen_adapter"):
        said = json.loads((tmp_path / folder / "gligen_adapter.json").read_text())
        assert (said["base_model"], said["samples"]) == ("tiny", 7)
