"""The shapes world: a scene is a background and one to four coloured shapes, drawn and described from a seed.

    scene = sample_scene(seed=7, index=0)
    image = draw(scene)                    # PIL, 64 x 64
    layout = scene_layout(scene)             # caption, phrases and boxes

Every scene is a function of (seed, index) alone. Within one scene no two objects share a colour, so a colour names
an object; objects may overlap a little, the later one in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..data.rng import generator
from ..layout import Layout

IMAGE_SIZE = 64  # pixels, both ways

# Scenes are numbered within a seed. What is trained on, looked at while training, and evaluated never meet.
TRAINING_SEED, VALIDATION_SEED, HELD_OUT_SEED = 4, 5, 1_000_003

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 30, 36),
    "yellow": (250, 218, 34),
    "cyan": (30, 214, 214),
    "blue": (34, 62, 226),
    "purple": (146, 36, 186),
    "pink": (252, 126, 194),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grass": (108, 158, 84),
    "sea": (88, 146, 180),
    "sand": (214, 194, 150),
    "night": (52, 56, 100),
    "snow": (226, 232, 238),
}
SKIES: dict[str, tuple[int, int, int]] = {  # above the horizon, where a background has one
    "grass": (178, 206, 230),
    "sea": (196, 214, 226),
    "sand": (176, 202, 226),
    "night": (84, 76, 128),
    "snow": (176, 192, 214),
}

_STAR = [  # ten points of a five-pointed star that fills the unit box
    (0.5 + radius * np.sin(angle), 0.5 - radius * np.cos(angle))
    for k, angle in enumerate(np.arange(10) * np.pi / 5)
    for radius in [0.5 if k % 2 == 0 else 0.22]
]
_STAR_LOW, _STAR_HIGH = np.min(_STAR, axis=0), np.max(_STAR, axis=0)
_OUTLINES = {
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": [tuple((np.array(p) - _STAR_LOW) / (_STAR_HIGH - _STAR_LOW)) for p in _STAR],
    "cross": [
        (a, b)
        for a, b in [
            (0.32, 0), (0.68, 0), (0.68, 0.32), (1, 0.32), (1, 0.68), (0.68, 0.68),
            (0.68, 1), (0.32, 1), (0.32, 0.68), (0, 0.68), (0, 0.32), (0.32, 0.32),
        ]
    ],
}  # fmt: skip
_SUPERSAMPLE = 4
_RING_HOLE = 0.24  # width of the ring's band, as a share of its box


@dataclass(frozen=True)
class Object:
    """One coloured shape. `box` is xyxy, 0-1, and encloses the shape exactly."""

    colour: str
    shape: str
    box: tuple[float, float, float, float]

    @property
    def phrase(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A whole image: background, horizon (0-1 from the top, or None) and objects, back to front."""

    background: str
    horizon: float | None
    objects: tuple[Object, ...]
    texture_seed: int


def sample_scene(seed: int, index: int, *, num_objects: int | None = None) -> Scene:
    """Draw scene number `index` of the endless sequence of `seed`.

    `num_objects` (1-4) fixes the count, which is drawn otherwise.
    """
    if num_objects is not None and not 1 <= num_objects <= 4:
        raise ValueError(f"num_objects is {num_objects}; a scene holds 1 to 4 objects")
    rng = generator("scene", seed, index)
    count = num_objects or int(rng.choice([1, 2, 3, 4], p=[0.3, 0.3, 0.25, 0.15]))
    boxes: list[tuple[float, float, float, float]] = []
    while len(boxes) < count:
        candidate = _sample_box(rng, largest=(0.56, 0.5, 0.44, 0.4)[count - 1])
        if all(_overlap(candidate, box) <= 0.1 for box in boxes):
            boxes.append(candidate)
        elif rng.random() < 0.02:  # a crowded corner: begin again rather than look for ever
            boxes.clear()
    colours = rng.permutation(list(COLOURS))[:count]
    return Scene(
        background=str(rng.choice(list(BACKGROUNDS))),
        horizon=float(rng.uniform(0.2, 0.55)) if rng.random() < 0.5 else None,
        objects=tuple(
            Object(str(colour), str(rng.choice(SHAPES)), box) for colour, box in zip(colours, boxes, strict=True)
        ),
        texture_seed=int(rng.integers(2**31)),
    )


def _sample_box(rng: np.random.Generator, largest: float) -> tuple[float, float, float, float]:
    side = rng.uniform(0.30, largest)
    stretch = np.exp(rng.uniform(-0.12, 0.12))  # width over height stays within 0.79 and 1.27
    width, height = side * stretch, side / stretch
    margin = 0.02
    x0, y0 = rng.uniform(margin, 1 - margin - width), rng.uniform(margin, 1 - margin - height)
    return (float(x0), float(y0), float(x0 + width), float(y0 + height))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Shared area as a share of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller


