"""The embedded tiny world: images of coloured shapes, an exact detector, and a small SDXL-form model of them.

`world` draws images from a seed, `detector` finds the objects again, `model` holds the shipped weights, and `build`
trains them from scratch. Everything here runs offline on a CPU. The functions below are what the rest of the library
reaches by the world's name, "shapes" (see `gligen_xl.worlds.World`); each imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluate.protocol import Protocol
    from ..pipelines.layouts import ImageLayout
    from .detectors import ShapesDetector, ShapesGrounder

NAME = "shapes"
GUIDANCE_SCALE = 2.0
EXAMPLE = ("grass with a red circle", "a red circle")
DRAWN_FOR_VALIDATION = 256


def model_folder() -> Path:
    """Return the folder of the embedded model, inside the installed package."""
    folder = Path(__file__).parent / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the embedded shapes model is missing ({folder} has no model_index.json): reinstall gligen-xl, "
            "or make the model with `gligen-xl shapes build`"
        )
    return folder


def new_detector() -> ShapesDetector:
    from .detectors import ShapesDetector

    return ShapesDetector()


def new_grounder() -> ShapesGrounder:
    from .detectors import ShapesGrounder

    return ShapesGrounder()


def write_shards(vae: Any, out: Path, count: int, *, held_out: bool) -> None:
    from . import data
    from .world import TRAINING_SEED, VALIDATION_SEED

    seed = VALIDATION_SEED if held_out else TRAINING_SEED
    data.write_shards(vae, out, count, seed=seed, captions="plain" if held_out else "ground")


def new_protocol(count: int | None) -> Protocol:
    from .layouts import new_protocol

    return new_protocol(count)


def check_call(pipeline: Any, call: dict[str, Any], layouts: Sequence[ImageLayout]) -> None:
    from .limits import check_limits

    check_limits(pipeline, call, layouts)
