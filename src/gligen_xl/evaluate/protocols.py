"""Named protocols: which layouts are evaluated, what finds the objects, and which figures tell. See docs/protocols.md.

protocol = find_protocol("coco-2017", coco=Path("coco"))
protocol.layouts, protocol.detector, protocol.metrics
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..layout import Layout, read_layouts
from ..worlds import NAMES, find_world
from . import coco_layouts, coco_mig
from .coco_layouts import CocoSplit, gligen_layouts, layout_to_image_layouts
from .coco_mig import draw_layouts, find_published, published_real_images, read_published
from .protocol import AP, COLOUR, PLACE, WRONG, Protocol
from .real_images import RESOLUTION, RealImages, centre_crop, real_images_of, squeeze

# Class detector of COCO's categories; those of free phrases: COCO-MIG's own evaluation uses the tiny one (Swin-T).
COCO_DETECTOR = "ustc-community/dfine-xlarge-coco"
MIG_DETECTOR = "IDEA-Research/grounding-dino-tiny"
PHRASE_DETECTOR = "IDEA-Research/grounding-dino-base"


def find_protocol(
    name: str | Path,
    *,
    coco: str | Path | None = None,
    images: str | Path | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Protocol:
    """Return the protocol of that name, or of the layouts of that file.

    Args:
        name: one of PROTOCOLS, or a JSON or JSONL file of layouts.
        coco: the COCO folder, for those that begin with "coco".
        images: for a file, a folder of real images that are named by their layouts' ids.
        count: the first so many layouts; by default all, and 256 of the shapes world.
        seed: of the layouts that are drawn (COCO-MIG and COCO-Position without a published file). Results of two seeds
            are of different layouts; the seed of the noise is no reason to change this one.

    Raises:
        FileNotFoundError: names what is missing, and where COCO's files are to be had.
        ValueError: a file is broken or of another kind, nothing is left of it, or `count` is more than there is.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} layouts; expected at least 1")
    folder = None if coco is None else Path(coco)
    if world := find_world(name):
        return world.new_protocol(count)
    if name in PROTOCOLS:
        protocol = _COCO[str(name)](folder, seed)
    else:
        protocol = _file(Path(name), None if images is None else Path(images))
    if not protocol.layouts:
        rules = ", ".join(f"{key} {value}" for key, value in protocol.parameters.items())
        raise ValueError(f"nothing is left of {folder} for {protocol.name}: {rules}")
    if count is not None and count > len(protocol.layouts):
        raise ValueError(f"count is {count}; {name} holds {len(protocol.layouts)} layouts")
    protocol = replace(protocol, layouts=protocol.layouts[:count])
    if isinstance(protocol.real, RealImages):
        protocol.real.check(protocol.layouts)
    return protocol


def grey(layout: Layout) -> Image.Image:
    """Return a uniformly grey image of the layout's size, where it has one."""
    return Image.new("RGB", (layout.width or RESOLUTION, layout.height or RESOLUTION), (128, 128, 128))


# Each of them ------------------------------------------------------------------------------------------------------


def _file(path: Path, images: Path | None) -> Protocol:
    if not path.is_file():
        raise FileNotFoundError(f"no layout file {path}, and no such protocol; there are {', '.join(PROTOCOLS)}")
    layouts = read_layouts(path)
    return Protocol(
        name=path.stem,
        paper="",
        parameters={"file": path.name},
        layouts=layouts,
        detector=PHRASE_DETECTOR,
        metrics=(*PLACE, *AP, *WRONG, "clip", "clip_objects"),
        real=None if images is None else real_images_of(images, layouts),
        empty=grey,
    )


def _coco(folder: Path | None, seed: int) -> Protocol:
    """Use COCO 2017 if the folder has it, else COCO 2014."""
    split = CocoSplit.find(folder, "val2017", "val2014")
    return _coco_2017(folder, seed) if split.name == "val2017" else _coco_2014(folder, seed)


def _coco_2014(folder: Path | None, seed: int) -> Protocol:
    split = CocoSplit.find(folder, "val2014")
    images, captions = split.images(), split.captions()
    return Protocol(
        name="coco-2014",
        paper="GLIGEN, arXiv 2301.07093, section 5.1",
        parameters={
            **_about(split, "centre crop"),
            "prompts": _prompts(captions),
            "smallest_area": coco_layouts.SMALLEST,
            "most_objects": coco_layouts.MOST,
        },
        layouts=gligen_layouts(images, captions),
        detector=COCO_DETECTOR,
        metrics=("fid", *AP, *PLACE, *WRONG, "clip", "clip_objects"),
        real=split.real_images(images, centre_crop),
        empty=grey,
    )


