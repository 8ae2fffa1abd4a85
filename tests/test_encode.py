"""Images to latents: diffusers' own, the same bits in any company, whole in half precision."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.tiny import sdxl_unet, sdxl_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gligen_xl.prepare import encode
from gligen_xl.prepare.encode import Encoder, load_vae, posterior_noise

NAMES = [f"picture-{k}" for k in range(8)]


@pytest.fixture
def vae():
    return sdxl_vae()


@pytest.fixture
def images():
    """Eight of (12, 20, 3), in turn of little contrast and of full."""
    rng = np.random.default_rng(0)
    return [rng.integers(*((100, 156) if k % 2 else (0, 256)), (12, 20, 3), np.uint8) for k in range(8)]


def other_vae(**changes):
    """As of newer models: sixteen channels that are shifted, an eighth of the image."""
    torch.manual_seed(3)
    settings = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**(settings | changes)).eval()


@torch.no_grad()
def posterior(vae, images):
    """Mean and standard deviation, (B, C, h, w) float32, by the public way."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255.0 * 2 - 1
    distribution = vae.encode(pixels).latent_dist
    return distribution.mean.numpy(), distribution.std.numpy()


def assert_rounded(latents, expected):
    assert latents.dtype == np.float16
    np.testing.assert_allclose(latents.astype(np.float32), expected, rtol=2**-10, atol=2e-5)


