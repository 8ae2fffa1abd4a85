"""The embedded tiny world: images of coloured shapes, an exact detector, and a small SDXL-form model of them.

`world` draws images from a seed, `detect` finds the objects again, `model` holds the shipped weights, and
`build` trains them from scratch. Everything here runs offline on a CPU.
"""

from .detector import Detection, detect
from .model import model_folder
from .world import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, sample_scene, scene_layout

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "SHAPES",
    "Detection",
    "Scene",
    "detect",
    "draw",
    "model_folder",
    "sample_scene",
    "scene_layout",
]
