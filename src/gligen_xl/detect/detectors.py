"""Detectors: what is where in an image, and what a layout's phrases ask of them.

    detector = find_detector("PekingU/rtdetr_r50vd", device="cuda")   # or a local folder, or "shapes"
    detector.query("two cars")                                       # Query(label="car", attributes={})
    detector.detect([image], [layout])                              # a list of Found an image

Three kinds: the exact one of the shapes world; networks of fixed classes (RT-DETR, D-FINE, DETR, YOLOS, ...); and
networks that look for free phrases (OWLv2, GroundingDINO, MM-GroundingDINO, OmDet-Turbo). Each of them may be asked for
colours as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as CLASS_KINDS

from ..hub import local_folder
from ..layout import Layout
from ..worlds import find_world
from .colour import ColourJudge, Segmenter, split_colour
from .detection import Detection, Detector, Query
from .network_detectors import CLASS_THRESHOLD, PHRASE_THRESHOLD, ClassDetector, ClassNetwork, PhraseDetector
from .networks import (
    FILES,
    WORD_KINDS,
    ZERO_SHOT_KINDS,
    CandidateNetwork,
    NetworkSettings,
    WordNetwork,
    check_kind,
    load_network,
)
from .weights import check_tokenizer, checksum, title

KEPT = 0.05  # score from which on a detection is kept for AP, under the threshold from which on it counts


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
    """Return the detector of that name. Code of a repository is never run; weights are safetensors.

    Args:
        name: "shapes", a folder, or a Hub repository.
        dtype: float32, or bfloat16 or float16 where these do (mixed precision).
        batch_size: images at once.
        threshold: score from which on a detection counts. None: 0.5 for fixed classes, 0.25 for free phrases.
        colour: judge colours: every phrase has to name one, as "a red car".
        segmenter: SAM, a folder or a Hub repository; its masks are what colours are judged in. None: an ellipse.

    Raises:
        FileNotFoundError: no such folder or repository.
        ValueError: it is no detector, or it cannot heed an argument.
    """
    if segmenter is not None and not colour:
        raise ValueError(f"segmenter is {str(segmenter)!r}, but no colours are judged; leave it out")
    if world := find_world(name):
        if threshold is not None or segmenter is not None:
            raise ValueError(f"the {name} detector has no threshold and no segmenter; leave them out")
        return world.new_detector()
    if "/" not in str(name) and not Path(name).is_dir():
        raise ValueError(f"no detector {str(name)!r}; expected 'shapes', a folder, or a Hub repository (owner/name)")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a score between 0 and 1")

    folder = local_folder(name, "detector", FILES, local_files_only=local_files_only)
    kind = check_kind(folder, (*CLASS_KINDS, *ZERO_SHOT_KINDS), "object detector")
    fixed = kind in CLASS_KINDS
    if threshold is None:
        threshold = CLASS_THRESHOLD if fixed else PHRASE_THRESHOLD
    # A text threshold under 0: a box's phrase is all of its words.
    settings = NetworkSettings(min(KEPT, threshold), -1.0, device, dtype, batch_size)
    named = (title(name, folder), checksum(folder))
    if fixed:
        loaded = load_network(
            folder,
            auto_model=AutoModelForObjectDetection,
            auto_processor=AutoImageProcessor,
            expected="config.json, preprocessor_config.json and weights in .safetensors",
        )
        detector: Detector = ClassDetector(*named, ClassNetwork(*loaded, settings), threshold)
    else:
        check_tokenizer(folder)
        network = WordNetwork if kind in WORD_KINDS else CandidateNetwork
        detector = PhraseDetector(*named, network(*load_network(folder), settings), threshold)
    if not colour:
        return detector
    masks = Segmenter.load(segmenter, device=device, local_files_only=local_files_only) if segmenter else None
    return ColourDetector(detector, ColourJudge(segmenter=masks))


# Colours ------------------------------------------------------------------------------------------------------------


class ColourDetector:
    """Another detector, which looks for the object that a phrase names; what is found is judged for its colours.

    An object may be of several colours, or none: the attribute is a tuple.
    """

    attributes = ("colour",)

    def __init__(self, detector: Detector, judge: ColourJudge):
        self.detector, self.judge = detector, judge
        self.name = f"{detector.name}-colour"
        self.labels_decide, self.reads_layouts = detector.labels_decide, detector.reads_layouts
        self.settings: Mapping[str, Any] = {**detector.settings, **judge.settings}

    def query(self, phrase: str) -> Query:
        colour, rest = split_colour(phrase)
        return Query(self.detector.query(rest).label, {"colour": colour})

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        colourless = [replace(of, phrases=[split_colour(phrase)[1] for phrase in of.phrases]) for of in layouts]
        every = self.detector.detect(images, colourless)
        coloured = []
        for image, found in zip(images, every, strict=True):
            colours = self.judge.colours(image, [item.box for item in found])
            coloured.append(
                [replace(item, attributes={"colour": names}) for item, names in zip(found, colours, strict=True)]
            )
        return coloured
