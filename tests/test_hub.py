"""Where pipelines and adapters come from and go to: folders of every layout, the Hub, one-file checkpoints, other
pipelines. The Hub is a folder here, of which only the files that are asked for are handed out."""

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from helpers.hub import SDXL, listing, original_checkpoint
from helpers.tiny import grounded, open_gates, sd_pipeline, sdxl_pipeline, sdxl_unet
from safetensors.torch import load_file, save_file

from gligen_xl import (
    StableDiffusionGLIGENInpaintPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionXLGLIGENControlNetPipeline,
    StableDiffusionXLGLIGENImg2ImgPipeline,
    StableDiffusionXLGLIGENInpaintPipeline,
    StableDiffusionXLGLIGENPipeline,
)
from gligen_xl.adapter import (
    AdapterConfig,
    adapter_config,
    adapter_parameters,
    adapter_state_dict,
    attach,
    fusers,
    is_attached,
)
from gligen_xl.adapter.convert import read_published
from gligen_xl.hub import pipeline_files
from gligen_xl.pipelines.export import export_pipeline

LAYOUT = {
    "gligen_phrases": ["a red circle", "a blue star"],
    "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]],
    "gligen_scheduled_sampling_beta": 1.0,
}
EVIL = "raise SystemExit('code of a repository was run')\n"


def draw(pipeline, **kwargs):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "width": 16, "height": 16}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline("an image of grass", generator=generator, **(settings | kwargs)).images


def draws_the_same(pipeline, other):
    return torch.equal(draw(pipeline, **LAYOUT), draw(other, **LAYOUT)) and torch.equal(draw(pipeline), draw(other))


def of_gated_form(pipeline, folder, **saving):
    """As `jiuntian/gligen-xl-1024`: the U-Net gated, a class list, and a .py beside it."""
    StableDiffusionXLPipeline.save_pretrained(pipeline, folder, **saving)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline_gligen_sdxl", "StableDiffusionXLGLIGENPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline_gligen_sdxl.py").write_text(EVIL)


# Which files of a repository ----------------------------------------------------------------------------------------


