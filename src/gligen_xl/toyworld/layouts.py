"""Layouts of the shapes world, and their images: drawn from the scenes that the layouts are of."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from ..evaluate.protocol import PLACE, WRONG, Protocol
from ..layout import Layout
from .world import HELD_OUT_SEED, IMAGE_SIZE, Scene, draw, sample_scene, scene_layout

USUAL_COUNT = 256  # scenes, where no number is asked for


def held_out_layouts(count: int, seed: int = HELD_OUT_SEED) -> list[Layout]:
    """Return layouts of the shapes world that no training has seen; their prompts never say where anything is."""
    if count < 1:
        raise ValueError(f"{count} layouts; expected at least 1")
    return [scene_layout(sample_scene(seed, k), seed=seed, index=k, places=False) for k in range(count)]


def scene_image(layout: Layout) -> Image.Image:
    """Draw the scene that a layout of `held_out_layouts` describes."""
    return draw(_scene(layout))


def background(layout: Layout) -> Image.Image:
    """Draw the same scene without its objects."""
    return draw(replace(_scene(layout), objects=()))


def _scene(layout: Layout) -> Scene:
    """Return the scene of a layout, by the id that `scene_layout` gives: shapes-SEED-INDEX."""
    assert layout.id is not None
    _, seed, index = layout.id.split("-")
    return sample_scene(int(seed), int(index))


def new_protocol(count: int | None) -> Protocol:
    """Held-out scenes, their images and their backgrounds; `USUAL_COUNT` by default."""
    count = USUAL_COUNT if count is None else count
    return Protocol(
        name="shapes",
        paper="",
        parameters={"scenes": count, "scene_seed": HELD_OUT_SEED, "pixels": IMAGE_SIZE, "prompts": "without places"},
        layouts=held_out_layouts(count),
        detector="shapes",
        metrics=(*PLACE, "colour", "shape", "colour_of_found", "shape_of_found", *WRONG),
        attributes=("colour", "shape"),
        real=scene_image,
        empty=background,
    )