def difference(a, b):
    """Of two sets of latents: root mean square, relative to the first."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.sqrt(((a - b) ** 2).mean() / (a**2).mean())


# What latents are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sdxl_vae, other_vae])
def test_latents_are_those_of_diffusers(make):
    vae = make()
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(3)]
    mean, std = posterior(vae, images)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    latents, finite = Encoder(vae)(images, NAMES[:3])
    assert finite.tolist() == [True] * 3
    assert_rounded(latents, (mean - shift) * scale)
    noise = np.stack([posterior_noise(5, name, mean.shape[1:]) for name in NAMES[:3]])
    assert_rounded(Encoder(vae, seed=5)(images, NAMES[:3])[0], (mean + std * noise - shift) * scale)


def test_an_encoder_knows_its_vae():
    plain, other = Encoder(sdxl_vae(), seed=3), Encoder(other_vae())
    assert (plain.channels, plain.downsampling, plain.scale, plain.shift) == (4, 2, 0.18215, 0.0)
    assert (other.channels, other.downsampling, other.scale, other.shift) == (16, 8, 0.3611, 0.1159)
    assert plain.metadata == {"scaling_factor": "0.18215", "latents": "sample", "seed": "3", "downsampling": "2"}
    assert other.metadata == {"scaling_factor": "0.3611", "latents": "mean", "shift_factor": "0.1159"}
    latents, _ = other([np.zeros((16, 32, 3), np.uint8)], ["a"])
    assert latents.shape == (1, 16, 2, 4)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_has_the_same_latents_in_any_company(vae, images, seed, dtype):
    encoder = Encoder(vae, seed=seed, dtype=dtype)
    together, _ = encoder(images, NAMES)
    for size in (1, 3):
        for start in range(0, 8, size):
            part = slice(start, start + size)
            assert np.array_equal(encoder(images[part], NAMES[part])[0], together[part])
    turned, _ = encoder(images[::-1], NAMES[::-1])
    assert np.array_equal(turned[::-1], together)


def test_several_at_once_differ_by_rounding_only(vae, images):
    single, _ = Encoder(vae, seed=0)(images, NAMES)
    several, _ = Encoder(vae, seed=0, at_once=3)(images, NAMES)
    assert_rounded(several, single.astype(np.float32))


def test_samples_follow_from_the_seed_and_the_name(vae, images):
    first, _ = Encoder(vae, seed=1)(images[:1] * 2, ["a", "b"])
    again, _ = Encoder(vae, seed=1)(images[:1] * 2, ["b", "a"])
    other, _ = Encoder(vae, seed=2)(images[:1] * 2, ["a", "b"])
    assert np.array_equal(first, again[::-1])
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, other)


# Noise --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63), st.text(max_size=40), st.integers(0, 2**63), st.text(max_size=40))
def test_noise_depends_on_seed_and_name(seed, name, other_seed, other_name):
    noise = posterior_noise(seed, name, (4, 4, 4))
    assert noise.dtype == np.float32
    assert np.array_equal(noise, posterior_noise(seed, name, (4, 4, 4)))
    if (seed, name) != (other_seed, other_name):
        assert not np.array_equal(noise, posterior_noise(other_seed, other_name, (4, 4, 4)))


def test_noise_is_standard_normal_and_independent():
    noise = np.stack([posterior_noise(0, f"sa_{k}", (4, 16, 16)) for k in range(300)]).reshape(300, -1).astype(float)
    count = noise.size  # of which the moments below have errors of 1 / sqrt(count)
    assert abs(noise.mean()) < 5 / np.sqrt(count)
    assert abs((noise**2).mean() - 1) < 5 * np.sqrt(2 / count)
    assert abs((noise**3).mean()) < 5 * np.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / count)
    within = np.corrcoef(noise)  # of images, over 1024 numbers each
    assert np.abs(within[~np.eye(300, dtype=bool)]).max() < 6 / np.sqrt(noise.shape[1])


# Half precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 0.003), (torch.bfloat16, 0.03)])
def test_half_precision_stays_close(images, dtype, near):
    vae = load_vae("shapes")
    full, _ = Encoder(vae, seed=0)(images, NAMES)
    encoder = Encoder(vae, seed=0, dtype=dtype)
    half, finite = encoder(images, NAMES)
    assert finite.all()
    assert encoder.repeated == 0
    assert 0 < difference(full, half) < near


def bright_among_grey():
    """Three grey images and, third, a white one."""
    rng = np.random.default_rng(2)
    images = [rng.integers(124, 132, (12, 20, 3), np.uint8) for _ in range(4)]
    images[2] = np.full_like(images[2], 255)
    return images


def overflowing(vae, gain):
    """What is white becomes 27 times `gain` in the first layer."""
    torch.nn.init.constant_(vae.encoder.conv_in.weight, gain)
    return vae


@pytest.mark.parametrize("at_once", [1, 4])
def test_an_image_that_overflows_is_repeated_in_float32(vae, at_once):
    images = bright_among_grey()
    overflowing(vae, 10_000.0)
    encoder = Encoder(vae, seed=0, dtype=torch.float16, at_once=at_once)
    latents, finite = encoder(images, NAMES[:4])
    assert finite.all()
    assert encoder.repeated == 1
    full, _ = Encoder(vae, seed=0)(images, NAMES[:4])
    assert np.array_equal(latents[2], full[2])
    calm = [*images[:2], images[3], images[3]]
    expected, _ = Encoder(vae, seed=0, dtype=torch.float16, at_once=at_once)(calm, NAMES[:4])
    others = [0, 1, 3]
    assert np.array_equal(latents[others], expected[others])
    assert not np.array_equal(latents[others], full[others])  # these are of half precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_in_float32_either_is_told(vae, dtype):
    images = bright_among_grey()
    encoder = Encoder(overflowing(vae, 1e19), dtype=dtype)
    _, finite = encoder(images, NAMES[:4])
    assert finite.tolist() == [True, True, False, True]


def test_what_float16_cannot_hold_is_not_finite(vae, images):
    vae.register_to_config(scaling_factor=1e7)
    latents, finite = Encoder(vae)(images, NAMES)
    assert not finite.any()
    assert np.isinf(latents).any(axis=(1, 2, 3)).all()


# Loading ------------------------------------------------------------------------------------------------------------


def test_a_vae_is_found_alone_in_a_pipeline_or_embedded(vae, tmp_path):
    vae.save_pretrained(tmp_path / "alone")
    vae.half().save_pretrained(tmp_path / "pipeline" / "vae")
    for folder, near in (("alone", 0), ("pipeline", 1e-3)):
        loaded = load_vae(str(tmp_path / folder))
        assert not loaded.training
        for name, value in sdxl_vae().state_dict().items():
            assert loaded.state_dict()[name].dtype == torch.float32
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=near, atol=near)
    shapes = load_vae("shapes")
    assert (shapes.config.latent_channels, Encoder(shapes).downsampling) == (4, 4)


def test_what_is_no_vae_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    stored = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    deeper = {
        "block_out_channels": [8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    wrong = {
        "empty": (None, None, "could not be loaded"),
        "no-json": ("{", stored, "could not be loaded .*not valid JSON"),
        "no-weights": (json.dumps(config), None, "could not be loaded"),
        "cut-short": (json.dumps(config), stored[:1000], "could not be loaded"),
        "other-width": (json.dumps(config | {"latent_channels": 8}), stored, "could not be loaded .*expected shape"),
        "deeper": (json.dumps(config | deeper), stored, r"lacks \d+ weights of its own config.json, as decoder"),
    }
    for name, (text, content, says) in wrong.items():
        folder = tmp_path / name
        folder.mkdir()
        if text is not None:
            (folder / "config.json").write_text(text)
        if content is not None:
            (folder / "diffusion_pytorch_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"the VAE .*{name} (is )?{says}"):
            load_vae(str(folder))
    sdxl_unet().save_pretrained(tmp_path / "unet")
    for name in (str(tmp_path / "unet"), str(tmp_path / "nowhere"), "somebody/no-vae"):
        with pytest.raises(ValueError, match=r"could not be loaded .*give a folder"):
            load_vae(name)


# One file -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_sdxl_vae(tmp_path, monkeypatch):
    """A VAE of SDXL's form with fewer channels, as a folder: the form of the file is not written in it."""
    monkeypatch.setitem(encode.SDXL_VAE_CONFIG, "block_out_channels", [32] * 4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AutoencoderKL.from_config(encode.SDXL_VAE_CONFIG).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_vae_in_one_file(small_sdxl_vae):
    from_folder = load_vae(str(small_sdxl_vae))
    from_file = load_vae(str(small_sdxl_vae / "diffusion_pytorch_model.safetensors"))
    assert from_file.config["scaling_factor"] == 0.13025
    state = from_file.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in from_folder.state_dict().items())


def test_a_file_that_is_no_vae_of_sdxl_is_refused(small_sdxl_vae, tmp_path):
    file = small_sdxl_vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "decoder" not in name}, tmp_path / "half.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:1000])
    for name in ("half", "other", "text", "cut"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*give a folder"):
            load_vae(str(tmp_path / f"{name}.safetensors"))
