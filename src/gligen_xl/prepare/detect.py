"""Boxes found in pictures from their captions, by any zero-shot detector of transformers.

    detector = Detector.load("IDEA-Research/grounding-dino-base", device="cuda")  # or a local folder
    detector.detect([picture], ["A man rides a bicycle. Trees stand behind him."])

Detectors are of two kinds. Those that ground every word of a text (GroundingDINO, MM-GroundingDINO) read the caption
whole, and what of it a box shows is its phrase. Others (OWL-ViT, OWLv2, OmDet-Turbo) look for candidates: the parts of
the caption between its commas and sentence marks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as KINDS

from ..files import read_json
from ..hub import local_folder
from ..layout import xyxy_from_cxcywh
from ..shapes.detect import detect as detect_shapes
from .detections import MARKS, Detections, Tokens, candidates, collect
from .settings import THRESHOLD

WORD_KINDS = ("grounding-dino", "mm-grounding-dino")  # config.model_type of those that ground every word
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a repository
_READ = ("logits", "pred_boxes", "decoder_class_logits", "decoder_coord_logits")  # of a model's outputs
_EXPECTED = "config.json, preprocessor_config.json, a tokenizer and weights in .safetensors"


class Detector(ABC):
    """Finds what a caption names.

    Attributes:
        cut_texts: number of the texts that were too long for it, and were cut.
        reads_captions: whether a picture without one has nothing to look for.
    """

    cut_texts: int = 0
    reads_captions: bool = False

    @abstractmethod
    def detect(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[Detections]:
        """What is found in each picture, (h, w, 3) uint8 of any size; the same whatever pictures are beside it.

        Raises:
            ValueError: pictures of another kind, or not one caption a picture.
        """

    @staticmethod
    def load(
        name: str | Path = "IDEA-Research/grounding-dino-base",
        *,
        box_threshold: float | None = None,
        text_threshold: float | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        text: str | None = None,
        local_files_only: bool = False,
    ) -> Detector:
        """A detector by name; thresholds as IGLIGEN's. Code of a repository is never run.

        Args:
            name: a folder, a Hub repository, or "shapes": the exact detector of the embedded world.
            box_threshold: of a box's score. None: `THRESHOLD`.
            text_threshold: of the score that a word needs to be in a box's phrase, where every word is grounded.
            dtype: float32, or bfloat16 or float16 where these do (mixed precision).
            batch_size: pictures at once.
            text: look for this in every picture, whatever its caption says.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it lacks what a detector is made of.
            ValueError: it is no zero-shot detector, or a package that it needs is not installed.
        """
        if name == "shapes":
            return ShapesDetector()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        folder = local_folder(name, "detector", _FILES, local_files_only=local_files_only)
        kind = _kind_of(folder)
        model, processor = _load(folder)
        of_box, of_text = (THRESHOLD if value is None else value for value in (box_threshold, text_threshold))
        settings = DetectorSettings(of_box, of_text, torch.device(device), dtype, batch_size, text)
        return (WordDetector if kind in WORD_KINDS else CandidateDetector)(model, processor, settings)


class ShapesDetector(Detector):
    """Of pictures of the shapes world; what the caption says does not matter."""

    def detect(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[Detections]:
        _check(pictures, captions)
        every = [detect_shapes(picture) for picture in pictures]
        return [
            Detections(
                [item.box for item in found], [1.0] * len(found), [f"a {item.colour} {item.shape}" for item in found]
            )
            for found in every
        ]


# Networks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectorSettings:
    """The arguments of `Detector.load`."""

    box_threshold: float
    text_threshold: float
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    text: str | None


class NetworkDetector(Detector):
    """Pictures in batches through a model. Only those that need no padding beside each other share one, since padding
    moves what a network sees."""

    def __init__(self, model: Any, processor: Any, settings: DetectorSettings):
        self.model = model.to(settings.device).eval()
        self.processor, self.settings = processor, settings
        self.cut_texts, self.reads_captions = 0, settings.text is None

    def detect(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[Detections]:
        _check(pictures, captions)
        queries = [self._query(caption if self.settings.text is None else self.settings.text) for caption in captions]
        groups: dict[Hashable, list[int]] = {}
        for k, (picture, query) in enumerate(zip(pictures, queries, strict=True)):
            if query:  # else there is nothing to look for
                groups.setdefault(self._group(picture, query), []).append(k)
        found = [Detections() for _ in pictures]
        for group in groups.values():
            for start in range(0, len(group), self.settings.batch_size):
                numbers = group[start : start + self.settings.batch_size]
                batch = self._batch([pictures[k] for k in numbers], [queries[k] for k in numbers])
                for k, detections in zip(numbers, batch, strict=True):
                    found[k] = detections
        return found

    @abstractmethod
    def _query(self, text: str) -> Any:
        """What is looked for; empty where the text names nothing."""

    @abstractmethod
    def _group(self, picture: np.ndarray, query: Any) -> Hashable:
        """Equal for pictures that can share a batch without padding."""

    @abstractmethod
    def _batch(self, pictures: list[np.ndarray], queries: list[Any]) -> Iterator[Detections]: ...

    def _run(self, inputs: dict[str, Any]) -> Any:
        """The model's outputs in float32. A batch that overflows in half precision is repeated without it."""
        inputs = {name: value.to(self.settings.device) for name, value in inputs.items()}
        outputs: Any = {}
        read: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            for dtype in dict.fromkeys((self.settings.dtype, torch.float32)):
                half = torch.autocast(self.settings.device.type, dtype) if dtype != torch.float32 else nullcontext()
                with half:
                    outputs = self.model(**inputs)
                read = {name: outputs[name].float() for name in _READ if name in outputs}
                if not any(bool((value.isnan() | (value == torch.inf)).any()) for value in read.values()):
                    break  # minus infinity is the score of what is no word
            for name, value in read.items():
                outputs[name] = value
        return outputs