def chosen_weights(files, variant=None):
    chosen = pipeline_files(files, variant)
    assert set(chosen) <= set(files)
    assert not [name for name in chosen if name.endswith((".py", ".msgpack", ".onnx", ".onnx_data", ".xml", ".md"))]
    assert all(name == "model_index.json" or name.count("/") == 1 for name in chosen)
    return [name for name in chosen if re.search(r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?$", name)]


def test_of_the_sdxl_repository_one_copy_of_the_weights():
    parts = [
        "text_encoder/model",
        "text_encoder_2/model",
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
    ]
    assert chosen_weights(SDXL) == [f"{part}.safetensors" for part in parts]
    assert chosen_weights(SDXL, "fp16") == [f"{part}.fp16.safetensors" for part in parts]
    settings = set(pipeline_files(SDXL, None)) - set(chosen_weights(SDXL))
    assert settings == {name for name in SDXL if name.endswith((".json", ".txt"))}


SHARDED = listing("""
model_index.json pipeline_gligen_sdxl.py unet/config.json unet/convert.py
unet/diffusion_pytorch_model-00001-of-00002.safetensors unet/diffusion_pytorch_model-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.fp16.json
vae/config.json vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.bin
gligen_adapter/gligen_adapter.json gligen_adapter/gligen_adapter.safetensors
gligen_adapter/gligen_adapter.fp16.safetensors
""")


def test_former_versions_beside_the_parts_of_a_pipeline_stay_there(hub, tmp_path):
    """SDXL's own repository holds `vae_1_0/` beside `vae/`."""
    grounded(sdxl_pipeline()).save_pretrained(tmp_path / "repository")
    shutil.copytree(tmp_path / "repository" / "vae", tmp_path / "repository" / "vae_1_0")
    hub.serve(tmp_path / "repository")
    StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl")
    assert not [name for name in hub.asked["files"] if name.startswith("vae_1_0/")]
    assert "vae/config.json" in hub.asked["files"]
    assert "gligen_adapter/gligen_adapter.json" in hub.asked["files"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_come_with_their_index_and_parts_without_a_variant_as_they_are(variant):
    chosen = chosen_weights(SHARDED, variant)
    unet = [name for name in chosen if name.startswith("unet/")]
    assert len(unet) == 3
    assert all(("fp16" in name) == (variant == "fp16") for name in unet)
    assert "vae/diffusion_pytorch_model.safetensors" in chosen
    assert "vae/diffusion_pytorch_model.bin" not in chosen
    adapter = "gligen_adapter.fp16.safetensors" if variant else "gligen_adapter.safetensors"
    assert [name for name in chosen if name.startswith("gligen_adapter/")] == [f"gligen_adapter/{adapter}"]
    assert "gligen_adapter/gligen_adapter.json" in pipeline_files(SHARDED, variant)


PICKLED = listing("""
model_index.json handler.py unet/config.json unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.fp16.bin text_encoder/config.json text_encoder/pytorch_model.bin
text_encoder/model.safetensors text_encoder_2/pytorch_model-00001-of-00002.bin
text_encoder_2/pytorch_model-00002-of-00002.bin text_encoder_2/pytorch_model.bin.index.json
.cache/unet.bin unet/.hidden.bin onnx/unet/model.bin
""")


def test_pickles_where_there_is_nothing_else():
    files = PICKLED
    sharded = [name for name in files if name.startswith("text_encoder_2/")]
    expected = ["unet/diffusion_pytorch_model.bin", "text_encoder/model.safetensors", *sharded]
    assert sorted(chosen_weights(files)) == sorted(expected)
    assert "unet/diffusion_pytorch_model.fp16.bin" in chosen_weights(files, "fp16")
    assert "unet/diffusion_pytorch_model.bin" not in chosen_weights(files, "fp16")


def test_ema_weights_beside_the_others_are_a_variant():
    files = ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    assert chosen_weights(files) == files[:1]
    assert chosen_weights(files, "non_ema") == files[1:]


# From the Hub -------------------------------------------------------------------------------------------------------


OPTIONS = {"revision": "v1", "cache_dir": "/somewhere", "token": "secret", "force_download": True}


@pytest.mark.parametrize("form", ["beside", "gated"])
def test_a_pipeline_of_a_repository(form, hub, tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=30)
    folder = tmp_path / "repository"
    if form == "gated":
        of_gated_form(pipeline, folder)
    else:
        pipeline.save_pretrained(folder)
    for name in ("evil.py", "unet/evil.py", "gligen_adapter/evil.py", "unet/diffusion_pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(EVIL)
    hub.serve(folder)
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl", **OPTIONS)
    assert draws_the_same(loaded, pipeline)
    assert {name: hub.asked[name] for name in OPTIONS} == OPTIONS
    assert (hub.asked["repo"], hub.asked["listed"]) == ("someone/gligen-xl",) * 2
    assert (hub.asked["listed_revision"], hub.asked["listed_token"]) == ("v1", "secret")
    assert not [name for name in hub.asked["files"] if name.endswith((".py", ".bin"))]


def test_a_variant_of_a_repository(hub, tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_pretrained(tmp_path / "repository", variant="fp16", max_shard_size="100KB")
    other = sdxl_pipeline(seed=9)  # the plain weights beside are others, to be told apart
    attach(other.unet, adapter_config(pipeline.unet))
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "repository", dirs_exist_ok=True)
    hub.serve(tmp_path / "repository")
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl", variant="fp16")
    assert draws_the_same(loaded, pipeline)
    weights = [name for name in hub.asked["files"] if ".safetensors" in name]
    assert len(weights) > 8
    assert all("fp16" in name for name in weights)
    assert "variant" not in hub.asked


@pytest.fixture
def cache(tmp_path):
    """A cache as huggingface_hub keeps it, with a model that was fetched once, its README left out."""
    pipeline = grounded(sdxl_pipeline())
    root = tmp_path / "cache" / "models--someone--gligen-xl"
    commit = "0123456789abcdef0123456789abcdef01234567"
    pipeline.save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return pipeline, {"cache_dir": str(tmp_path / "cache")}


@pytest.mark.parametrize("asked_for", [{"local_files_only": True}, {}])
def test_what_was_fetched_before_loads_without_a_network(cache, asked_for):
    pipeline, options = cache  # the tests run with HF_HUB_OFFLINE
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl", **options, **asked_for)
    assert draws_the_same(loaded, pipeline)
    pipeline.unload_gligen_adapter()
    pipeline.load_gligen_adapter("someone/gligen-xl", subfolder="gligen_adapter", **options, **asked_for)
    assert draws_the_same(loaded, pipeline)
    config, _, _ = read_published("someone/gligen-xl", **options, **asked_for)
    assert config.slots == adapter_config(pipeline.unet).slots


def test_a_name_that_is_neither_folder_nor_repository_says_both():
    with pytest.raises(FileNotFoundError, match="no pipeline folder runs/modell, and no such repository was reached"):
        StableDiffusionXLGLIGENPipeline.from_pretrained("runs/modell")


def test_a_part_that_is_given_is_not_fetched(hub, tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_pretrained(tmp_path / "repository")
    hub.serve(tmp_path / "repository")
    StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl", vae=pipeline.vae)
    assert not [name for name in hub.asked["files"] if name.startswith("vae/")]


def test_a_pipeline_without_a_unet_encodes_prompts_and_is_saved(tmp_path):
    grounded(sdxl_pipeline()).save_pretrained(tmp_path / "whole")
    encoder = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "whole", unet=None)
    assert len(encoder.encode_prompt("grass")) == 4


def test_only_the_adapter_of_a_folder_is_uploaded(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("gligen_xl.hub.create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("gligen_xl.hub.upload_folder", lambda **options: asked.update(options))
    (tmp_path / "secrets.txt").write_text("mine")
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path, push_to_hub=True, repo_id="someone/adapter", variant="fp16")
    assert asked["allow_patterns"] == ["gligen_adapter.json", "gligen_adapter.fp16.safetensors"]


def test_one_description_does_not_come_to_describe_another_adapters_weights(tmp_path):
    grounded(sdxl_pipeline(), slots=4).save_gligen_adapter(tmp_path)
    grounded(sdxl_pipeline(), slots=4).save_gligen_adapter(tmp_path, variant="fp16", dtype=torch.float16)
    with pytest.raises(ValueError, match="of an adapter of another form"):
        grounded(sdxl_pipeline(), slots=6).save_gligen_adapter(tmp_path, variant="bf16")


def test_a_lone_variant_is_found_without_being_named(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path, variant="fp16")
    other = sdxl_pipeline()
    other.load_gligen_adapter(tmp_path)
    assert draws_the_same(other, pipeline)


def test_gligens_nine_channels_are_not_given_to_an_inpainting_pipeline(tmp_path):
    pipeline = sd_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=24, phrase_dim=24, inpaint=True))
    export_pipeline(pipeline, tmp_path / "gligen")
    with pytest.raises(ValueError, match="load it with StableDiffusionGLIGENPipeline and give gligen_inpaint_image"):
        StableDiffusionGLIGENInpaintPipeline.from_pretrained(tmp_path / "gligen", safety_checker=None)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "gligen_adapter.safetensors"),
        ({"variant": "fp16"}, "gligen_adapter.fp16.safetensors"),
        ({"weight_name": "mine.safetensors"}, "mine.safetensors"),
    ],
)
@pytest.mark.parametrize("subfolder", [None, "a/b"])
def test_an_adapter_of_a_repository(options, name, subfolder, hub, tmp_path):
    pipeline, folder = grounded(sdxl_pipeline()), tmp_path / "repository"
    inner = folder / (subfolder or "")
    pipeline.save_gligen_adapter(inner)
    if name != "gligen_adapter.safetensors":
        (inner / "gligen_adapter.safetensors").rename(inner / name)
    (inner / "evil.py").write_text(EVIL)
    hub.serve(folder)
    other = sdxl_pipeline()
    other.load_gligen_adapter("someone/adapter", subfolder=subfolder, **options, **OPTIONS)
    assert draws_the_same(other, pipeline)
    assert {name: hub.asked[name] for name in OPTIONS} == OPTIONS
    prefix = f"{subfolder}/" if subfolder else ""
    assert hub.asked["files"] == [f"{prefix}gligen_adapter.json", prefix + name]


