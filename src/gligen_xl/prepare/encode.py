"""Encodes images to latents, with any `AutoencoderKL`.

The same image gives the same bits, whatever it shares a batch with: noise follows from (seed, name of the image),
and images pass the VAE one by one unless more are asked for, as the last bit of a convolution depends on how many
there are.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..data.shards import DOWNSAMPLING, SDXL_SCALING_FACTOR
from ..hub import local_folder, model_files, pipeline_files
from ..io import write_json
from ..worlds import find_world

SDXL_VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": float(SDXL_SCALING_FACTOR),
}


def load_vae(name: str) -> AutoencoderKL:
    """Load a VAE in float32: a folder of it or of a pipeline, one file of SDXL's, a Hub repository, or "shapes".

    Raises:
        ValueError: it could not be loaded, or lacks weights.
    """
    if Path(name).is_file():
        return _load_vae_file(Path(name))
    if world := find_world(name):
        name = str(world.model_folder())
    try:
        folder = local_folder(name, "VAE", lambda files, _: _vae_files(files))
        loaded: Any = AutoencoderKL.from_pretrained(
            str(folder / "vae" if (folder / "vae" / "config.json").is_file() else folder),
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers has its own kinds for each way of being wrong
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"the VAE {name} could not be loaded ({text}); give a folder (--vae)") from error
    vae, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # diffusers would go on with numbers by chance
        raise ValueError(f"the VAE {name} lacks {len(missing)} weights of its own config.json, as {missing[0]}")
    return vae.eval()


def _vae_files(files: list[str]) -> list[str]:
    """Choose the files of a VAE's, or a pipeline's, repository."""
    return model_files(files) if "config.json" in files else [n for n in pipeline_files(files, None) if n[:4] == "vae/"]


def _load_vae_file(path: Path) -> AutoencoderKL:
    """Load a VAE in one file, which does not say what form it has: SDXL's is expected."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", SDXL_VAE_CONFIG)
        try:
            vae: Any = AutoencoderKL.from_single_file(str(path), config=folder, local_files_only=True)
        except Exception as error:  # diffusers has many kinds, by what it takes the file for
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is no VAE of SDXL in one file ({reason}); give a folder (--vae)") from error
    if missing := sorted(name for name, value in vae.state_dict().items() if value.is_meta):
        raise ValueError(f"{path} lacks {len(missing)} weights of SDXL's VAE, as {missing[0]}; give a folder (--vae)")
    return vae.float().eval()


class Encoder:
    """A VAE that makes latents as training needs them.

    Args:
        dtype: to compute in; the weights stay in float32. Where half precision overflows, float32 takes over.
        seed: of the samples of the posterior; None takes its mean.
        at_once: images in one pass. More than one may be faster on a GPU; the last bit then depends on their number.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        at_once: int = 1,
    ):
        self.vae: Any = vae.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.dtype, self.seed, self.at_once = torch.device(device), dtype, seed, at_once
        self.scale = float(vae.config["scaling_factor"])
        self.shift = float(vae.config.get("shift_factor") or 0)
        self.downsampling = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.channels = int(vae.config["latent_channels"])
        self.repeated = 0  # images that overflowed and were encoded again in float32

    @property
    def metadata(self) -> dict[str, str]:
        """What shards say of their latents, with the name of the VAE."""
        values = {"scaling_factor": repr(self.scale), "latents": "mean" if self.seed is None else "sample"}
        values |= {"seed": str(self.seed)} if self.seed is not None else {}
        values |= {"shift_factor": repr(self.shift)} if self.shift else {}
        return values | ({"downsampling": str(self.downsampling)} if self.downsampling != DOWNSAMPLING else {})

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode images of one size, and say which of them can be trained on.

        Args:
            images: (h, w, 3) uint8 each. names: of the images, from which their noise follows.

        Returns:
            (B, C, h / 8, w / 8) float16, scaled; (B,) bool, False where they are not finite, in float32 either.
        """
        latents = []
        for first in range(0, len(images), self.at_once):
            part = slice(first, first + self.at_once)
            latents.append(self._encode(np.stack(images[part]), names[part]))
        result = torch.cat(latents).half().cpu().numpy()
        return result, np.asarray(np.isfinite(result).all(axis=(1, 2, 3)))

    def _encode(self, images: np.ndarray, names: Sequence[str]) -> Tensor:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = self._posterior(pixels, names, self.dtype)
        if self.dtype != torch.float32:
            bad = ~latents.half().isfinite().flatten(1).all(dim=1)
            for k in torch.nonzero(bad).flatten().tolist():
                latents[k : k + 1] = self._posterior(pixels[k : k + 1], names[k : k + 1], torch.float32)
                self.repeated += 1
        return latents

    def _posterior(self, pixels: Tensor, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """Return scaled latents in float32."""
        half = torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with half:
            posterior = self.vae.encode(pixels, return_dict=False)[0]
        latents = posterior.mean.float()
        if self.seed is not None:
            noise = np.stack([posterior_noise(self.seed, name, tuple(latents.shape[1:])) for name in names])
            latents = latents + posterior.std.float() * torch.from_numpy(noise).to(self.device)
        return (latents - self.shift) * self.scale


def posterior_noise(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the standard normal noise of an image, float32: the same on every device."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return rng.standard_normal(shape, np.float32)
