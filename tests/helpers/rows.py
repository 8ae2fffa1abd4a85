"""Rows and latents of shards, as training reads them."""

import numpy as np

from gligen_xl.data.shards import Row

METADATA = {"resolution": "64", "vae": "tiny", "scaling_factor": "0.18215"}


def row(k, **changes):
    settings = {
        "image_id": f"picture-{k}", "caption": f"grass with {k} rings", "boxes": [(0.1, 0.2, 0.3, 0.4)] * k,
        "scores": [0.5] * k, "phrases": ["a ring"] * k, "original_height": 480, "original_width": 640, "crop_left": k,
    }  # fmt: skip
    return Row(**(settings | changes))


def latents(count, side=4):
    return np.random.default_rng(0).normal(size=(count, 4, side, side)).astype(np.float16)