class WordDetector(NetworkDetector):
    """Of the kind of GroundingDINO: a text is a sequence of words, each of which a box may show."""

    def _query(self, text: str) -> str:
        """Lower-cased and ended with a full stop, as the model was trained; cut before the word that is too much."""
        text = text.strip().lower()
        if not text.strip("".join(MARKS) + " "):
            return ""
        limit = min(self.model.config.max_text_len, self.processor.tokenizer.model_max_length)
        encoding = self.processor.tokenizer(text, verbose=False).encodings[0]
        if len(encoding) + (not text.endswith(".")) > limit:
            self.cut_texts += 1
            last = limit - 3  # there come a full stop and the token of the end
            while last > 1 and encoding.word_ids[last] == encoding.word_ids[last + 1]:
                last -= 1
            text = text[: encoding.offsets[last][1]]
        return text if text.endswith(".") else text + "."

    def _group(self, picture: np.ndarray, query: str) -> Hashable:
        return picture.shape

    def _batch(self, pictures: list[np.ndarray], queries: list[str]) -> Iterator[Detections]:
        texts = self.processor.tokenizer(queries, padding=True, return_tensors="pt")
        outputs = self._run({**self.processor.image_processor(pictures, return_tensors="pt"), **texts})
        scores = outputs.logits.sigmoid().cpu().numpy()  # (B, boxes, tokens)
        boxes = xyxy_from_cxcywh(outputs.pred_boxes.cpu().numpy())  # (B, boxes, 4)
        for k, encoding in enumerate(texts.encodings):
            tokens = Tokens(queries[k], tuple(encoding.offsets), tuple(encoding.word_ids))
            best = scores[k].max(-1)
            kept = np.flatnonzero(best > self.settings.box_threshold)
            phrases = [tokens.phrase(scores[k, number], self.settings.text_threshold) for number in kept]
            yield collect(boxes[k, kept], best[kept], phrases)


class CandidateDetector(NetworkDetector):
    """Of the kind of OWL-ViT: a box shows one of several texts."""

    def _query(self, text: str) -> tuple[str, ...]:
        parts = candidates(text)
        tokenizer = self.processor.tokenizer
        lengths = [len(tokenizer(part, verbose=False)["input_ids"]) for part in parts]
        self.cut_texts += sum(length > tokenizer.model_max_length for length in lengths)
        return parts

    def _group(self, picture: np.ndarray, query: tuple[str, ...]) -> Hashable:
        return len(query)  # sizes do not matter: these models see every picture in one size

    def _batch(self, pictures: list[np.ndarray], queries: list[tuple[str, ...]]) -> Iterator[Detections]:
        labels = [list(query) for query in queries]
        inputs = self.processor(
            text=labels, images=pictures, padding="max_length", truncation=True, return_tensors="pt"
        )
        every = self.processor.post_process_grounded_object_detection(
            self._run(inputs),
            threshold=self.settings.box_threshold,
            target_sizes=[picture.shape[:2] for picture in pictures],
            text_labels=labels,
        )
        for picture, found in zip(pictures, every, strict=True):
            height, width = picture.shape[:2]
            boxes = found["boxes"].cpu().numpy() / np.array([width, height, width, height], np.float32)
            yield collect(boxes, found["scores"].cpu().numpy(), found["text_labels"])


def _check(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions; give one a picture")
    for k, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"picture {k} is {picture.dtype} {picture.shape}; expected uint8 (height, width, 3)")


# Loading ------------------------------------------------------------------------------------------------------------


def _kind_of(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; a detector is {_EXPECTED}")
    content = read_json(config)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{folder} is of model_type {kind!r}, no zero-shot detector; expected {', '.join(KINDS)}")
    return kind


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and processor. A small picture shows now what packages the processor needs, not after the first archive."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **options)
        processor.image_processor(np.zeros((32, 32, 3), np.uint8), return_tensors="pt")
        model = AutoModelForZeroShotObjectDetection.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **options
        )
    except ImportError as error:  # transformers names the package, and the command that installs it
        raise ValueError(f"the detector {folder} needs a package: {' '.join(str(error).split())}") from error
    except Exception as error:  # each of its parts has its own kinds
        raise ValueError(f"the detector {folder} cannot be loaded; expected {_EXPECTED}: {error}") from error
    return model, processor
