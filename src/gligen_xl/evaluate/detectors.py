"""Detectors: what is where in a picture, and what a layout's phrases ask of them.

    detector = find_detector("PekingU/rtdetr_r50vd", device="cuda")   # or a local folder, or "shapes"
    detector.wanted("two cars")                                       # Wanted(label="car", attributes={})
    detector.detect([picture], [layout])                              # a list of Found a picture

Three kinds: the exact one of the shapes world; networks of fixed classes (RT-DETR, D-FINE, DETR, YOLOS, ...); and
networks that look for free phrases (OWLv2, GroundingDINO, MM-GroundingDINO, OmDet-Turbo).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as CLASS_KINDS

from ..hub import local_folder, names_repository
from ..layout import Layout, box_iou
from ..prepare.detections import Detections
from ..prepare.networks import (
    FILES,
    WORD_KINDS,
    ZERO_SHOT_KINDS,
    CandidateNetwork,
    Network,
    NetworkSettings,
    WordNetwork,
    check_kind,
    load_network,
)
from ..shapes.detect import detect
from ..shapes.world import COLOURS, SHAPES
from .colour import ColourJudge, Segmenter, split_colour
from .found import Found
from .scores import ObjectScore, score_picture

KEPT = 0.05  # score from which on a detection is kept for AP, under the threshold from which on it counts
CLASS_THRESHOLD = 0.5  # transformers' own
PHRASE_THRESHOLD = 0.25  # COCO-MIG's evaluation, as is the next
SAME = 0.8  # IoU from which on two boxes of one phrase are the same object
MOST = 100  # detections a picture, as COCO's AP takes them


@dataclass(frozen=True)
class Wanted:
    """What a phrase asks for, in a detector's words: the label of a detection, and what it is to be judged."""

    label: str
    attributes: Mapping[str, str] = field(default_factory=dict)


class Detector(Protocol):
    """Finds the objects of layouts.

    Attributes:
        name: for file names and reports.
        settings: all that its detections depend on, for reports.
        attributes: what is judged beside the place, as ("colour",).
        labels_decide: only detections of the requested label may be assigned to an object; else any, by IoU alone.
    """

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def labels_decide(self) -> bool: ...

    def wanted(self, phrase: str) -> Wanted:
        """Raises ValueError, if it cannot look for that."""
        ...

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        """What is in each picture, best first; the same whatever pictures are beside it, to rounding.

        Also what scores less than `settings["threshold"]`, down to `KEPT`: AP is of the less sure as well.
        """
        ...


def find_detector(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    threshold: float | None = None,
    colour: bool = False,
    segmenter: str | Path | None = None,
    local_files_only: bool = False,
) -> Detector:
    """The detector of that name. Code of a repository is never run; weights are safetensors.

    Args:
        name: "shapes", a folder, or a Hub repository.
        dtype: float32, or bfloat16 or float16 where these do (mixed precision).
        batch_size: pictures at once.
        threshold: score from which on a detection counts. None: 0.5 for fixed classes, 0.25 for free phrases.
        colour: judge colours: every phrase has to name one, as "a red car".
        segmenter: SAM, a folder or a Hub repository; its masks are what colours are judged in. None: an ellipse.

    Raises:
        FileNotFoundError: no such folder or repository.
        ValueError: it is no detector, or it cannot heed an argument.
    """
    if segmenter is not None and not colour:
        raise ValueError(f"segmenter is {str(segmenter)!r}, but no colours are judged; leave it out")
    if name == "shapes":
        if threshold is not None or segmenter is not None:
            raise ValueError("the shapes detector has no threshold and no segmenter; leave them out")
        return ShapesDetector()
    if "/" not in str(name) and not Path(name).is_dir():
        raise ValueError(f"no detector {str(name)!r}; expected 'shapes', a folder, or a Hub repository (owner/name)")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a score between 0 and 1")

    folder = local_folder(name, "detector", FILES, local_files_only=local_files_only)
    kind = check_kind(folder, (*CLASS_KINDS, *ZERO_SHOT_KINDS), "object detector")
    title = str(name) if names_repository(name) and not Path(name).is_dir() else folder.resolve().name
    fixed = kind in CLASS_KINDS
    if threshold is None:
        threshold = CLASS_THRESHOLD if fixed else PHRASE_THRESHOLD
    # A text threshold under 0: a box's phrase is all of its words.
    settings = NetworkSettings(min(KEPT, threshold), -1.0, device, dtype, batch_size)
    if fixed:
        loaded = load_network(
            folder,
            auto_model=AutoModelForObjectDetection,
            auto_processor=AutoImageProcessor,
            expected="config.json, preprocessor_config.json and weights in .safetensors",
        )
        detector: Detector = ClassDetector(title, ClassNetwork(*loaded, settings), threshold)
    else:
        network = WordNetwork if kind in WORD_KINDS else CandidateNetwork
        detector = PhraseDetector(title, network(*load_network(folder), settings), threshold)
    if not colour:
        return detector
    masks = Segmenter.load(segmenter, device=device, local_files_only=local_files_only) if segmenter else None
    return ColourDetector(detector, ColourJudge(segmenter=masks))