def test_an_unknown_option_of_the_hub_is_refused(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path)
    with pytest.raises(TypeError, match=r"unknown arguments \['revison'\]"):
        pipeline.load_gligen_adapter(tmp_path, revison="v1")
    with pytest.raises(TypeError, match="are for push_to_hub=True"):
        pipeline.save_gligen_adapter(tmp_path, repo_id="someone/adapter")
    assert is_attached(pipeline.unet)


# To the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """What was uploaded: its folder, and the arguments."""
    seen = {}

    def create_repo(repo_id, **options):
        seen["created"] = {"repo_id": repo_id, **options}

        class Made:
            pass

        Made.repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        return Made

    def upload_folder(*, repo_id, folder_path, **options):
        seen["uploaded"] = {"repo_id": repo_id, **options}
        seen["folder"] = tmp_path / "uploaded"
        shutil.copytree(folder_path, seen["folder"])
        return "the commit"

    monkeypatch.setattr("gligen_xl.hub.create_repo", create_repo)
    monkeypatch.setattr("gligen_xl.hub.upload_folder", upload_folder)
    return seen


def test_a_pushed_pipeline_comes_back_with_its_adapter(uploads):
    pipeline = grounded(sdxl_pipeline())
    options = {"private": True, "token": "secret", "commit_message": "mine", "create_pr": True}
    assert pipeline.push_to_hub("me/pipeline", **options) == "the commit"
    assert uploads["created"] == {"repo_id": "me/pipeline", "private": True, "token": "secret", "exist_ok": True}
    expected = {"repo_id": "me/pipeline", "token": "secret", "commit_message": "mine", "create_pr": True}
    assert uploads["uploaded"] == expected
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(uploads["folder"])
    assert draws_the_same(loaded, pipeline)
    assert is_attached(pipeline.unet)


