"""What all images of a folder are generated with, written into it; and one process at a time at a part of them."""

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
from ..io import read_json, write_json
from ..layout import Layout, write_layouts
from ..locks import only_one
from ..pipelines.grounding import GroundingMixin

BINDING, LAYOUTS = "generation.json", "layouts.jsonl"


def generation_settings(pipeline: GroundingMixin, **settings: Any) -> dict[str, Any]:
    """What a folder's images depend on beside their layouts and ways: `settings`, the scheduler, and checksums of
    the U-Net's and the adapter's weights, where these can be read (with sequential offload they cannot)."""
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
    """`layouts.jsonl`: the id of each is its key, which its images are called by."""
    write_layouts(Path(out) / LAYOUTS, [replace(layout, id=key) for key, layout in layouts.items()])


def bind(out: str | Path, layouts: Mapping[str, Layout], settings: Mapping[str, Any]) -> None:
    """Say what the images of `out` are of, and are generated with: the first process does, the others agree.

    Raises:
        ValueError: they were generated with something else; names it.
    """
    path = Path(out) / BINDING
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(path.with_name(f".{BINDING}.lock"), f"another process has kept {path} locked for a minute", 60):
        if not path.is_file():
            write_json(path, settings)
        former = read_binding(path)
        for name in sorted(former.keys() & settings.keys(), key=lambda name: (name.endswith("checksum"), name)):
            if former[name] != settings[name]:
                raise ValueError(
                    f"{out} holds images generated with {name} {former[name]!r}, now it is {settings[name]!r}; "
                    "choose another folder (--out)"
                )
        write_keyed(out, layouts)


def read_binding(path: Path) -> dict[str, Any]:
    """What `bind` wrote.

    Raises:
        ValueError: it is something else.
    """
    former = read_json(path)
    if not isinstance(former, dict):
        raise ValueError(f"{path} does not say what the images beside it were generated with; choose another folder")
    return former


def only_one_at(out: str | Path, part: tuple[int, int]) -> AbstractContextManager[None]:
    """Inside the block this part of the folder is this process's.

    Raises:
        ValueError: another process is at it.
    """
    number, parts = part
    busy = (
        f"another process generates part {number}/{parts} in {out}; wait for it, or share the work "
        "(--part 1/2 and --part 2/2)"
    )
    return only_one(Path(out) / f".part-{number}-of-{parts}.lock", busy)


def check_slots(pipeline: GroundingMixin, layouts: Mapping[str, Layout]) -> None:
    """Raises ValueError where a layout has more objects than the adapter takes."""
    if not is_attached(getattr(pipeline, "unet", None)):
        return
    slots = adapter_config(pipeline.unet).slots
    for key, layout in layouts.items():
        if len(layout.boxes) > slots:
            raise ValueError(f"layout {key} has {len(layout.boxes)} objects, the adapter {slots} slots; leave it out")
