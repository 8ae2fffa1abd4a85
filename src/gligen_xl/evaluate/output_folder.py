"""The folder of an evaluation: what its images are generated with, and one process at a time for each part of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import adapter_config, adapter_state_dict, is_attached
from ..adapter.weights import fingerprint
from ..layout import Layout, write_layouts
from ..pipelines.grounding import GroundingMixin
from ..workdir import claim_settings, exclusive, read_settings

GENERATION, LAYOUTS = "generation.json", "layouts.jsonl"


def generation_settings(pipeline: GroundingMixin, **settings: Any) -> dict[str, Any]:
    """Return all that a folder's images depend on, beside their layouts and conditions.

    These are `settings`, the scheduler, and checksums of the U-Net's and the adapter's weights, where these can be
    read (with sequential offload they cannot).
    """
    settings |= {"scheduler": type(pipeline.scheduler).__name__}
    unet = pipeline.unet
    if any(value.is_meta for value in unet.state_dict().values()):
        return settings
    return settings | {"unet_checksum": fingerprint(unet), "adapter_checksum": _adapter_checksum(unet)}


def _adapter_checksum(unet: torch.nn.Module) -> str:
    if not is_attached(unet):
        return "no adapter"
    digest = hashlib.sha256()
    for name, value in sorted(adapter_state_dict(unet).items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_keyed(out: str | Path, layouts: Mapping[str, Layout]) -> None:
    """Write `layouts.jsonl`, where the id of each layout is its key, by which its images are called."""
    write_layouts(Path(out) / LAYOUTS, [replace(layout, id=key) for key, layout in layouts.items()])


def claim_generation(out: str | Path, layouts: Mapping[str, Layout], settings: Mapping[str, Any]) -> None:
    """Write what the images of `out` are generated with, and their layouts; a later process has to agree.

    Raises:
        ValueError: the images there were generated with something else; the error names it.
    """
    claim_settings(Path(out) / GENERATION, settings, f"{out} holds images generated")
    write_keyed(out, layouts)


read_generation = read_settings


def only_one_at(out: str | Path, part: tuple[int, int]) -> AbstractContextManager[None]:
    """Hold this part of the folder during the block.

    Raises:
        ValueError: another process generates it.
    """
    number, parts = part
    busy = (
        f"another process generates part {number}/{parts} in {out}; wait for it, or share the work "
        "(--part 1/2 and --part 2/2)"
    )
    return exclusive(Path(out) / f".part-{number}-of-{parts}.lock", busy)


def check_slots(pipeline: GroundingMixin, layouts: Mapping[str, Layout]) -> None:
    """Raise ValueError if a layout has more objects than the adapter takes."""
    if not is_attached(getattr(pipeline, "unet", None)):
        return
    slots = adapter_config(pipeline.unet).slots
    for key, layout in layouts.items():
        if len(layout.boxes) > slots:
            raise ValueError(f"layout {key} has {len(layout.boxes)} objects, the adapter {slots} slots; leave it out")
