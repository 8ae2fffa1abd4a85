"""Scores of one image: which detection stands for which requested object, and what is there too often or too rarely.

The rules, and where they differ from published ones: an object is assigned at most one detection, and a detection to at
most one object. COCO-MIG's evaluation (github.com/LeyRio/MIG_Bench) takes for each object the detection of best IoU,
so that one cat can pass for two that overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..layout import Box, Layout, box_iou
from .detection import Detection

if TYPE_CHECKING:
    from .detectors import Detector

FOUND = 0.5  # IoU from which on an object counts as found
_Labelled = tuple[str, Sequence[float]]  # a label or phrase, and where


@dataclass(frozen=True)
class ObjectScore:
    """One requested object against the detection that was assigned to it.

    Args:
        iou: 0 if nothing was assigned.
        attributes: whether the assigned detection is what the phrase says, by attribute ("colour", "shape"). All are
            False if nothing was assigned.
        assigned: the number of that detection among the image's, or None.
        label: what the detector was to look for.
    """

    iou: float
    attributes: Mapping[str, bool] = field(default_factory=dict)
    assigned: int | None = None
    label: str = ""

    @property
    def success(self) -> bool:
        """Found (IoU at least 0.5) and right in every attribute."""
        return self.iou >= FOUND and all(self.attributes.values())


@dataclass(frozen=True)
class ImageScore:
    """An image against the layout that it was asked to follow.

    Args:
        objects: one a box of the layout, in its order.
        found: all detections, also those that the detector is not sure of.
        extra: how many more there are than requested, of the requested labels.
        missing: how many fewer there are than requested, wherever they stand.
        clip: similarity of the image and its prompt, where it was measured.
        clip_objects: that of each box and its phrase.
    """

    layout: Layout
    key: str
    objects: tuple[ObjectScore, ...]
    found: tuple[Detection, ...]
    extra: int
    missing: int
    clip: float | None = None
    clip_objects: tuple[float, ...] | None = None

    @property
    def success(self) -> bool:
        """Whether every object is."""
        return all(score.success for score in self.objects)


def score_image(
    layout: Layout, key: str, found: Sequence[Detection], detector: Detector, beside: Sequence[tuple[str, Box]] = ()
) -> ImageScore:
    """Assign detections to the requested objects and count what is left.

    Pairs are taken by falling IoU, of detections of the requested label (of any, where the detector's labels do not
    decide); attributes do not keep a detection from being assigned, they are then right or wrong. Detections below the
    detector's threshold (`settings["threshold"]`, where it has one) are kept for AP, and neither assigned nor counted.

    Args:
        beside: phrases and boxes of objects that the image rightly holds, and that were not requested: a real image
            whose layout names only some of them. Detections of these are passed over.

    Raises:
        ValueError: a phrase that the detector cannot look for.
    """
    wanted = [detector.query(phrase) for phrase in layout.phrases]
    if beside:
        requested = list(zip([item.label for item in wanted], layout.boxes, strict=True))
        found = _requested(found, requested, beside, detector)
    threshold = detector.settings.get("threshold", 0.0)
    sure = [number for number, item in enumerate(found) if item.score >= threshold]
    overlap = box_iou(np.array(layout.boxes), np.array([found[number].box for number in sure]))

    pairs = []
    for k, column in zip(*np.nonzero(overlap), strict=True):
        number, iou = sure[column], float(overlap[k, column])
        item = found[number]
        if detector.labels_decide and item.label != wanted[k].label:
            continue
        right = {name: item.has(name, wanted[k].attributes[name]) for name in detector.attributes}
        # Equal IoUs are told apart by what the pair is, so that no order of objects or detections matters.
        wrong = sum(not value for value in right.values())
        rank = (-iou, wrong, -item.score, layout.boxes[k], layout.phrases[k], item.box, item.label)
        pairs.append((rank, int(k), number, ObjectScore(iou, right, number, wanted[k].label)))

    nothing = dict.fromkeys(detector.attributes, False)
    scores: list[ObjectScore] = [ObjectScore(0.0, nothing, None, item.label) for item in wanted]
    taken: set[int] = set()
    for _, k, number, score in sorted(pairs, key=lambda pair: pair[0]):
        if scores[k].assigned is None and number not in taken:
            scores[k] = score
            taken.add(number)

    decide = detector.labels_decide
    requested = Counter(item.label if decide else "" for item in wanted)
    seen = Counter(found[number].label if decide else "" for number in sure)
    return ImageScore(
        layout=layout,
        key=key,
        objects=tuple(scores),
        found=tuple(found),
        extra=sum(max(seen[label] - number, 0) for label, number in requested.items()),
        missing=sum(max(number - seen[label], 0) for label, number in requested.items()),
    )


def _requested(
    found: Sequence[Detection], requested: Sequence[_Labelled], beside: Sequence[_Labelled], detector: Detector
) -> list[Detection]:
    """Those detections that do not stand for an object beside: one that they find (IoU at least 0.5), and overlap more
    than any that is requested. As COCO's evaluation passes over what it ignores."""
    known = []
    for phrase, box in beside:
        with suppress(ValueError):  # what the detector cannot look for, it has not found
            known.append((detector.query(phrase).label, box))

    def best(objects: Sequence[_Labelled]) -> np.ndarray:
        """IoU of each detection with the object of its label that it overlaps most."""
        overlap = box_iou(np.array([item.box for item in found]), np.array([box for _, box in objects]))
        if detector.labels_decide:
            labels = np.array([label for label, _ in objects], dtype=object)
            overlap = overlap * (np.array([item.label for item in found], dtype=object)[:, None] == labels[None])
        return overlap.max(-1, initial=0.0)

    there = best(known)
    stays = (there < FOUND) | (there <= best(requested))
    return [item for item, stay in zip(found, stays, strict=True) if stay]
