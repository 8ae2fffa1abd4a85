"""Weights that lack a tensor, do not fit, or hold values that are no numbers: refused, by name, in every part."""

import argparse
import json
import shutil

import pytest
import torch
from diffusers import ControlNetModel
from helpers.hub import original_checkpoint, unet_name
from helpers.published import original_name
from helpers.tiny import grounded, sd15_unet, sd_pipeline, sdxl_pipeline, sdxl_unet
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from gligen_xl import StableDiffusionGLIGENPipeline, StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import adapter_state_dict, is_attached
from gligen_xl.adapter.convert import holds_adapter, read_published
from gligen_xl.pipelines.auto import load_pipeline

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "gligen_adapter"]
LAYOUT = {"gligen_phrases": ["a red circle"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    grounded(sdxl_pipeline()).save_pretrained(root / "xl")
    grounded(sdxl_pipeline()).save_pretrained(root / "half", variant="fp16")
    grounded(sd_pipeline()).save_pretrained(root / "sd")
    grounded(sdxl_pipeline()).save_pretrained(root / "sharded", max_shard_size="30KB")
    return root


def changed(folder, part, change):
    """Applies `change(tensors, name)` to a part's file, with a name from the middle of it; returns that."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(name for name, value in tensors.items() if value.ndim)[len(tensors) // 2]
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def drop(tensors, name):
    del tensors[name]


def reshape(tensors, name):
    tensors[name] = torch.zeros(3, 3, 3)


def not_a_number(tensors, name):
    tensors[name].view(-1)[-1] = float("nan")


def infinite(tensors, name):
    tensors[name].view(-1)[0] = float("inf")


LOADERS = [StableDiffusionXLGLIGENPipeline.from_pretrained, lambda folder, **given: load_pipeline(str(folder), **given)]


@pytest.mark.parametrize("load", LOADERS, ids=["from_pretrained", "load_pipeline"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, r"it lacks .*{name}"),
        (reshape, r"{name} is \(3, 3, 3\)"),
        (not_a_number, r"{name} .*not finite"),
        (infinite, r"{name} .*not finite"),
    ],
    ids=["missing", "shape", "nan", "inf"],
)
def test_every_part_is_refused_by_name(whole, tmp_path, part, change, says, load):
    shutil.copytree(whole / "xl", tmp_path / "model")
    name = changed(tmp_path / "model", part, change)
    with pytest.raises(ValueError, match=says.format(name=name.replace(".", r"\."))) as error:
        load(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model" / part) in str(error.value)


def test_with_a_variant(whole, tmp_path):
    shutil.copytree(whole / "half", tmp_path / "model")
    name = changed(tmp_path / "model", "text_encoder", drop)
    with pytest.raises(ValueError, match=f"text_encoder .*lacks {name}"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "model", variant="fp16")


def test_in_pickled_weights(whole, tmp_path):
    for part in ("vae", "text_encoder_2"):
        shutil.copytree(whole / "xl", tmp_path / part)
        file = next((tmp_path / part / part).glob("*.safetensors"))
        tensors = load_file(file)
        file.unlink()
        pickled = {"vae": "diffusion_pytorch_model.bin"}.get(part, "pytorch_model.bin")
        torch.save(tensors, file.with_name(pickled))
        assert StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / part).unet is not None
        name = sorted(tensors)[5]
        del tensors[name]
        torch.save(tensors, file.with_name(pickled))
        with pytest.raises(ValueError, match=f"{part} .*lacks {name}"):
            StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / part)


def test_parts_that_are_given_are_not_looked_at(whole, tmp_path):
    shutil.copytree(whole / "xl", tmp_path / "model")
    changed(tmp_path / "model", "vae", drop)
    vae = sdxl_pipeline().vae
    assert StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "model", vae=vae).vae is vae


def test_an_index_that_names_a_file_which_is_not_there(whole, tmp_path):
    shutil.copytree(whole / "sharded", tmp_path / "model")
    assert StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "model").unet is not None
    index = next((tmp_path / "model" / "unet").glob("*.index.json"))
    gone = sorted(json.loads(index.read_text())["weight_map"].values())[0]
    (index.parent / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"{index.name} names {gone}, which is missing") as error:
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("low", [True, False])
def test_without_the_fast_way_of_loading_too(whole, tmp_path, low):
    shutil.copytree(whole / "sd", tmp_path / "model")
    name = changed(tmp_path / "model", "unet", drop)
    with pytest.raises(ValueError, match=f"unet .*lacks {name}"):
        StableDiffusionGLIGENPipeline.from_pretrained(tmp_path / "model", low_cpu_mem_usage=low)


# No false alarms ----------------------------------------------------------------------------------------------------


def test_names_of_older_libraries_are_the_same_weights(whole, tmp_path):
    """transformers saves its encoders with a prefix or without; old files hold positions, which are no weights."""
    for number, prefix in enumerate(("text_model.", "")):
        folder = tmp_path / str(number)
        shutil.copytree(whole / "sd", folder)
        file = folder / "text_encoder" / "model.safetensors"
        tensors = {f"{prefix}{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(48)[None]
        save_file(tensors, file, metadata={"format": "pt"})
        pipeline = StableDiffusionGLIGENPipeline.from_pretrained(folder)
        state = StableDiffusionGLIGENPipeline.from_pretrained(whole / "sd").text_encoder.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in pipeline.text_encoder.state_dict().items())


def test_a_vae_with_the_former_names_of_its_attention(whole, tmp_path):
    """As that of Stable Diffusion 1.5 is stored: diffusers knows both."""
    shutil.copytree(whole / "sd", tmp_path / "model")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    tensors, former = load_file(file), {}
    for name, value in tensors.items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        former[name] = value
    assert former.keys() != tensors.keys()
    save_file(former, file, metadata={"format": "pt"})
    loaded = StableDiffusionGLIGENPipeline.from_pretrained(tmp_path / "model").vae.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    del former[next(name for name in former if ".query." in name)]
    save_file(former, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vae .*lacks .*to_q"):
        StableDiffusionGLIGENPipeline.from_pretrained(tmp_path / "model")


# Others -------------------------------------------------------------------------------------------------------------


def test_a_gated_unet_that_lacks_a_tensor_of_its_adapter(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    StableDiffusionXLPipeline.save_pretrained(grounded(sdxl_pipeline(), slots=30), tmp_path)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fuser.linear.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path / 'unet'} .* no values .*{name}"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, ".*lacks {name}"),
        (reshape, "cannot be loaded: .*{name}"),
        (not_a_number, ".*{name} .*not finite"),
    ],
)
def test_a_controlnet(whole, tmp_path, change, says):
    ControlNetModel.from_unet(sdxl_unet()).save_pretrained(tmp_path / "nets" / "net")
    name = changed(tmp_path / "nets", "net", change)
    with pytest.raises(ValueError, match="the ControlNet .*net.*" + says.format(name=name)) as error:
        load_pipeline(str(whole / "xl"), controlnets=[str(tmp_path / "nets" / "net")])
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_finite_is_refused_however_it_comes(whole, tmp_path):
    shutil.copytree(whole / "xl" / "gligen_adapter", tmp_path / "adapter")
    name = changed(tmp_path, "adapter", not_a_number)
    pipeline = grounded(sdxl_pipeline())
    says = f"gligen_adapter.safetensors: {name} .*not finite"
    with pytest.raises(ValueError, match=says):
        pipeline.load_gligen_adapter(tmp_path / "adapter")
    assert is_attached(pipeline.unet)
    with pytest.raises(ValueError, match=says):
        read_published(tmp_path / "adapter")


# One file -----------------------------------------------------------------------------------------------------------


def test_which_files_hold_an_adapter(tmp_path):
    state = adapter_state_dict(grounded(sd_pipeline(layers_per_block=2)).unet)
    plain = {name: value.clone() for name, value in sd15_unet().state_dict().items()}
    for holds, tensors in ((True, {original_name(name): value for name, value in state.items()}), (False, plain)):
        save_file(tensors, tmp_path / "x.safetensors")
        torch.save({"state_dict": tensors, "step": 3}, tmp_path / "x.ckpt")
        assert holds_adapter(tmp_path / "x.safetensors") is holds
        assert holds_adapter(tmp_path / "x.ckpt") is holds


@pytest.fixture
def one_file(tmp_path):
    """Of an SDXL model with an adapter in its U-Net: tensors by the original names, and a folder with the settings."""
    pipeline = sdxl_pipeline()
    pipeline.unet = sdxl_unet(layers_per_block=2)
    tensors = original_checkpoint(pipeline, layers=2)
    pipeline.save_pretrained(tmp_path / "settings")
    for weights in (tmp_path / "settings").rglob("*.safetensors"):
        weights.unlink()
    grounded(pipeline, slots=30)
    adapter = adapter_state_dict(pipeline.unet)
    return pipeline, tensors, {unet_name(name, 2): value for name, value in adapter.items()}, str(tmp_path / "settings")


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_checkpoint_in_one_file_is_loaded_with_the_adapter_in_it(one_file, tmp_path, ending):
    pipeline, tensors, adapter, settings = one_file
    file = tmp_path / f"model.{ending}"
    if ending == "safetensors":
        save_file(tensors | adapter, file)
    else:
        content = {"state_dict": tensors | adapter, "args": argparse.Namespace(lr=1), "step": 7}
        torch.save(content | {"config": vars(OmegaConf.create({"a": [1]}))}, file)
    for load in (
        lambda: StableDiffusionXLGLIGENPipeline.from_single_file(file, config=settings, add_watermarker=False),
        lambda: load_pipeline(file, config=settings, add_watermarker=False),
    ):
        loaded = load()
        got, expected = adapter_state_dict(loaded.unet), adapter_state_dict(pipeline.unet)
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in got.items())
        images = [
            one(
                "grass", num_inference_steps=2, output_type="latent", height=16, width=16,
                generator=torch.Generator().manual_seed(0), **LAYOUT,
            ).images
            for one in (loaded, pipeline)
        ]  # fmt: skip
        assert torch.equal(*images)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight"),
        ("first_stage_model.decoder.conv_out.bias", "decoder.conv_out.bias"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "final_layer_norm.weight"),
        ("conditioner.embedders.1.model.ln_final.bias", "final_layer_norm.bias"),
    ],
)
def test_a_checkpoint_in_one_file_that_lacks_a_tensor(one_file, tmp_path, lost, says):
    _, tensors, _, settings = one_file
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors .*lacks .*{says}") as error:
        StableDiffusionXLGLIGENPipeline.from_single_file(
            tmp_path / "model.safetensors", config=settings, add_watermarker=False
        )
    assert "\n" not in str(error.value)
