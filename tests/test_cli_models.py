"""The commands with people's own models: LoRAs, ControlNets, images to start from, weights in and out."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from helpers.commands import FAST, fails, run
from helpers.published import original_name
from helpers.tiny import grounded, sd_pipeline, sdxl_pipeline, sdxl_unet
from PIL import Image
from safetensors.torch import save_file

from gligen_xl.adapter import adapter_state_dict, read_adapter
from gligen_xl.images.draw import METADATA_KEY

ONE = ("--prompt", "grass", "--phrase", "a ring", "--box", 0.1, 0.2, 0.6, 0.7, "--beta", 1)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlnet")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(sdxl_unet(), conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for value in net.parameters():  # its last layers begin at zero
            value.add_(torch.randn_like(value) * 0.1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    torch.manual_seed(0)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}, path)
    return path


def made(capsys, out, *words):
    """The first image that a generate command makes, as numbers, and what it says of itself."""
    code, output, error = run(capsys, "generate", *words, *ONE, "--steps", 2, "--seed", 5, "--out", out)
    assert code == 0, error
    with Image.open(out / "0000.png") as opened:
        return np.asarray(opened).astype(int), json.loads(opened.text[METADATA_KEY]), output + error


def test_each_image_gets_a_line_with_file_seed_and_time(capsys, model, tmp_path):
    _, _, output = made(capsys, tmp_path, "--model", model, "--width", 16, "--height", 16, "--count", 2)
    lines = [line for line in output.replace("\r", "\n").splitlines() if ".png" in line]
    assert len(lines) == 2
    assert "0001.png  seed 6  " in lines[1]
    assert lines[1].endswith(" s")


def test_loras_controlnets_and_schedulers_change_the_image(capsys, model, lora, controlnet, image, tmp_path):
    size = ("--model", model, "--width", 16, "--height", 16)
    plain, _, _ = made(capsys, tmp_path / "plain", *size)
    with_lora, about, _ = made(capsys, tmp_path / "lora", *size, "--lora", f"{lora}=0.9")
    assert about["lora"] == [f"{lora.name}=0.9"]  # its folder stays on the machine
    without, _, _ = made(capsys, tmp_path / "without", *size, "--lora", f"{lora}=0")
    control = ("--controlnet", controlnet, "--control_image", image)
    controlled, about, _ = made(capsys, tmp_path / "control", *size, *control)
    assert about["controlnet"] == [controlnet.name]
    weak, _, _ = made(capsys, tmp_path / "weak", *size, *control, "--control_scale", 0)
    euler, _, _ = made(capsys, tmp_path / "euler", *size, "--scheduler", "EulerAncestralDiscreteScheduler")
    off, _, _ = made(capsys, tmp_path / "off", *size, "--adapter_scale", 0)
    for name, other in {"lora": with_lora, "control": controlled, "euler": euler, "off": off}.items():
        assert abs(other - plain).max() > 1, name
    assert abs(without - plain).max() <= 1
    assert abs(weak - plain).max() <= 1


def test_images_to_start_from(capsys, model, image, tmp_path):
    started, about, _ = made(capsys, tmp_path / "image", "--model", model, "--image", image, "--strength", 0.5)
    assert started.shape == (40, 24, 3)  # its own size
    assert about["strength"] == 0.5
    resized, _, _ = made(capsys, tmp_path / "sized", "--model", model, "--image", image, "--width", 16)
    assert resized.shape == (40, 16, 3)
    mask = tmp_path / "mask.png"
    Image.new("L", (24, 40), 255).save(mask)
    masked, _, _ = made(capsys, tmp_path / "mask", "--model", model, "--image", image, "--mask", mask)
    assert masked.shape == (40, 24, 3)
    kept, _, _ = made(
        capsys, tmp_path / "kept", "--model", model, "--inpaint_image", image, "--width", 16, "--height", 32
    )
    assert kept.shape == (32, 16, 3)


def test_stable_diffusion_one_is_known_by_its_folder(capsys, tmp_path):
    grounded(sd_pipeline()).save_pretrained(tmp_path / "sd")
    drawn, _, _ = made(capsys, tmp_path / "out", "--model", tmp_path / "sd")
    assert drawn.shape == (16, 16, 3)
    says = fails(capsys, "generate", "--model", tmp_path / "sd", *ONE, "--image", tmp_path / "out" / "0000.png")
    assert "there is no pipeline for Stable Diffusion 1.x / 2.x with image-to-image" in says


def test_export_and_convert_give_the_adapter_back(capsys, model, tmp_path):
    code, output, error = run(capsys, "export", "--model", model, "--out", tmp_path / "exported")
    assert code == 0, error
    assert "trust_remote_code=True" in output
    code, output, error = run(
        capsys, "convert", tmp_path / "exported", "--out", tmp_path / "adapter", "--dtype", "float16"
    )
    assert code == 0, error
    assert "4 slots" in output
    config, state, about = read_adapter(tmp_path / "adapter")
    expected = adapter_state_dict(grounded(sdxl_pipeline()).unet)
    assert all(torch.equal(state[name], value.half()) for name, value in expected.items())
    assert (config.slots, about["converted_from"]) == (4, "exported")
    drawn = [
        made(capsys, tmp_path / name, "--model", folder, "--width", 16, "--height", 16)[0]
        for name, folder in (("first", model), ("second", tmp_path / "exported"))
    ]
    assert np.array_equal(*drawn)


def test_convert_reads_a_single_file_of_the_original_code(capsys, tmp_path):
    state = adapter_state_dict(grounded(sd_pipeline(layers_per_block=2)).unet)
    torch.save({original_name(name): value for name, value in state.items()}, tmp_path / "gligen.bin")
    code, output, error = run(capsys, "convert", tmp_path / "gligen.bin", "--out", tmp_path / "adapter", "--slots", 8)
    assert code == 0, error
    assert "8 slots" in output
    assert read_adapter(tmp_path / "adapter")[1].keys() == state.keys()


def test_wrong_input_is_one_line(capsys, model, image, lora, controlnet, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "broken.bin").write_bytes(b"\x80\x04nonsense")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    (tmp_path / "full").mkdir()
    sdxl_pipeline().save_pretrained(tmp_path / "plain")
    (tmp_path / "full" / "mine.txt").write_text("mine")
    generate = ("generate", "--model", model, *ONE)
    for words, says in [
        ((*generate, "--mask", image), "give both"),
        ((*generate, "--image", image, "--inpaint_image", image), "give one of the two"),
        ((*generate, "--image", image, "--strength", 2), "--strength is 2"),
        ((*generate, "--image", tmp_path / "no.png"), "no image"),
        ((*generate, "--image", tmp_path / "text.png"), "not an image"),
        ((*generate, "--controlnet", controlnet), "1 --controlnet, 0 --control_image"),
        ((*generate, "--scheduler", "Magic"), "expected euler, euler_a"),
        ((*generate, "--scheduler", "FlowMatchEulerDiscreteScheduler"), "this model takes "),
        ((*generate, "--lora", f"{lora}=much"), "the scale of --lora"),
        ((*generate, "--adapter_scale", "nan"), "adapter_scale"),
        ((*generate, "--adapter", tmp_path / "broken.bin"), "gligen-xl convert"),
        (("generate", "--model", tmp_path / "broken.safetensors", *ONE), "damaged or not a safetensors file"),
        (("generate", "--model", model, "--config", model, *ONE), "config is for a checkpoint in one file"),
        (("generate", "--model", tmp_path / "full", *ONE), "has no model_index.json"),
        (("convert", tmp_path / "broken.bin", "--out", tmp_path / "x"), "damaged"),
        (("convert", tmp_path / "nothing", "--out", tmp_path / "x"), "expected a folder or a Hub repository"),
        (("convert", tmp_path / "full", "--out", tmp_path / "x"), "holds no weights"),
        (("convert", tmp_path / "plain", "--out", tmp_path / "x"), "holds no GLIGEN adapter"),
        (("convert", model, "--out", f"{model}/gligen_adapter"), "holds an adapter already"),
        (("generate", "--model", lora, "--config", tmp_path / "plain", *ONE), "is not a complete checkpoint"),
        ((*generate, "--strength", 0.5), "--strength is of --image"),
        (("export", "--model", model, "--out", tmp_path / "full"), "not empty"),
        (("export", "--model", tmp_path / "nothing", "--out", tmp_path / "x"), "no pipeline folder"),
    ]:
        line = fails(capsys, *words)
        assert says in line, line
    assert not (tmp_path / "x").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_model_without_an_adapter_says_how_to_load_one(capsys, tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "plain")
    line = fails(capsys, "generate", "--model", tmp_path / "plain", *ONE, *FAST)
    assert "load_gligen_adapter" in line