@pytest.mark.parametrize("named", [True, False])
def test_a_pipeline_saved_and_pushed_at_once(named, uploads, tmp_path):
    pipeline = grounded(sdxl_pipeline())
    names = {"repo_id": "me/pipeline"} if named else {}
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, revision="v2", **names)
    assert uploads["uploaded"]["repo_id"] == ("me/pipeline" if named else "me/mine")
    assert uploads["uploaded"]["revision"] == "v2"
    assert uploads["uploaded"]["commit_message"]
    for folder in (uploads["folder"], tmp_path / "mine"):
        assert draws_the_same(StableDiffusionXLGLIGENPipeline.from_pretrained(folder), pipeline)


def test_a_pushed_variant(uploads):
    pipeline = grounded(sdxl_pipeline())
    pipeline.push_to_hub("me/pipeline", variant="fp16")
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(uploads["folder"], variant="fp16")
    assert draws_the_same(loaded, pipeline)


def test_a_pushed_adapter_comes_back(uploads, tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path / "mine", push_to_hub=True, private=False, token="secret")
    assert uploads["created"] == {"repo_id": "mine", "private": False, "token": "secret", "exist_ok": True}
    assert uploads["uploaded"]["repo_id"] == "me/mine"
    other = sdxl_pipeline()
    other.load_gligen_adapter(uploads["folder"])
    assert draws_the_same(other, pipeline)


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("saving", [{"max_shard_size": "100KB"}, {"variant": "fp16"}, {}])
def test_sharded_folders_and_variants(gated, saving, tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=30)
    if gated:
        of_gated_form(pipeline, tmp_path, **saving)
    else:
        pipeline.save_pretrained(tmp_path, **saving)
    names = [path.name for path in (tmp_path / "unet").glob("*.safetensors")]
    assert len(names) > 1 if "max_shard_size" in saving else len(names) == 1
    assert all(("fp16" in name) == ("variant" in saving) for name in names)
    variant = {"variant": saving["variant"]} if "variant" in saving else {}
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, **variant)
    assert draws_the_same(loaded, pipeline)


def test_a_folder_in_half_precision_keeps_its_boxes(tmp_path):
    """Weights in float16, as published, read into float32 and into bfloat16."""
    pipeline = grounded(sdxl_pipeline(), slots=30)
    of_gated_form(pipeline.to(torch.float16), tmp_path, variant="fp16")
    loaded = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, variant="fp16")
    parts = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert {value.dtype for part in parts for value in part.parameters()} == {torch.float32}
    assert torch.equal(draw(loaded, **LAYOUT), draw(pipeline.to(torch.float32), **LAYOUT))
    half = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    assert {value.dtype for value in half.unet.parameters()} == {torch.bfloat16}
    assert draw(half, **LAYOUT).isfinite().all()