# The shapes world ---------------------------------------------------------------------------------------------------


class ShapesDetector:
    """The exact detector of the shapes world; attributes are colour and shape, and labels do not decide."""

    name = "shapes"
    settings: Mapping[str, Any] = {"detector": "shapes"}
    attributes = ("colour", "shape")
    labels_decide = False

    def wanted(self, phrase: str) -> Wanted:
        colour, shape = self.parse(phrase)
        return Wanted(f"{colour} {shape}", {"colour": colour, "shape": shape})

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        return [
            [
                Found(item.box, f"{item.colour} {item.shape}", item.score, {"colour": item.colour, "shape": item.shape})
                for item in detect(picture)
            ]
            for picture, _ in zip(pictures, layouts, strict=True)
        ]

    def score(self, picture: Image.Image, layout: Layout) -> list[ObjectScore]:
        """One score an object, in the layout's order."""
        (found,) = self.detect([picture], [layout])
        return list(score_picture(layout, "", found, self).objects)

    @staticmethod
    def parse(phrase: str) -> tuple[str, str]:
        """Colour and shape that a phrase names."""
        words = re.findall(r"[a-z]+", phrase.lower())
        colours, shapes = [w for w in words if w in COLOURS], [w for w in words if w in SHAPES]
        if len(colours) != 1 or len(shapes) != 1:
            raise ValueError(
                f"the shapes detector cannot look for {phrase!r}; a phrase has to name one colour "
                f"({', '.join(COLOURS)}) and one shape ({', '.join(SHAPES)})"
            )
        return colours[0], shapes[0]


# Fixed classes ------------------------------------------------------------------------------------------------------


class ClassDetector:
    """Of fixed classes, those of the network's `id2label`.

    A phrase is a class's name, with or without an article, in the singular or the plural. Some networks use VOC's names
    of COCO's classes (sofa, aeroplane, tvmonitor): these are taken for the same.
    """

    attributes: tuple[str, ...] = ()
    labels_decide = True

    def __init__(self, name: str, network: ClassNetwork, threshold: float = CLASS_THRESHOLD):
        self.network = network
        self.name, self.settings = _file_name(name), _settings(name, network, threshold)
        self._names: dict[str, str] = {}  # of a class, by its spelling without spaces
        for class_name in network.classes:
            self._names.setdefault(_spelling(class_name), class_name)

    def wanted(self, phrase: str) -> Wanted:
        for form in _singulars(plain(phrase)):
            if (name := self._names.get(_spelling(form))) is not None:
                return Wanted(name)
        near = get_close_matches(plain(phrase), self.network.classes, n=3, cutoff=0.6)
        near += [name for name in self.network.classes if name in plain(phrase).split() and name not in near]
        hint = f"; near are {', '.join(near)}" if near else f"; it has {', '.join(self.network.classes[:8])}, ..."
        raise ValueError(
            f"the detector {self.name} cannot look for {phrase!r}, which is none of its {len(self.network.classes)} "
            f"classes{hint}. For free phrases take OWLv2 or GroundingDINO"
        )

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        found = self.network.find([_pixels(picture) for picture in pictures], [True] * len(layouts))
        return [list(_best(detections)) for detections in found]


class ClassNetwork(Network):
    """A network of fixed classes; there is nothing to ask it."""

    @property
    def classes(self) -> list[str]:
        return [name for name in self.model.config.id2label.values() if name != "N/A"]

    def _group(self, picture: np.ndarray, query: bool) -> Hashable:
        return picture.shape

    def _batch(self, pictures: list[np.ndarray], queries: list[bool]) -> Iterator[Detections]:
        every = self.processor.post_process_object_detection(
            self._run(self.processor(pictures, return_tensors="pt")),
            threshold=self.settings.box_threshold,
            target_sizes=[picture.shape[:2] for picture in pictures],
        )
        for picture, found in zip(pictures, every, strict=True):
            names = [self.model.config.id2label[number] for number in found["labels"].tolist()]
            yield self._post_processed(found, picture, names)


