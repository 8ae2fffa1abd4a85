"""Layouts of a COCO folder as it is unpacked: `annotations/` with `instances_val2017.json` and `captions_val2017.json`,
and the images in `val2017/`.

Phrases are the names of the categories. The prompt is the image's first caption (that of the lowest annotation id),
or the names of its categories where there are no captions. Crowds are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..images.crop import move_boxes
from ..layout import Layout, xyxy_from_xywh
from ..prepare.captions.files import pairs_of, survey
from ..prepare.sources.coco import coco_chunks
from .real_images import FrameMaker, RealImages, centre_crop, squeeze

HOST = "http://images.cocodataset.org"
ALL = 1 << 40  # images in a chunk


@dataclass(frozen=True)
class CocoImage:
    """An image as annotated.

    Args:
        file: its name. size: (height, width).
        categories: names, of each of n objects. boxes: (n, 4) xyxy, 0-1 of the whole image.
        areas: (n,) of the boxes, as shares of the image.
    """

    id: str
    file: str
    size: tuple[int, int]
    categories: tuple[str, ...]
    boxes: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class CocoSplit:
    """One split of a COCO folder, as "val2017"."""

    folder: Path
    name: str

    @classmethod
    def find(cls, folder: Path | None, *names: str, instead: str = "") -> CocoSplit:
        """Return the first of these splits whose instances file the folder has.

        Args:
            instead: what else would do, for the messages.

        Raises:
            ValueError: no folder is given.
            FileNotFoundError: it has none of them; says where they are to be had.
        """
        if folder is None:
            raise ValueError(
                f"the layouts come from a COCO folder, and none is given (--coco): one with {_instances(names[0])}"
                f"{instead}; {_where(names[0])}"
            )
        for name in names:
            if (folder / _instances(name)).is_file():
                return cls(folder, name)
        expected = " or ".join(_instances(name) for name in names)
        raise FileNotFoundError(f"{folder} has no {expected}{instead}; {_where(names[0])}")

    def images(self) -> list[CocoImage]:
        """Return the images in the order of the file, each with its objects in their order.

        Raises:
            ValueError: the file is no instances file, or broken.
        """
        instances = self.folder / _instances(self.name)
        (chunk,) = coco_chunks(self.folder, instances, None, ALL)
        if unsized := [name for name, size in zip(chunk.image_ids, chunk.sizes, strict=True) if not size.all()]:
            raise ValueError(f"{instances}: image {unsized[0]} has no width and height")
        boxes, sizes = chunk.boxes.astype(np.float64), chunk.sizes[chunk.owners].astype(np.float64)
        shares = xyxy_from_xywh(boxes / np.tile(sizes[:, ::-1], 2))
        areas = boxes[:, 2:].prod(-1) / sizes.prod(-1)  # not of the shares, which rounding makes more or less than 2 %
        ends = np.searchsorted(chunk.owners, np.arange(chunk.weight + 1))
        return [
            CocoImage(
                id=chunk.image_ids[k],
                file=chunk.file_names[k],
                size=(int(chunk.sizes[k, 0]), int(chunk.sizes[k, 1])),
                categories=chunk.phrases[first:end],
                boxes=shares[first:end],
                areas=areas[first:end],
            )
            for k, (first, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
        ]

    def captions(self) -> dict[str, str]:
        """Return the first caption of each image, by its id; none where there is no captions file."""
        file = self.folder / "annotations" / f"captions_{self.name}.json"
        if not file.is_file():
            return {}
        reader, _ = survey(file)
        return {image: " ".join(caption.split()) for image, caption in pairs_of(file, reader) if caption}

    def real_images(self, images: Sequence[CocoImage], frame: FrameMaker) -> RealImages | None:
        """Return the real images; None where the folder has annotations alone.

        Raises:
            ValueError: a file name leads out of the folder.
        """
        folder = self.folder / self.name
        if not folder.is_dir():
            return None
        for image in images:
            if Path(image.file).is_absolute() or ".." in Path(image.file).parts:
                raise ValueError(f"image {image.id}: file_name is {image.file!r}; expected a file in {folder}")
        return RealImages(
            files={image.id: folder / image.file for image in images},
            frame=frame,
            sizes={image.id: image.size for image in images},
            annotated={image.id: (image.categories, image.boxes) for image in images},
            source=f"; they are in {HOST}/zips/{self.name}.zip",
        )


def _instances(name: str) -> str:
    return f"annotations/instances_{name}.json"


def _where(name: str) -> str:
    return f"COCO's annotations are in {HOST}/annotations/annotations_trainval{name[-4:]}.zip (cocodataset.org)"


# GLIGEN's, COCO 2014 ------------------------------------------------------------------------------------------------

SMALLEST, MOST = 0.01, 30  # share of the square below which GLIGEN's data leave a box out; its model's slots


def gligen_layouts(images: Iterable[CocoImage], captions: Mapping[str, str]) -> list[Layout]:
    """Return layouts as GLIGEN's own data code frames them; images without an object have none.

    The middle square is cut out. Boxes are clipped to it; of those that take 1 % of it or more, the 30 largest stay,
    largest first.
    """
    layouts = []
    for image in images:
        moved = move_boxes(centre_crop(*image.size), image.boxes.tolist(), min_share=0)
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in moved.boxes]
        largest = sorted((k for k, area in enumerate(areas) if area >= SMALLEST), key=lambda k: -areas[k])[:MOST]
        layouts.append(_layout(image, moved.boxes, moved.kept, largest, captions))
    return [layout for layout in layouts if layout.boxes]


# Layout-to-image, COCO 2017 -----------------------------------------------------------------------------------------

FEWEST_OBJECTS, MOST_OBJECTS, ABOVE = 3, 8, 0.02


def layout_to_image_layouts(images: Iterable[CocoImage], captions: Mapping[str, str]) -> list[Layout]:
    """Return the layouts of images with 3 to 8 objects, counting those whose box is more than 2 % of the image.

    Images are squeezed into a square, so boxes are shares of the whole image.
    """
    layouts = []
    for image in images:
        large = np.flatnonzero(image.areas > ABOVE)
        moved = move_boxes(squeeze(*image.size), image.boxes[large].tolist(), min_share=0)
        if FEWEST_OBJECTS <= len(moved.boxes) <= MOST_OBJECTS:
            layouts.append(_layout(image, moved.boxes, large[moved.kept].tolist(), range(len(moved.boxes)), captions))
    return layouts


def _layout(
    image: CocoImage,
    boxes: Sequence[Sequence[float]],
    numbers: Sequence[int],
    chosen: Iterable[int],
    captions: Mapping[str, str],
) -> Layout:
    """Make a layout of framed boxes and the numbers of their annotations; only the chosen ones stay."""
    chosen = list(chosen)
    phrases = [image.categories[numbers[k]] for k in chosen]
    return Layout(
        prompt=captions.get(image.id) or ", ".join(dict.fromkeys(phrases)),
        phrases=phrases,
        boxes=[boxes[k] for k in chosen],
        id=image.id,
    )
