"""Real images of layouts: what a detector scores on them is about the most that generated images can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..images.crop import Frame, square_frame
from ..images.decode import decode, framed, image_size
from ..layout import Box, Layout
from ..prepare.sources.paths import find_images

RESOLUTION = 512  # pixels, both ways: GLIGEN's images, and those that COCO-MIG's evaluation looks at

FrameMaker = Callable[[int, int], Frame]  # of (height, width)


def squeeze(height: int, width: int) -> Frame:
    """Squeeze the whole image into a square; boxes as shares of the image stay the same."""
    return Frame((height, width), (RESOLUTION, RESOLUTION), 0, 0, (RESOLUTION, RESOLUTION))


def centre_crop(height: int, width: int) -> Frame:
    """Cut out the middle of the image, as `prepare` does with the images that are trained on."""
    return square_frame(height, width, RESOLUTION)


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Real images by the id of their layout; called with a layout, its image.

    Args:
        files: of each layout.
        frame: how an image was framed when its boxes were made; None for the whole image as it is.
        sizes: (height, width) that the annotations are made for, where that is known.
        annotated: names and boxes (n, 4), xyxy 0-1 of the whole image, of all objects; where they and `sizes` are
            known.
        source: where missing ones are to be had.
    """

    files: Mapping[str, Path]
    frame: FrameMaker | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    annotated: Mapping[str, tuple[Sequence[str], np.ndarray]] = field(default_factory=dict)
    source: str = ""

    def __call__(self, layout: Layout) -> Image.Image:
        """Return the image of this layout, RGB.

        Raises:
            ValueError: it is damaged, or of another size than its annotations are made for.
            OSError: it cannot be read.
        """
        assert layout.id is not None
        path = self.files[layout.id]
        size = image_size(path)
        if size != (stated := self.sizes.get(layout.id, size)):
            raise ValueError(
                f"{path} has {size[1]} x {size[0]} pixels, but its annotations are made for {stated[1]} x {stated[0]}; "
                "it is not the image that they describe"
            )
        image = decode(path)
        return image if self.frame is None else Image.fromarray(framed(image, self.frame(*size)))

    def ignored(self, layout: Layout) -> list[tuple[str, Box]]:
        """Return names and framed boxes of the objects that the image holds and the layout does not ask for."""
        assert layout.id is not None
        names, boxes = self.annotated.get(layout.id, ((), np.empty((0, 4))))
        if self.frame is not None and len(names):
            boxes = self.frame(*self.sizes[layout.id]).move(boxes)
        boxes = np.clip(boxes, 0, 1)
        asked = np.isclose(boxes[:, None], np.array(layout.boxes)[None], rtol=0, atol=1e-6).all(-1).any(-1)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        return [(names[k], tuple(boxes[k].tolist())) for k in np.flatnonzero(seen & ~asked).tolist()]

    def version(self, layout: Layout) -> str:
        """Changes when another file takes the image's place."""
        assert layout.id is not None
        stat = self.files[layout.id].stat()
        return f"{self.files[layout.id].name}, {stat.st_size} bytes, {stat.st_mtime_ns}"

    def check(self, layouts: Iterable[Layout]) -> None:
        """Are all of these there?

        Raises:
            FileNotFoundError: names the first that is not, and says how many are lacking.
        """
        files = [self.files[layout.id] for layout in layouts if layout.id is not None]
        if lacking := [path for path in files if not path.is_file()]:
            raise FileNotFoundError(
                f"{len(lacking)} of {len(files)} images are missing, the first is {lacking[0]}{self.source}"
            )


def real_images_of(folder: Path, layouts: Iterable[Layout]) -> RealImages:
    """Return the images of a folder whose names, without the ending, are the layouts' ids.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a layout has no id or no image, or two images have one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of real images")
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{folder} has two images {name}: {found[name].name} and {path.name}; keep one of them")
        found[name] = path
    ids = [layout.id for layout in layouts]
    if None in ids:
        raise ValueError(f"layout {ids.index(None)} has no id; real images belong to layouts by their ids")
    if lacking := [name for name in ids if name not in found]:
        raise ValueError(
            f"{folder} has no image of {len(lacking)} of {len(ids)} layouts, the first is {lacking[0]!r}; "
            "the name of an image, without its ending, is the id of its layout"
        )
    return RealImages(files={name: found[name] for name in ids if name is not None})
