"""Two evaluations of the same layouts: by how much one is above the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..detect.detectors import Detector
from ..layout import Layout, read_layouts
from .clip import ClipScorer
from .metrics import Estimate, paired_difference
from .output_folder import LAYOUTS
from .run import Condition, image_set_named, open_caches, rank, score_detections
from .sampling import ImageSet


@dataclass(frozen=True)
class Comparison:
    """A condition less the same one of another evaluation, in images of the same layouts."""

    condition: str
    other: str
    difference: Mapping[str, Estimate]


def compare(
    conditions: Iterable[Condition], other: str | Path, detector: Detector, clip: ClipScorer | None = None
) -> list[Comparison]:
    """Return the paired differences from another evaluation, of the conditions with the same name; if none has, of the
    first.

    The other one's images are not looked at: what the same detector found in them is kept in its folder. CLIP scores
    are compared where that has been scored with the same model.

    Raises:
        FileNotFoundError: it is no evaluation's folder.
        ValueError: it is of other layouts, or was scored by another detector.
    """
    other = Path(other)
    theirs_of = layouts_of(other)
    ours = [condition for condition in conditions if condition.kind in ("grounded", "off")]
    names = sorted((one for one in _scored_sets(other) if one.kind in ("grounded", "off")), key=rank)
    same = [(condition, condition.name) for condition in ours if condition.name in {one.name for one in names}]
    pairs = same or [(condition, one.name) for condition in ours[:1] for one in names[:1]]
    ap = find_spec("faster_coco_eval") is not None
    compared = []
    for condition, name in pairs:
        detections, *others = open_caches(other, name, detector, clip)
        found = [
            (score, [cache.latest(score.key, score.layout) for cache in (detections, *others)])
            for score in condition.images
            if _same(score.layout, theirs_of.get(score.key)) and detections.latest(score.key, score.layout) is not None
        ]
        if any(None in of_one for _, of_one in found):  # CLIP has not seen all, so none is compared by it
            found = [(score, of_one[:1]) for score, of_one in found]
        theirs = [score_detections(score.layout, score.key, of_one, detector) for score, of_one in found]
        if theirs:
            compared.append(Comparison(condition.name, name, paired_difference(condition.images, theirs, ap=ap)))
    if not compared:
        raise ValueError(
            f"{other} holds nothing that {detector.name} with these settings found for these layouts; score it in the "
            f"same way first (--pictures {other / 'pictures'} --out {other})"
        )
    return compared


def layouts_of(out: str | Path) -> dict[str | None, Layout]:
    """Return the layouts of an evaluation's folder by their keys.

    Raises:
        FileNotFoundError: it is none.
    """
    file = Path(out) / LAYOUTS
    if not file.is_file():
        raise FileNotFoundError(f"{out} is no evaluation: it has no {LAYOUTS}")
    return {layout.id: layout for layout in read_layouts(file)}


def _scored_sets(out: Path) -> Iterator[ImageSet]:
    for folder in (out / "detections").iterdir() if (out / "detections").is_dir() else ():
        yield image_set_named(folder.name)


def _same(a: Layout, b: Layout | None) -> bool:
    return b is not None and (a.prompt, a.phrases, a.boxes) == (b.prompt, b.phrases, b.boxes)
