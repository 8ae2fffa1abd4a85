"""COCO-MIG and COCO-Position: two to six objects of COCO images, with and without a colour drawn for each.

Published files are read, in whichever of their forms a folder has:

    mig_bench.json         {"0": {"caption": ..., "segment": [{"bbox": [x0, y0, x1, y1], "label": "a red cat"}, ...],
                           "image_id": "500084"}, ...}; boxes are shares of the image
    mig_bench_anno.yaml    {prompt: {"a red cat": [[x0, y0, x1, y1], ...], ..., "coco_id": "6"}, ...}
    coco_position.jsonl    as mig_bench.json, in spite of its name

Without one, the layouts are drawn by the procedure of COCO-MIG's authors (github.com/LeyRio/MIG_Bench). That draws
without a seed, so the drawn ones are of the same kind as the published 800 and not the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rng import generator
from ..io import read_json
from ..layout import Layout
from ..limits import MAX_UNPACKED
from ..yaml_io import read_yaml
from .coco_layouts import HOST, CocoImage
from .real_images import RealImages, squeeze

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown")
NUMBERS = range(2, 7)  # objects in a layout
OF_EACH = 160  # layouts for each number
SMALLEST_SIDE = 1 / 8  # of the image's; an object that is thinner is left out

MIG_FILES = ("mig_bench.json", "mig_bench_anno.yaml")
POSITION_FILES = ("coco_position.jsonl",)
SOURCES = (
    "mig_bench.json is linked at github.com/LeyRio/MIG_Bench, mig_bench_anno.yaml is in bench_file/ of "
    "github.com/limuloo/MIGC, and coco_position.jsonl in eval/data/ of github.com/XuankeShi/ConsistCompose"
)


def find_published(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first of these files that stands in the folder or in its `annotations/`."""
    paths = (place / name for name in names for place in (folder, folder / "annotations"))
    return next((path for path in paths if path.is_file()), None)


def read_published(path: Path) -> tuple[list[Layout], dict[str, str]]:
    """Return the layouts of a published file by their numbers, and the COCO image of each where the file says it.

    Raises:
        ValueError: names the file and the entry that is not as expected.
    """
    entries = sorted(_entries(path), key=lambda entry: int(entry[0]))
    if not entries:
        raise ValueError(f"{path} holds no layouts")
    layouts, image_ids = [], {}
    for number, prompt, objects, image in entries:
        try:
            phrases, boxes = [phrase for phrase, _ in objects], [box for _, box in objects]
            layouts.append(Layout(prompt=prompt.strip(), phrases=phrases, boxes=boxes, id=number))
        except ValueError as error:
            raise ValueError(f"{path}, layout {number}: {error}") from error
        if image is not None:
            image_ids[number] = image
    return layouts, image_ids


_Entry = tuple[str, str, list[tuple[str, Any]], str | None]  # number, prompt, (phrase, box) each, COCO image


def _entries(path: Path) -> Iterator[_Entry]:
    in_yaml = path.suffix == ".yaml"
    content = read_yaml(path) if in_yaml else read_json(path, limit=MAX_UNPACKED)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object of layouts; {SOURCES}")
    for key, entry in content.items():
        try:
            yield _yaml_entry(key, entry) if in_yaml else _json_entry(key, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected = "phrases with boxes, and coco_id" if in_yaml else "caption, segment (bbox, label) and image_id"
            raise ValueError(f"{path}, layout {key!r:.60}: expected {expected}; got {entry!r:.80}") from error


def _json_entry(number: str, entry: Mapping[str, Any]) -> _Entry:
    objects = [(item["label"].strip(), item["bbox"]) for item in entry["segment"]]
    return str(int(number)), entry["caption"], objects, str(int(entry["image_id"]))


def _yaml_entry(prompt: str, entry: Mapping[str, Any]) -> _Entry:
    objects = [(phrase, box) for phrase, boxes in entry.items() if phrase != "coco_id" for box in boxes]
    return str(int(entry["coco_id"])), prompt, objects, None  # coco_id is the layout's number and no image of COCO


def published_real_images(folder: Path, image_ids: Mapping[str, str]) -> RealImages | None:
    """Return the images of COCO 2014 that published layouts were made of; None where the folder has none."""
    images = folder / "val2014"
    if not image_ids or not images.is_dir():
        return None
    return RealImages(
        files={number: images / f"COCO_val2014_{int(image_id):012d}.jpg" for number, image_id in image_ids.items()},
        frame=squeeze,
        source=f"; they are in {HOST}/zips/val2014.zip",
    )


# Drawn --------------------------------------------------------------------------------------------------------------


def draw_layouts(images: Sequence[CocoImage], *, colours: bool, seed: int) -> list[Layout]:
    """Return at most 160 layouts for each number of objects from 2 to 6, of images in an order that follows from the
    seed.

    Objects of which a side is less than an eighth of the image's are left out. Of more than six, the first six stay,
    largest first. Images with a person among what stays are left out, and, with colours, prompts that were there.
    Layouts of 2, 3, 4, 5 and 6 objects take turns, so that the first ones are as mixed as all.
    """
    taken: dict[int, list[Layout]] = {number: [] for number in NUMBERS}
    prompts: set[str] = set()
    for k in generator("coco-mig", seed).permutation(len(images)).tolist():
        image = images[k]
        boxes = image.boxes.clip(0, 1)
        chosen = _chosen(boxes)
        names = [image.categories[j] for j in chosen]
        if len(taken.get(len(names), ())) >= OF_EACH or len(names) not in taken or "person" in names:
            continue
        drawn = generator("colours", seed, image.id).choice(COLOURS, len(names)).tolist()
        phrases = [f"a {colour} {name}" if colours else f"a {name}" for colour, name in zip(drawn, names, strict=True)]
        prompt = f"a photo of {' and '.join(phrases)}"
        if colours and prompt in prompts:
            continue
        prompts.add(prompt)
        layout = Layout(prompt=prompt, phrases=phrases, boxes=boxes[chosen].tolist(), id=image.id)
        taken[len(names)].append(layout)
    return [layout for turn in zip_longest(*taken.values()) for layout in turn if layout is not None]


def _chosen(boxes: np.ndarray) -> list[int]:
    """Return which of these objects (n, 4) stay, at most six."""
    sides = boxes[:, 2:] - boxes[:, :2]
    wide = np.flatnonzero((sides >= SMALLEST_SIDE).all(-1)).tolist()
    first = wide[: NUMBERS[-1]]
    return sorted(first, key=lambda k: -sides[k].prod()) if len(wide) > len(first) else first