@pytest.mark.parametrize("name", ["pipeline_gligen_sdxl", "pipeline"])
def test_code_in_a_folder_is_never_run(name, tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=30)
    of_gated_form(pipeline, tmp_path)
    for place in (f"{name}.py", f"unet/{name}.py", "unet/unet.py", "gligen_adapter.py"):
        (tmp_path / place).write_text(EVIL)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = [name, "StableDiffusionXLGLIGENPipeline"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert draws_the_same(StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path), pipeline)
    with pytest.warns(UserWarning, match="never run"):
        again = StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is StableDiffusionXLGLIGENPipeline


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "gligen_adapter"])
def test_half_written_weights_are_named(part, tmp_path):
    grounded(sdxl_pipeline()).save_pretrained(tmp_path)
    (file,) = (tmp_path / part).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match=re.escape(str(file))):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=part):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)
    file.write_bytes(whole)
    assert is_attached(StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path).unet)


def test_a_missing_shard_is_named(tmp_path):
    of_gated_form(grounded(sdxl_pipeline()), tmp_path, max_shard_size="100KB")
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)


def test_a_gated_unet_without_the_weights_of_its_adapter_is_refused(tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(settings | {"attention_type": "gated"}))
    with pytest.raises(ValueError, match=r"no values .*fuser"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)


def test_folders_of_the_wrong_kind_say_what_they_are_not(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.save_gligen_adapter(tmp_path / "adapter")
    expected = draw(pipeline, **LAYOUT)
    for folder in ("adapter", "pipeline/unet", "pipeline/gligen_adapter"):
        with pytest.raises(FileNotFoundError, match=r"not a pipeline folder: it has no model_index\.json"):
            StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match=r"no gligen_adapter\.json; it has .*gligen_adapter.*unet"):
        pipeline.load_gligen_adapter(tmp_path / "pipeline")
    with pytest.raises(FileNotFoundError, match=r"has no gligen_adapter\.fp16\.safetensors"):
        pipeline.load_gligen_adapter(tmp_path / "adapter", variant="fp16")
    with pytest.raises(ValueError, match="is a file; expected an adapter folder"):
        pipeline.load_gligen_adapter(tmp_path / "adapter" / "gligen_adapter.safetensors")
    with pytest.raises(ValueError, match="loaded with from_single_file"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "adapter" / "gligen_adapter.safetensors")
    (tmp_path / "adapter" / "gligen_adapter.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"gligen_adapter\.json is not valid JSON"):
        pipeline.load_gligen_adapter(tmp_path / "adapter")
    assert torch.equal(draw(pipeline, **LAYOUT), expected)


# Adapter files ------------------------------------------------------------------------------------------------------


def test_variants_of_an_adapter_stand_side_by_side(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path)
    pipeline.save_gligen_adapter(tmp_path, dtype=torch.float16, variant="fp16")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gligen_adapter.fp16.safetensors", "gligen_adapter.json", "gligen_adapter.safetensors"]
    sizes = [(tmp_path / name).stat().st_size for name in (names[0], names[2])]
    assert sizes[0] < 0.6 * sizes[1]
    other = sdxl_pipeline()
    other.load_gligen_adapter(tmp_path)
    assert draws_the_same(other, pipeline)
    other.load_gligen_adapter(tmp_path, variant="fp16")
    for name, value in adapter_state_dict(other.unet).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, adapter_state_dict(pipeline.unet)[name].half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_an_adapter_is_saved_in(dtype, tmp_path):
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path, dtype=dtype)
    saved = load_file(tmp_path / "gligen_adapter.safetensors")
    assert {value.dtype for value in saved.values()} == {dtype}


