"""Layouts of a COCO folder as it is unpacked: `annotations/` with `instances_val2017.json` and `captions_val2017.json`,
and the pictures in `val2017/`.

Phrases are the names of the categories. The prompt is the picture's first caption (that of the lowest annotation id),
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
from .real_images import FrameMaker, Photographs, centre_crop, squeeze

HOST = "http://images.cocodataset.org"
ALL = 1 << 40  # images in a chunk


@dataclass(frozen=True)
class CocoPicture:
    """A picture as annotated.

    Args:
        file: its name. size: (height, width).
        categories: names, of each of n objects. boxes: (n, 4) xyxy, 0-1 of the whole picture.
        areas: (n,) of the boxes, as shares of the picture.
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
        """The first of these splits whose instances file the folder has.

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

    def pictures(self) -> list[CocoPicture]:
        """In the order of the file, each with its objects in theirs.

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
            CocoPicture(
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
        """The first caption of each picture, by its id; none where there is no captions file."""
        file = self.folder / "annotations" / f"captions_{self.name}.json"
        if not file.is_file():
            return {}
        reader, _ = survey(file)
        return {image: " ".join(caption.split()) for image, caption in pairs_of(file, reader) if caption}

    def photographs(self, pictures: Sequence[CocoPicture], frame: FrameMaker) -> Photographs | None:
        """The real pictures; None where the folder has annotations alone.

        Raises:
            ValueError: a file name leads out of the folder.
        """
        folder = self.folder / self.name
        if not folder.is_dir():
            return None
        for picture in pictures:
            if Path(picture.file).is_absolute() or ".." in Path(picture.file).parts:
                raise ValueError(f"image {picture.id}: file_name is {picture.file!r}; expected a file in {folder}")
        return Photographs(
            files={picture.id: folder / picture.file for picture in pictures},
            frame=frame,
            sizes={picture.id: picture.size for picture in pictures},
            annotated={picture.id: (picture.categories, picture.boxes) for picture in pictures},
            source=f"; they are in {HOST}/zips/{self.name}.zip",
        )


def _instances(name: str) -> str:
    return f"annotations/instances_{name}.json"


def _where(name: str) -> str:
    return f"COCO's annotations are in {HOST}/annotations/annotations_trainval{name[-4:]}.zip (cocodataset.org)"


# GLIGEN's, COCO 2014 ------------------------------------------------------------------------------------------------

SMALLEST, MOST = 0.01, 30  # share of the square below which GLIGEN's data leave a box out; its model's slots


def gligen_layouts(pictures: Iterable[CocoPicture], captions: Mapping[str, str]) -> list[Layout]:
    """Layouts as GLIGEN's own data code frames them; pictures without an object have none.

    The middle square is cut out. Boxes are clipped to it; of those that take 1 % of it or more, the 30 largest stay,
    largest first.
    """
    layouts = []
    for picture in pictures:
        moved = move_boxes(centre_crop(*picture.size), picture.boxes.tolist(), min_share=0)
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in moved.boxes]
        largest = sorted((k for k, area in enumerate(areas) if area >= SMALLEST), key=lambda k: -areas[k])[:MOST]
        layouts.append(_layout(picture, moved.boxes, moved.kept, largest, captions))
    return [layout for layout in layouts if layout.boxes]


# Layout-to-image, COCO 2017 -----------------------------------------------------------------------------------------

FEWEST_OBJECTS, MOST_OBJECTS, ABOVE = 3, 8, 0.02


def layout_to_image_layouts(pictures: Iterable[CocoPicture], captions: Mapping[str, str]) -> list[Layout]:
    """The layouts of pictures with 3 to 8 objects, counting those whose box is more than 2 % of the picture.

    Pictures are squeezed into a square, so boxes are shares of the whole picture.
    """
    layouts = []
    for picture in pictures:
        large = np.flatnonzero(picture.areas > ABOVE)
        moved = move_boxes(squeeze(*picture.size), picture.boxes[large].tolist(), min_share=0)
        if FEWEST_OBJECTS <= len(moved.boxes) <= MOST_OBJECTS:
            layouts.append(_layout(picture, moved.boxes, large[moved.kept].tolist(), range(len(moved.boxes)), captions))
    return layouts


def _layout(
    picture: CocoPicture,
    boxes: Sequence[Sequence[float]],
    numbers: Sequence[int],
    chosen: Iterable[int],
    captions: Mapping[str, str],
) -> Layout:
    """Of framed boxes and the numbers of the annotations that they are of, the chosen ones."""
    chosen = list(chosen)
    phrases = [picture.categories[numbers[k]] for k in chosen]
    return Layout(
        prompt=captions.get(picture.id) or ", ".join(dict.fromkeys(phrases)),
        phrases=phrases,
        boxes=[boxes[k] for k in chosen],
        id=picture.id,
    )