def _coco_2017(folder: Path | None, seed: int) -> Protocol:
    split = CocoSplit.find(folder, "val2017")
    images, captions = split.images(), split.captions()
    return Protocol(
        name="coco-2017",
        paper="layout-to-image: filter of sg2im, arXiv 1804.01622; YOLO score of LAMA, ICCV 2021; GLIGEN, section 5.1",
        parameters={
            **_about(split, "squeeze"),
            "prompts": _prompts(captions),
            "area_above": coco_layouts.ABOVE,
            "fewest_objects": coco_layouts.FEWEST_OBJECTS,
            "most_objects": coco_layouts.MOST_OBJECTS,
        },
        layouts=layout_to_image_layouts(images, captions),
        detector=COCO_DETECTOR,
        metrics=("fid", *AP, *PLACE, *WRONG, "clip", "clip_objects"),
        real=split.real_images(images, squeeze),
        empty=grey,
    )


def _about(split: CocoSplit, frame: str) -> dict[str, Any]:
    about = {"split": split.name, "frame": frame, "resolution": RESOLUTION, "crowds": "left out"}
    if not (split.folder / split.name).is_dir():
        about["real_pictures"] = f"none, the folder has no {split.name}/"
    return about


def _prompts(captions: Mapping[str, str]) -> str:
    return "first caption" if captions else "names of the categories, the folder has no captions"


def _coco_mig(folder: Path | None, seed: int) -> Protocol:
    layouts, parameters, _ = _two_to_six(folder, coco_mig.MIG_FILES, colours=True, seed=seed)
    return Protocol(
        name="coco-mig",
        paper="MIGC, arXiv 2402.05408",
        parameters={**parameters, "real_pictures": "none, no photograph shows the colours that were drawn"},
        layouts=layouts,
        detector=MIG_DETECTOR,
        metrics=(
            "success",
            "mean_iou_right",
            *PLACE[1:],
            *COLOUR,
            *WRONG,
            "clip",
            "clip_objects",
        ),
        attributes=("colour",),
        real=None,
        empty=grey,
    )


def _coco_position(folder: Path | None, seed: int) -> Protocol:
    layouts, parameters, real = _two_to_six(folder, coco_mig.POSITION_FILES, colours=False, seed=seed)
    return Protocol(
        name="coco-position",
        paper="MIGC++, arXiv 2407.02329; file and evaluation of ConsistCompose, arXiv 2511.18333",
        parameters=parameters,
        layouts=layouts,
        detector=MIG_DETECTOR,
        metrics=(*PLACE, *AP, *WRONG, "clip", "clip_objects"),
        real=real,
        empty=grey,
    )


def _two_to_six(
    folder: Path | None, names: Sequence[str], *, colours: bool, seed: int
) -> tuple[list[Layout], dict[str, Any], RealImages | None]:
    """Return the layouts of a published file, or draw them from COCO's validation images; with their parameters and
    images."""
    if folder and (published := find_published(folder, names)):
        layouts, image_ids = read_published(published)
        return layouts, {"file": published.name, "frame": "squeeze"}, published_real_images(folder, image_ids)
    instead = f", or with {' or '.join(names)} ({coco_mig.SOURCES})"
    split = CocoSplit.find(folder, "val2014", "val2017", instead=instead)
    images = split.images()
    layouts = draw_layouts(images, colours=colours, seed=seed)
    parameters = {
        "drawn": f"from {split.name}, since the folder has no {' or '.join(names)}: not the published layouts",
        "layout_seed": seed,
        "smallest_side": coco_mig.SMALLEST_SIDE,
        "layouts_by_objects": {n: sum(len(layout.boxes) == n for layout in layouts) for n in coco_mig.NUMBERS},
        **_about(split, "squeeze"),
    }
    return layouts, parameters, split.real_images(images, squeeze)


_COCO: Mapping[str, Callable[[Path | None, int], Protocol]] = {
    "coco": _coco,
    "coco-2014": _coco_2014,
    "coco-2017": _coco_2017,
    "coco-position": _coco_position,
    "coco-mig": _coco_mig,
}
PROTOCOLS = (*NAMES, *_COCO)