def test_what_float16_cannot_hold_is_refused_and_leaves_the_former_file(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path)
    former = (tmp_path / "gligen_adapter.safetensors").read_bytes()
    name, value = next(iter(adapter_parameters(pipeline.unet).items()))
    with torch.no_grad():
        value.view(-1)[0] = 1e5
    with pytest.raises(ValueError, match=rf"{re.escape(name)} reaches 100000, too much for torch\.float16"):
        pipeline.save_gligen_adapter(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        pipeline.save_gligen_adapter(tmp_path, dtype=torch.int8)
    assert (tmp_path / "gligen_adapter.safetensors").read_bytes() == former
    pipeline.save_gligen_adapter(tmp_path, dtype=torch.bfloat16)


def test_adapters_of_another_base_are_refused_by_name_and_the_former_stays(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    expected = draw(pipeline, **LAYOUT)
    grounded(sd_pipeline()).save_gligen_adapter(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"sd is for a cross-attention width of 24, the U-Net has 40"):
        pipeline.load_gligen_adapter(tmp_path / "sd")
    wider = sdxl_pipeline()
    wider.unet = sdxl_unet(block_out_channels=(8, 32, 32), attention_head_dim=(1, 4, 4))
    grounded(wider).save_gligen_adapter(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"does not fit this U-Net: \w+_blocks.*fuser.* is \(.*expected \("):
        pipeline.load_gligen_adapter(tmp_path / "wider")
    deeper = sdxl_pipeline()
    deeper.unet = sdxl_unet(transformer_layers_per_block=(1, 1, 1))
    grounded(deeper).save_gligen_adapter(tmp_path / "shallower")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors, .*transformer_blocks\.1\.fuser"):
        pipeline.load_gligen_adapter(tmp_path / "shallower")
    other = sdxl_pipeline()
    attach(other.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=32))
    other.save_gligen_adapter(tmp_path / "phrases")
    with pytest.raises(ValueError, match="width 32, these text encoders give 40"):
        pipeline.load_gligen_adapter(tmp_path / "phrases")
    assert torch.equal(draw(pipeline, **LAYOUT), expected)


# From other pipelines -----------------------------------------------------------------------------------------------


def test_a_pipeline_of_diffusers_becomes_ours_over_the_same_parts(tmp_path):
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path)
    plain = StableDiffusionXLPipeline(**sdxl_pipeline().components, add_watermarker=False)
    ours = StableDiffusionXLGLIGENPipeline.from_pipe(plain, add_watermarker=False)
    assert type(ours) is StableDiffusionXLGLIGENPipeline
    assert all(ours.components[name] is plain.components[name] for name in plain.components)
    assert torch.equal(draw(ours), draw(plain))
    ours.load_gligen_adapter(tmp_path)
    assert draws_the_same(ours, grounded(sdxl_pipeline()))


def test_a_gated_pipeline_of_diffusers_becomes_ours_with_its_adapter():
    pipeline = grounded(sdxl_pipeline(), slots=30)
    native = sdxl_unet(attention_type="gated")
    native.load_state_dict(pipeline.unet.state_dict())
    plain = StableDiffusionXLPipeline(**sdxl_pipeline().components | {"unet": native}, add_watermarker=False)
    assert draws_the_same(StableDiffusionXLGLIGENPipeline.from_pipe(plain, add_watermarker=False), pipeline)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_between_our_classes_the_adapter_and_its_scale_come_along(scale):
    text = grounded(sdxl_pipeline())
    text.set_gligen_adapter_scale(scale)
    expected = draw(text, **LAYOUT)
    net = ControlNetModel.from_unet(sdxl_unet(), conditioning_embedding_out_channels=(8, 8))
    kinds = {
        StableDiffusionXLGLIGENImg2ImgPipeline: {},
        StableDiffusionXLGLIGENInpaintPipeline: {},
        StableDiffusionXLGLIGENControlNetPipeline: {"controlnet": net},
    }
    for kind, further in kinds.items():
        other = kind.from_pipe(text, add_watermarker=False, **further)
        assert other.unet is text.unet
        assert adapter_config(other.unet).slots == 4
        assert {float(fuser.scale) for fuser in fusers(other.unet).values()} == {scale}
        back = StableDiffusionXLGLIGENPipeline.from_pipe(other, add_watermarker=False)
        assert torch.equal(draw(back, **LAYOUT), expected)
    plain = StableDiffusionXLImg2ImgPipeline.from_pipe(text, add_watermarker=False)
    assert plain.unet is text.unet