# Drawing ------------------------------------------------------------------------------------------------------------


def shape_mask(shape: str, size: tuple[int, int]) -> Image.Image:
    """Draw the shape, filling an "L" image of `size` (width, height) edge to edge; 255 inside."""
    width, height = size
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, width - 1, height - 1), fill=255)
        if shape == "ring":
            inset_x, inset_y = _RING_HOLE * width, _RING_HOLE * height
            pen.ellipse((inset_x, inset_y, width - 1 - inset_x, height - 1 - inset_y), fill=0)
    elif shape == "square":
        pen.rectangle((0, 0, width - 1, height - 1), fill=255)
    elif shape in _OUTLINES:
        pen.polygon([(x * (width - 1), y * (height - 1)) for x, y in _OUTLINES[shape]], fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}; this world has {', '.join(SHAPES)}")
    return mask


def draw(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw the scene as an RGB image of `size` x `size` pixels, antialiased."""
    canvas = Image.fromarray(_background(scene, size)).resize(
        (size * _SUPERSAMPLE, size * _SUPERSAMPLE), Image.Resampling.NEAREST
    )
    for item in scene.objects:
        x0, y0, x1, y1 = (round(v * size * _SUPERSAMPLE) for v in item.box)
        canvas.paste(COLOURS[item.colour], (x0, y0), shape_mask(item.shape, (x1 - x0, y1 - y0)))
    return canvas.reduce(_SUPERSAMPLE)


def _background(scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) uint8: ground, sky above the horizon if there is one, and a faint texture."""
    rng = generator("texture", scene.texture_seed)
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    if scene.horizon is not None:
        image[: round(scene.horizon * size)] = SKIES[scene.background]
    coarse = Image.fromarray(rng.normal(0, 5, (9, 9)).astype(np.float32))
    image += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    image += rng.normal(0, 1.5, (size, size, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


# Words --------------------------------------------------------------------------------------------------------------

PLACES = {
    (0, 0): "at the top left", (1, 0): "at the top", (2, 0): "at the top right",
    (0, 1): "on the left", (1, 1): "in the middle", (2, 1): "on the right",
    (0, 2): "at the bottom left", (1, 2): "at the bottom", (2, 2): "at the bottom right",
}  # fmt: skip
_GROUNDS = {"grass": "grass", "sea": "the sea", "sand": "sand", "night": "the night", "snow": "snow"}
_TEMPLATES = (
    "{objects} on {ground}",
    "{ground} with {objects}",
    "an image of {ground} with {objects}",
    "a picture of {objects} on {ground}",
    "{objects} and {ground} behind",
)


def place(box: tuple[float, float, float, float]) -> str:
    """Describe where the centre of a box lies, by thirds of the image."""
    column, row = (min(int((box[k] + box[k + 2]) / 2 * 3), 2) for k in (0, 1))
    return PLACES[column, row]


def caption(scene: Scene, rng: np.random.Generator, *, places: bool) -> str:
    """Say what is in the scene, in one of many ways; with `places`, also where each object is and how large."""
    said = []
    for k in rng.permutation(len(scene.objects)):
        item = scene.objects[k]
        words = f"{item.colour} {item.shape}"
        if places:
            side = max(item.box[2] - item.box[0], item.box[3] - item.box[1])
            if rng.random() < 0.5:
                words = f"{'small' if side < 0.33 else 'large' if side > 0.42 else 'medium'} {words}"
            words = f"{words} {place(item.box)}"
        said.append(f"a {words}")
    objects = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return str(rng.choice(_TEMPLATES)).format(objects=objects, ground=_GROUNDS[scene.background])


def ground_caption(scene: Scene, index: int) -> str:
    """Describe the background alone, in one of three wordings."""
    return f"{('an image of ', 'a picture of ', '')[index % 3]}{_GROUNDS[scene.background]}"


def vocabulary() -> list[str]:
    """Every word that captions and phrases of this world can hold, sorted."""
    text = " ".join([*_TEMPLATES, *PLACES.values(), *_GROUNDS.values(), *COLOURS, *SHAPES, "small medium large the ,"])
    return sorted(set(text.replace("{objects}", "").replace("{ground}", "").split()))


def scene_layout(scene: Scene, *, seed: int = 0, index: int = 0, places: bool = False) -> Layout:
    """Return the scene's caption, phrases and boxes; (seed, index) decides the wording."""
    rng = generator("words", seed, index)
    return Layout(
        prompt=caption(scene, rng, places=places),
        phrases=[item.phrase for item in scene.objects],
        boxes=[item.box for item in scene.objects],
        id=f"shapes-{seed}-{index}",
    )
