"""Scores of one image: which detection is assigned to which requested object, and which objects are extra or missing.

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

FOUND = 0.5  # IoU from which an object counts as found
_Labelled = tuple[str, Sequence[float]]  # a label or phrase, and where


@dataclass(frozen=True)
class ObjectScore:
    """A requested object, compared with the detection that was assigned to it.

    Args:
        iou: 0 if no detection was assigned.
        attributes: whether the detection has the attributes that the phrase names ("colour", "shape"). All are False
            if no detection was assigned.
        assigned: the number of that detection among the image's, or None.
        label: the label that the detector looked for.
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
    """An image, compared with the layout that it was asked to follow.

    Args:
        objects: one score for each box of the layout, in its order.
        detections: all of them, including those below the detector's threshold.
        extra: how many objects of the requested labels there are beyond those requested.
        missing: how many of the requested objects are nowhere in the image.
        clip: similarity of the image and its prompt, if it was measured.
        clip_objects: similarity of each box and its phrase.
    """

    layout: Layout
    key: str
    objects: tuple[ObjectScore, ...]
    detections: tuple[Detection, ...]
    extra: int
    missing: int
    clip: float | None = None
    clip_objects: tuple[float, ...] | None = None

    @property
    def success(self) -> bool:
        """Tell whether every object is found and right."""
        return all(score.success for score in self.objects)


def score_image(
    layout: Layout,
    key: str,
    detections: Sequence[Detection],
    detector: Detector,
    ignored: Sequence[tuple[str, Box]] = (),
) -> ImageScore:
    """Assign detections to the requested objects, and count what is extra and what is missing.

    Pairs are assigned by falling IoU, among detections of the requested label (of any label if the detector's labels do
    not decide). Attributes do not prevent an assignment; they are then right or wrong. Detections below the
    detector's threshold (`settings["threshold"]`, if it has one) are kept for AP, but neither assigned nor counted.

    Args:
        ignored: phrases and boxes of objects that the image rightly holds although they were not requested, as in a
            real image whose layout names only some of its objects. Detections of these do not count.

    Raises:
        ValueError: the detector cannot look for a phrase.
    """
    queries = [detector.query(phrase) for phrase in layout.phrases]
    if ignored:
        requested = list(zip([query.label for query in queries], layout.boxes, strict=True))
        detections = _without_ignored(detections, requested, ignored, detector)
    threshold = detector.settings.get("threshold", 0.0)
    sure = [number for number, detection in enumerate(detections) if detection.score >= threshold]
    overlap = box_iou(np.array(layout.boxes), np.array([detections[number].box for number in sure]))

    pairs = []
    for k, column in zip(*np.nonzero(overlap), strict=True):
        number, iou = sure[column], float(overlap[k, column])
        detection, query = detections[number], queries[k]
        if detector.labels_decide and detection.label != query.label:
            continue
        right = {name: detection.has(name, query.attributes[name]) for name in detector.attributes}
        # Ties of IoU are broken by what the pair is, so that the order of objects and detections does not matter.
        wrong = sum(not value for value in right.values())
        rank = (-iou, wrong, -detection.score, layout.boxes[k], layout.phrases[k], detection.box, detection.label)
        pairs.append((rank, int(k), number, ObjectScore(iou, right, number, query.label)))

    none_right = dict.fromkeys(detector.attributes, False)
    scores: list[ObjectScore] = [ObjectScore(0.0, none_right, None, query.label) for query in queries]
    assigned: set[int] = set()
    for _, k, number, score in sorted(pairs, key=lambda pair: pair[0]):
        if scores[k].assigned is None and number not in assigned:
            scores[k] = score
            assigned.add(number)

    decide = detector.labels_decide
    requests = Counter(query.label if decide else "" for query in queries)
    counts = Counter(detections[number].label if decide else "" for number in sure)
    return ImageScore(
        layout=layout,
        key=key,
        objects=tuple(scores),
        detections=tuple(detections),
        extra=sum(max(counts[label] - number, 0) for label, number in requests.items()),
        missing=sum(max(number - counts[label], 0) for label, number in requests.items()),
    )


def _without_ignored(
    detections: Sequence[Detection], requested: Sequence[_Labelled], ignored: Sequence[_Labelled], detector: Detector
) -> list[Detection]:
    """Leave out the detections of ignored objects: IoU of at least 0.5 with one, and more than with any requested
    object. COCO's evaluation treats its ignored regions in the same way."""
    known = []
    for phrase, box in ignored:
        with suppress(ValueError):  # the detector cannot have detected what it cannot look for
            known.append((detector.query(phrase).label, box))

    def best(objects: Sequence[_Labelled]) -> np.ndarray:
        """The IoU of each detection with the object of its label that it overlaps most."""
        overlap = box_iou(np.array([item.box for item in detections]), np.array([box for _, box in objects]))
        if detector.labels_decide:
            labels = np.array([label for label, _ in objects], dtype=object)
            overlap = overlap * (np.array([item.label for item in detections], dtype=object)[:, None] == labels[None])
        return overlap.max(-1, initial=0.0)

    of_ignored = best(known)
    stays = (of_ignored < FOUND) | (of_ignored <= best(requested))
    return [detection for detection, stay in zip(detections, stays, strict=True) if stay]