def test_between_our_classes_of_stable_diffusion():
    text = grounded(sd_pipeline())
    expected = draw(text, **LAYOUT)
    masks = StableDiffusionGLIGENInpaintPipeline.from_pipe(text)
    assert masks.unet is text.unet
    assert torch.equal(draw(StableDiffusionGLIGENPipeline.from_pipe(masks), **LAYOUT), expected)
    plain = StableDiffusionPipeline(**sd_pipeline().components, requires_safety_checker=False)
    assert torch.equal(draw(StableDiffusionGLIGENPipeline.from_pipe(plain)), draw(sd_pipeline()))


@pytest.mark.parametrize("kind", [StableDiffusionXLGLIGENImg2ImgPipeline, StableDiffusionXLGLIGENPipeline])
def test_parts_keep_their_types_which_may_differ(kind):
    text = grounded(sdxl_pipeline()).to(torch.bfloat16)
    text.vae.to(torch.float32)
    with torch.no_grad():
        for value in adapter_parameters(text.unet).values():  # an adapter as it is while it is trained
            value.data = value.data.float()
    before = {
        f"{name}.{inner}": value.dtype
        for name, part in text.components.items()
        if isinstance(part, torch.nn.Module)
        for inner, value in part.named_parameters()
    }
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    made = kind.from_pipe(text, add_watermarker=False)
    for name, dtype in before.items():
        part, _, inner = name.partition(".")
        assert made.components[part].get_parameter(inner).dtype == dtype
    for asked in ({"dtype": torch.float32}, {"torch_dtype": torch.float32}):
        cast = kind.from_pipe(text.to(torch.bfloat16), add_watermarker=False, **asked)
        assert {value.dtype for value in cast.unet.parameters()} == {torch.float32}
    assert made.to(torch.bfloat16).unet.dtype == torch.bfloat16  # nothing of it lasts


# From one file ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """A checkpoint in one file, and a folder with the settings of its parts but none of their weights."""
    folder = tmp_path_factory.mktemp("one_file")
    pipeline = sdxl_pipeline()
    save_file(original_checkpoint(pipeline), folder / "model.safetensors")
    pipeline.save_pretrained(folder / "settings")
    for weights in (folder / "settings").rglob("*.safetensors"):
        weights.unlink()
    return folder / "model.safetensors", str(folder / "settings")


@pytest.fixture
def _quiet():
    """diffusers notes every name in the file that a part does not use."""
    logger = logging.getLogger("diffusers")
    former = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(former)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    "kind",
    [
        StableDiffusionXLGLIGENPipeline,
        StableDiffusionXLGLIGENImg2ImgPipeline,
        StableDiffusionXLGLIGENInpaintPipeline,
    ],
)
def test_a_checkpoint_in_one_file_takes_an_adapter(kind, one_file, tmp_path):
    file, settings = one_file
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path)
    loaded = kind.from_single_file(str(file), config=settings, add_watermarker=False)
    assert type(loaded) is kind
    assert not is_attached(loaded.unet)
    expected = sdxl_pipeline()
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        got, wanted = (pipeline.components[name].state_dict() for pipeline in (loaded, expected))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in got), name
    loaded.load_gligen_adapter(tmp_path)
    loaded = StableDiffusionXLGLIGENPipeline.from_pipe(loaded, add_watermarker=False)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert draws_the_same(loaded, grounded(sdxl_pipeline()))


@pytest.mark.usefixtures("_quiet")
def test_a_damaged_or_missing_checkpoint_in_one_file(one_file, tmp_path):
    file, settings = one_file
    whole = Path(file).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"half\.safetensors|incomplete"):
        StableDiffusionXLGLIGENPipeline.from_single_file(str(tmp_path / "half.safetensors"), config=settings)
    lone = sdxl_pipeline()
    open_gates(grounded(lone).unet)
    lone.save_gligen_adapter(tmp_path / "adapter")
    with pytest.raises(Exception, match="missing"):
        StableDiffusionXLGLIGENPipeline.from_single_file(
            str(tmp_path / "adapter" / "gligen_adapter.safetensors"), config=settings
        )
