"""Out into the published form: plain diffusers loads it, grounding included, where this library is not there."""

import json
import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers.tiny import grounded, open_gates, sd_pipeline, sdxl_pipeline
from PIL import Image

from gligen_xl import StableDiffusionGLIGENPipeline, StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import AdapterConfig, adapter_config, attach
from gligen_xl.pipelines.export import export_pipeline

LAYOUT = {
    "gligen_phrases": ["a red circle", "a blue star"],
    "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]],
}

# Runs where `import gligen_xl` fails: the folder's own file is all there is.
ELSEWHERE = """
import json, sys, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gligen_xl":
            raise ImportError("gligen_xl is not installed here")

sys.meta_path.insert(0, Refuse())
from diffusers import DiffusionPipeline
import diffusers

folder, out, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
images = []
for call in calls:
    scheduler = call.pop("scheduler", None)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    try:
        images.append(pipeline(**call, generator=torch.Generator().manual_seed(3)).images)
    except ValueError as error:
        images.append(str(error))
assert "gligen_xl" not in sys.modules
torch.save({"pictures": images, "class": type(pipeline).__name__}, out)
"""


def elsewhere(folder, tmp_path, calls, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(textwrap.dedent(ELSEWHERE))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # where diffusers copies the folder's file to
    command = [sys.executable, tmp_path / "elsewhere.py", folder, tmp_path / "out.pt", json.dumps(calls)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "out.pt", weights_only=True)


@pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
def test_diffusers_alone_gives_the_same_images(make, tmp_path, monkeypatch):
    pipeline = grounded(make(), slots=5)
    export_pipeline(pipeline, tmp_path / "exported")
    common = {"prompt": "grass", "num_inference_steps": 5, "output_type": "latent", "height": 16, "width": 16}
    two = {"gligen_phrases": [LAYOUT["gligen_phrases"], ["a ring"]]}
    two["gligen_boxes"] = [LAYOUT["gligen_boxes"], [[0.2, 0.3, 0.6, 0.9]]]
    calls = [
        common,
        common | LAYOUT | {"gligen_scheduled_sampling_beta": 1.0},
        common | LAYOUT | {"gligen_scheduled_sampling_beta": 0.4, "guidance_scale": 1.0},
        common | LAYOUT | {"gligen_scheduled_sampling_beta": [0.2, 0.6, 0.2]},
        common | LAYOUT | {"gligen_scheduled_sampling_beta": [0, 1, 0]},
        common | two | {"num_images_per_prompt": 2},
        common | LAYOUT | {"gligen_scheduled_sampling_beta": 0.6, "scheduler": "HeunDiscreteScheduler"},
        common | LAYOUT | {"gligen_scheduled_sampling_beta": 0.6, "scheduler": "PNDMScheduler"},
    ]
    got = elsewhere(tmp_path / "exported", tmp_path, calls, monkeypatch)
    assert got["class"] == type(pipeline).__name__
    pipeline.scheduler = DDIMScheduler.from_pretrained(tmp_path / "exported", subfolder="scheduler")
    for k, (call, theirs) in enumerate(zip(calls, got["pictures"], strict=True)):
        if scheduler := call.pop("scheduler", None):
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        ours = pipeline(**call, generator=torch.Generator().manual_seed(3)).images
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4, msg=lambda words, k=k: f"call {k}: {words}")
    assert (got["pictures"][0] - got["pictures"][1]).abs().max() > 1e-2


def test_the_file_alone_refuses_what_cannot_be_drawn(tmp_path, monkeypatch):
    export_pipeline(grounded(sdxl_pipeline(), slots=3), tmp_path / "exported")
    wrong = {
        "phrases and gligen_boxes together": {"gligen_phrases": ["a"]},
        "expected a list of strings": {"gligen_phrases": "a dog", "gligen_boxes": [[0, 0, 1, 1]]},
        "2 phrases but 1 boxes": {"gligen_phrases": ["a", "b"], "gligen_boxes": [[0, 0, 1, 1]]},
        "is not (x0, y0, x1, y1)": {"gligen_phrases": ["a"], "gligen_boxes": [[0.5, 0, 0.2, 1]]},
        "4 objects, the model 3 slots": {"gligen_phrases": ["a"] * 4, "gligen_boxes": [[0, 0, 1, 1]] * 4},
        "expected 0 to 1": LAYOUT | {"gligen_scheduled_sampling_beta": 2},
    }
    calls = [{"prompt": "grass", "num_inference_steps": 1} | call for call in wrong.values()]
    got = elsewhere(tmp_path / "exported", tmp_path, calls, monkeypatch)["pictures"]
    for words, message in zip(wrong, got, strict=True):
        assert words in message


def test_the_exported_unet_is_the_same(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    export_pipeline(pipeline, tmp_path, max_shard_size="60KB")
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.config.attention_type == "gated"
    theirs, ours = unet.state_dict(), pipeline.unet.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_gligen", "StableDiffusionXLGLIGENPipeline"]


def test_an_exported_folder_comes_back_with_its_slots(tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=5)
    export_pipeline(pipeline, tmp_path)
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)
    assert adapter_config(loaded.unet).slots == 5
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
    ours, theirs = (
        each("grass", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1), **LAYOUT)
        for each in (pipeline, loaded)
    )
    assert torch.equal(ours.images, theirs.images)


def test_an_inpainting_adapter_becomes_a_folder_of_diffusers_own_class(tmp_path):
    pipeline = sd_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=24, phrase_dim=24, inpaint=True))
    open_gates(pipeline.unet)
    export_pipeline(pipeline, tmp_path)
    assert pipeline.unet.config.in_channels == 4  # exporting does not disturb
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert unet.config.in_channels == 9
    assert torch.equal(unet.conv_in.weight, pipeline.unet.conv_in.weight)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionGLIGENPipeline"
    assert not list(tmp_path.glob("*.py"))
    loaded = StableDiffusionGLIGENPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert adapter_config(loaded.unet).inpaint


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers is going to leave its GLIGEN pipelines
def test_diffusers_own_class_inpaints_with_an_exported_inpainting_adapter(tmp_path):
    pipeline = sd_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=24, phrase_dim=24, inpaint=True))
    open_gates(pipeline.unet)
    export_pipeline(pipeline, tmp_path)
    theirs = diffusers.StableDiffusionGLIGENPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (16, 16), "green")
    got = theirs("grass", num_inference_steps=2, output_type="np", gligen_inpaint_image=image, **LAYOUT).images
    assert got.shape == (1, 16, 16, 3)
    for slots, make in ((5, sd_pipeline), (30, sdxl_pipeline)):
        pipeline = make()
        width = pipeline.unet.config.cross_attention_dim
        attach(pipeline.unet, AdapterConfig(cross_attention_dim=width, phrase_dim=width, slots=slots, inpaint=True))
        with pytest.raises(ValueError, match=r"SD 1\.x and 2\.x with 30 slots"):
            export_pipeline(pipeline, tmp_path / "no")


def test_what_cannot_be_exported_is_refused_and_leaves_no_folder(tmp_path):
    pipeline = sdxl_pipeline()
    with pytest.raises(ValueError, match="carries no GLIGEN adapter"):
        export_pipeline(pipeline, tmp_path / "out")
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=40, grounding_logit_bias=1.0))
    with pytest.raises(ValueError, match="no logit bias; this adapter has every=1 and grounding_logit_bias=1"):
        export_pipeline(pipeline, tmp_path / "out")
    pipeline = grounded(sdxl_pipeline())
    pipeline.set_gligen_adapter_scale(0.5)
    with pytest.raises(ValueError, match="scale is"):
        export_pipeline(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()