_VOC = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
_PLURALS = (("people", "person"), ("ies", "y"), ("ves", "fe"), ("ves", "f"), ("s", ""), ("es", ""))


def _spelling(name: str) -> str:
    """Of a class, whoever spells it: "potted plant" and "pottedplant", "tv" and "tv monitor"."""
    joined = re.sub(r"[\W_]", "", name.lower())
    return _VOC.get(joined, joined)


def _singulars(name: str) -> Iterator[str]:
    """The name itself first ("skis" are a class), then what it could be the plural of."""
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

    def __init__(self, name: str, network: WordNetwork | CandidateNetwork, threshold: float = PHRASE_THRESHOLD):
        self.network = network
        self.name, self.settings = _file_name(name), _settings(name, network, threshold) | {"same_iou": SAME}

    def wanted(self, phrase: str) -> Wanted:
        label = plain(phrase)
        text = f"{label} ." if isinstance(self.network, WordNetwork) else label
        if not re.search(r"\w", label):
            raise ValueError(f"the detector {self.name} cannot look for {phrase!r}, which holds no word")
        if (excess := self.network.excess(text)) > 0:
            raise ValueError(f"the detector {self.name} cannot look for {phrase!r}; it is {excess} tokens too long")
        return Wanted(label)

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        seen: list[np.ndarray] = []
        queries: list[Any] = []
        owners: list[int] = []
        for k, (picture, layout) in enumerate(zip(pictures, layouts, strict=True)):
            labels = list(dict.fromkeys(self.wanted(phrase).label for phrase in layout.phrases))
            asked = self._queries(labels)
            queries += asked
            seen += [_pixels(picture)] * len(asked)
            owners += [k] * len(asked)
        every: list[list[Found]] = [[] for _ in pictures]
        for k, detections in zip(owners, self.network.find(seen, queries), strict=True):
            every[k] += _best(_distinct(detections))
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
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the", "some") else words)


def _distinct(detections: Detections) -> Detections:
    """Without those that overlap a better one of the same phrase by `SAME` or more."""
    overlap = box_iou(np.array(detections.boxes), np.array(detections.boxes))
    kept: list[int] = []
    for k, phrase in enumerate(detections.phrases):  # best first
        if not any(detections.phrases[j] == phrase and overlap[k, j] >= SAME for j in kept):
            kept.append(k)
    return Detections(
        [detections.boxes[k] for k in kept],
        [detections.scores[k] for k in kept],
        [detections.phrases[k] for k in kept],
    )


# Colours ------------------------------------------------------------------------------------------------------------


class ColourDetector:
    """Another detector, which looks for the object that a phrase names; what is found is judged for its colours.

    An object may be of several colours, or none: the attribute is a tuple.
    """

    attributes = ("colour",)

    def __init__(self, detector: Detector, judge: ColourJudge):
        self.detector, self.judge = detector, judge
        self.name, self.labels_decide = f"{detector.name}-colour", detector.labels_decide
        self.settings: Mapping[str, Any] = {**detector.settings, **judge.settings}

    def wanted(self, phrase: str) -> Wanted:
        colour, rest = split_colour(phrase)
        return Wanted(self.detector.wanted(rest).label, {"colour": colour})

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Found]]:
        colourless = [replace(of, phrases=[split_colour(phrase)[1] for phrase in of.phrases]) for of in layouts]
        every = self.detector.detect(pictures, colourless)
        coloured = []
        for picture, found in zip(pictures, every, strict=True):
            colours = self.judge.colours(picture, [item.box for item in found])
            coloured.append(
                [replace(item, attributes={"colour": names}) for item, names in zip(found, colours, strict=True)]
            )
        return coloured


def _best(detections: Detections) -> Iterable[Found]:
    every = zip(detections.boxes, detections.phrases, detections.scores, strict=True)
    return (Found(*each) for each in list(every)[:MOST])


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _settings(name: str, network: Network, threshold: float) -> dict[str, Any]:
    return {
        "detector": name,
        "kind": network.model.config.model_type,
        "threshold": threshold,
        "kept_from": network.settings.box_threshold,
        "dtype": str(network.settings.dtype).removeprefix("torch."),
    }
