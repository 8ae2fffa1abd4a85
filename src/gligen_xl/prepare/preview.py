"""Shows samples of shards as images: latents decoded, with what their table says drawn over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..data.shards import Row, Shard, shard_stems
from ..escape import printable
from ..images.draw import draw_boxes, enlarged, grid
from ..io import read_json
from ..layout import Layout
from ..redact import public_name
from .encode import load_vae
from .unit import WORK_FOLDER


def show_samples(
    folder: str | Path, *, index: int | None = None, count: int = 16, vae: str | None = None, min_score: float = 0.0
) -> tuple[Image.Image, list[str]]:
    """Draw one sample, or `count` spread evenly over all; and describe each in a line.

    Args:
        index: number of the sample, counted through the shards by name.
        vae: folder or repository; by default what the shards name.
        min_score: boxes of lower confidence are left out.

    Raises:
        ValueError: no such sample, or a VAE that is not of these latents.
    """
    shards = [Shard(stem, with_table=False) for stem in shard_stems(folder)]
    total = sum(map(len, shards))
    if not total:
        raise ValueError(f"{folder} holds no samples")
    if index is not None and not 0 <= index < total:
        raise ValueError(f"there is no sample {index}; {folder} holds {total}, from 0")
    numbers = [index] if index is not None else sorted({int(k) for k in np.linspace(0, total - 1, min(count, total))})
    name = vae or _prepared_with(shards[0]) or shards[0].metadata.get("vae", "")
    if not name:
        raise ValueError("these shards do not name their VAE; say which by vae (--vae)")
    decoder = load_vae(name)
    images, lines = [], []
    for number in numbers:
        shard, place = _find(shards, number)
        row = shard.row(place)
        keep = [k for k, score in enumerate(row.scores) if score >= min_score]
        layout = Layout(phrases=[row.phrases[k] for k in keep], boxes=[row.boxes[k] for k in keep])
        lines.append(_line(number, shard, row, layout))
        drawn = draw_boxes(enlarged(_decode(decoder, shard, place)), layout)
        images.append(grid([[drawn]], captions=[f"{number}: {row.caption}"], gap=2))
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = [images[first : first + columns] for first in range(0, len(images), columns)]
    return grid(rows), lines


def _prepared_with(shard: Shard) -> str:
    """Return the VAE of the preparation whose settings lie beside the shards, if it is the one that the shard names:
    the shard itself has only the last name of a folder."""
    for folder in (shard.stem.parent, shard.stem.parent.parent):  # each resolution may have a folder of its own
        if (file := folder / WORK_FOLDER / "settings.json").is_file():
            settings = read_json(file)
            name = settings.get("vae") if isinstance(settings, dict) else None
            if isinstance(name, str) and public_name(name, hub=True) == shard.metadata.get("vae"):
                return name
    return ""


def _find(shards: list[Shard], number: int) -> tuple[Shard, int]:
    for shard in shards:
        if number < len(shard):
            return shard, number
        number -= len(shard)
    raise AssertionError("the number was checked")


@torch.no_grad()
def _decode(vae: AutoencoderKL, shard: Shard, place: int) -> Image.Image:
    latents = torch.from_numpy(np.array(shard.latents[place : place + 1], np.float32))
    if latents.shape[1] != vae.config["latent_channels"]:
        raise ValueError(f"{shard.stem} has {latents.shape[1]} channels, the VAE {vae.config['latent_channels']}")
    factor = float(shard.metadata.get("scaling_factor") or vae.config["scaling_factor"])
    shift = float(shard.metadata.get("shift_factor") or 0)
    decode: Any = vae.decode  # its annotation names a type that no tensor has
    pixels = decode(latents / factor + shift, return_dict=False)[0][0].clamp(-1, 1)
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def _line(number: int, shard: Shard, row: Row, layout: Layout) -> str:
    size = f"{row.original_width} x {row.original_height}"
    return printable(f"{number}: {row.image_id} ({shard.stem.name}, {size}, {len(layout.boxes)} boxes) {row.caption}")
