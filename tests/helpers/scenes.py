"""Folders of images of the shapes world, to prepare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL.Image import Image

from gligen_xl.toyworld.world import draw, sample_scene, scene_layout


def scenes_folder(
    folder: Path, count: int, *, seed: int, changed: Callable[[Image, int], Image] = lambda image, _: image
) -> Path:
    """Images 0.png, 1.png, ... in `folder`, with rows in the convention of Hugging Face.

    Args:
        changed: makes of an image and its number the one that is saved.
    """
    folder.mkdir()
    lines = []
    for index in range(count):
        scene = sample_scene(seed, index)
        layout = scene_layout(scene, seed=seed, index=index)
        changed(draw(scene), index).save(folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "text": layout.prompt, "phrases": layout.phrases, "boxes": layout.boxes}
        lines.append(json.dumps(row | {"box_format": "xyxy"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
