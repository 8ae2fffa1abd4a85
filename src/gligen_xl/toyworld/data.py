"""Training data of the shapes world: scenes drawn, encoded and written as ordinary shards."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from ..data.shard_writer import write_shard
from ..data.shards import Row, has_shard
from .world import IMAGE_SIZE, draw, generator, ground_caption, sample_scene, scene_layout

SHARD_IMAGES, ENCODED_AT_ONCE = 10_000, 100

Captions = Literal["places", "ground", "plain"]


def images(seed: int, first: int, count: int) -> Tensor:
    """Drawn scenes (count, 3, 64, 64), -1..1."""
    drawn = np.stack([np.asarray(draw(sample_scene(seed, index))) for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_shards(vae: AutoencoderKL, out: Path, count: int, *, seed: int, captions: Captions) -> None:
    """Draw and encode `count` scenes of `seed` into shards under `out`; whole shards that stand there are kept.

    Args:
        captions: "places", half of them say where things are, so that a base learns positions; "ground", none does and
            half name the background alone, so that an adapter has to take objects from its boxes; "plain", all name
            the objects and none says where they are.
    """
    for first in range(0, count, SHARD_IMAGES):
        size = min(SHARD_IMAGES, count - first)
        stem = out / f"shapes-{seed}-{first:07d}-{size}"
        if has_shard(stem):
            continue
        with tqdm(total=size, desc=stem.name, unit="image", disable=None) as bar:
            latents = []
            for start in range(first, first + size, ENCODED_AT_ONCE):
                part = min(ENCODED_AT_ONCE, first + size - start)
                latents.append(encode(vae, images(seed, start, part)))
                bar.update(part)
        scale = vae.config["scaling_factor"]
        downsampling = str(IMAGE_SIZE // latents[0].shape[-1])
        metadata = {"resolution": str(IMAGE_SIZE), "downsampling": downsampling}
        metadata |= {"vae": "shapes", "scaling_factor": str(scale)}
        rows = [_row(seed, index, captions) for index in range(first, first + size)]
        write_shard(stem, np.concatenate(latents), rows, metadata)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in -1..1 to scaled latents, float16: the mean of the posterior."""
    images = images.to(vae.device, vae.dtype).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(images, return_dict=False)[0]
    return np.ascontiguousarray((posterior.mean * vae.config["scaling_factor"]).half().cpu().numpy())


def _row(seed: int, index: int, captions: Captions) -> Row:
    scene = sample_scene(seed, index)
    places = captions == "places" and generator("places", seed, index).random() < 0.5
    layout = scene_layout(scene, seed=seed, index=index, places=bool(places))
    return Row(
        image_id=f"shapes-{seed}-{index}",
        caption=ground_caption(scene, index) if captions == "ground" and index % 2 == 0 else layout.prompt,
        boxes=[item.box for item in scene.objects],
        scores=[1.0] * len(scene.objects),
        phrases=list(layout.phrases),
        original_height=IMAGE_SIZE,
        original_width=IMAGE_SIZE,
    )
