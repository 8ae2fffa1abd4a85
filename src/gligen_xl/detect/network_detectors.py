"""Detectors that are networks of transformers: of fixed classes, and of free phrases."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from PIL import Image

from ..layout import Layout, box_iou
from .detection import Detection, Query
from .networks import CandidateNetwork, Network, WordNetwork

CLASS_THRESHOLD = 0.5  # transformers' own
PHRASE_THRESHOLD = 0.25  # COCO-MIG's evaluation, as is the next
SAME = 0.8  # IoU from which on two boxes of one phrase are the same object
MOST = 100  # detections an image, as COCO's AP takes them


# Fixed classes ------------------------------------------------------------------------------------------------------


class ClassDetector:
    """Of fixed classes, those of the network's `id2label`.

    A phrase is a class's name, with or without an article, in the singular or the plural. Some networks use VOC's names
    of COCO's classes (sofa, aeroplane, tvmonitor): these are taken for the same.
    """

    attributes: tuple[str, ...] = ()
    labels_decide = True
    reads_layouts = False

    def __init__(self, name: str, checksum: str, network: ClassNetwork, threshold: float = CLASS_THRESHOLD):
        self.network = network
        self.name, self.settings = _file_name(name), _settings(name, checksum, network, threshold)
        self._names: dict[str, str] = {}  # of a class, by its spelling without spaces
        for class_name in network.classes:
            self._names.setdefault(_spelling(class_name), class_name)

    def query(self, phrase: str) -> Query:
        for form in _singulars(plain(phrase)):
            if (name := self._names.get(_spelling(form))) is not None:
                return Query(name)
        near = get_close_matches(plain(phrase), self.network.classes, n=3, cutoff=0.6)
        near += [name for name in self.network.classes if name in plain(phrase).split() and name not in near]
        hint = f"; near are {', '.join(near)}" if near else f"; it has {', '.join(self.network.classes[:8])}, ..."
        raise ValueError(
            f"the detector {self.name} cannot look for {phrase!r}, which is none of its {len(self.network.classes)} "
            f"classes{hint}. For free phrases take OWLv2 or GroundingDINO"
        )

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        found = self.network.find([_pixels(image) for image in images], [True] * len(layouts))
        return [detections[:MOST] for detections in found]


class ClassNetwork(Network):
    """A network of fixed classes; there is nothing to ask it."""

    @property
    def classes(self) -> list[str]:
        return [name for name in self.model.config.id2label.values() if name != "N/A"]

    def _group(self, image: np.ndarray, query: bool) -> Hashable:
        return image.shape

    def _batch(self, images: list[np.ndarray], queries: list[bool]) -> Iterator[list[Detection]]:
        every = self.processor.post_process_object_detection(
            self._run(self.processor(images, return_tensors="pt")),
            threshold=self.settings.box_threshold,
            target_sizes=[image.shape[:2] for image in images],
        )
        for image, found in zip(images, every, strict=True):
            names = [self.model.config.id2label[number] for number in found["labels"].tolist()]
            yield self._post_processed(found, image, names)


_VOC = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
_PLURALS = (("people", "person"), ("ies", "y"), ("ves", "fe"), ("ves", "f"), ("s", ""), ("es", ""))


def _spelling(name: str) -> str:
    """Return one spelling of a class, whoever wrote it: "potted plant" and "pottedplant", "tv" and "tv monitor"."""
    joined = re.sub(r"[\W_]", "", name.lower())
    return _VOC.get(joined, joined)


def _singulars(name: str) -> Iterator[str]:
    """Yield the name itself first ("skis" is a class), then what it could be the plural of."""
    yield name
    for ending, singular in _PLURALS:
        if name.endswith(ending):
            yield name.removesuffix(ending) + singular


# Free phrases -------------------------------------------------------------------------------------------------------


class PhraseDetector:
    """Looks for a layout's own phrases; equal ones, whatever their article, share a label.

    Networks that ground words read the phrases as one text, " . " between them; more than they read at once become
    several texts. A box is of the phrase that holds its best word. Boxes of one phrase that overlap by `SAME` or more
    are the same object, and the best is kept.
    """

    attributes: tuple[str, ...] = ()
    labels_decide = True
    reads_layouts = True

    def __init__(
        self,
        name: str,
        checksum: str,
        network: WordNetwork | CandidateNetwork,
        threshold: float = PHRASE_THRESHOLD,
    ):
        self.network = network
        self.name = _file_name(name)
        self.settings = _settings(name, checksum, network, threshold) | {"same_iou": SAME}

    def query(self, phrase: str) -> Query:
        label = plain(phrase)
        text = f"{label} ." if isinstance(self.network, WordNetwork) else label
        if not re.search(r"\w", label):
            raise ValueError(f"the detector {self.name} cannot look for {phrase!r}, which holds no word")
        if (excess := self.network.excess(text)) > 0:
            raise ValueError(f"the detector {self.name} cannot look for {phrase!r}; it is {excess} tokens too long")
        return Query(label)

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        seen: list[np.ndarray] = []
        queries: list[Any] = []
        owners: list[int] = []
        for k, (image, layout) in enumerate(zip(images, layouts, strict=True)):
            labels = list(dict.fromkeys(self.query(phrase).label for phrase in layout.phrases))
            asked = self._queries(labels)
            queries += asked
            seen += [_pixels(image)] * len(asked)
            owners += [k] * len(asked)
        every: list[list[Detection]] = [[] for _ in images]
        for k, detections in zip(owners, self.network.find(seen, queries), strict=True):
            every[k] += _distinct(detections)[:MOST]
        return [sorted(found, key=lambda item: -item.score)[:MOST] for found in every]

    def _queries(self, labels: Sequence[str]) -> list[Any]:
        if isinstance(self.network, CandidateNetwork):
            return [tuple(labels)] if labels else []
        texts: list[str] = []
        for label in labels:
            if texts and self.network.excess(f"{texts[-1]} {label} .") <= 0:
                texts[-1] += f" {label} ."
            else:
                texts.append(f"{label} .")
        return texts


def plain(phrase: str) -> str:
    """Lower-cased, without an article at its begin, sentence marks, and spaces that say nothing.

    A detector that grounds words takes a mark for the end of a phrase.
    """
    words = re.sub(r"[.?!]", " ", phrase.lower()).strip(" ,;:-").split()
    without = " ".join(words[1:]).strip(" ,;:-")
    return without if without and words[0] in ("a", "an", "the", "some") else " ".join(words)


def _distinct(detections: Sequence[Detection]) -> list[Detection]:
    """Leave out those that overlap a better one of the same label by `SAME` or more."""
    boxes = np.array([detection.box for detection in detections])
    overlap = box_iou(boxes, boxes)
    distinct: list[int] = []
    for k, detection in enumerate(detections):  # best first
        if not any(detections[j].label == detection.label and overlap[k, j] >= SAME for j in distinct):
            distinct.append(k)
    return [detections[k] for k in distinct]


# Both -----------------------------------------------------------------------------------------------------------------


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _settings(name: str, checksum: str, network: Network, threshold: float) -> dict[str, Any]:
    return {
        "detector": name,
        "checksum": checksum,
        "kind": network.model.config.model_type,
        "threshold": threshold,
        "kept_from": network.settings.box_threshold,
        "dtype": str(network.settings.dtype).removeprefix("torch."),
    }
