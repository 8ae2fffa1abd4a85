"""Where boxes are followed and where they are not: metrics of parts of the objects.

    slices(condition.images, protocol.layouts, detector.query)["size"]

A grouping puts each requested object into one part. Intervals are over images, as those of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..detect.matching import ImageScore
from ..layout import Layout
from .metrics import Estimate, Ratio, of_objects, ratios_of

if TYPE_CHECKING:
    from ..detect.detection import Query

# Shares of the image's area. 2 % is what layout-to-image's filter leaves out; from there on the sides of a square box
# grow by about half each time: 14, 22, 32 and 50 % of the image's.
SIZE_EDGES = (0.02, 0.05, 0.1, 0.25)
# Number of the objects of all layouts that have the phrase. Phrases follow Zipf's law: a factor of ten each time.
FREQUENCY_EDGES = (2, 10, 100)
# One by one as far as COCO-MIG and COCO-Position go (2 to 6); published layouts have up to 30, few more than 10.
MOST_OBJECTS_ALONE, MANY_OBJECTS = 6, 10

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
METRICS = ("success", "mean_iou", "mean_iou_right", "recall_50")  # those that are of single objects


@dataclass(frozen=True)
class Slice:
    """A part of the objects.

    Args:
        objects, images: how many, and in how many images.
        metrics: those of METRICS; `mean_iou_right` where attributes are judged.
    """

    name: str
    objects: int
    images: int
    metrics: Mapping[str, Estimate]


def slices(
    images: Sequence[ImageScore], layouts: Sequence[Layout], wanted: Callable[[str], Query]
) -> dict[str, list[Slice]]:
    """Return the parts that have objects, in their order, by grouping.

    Args:
        layouts: all that are evaluated, to count phrases in.
        wanted: a detector's; it tells the attributes that a phrase asks for.

    Returns:
        size: share of the image's area.
        position: which ninth of the image the centre of the box is in, "top left" to "bottom right".
        objects: number of objects in the image.
        frequency: number of the objects of all layouts with this phrase (not of the data that a model was trained on).
        ATTRIBUTE: the value that is asked for, as "red", most frequent first; where phrases ask for one.
    """
    wanted = cache(wanted)
    counts = Counter(plain_phrase(phrase) for layout in layouts for phrase in layout.phrases)
    attributes = {name for image in images for phrase in image.layout.phrases for name in wanted(phrase).attributes}

    def size(image: ImageScore, k: int) -> str:
        return size_name(image.layout.boxes[k])

    def position(image: ImageScore, k: int) -> str:
        return position_name(image.layout.boxes[k])

    def objects(image: ImageScore, k: int) -> str:
        return objects_name(len(image.objects))

    def frequency(image: ImageScore, k: int) -> str:
        return frequency_name(counts[plain_phrase(image.layout.phrases[k])])

    def asked(attribute: str) -> _Part:
        return lambda image, k: wanted(image.layout.phrases[k]).attributes.get(attribute, "")

    groupings = {"size": size, "position": position, "objects": objects, "frequency": frequency}
    groupings |= {attribute: asked(attribute) for attribute in sorted(attributes)}
    scores = [score for image in images for score in image.objects]
    if not scores:
        return {}
    of_image = np.repeat(np.arange(len(images)), [len(image.objects) for image in images])
    ratios = {name: ratio for name, ratio in of_objects(scores).items() if name in METRICS}
    found = {name: _parts(images, of_image, ratios, part, _ORDERS.get(name)) for name, part in groupings.items()}
    return {name: parts for name, parts in found.items() if parts}


# Names of parts -----------------------------------------------------------------------------------------------------


def size_name(box: Sequence[float]) -> str:
    """Name the size of an object by its share of the image's area."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return _SIZES[sum(area >= edge for edge in SIZE_EDGES)]


def position_name(box: Sequence[float]) -> str:
    """Name the third of the height and of the width that the box's centre is in."""
    row, column = (min(int(3 * (box[k] + box[k + 2]) / 2), 2) for k in (1, 0))
    return _place(ROWS[row], COLUMNS[column])


def objects_name(number: int) -> str:
    if number <= MOST_OBJECTS_ALONE:
        return str(number)
    return _OBJECTS[-2] if number <= MANY_OBJECTS else _OBJECTS[-1]


def frequency_name(number: int) -> str:
    return _FREQUENCIES[sum(number >= edge for edge in FREQUENCY_EDGES)]


def plain_phrase(phrase: str) -> str:
    """Capitals and spaces make no other phrase."""
    return " ".join(phrase.casefold().split())


def _place(row: str, column: str) -> str:
    return row if column == "centre" else column if row == "middle" else f"{row} {column}"


_SIZES = (
    f"under {100 * SIZE_EDGES[0]:g} %",
    *(f"{100 * low:g} to {100 * high:g} %" for low, high in pairwise(SIZE_EDGES)),
    f"from {100 * SIZE_EDGES[-1]:g} %",
)
_FREQUENCIES = (
    "once",
    *(f"{low} to {high - 1} times" for low, high in pairwise(FREQUENCY_EDGES)),
    f"{FREQUENCY_EDGES[-1]} times or more",
)
_OBJECTS = (
    *(str(number) for number in range(1, MOST_OBJECTS_ALONE + 1)),
    f"{MOST_OBJECTS_ALONE + 1} to {MANY_OBJECTS}",
    f"more than {MANY_OBJECTS}",
)
POSITIONS = tuple(_place(row, column) for row in ROWS for column in COLUMNS)  # row by row
_ORDERS = {"size": _SIZES, "position": POSITIONS, "objects": _OBJECTS, "frequency": _FREQUENCIES}


# Parts --------------------------------------------------------------------------------------------------------------

_Part = Callable[[ImageScore, int], str]  # of the k-th object; empty: in none


def _parts(
    images: Sequence[ImageScore],
    of_image: np.ndarray,
    ratios: Mapping[str, Ratio],
    part: _Part,
    order: Sequence[str] | None,
) -> list[Slice]:
    """
    Args:
        of_image: which image each object is in.
        ratios: see `of_objects`.
        order: of the parts; None: most objects first, then by name.
    """
    of_object = [part(image, k) for image in images for k in range(len(image.objects))]
    sizes = Counter(of_object)
    names = [name for name in order or sorted(sizes, key=lambda name: (-sizes[name], name)) if name and sizes[name]]
    if not names:
        return []
    numbers = {name: number for number, name in enumerate(names)}
    columns = np.array([numbers.get(name, len(names)) for name in of_object])  # the last one: those in no part
    cells, shape = of_image * (len(names) + 1) + columns, (len(images), len(names) + 1)

    def summed(values: np.ndarray) -> np.ndarray:
        """Sum up the values of each image and part: (images, parts)."""
        return np.bincount(cells, values, shape[0] * shape[1]).reshape(shape)[:, : len(names)]

    sums = [(summed(values), summed(counted)) for values, counted in ratios.values()]
    estimates = iter(ratios_of(*(np.hstack(columns) for columns in zip(*sums, strict=True))))
    of_parts = {metric: [next(estimates) for _ in names] for metric in ratios}
    in_images = np.count_nonzero(summed(np.ones(len(cells))), axis=0)
    return [
        Slice(name, sizes[name], int(in_images[k]), {metric: of_parts[metric][k] for metric in ratios})
        for k, name in enumerate(names)
    ]
