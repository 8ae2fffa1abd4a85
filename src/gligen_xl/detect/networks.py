"""Detection networks of transformers: loading, images in batches, half precision that may overflow.

Zero-shot networks are of two kinds. Those that ground every word of a text (GroundingDINO, MM-GroundingDINO) are asked
with a text, and what of it a box shows is its phrase. Others (OWL-ViT, OWLv2, OmDet-Turbo) are asked with candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from ..io import read_json
from ..layout import xyxy_from_cxcywh
from .detection import Detection
from .outputs import Tokens, collect

ZERO_SHOT_KINDS = tuple(MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES)  # config.model_type of all
WORD_KINDS = ("grounding-dino", "mm-grounding-dino")  # of those that ground every word
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a repository
_READ = ("logits", "pred_boxes", "decoder_class_logits", "decoder_coord_logits")  # of a model's outputs
_EXPECTED = "config.json, preprocessor_config.json, a tokenizer and weights in .safetensors"


@dataclass(frozen=True)
class NetworkSettings:
    """How a network is asked.

    Args:
        box_threshold: of a box's score.
        text_threshold: of the score that a word needs to be in a box's phrase, where every word is grounded.
        dtype: float32, or bfloat16 or float16 where these do (mixed precision).
        batch_size: images at once.
    """

    box_threshold: float
    text_threshold: float = 0.0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")


class Network(ABC):
    """Images in batches through a model. Only those that need no padding beside each other share one, since padding
    moves what a network sees."""

    def __init__(self, model: Any, processor: Any, settings: NetworkSettings):
        self.model = model.to(settings.device).eval()
        self.processor, self.settings = processor, settings

    def find(self, images: Sequence[np.ndarray], queries: Sequence[Any]) -> list[list[Detection]]:
        """Return what is found in each image, (h, w, 3) uint8 of any size; nothing if its query is empty."""
        groups: dict[Hashable, list[int]] = {}
        for k, (image, query) in enumerate(zip(images, queries, strict=True)):
            if query:  # else there is nothing to look for
                groups.setdefault(self._group(image, query), []).append(k)
        found: list[list[Detection]] = [[] for _ in images]
        for group in groups.values():
            for start in range(0, len(group), self.settings.batch_size):
                numbers = group[start : start + self.settings.batch_size]
                batch = self._batch([images[k] for k in numbers], [queries[k] for k in numbers])
                for k, detections in zip(numbers, batch, strict=True):
                    found[k] = detections
        return found

    @abstractmethod
    def _group(self, image: np.ndarray, query: Any) -> Hashable:
        """Equal for images that can share a batch without padding."""

    @abstractmethod
    def _batch(self, images: list[np.ndarray], queries: list[Any]) -> Iterator[list[Detection]]: ...

    def _run(self, inputs: dict[str, Any]) -> Any:
        """Return the model's outputs in float32. A batch that overflows in half precision is repeated in float32."""
        inputs = {name: value.to(self.settings.device) for name, value in inputs.items()}
        device_type = torch.device(self.settings.device).type
        outputs: Any = {}
        read: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            for dtype in dict.fromkeys((self.settings.dtype, torch.float32)):
                with torch.autocast(device_type, dtype) if dtype != torch.float32 else nullcontext():
                    outputs = self.model(**inputs)
                read = {name: outputs[name].float() for name in _READ if name in outputs}
                if not any(bool((value.isnan() | (value == torch.inf)).any()) for value in read.values()):
                    break  # minus infinity is the score of what is no word
            for name, value in read.items():
                outputs[name] = value
        return outputs

    def _post_processed(self, found: dict[str, Any], image: np.ndarray, phrases: Sequence[str]) -> list[Detection]:
        """Convert the library's own post-processing of one image, which is in pixels."""
        height, width = image.shape[:2]
        boxes = found["boxes"].cpu().numpy() / np.array([width, height, width, height], np.float32)
        return collect(boxes, found["scores"].cpu().numpy(), phrases)


class WordNetwork(Network):
    """Of the kind of GroundingDINO: a query is a text, in sentences, and a box may show any of its words."""

    def excess(self, text: str) -> int:
        """Return by how many tokens a text is longer than the network reads."""
        return len(self.processor.tokenizer(text, verbose=False)["input_ids"]) - self.limit

    @property
    def limit(self) -> int:
        """Tokens, those of begin and end included."""
        return min(self.model.config.max_text_len, self.processor.tokenizer.model_max_length)

    def _group(self, image: np.ndarray, query: str) -> Hashable:
        return image.shape

    def _batch(self, images: list[np.ndarray], queries: list[str]) -> Iterator[list[Detection]]:
        texts = self.processor.tokenizer(queries, padding=True, return_tensors="pt")
        outputs = self._run({**self.processor.image_processor(images, return_tensors="pt"), **texts})
        scores = outputs.logits.sigmoid().cpu().numpy()  # (B, boxes, tokens)
        boxes = xyxy_from_cxcywh(outputs.pred_boxes.cpu().numpy())  # (B, boxes, 4)
        for k, encoding in enumerate(texts.encodings):
            tokens = Tokens(queries[k], tuple(encoding.offsets), tuple(encoding.word_ids))
            best = scores[k].max(-1)
            kept = np.flatnonzero(best > self.settings.box_threshold)
            phrases = [tokens.phrase(scores[k, number], self.settings.text_threshold) for number in kept]
            yield collect(boxes[k, kept], best[kept], phrases)


class CandidateNetwork(Network):
    """Of the kind of OWL-ViT: a query is several texts, and a box shows one of them."""

    def excess(self, text: str) -> int:
        """Return by how many tokens a text is longer than the network reads."""
        tokenizer = self.processor.tokenizer
        return len(tokenizer(text, verbose=False)["input_ids"]) - tokenizer.model_max_length

    def _group(self, image: np.ndarray, query: tuple[str, ...]) -> Hashable:
        return len(query)  # sizes do not matter: these models see every image in one size

    def _batch(self, images: list[np.ndarray], queries: list[tuple[str, ...]]) -> Iterator[list[Detection]]:
        labels = [list(query) for query in queries]
        inputs = self.processor(text=labels, images=images, padding="max_length", truncation=True, return_tensors="pt")
        every = self.processor.post_process_grounded_object_detection(
            self._run(inputs),
            threshold=self.settings.box_threshold,
            target_sizes=[image.shape[:2] for image in images],
            text_labels=labels,
        )
        for image, found in zip(images, every, strict=True):
            yield self._post_processed(found, image, found["text_labels"])


# Loading ------------------------------------------------------------------------------------------------------------


def kind_of(folder: Path) -> str | None:
    """Return the model_type in a folder's config.json.

    Raises:
        FileNotFoundError: there is none.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; expected {_EXPECTED}")
    content = read_json(config)
    return content.get("model_type") if isinstance(content, dict) else None


def check_kind(folder: Path, kinds: Collection[str], what: str) -> str:
    """Return the folder's kind; raise a ValueError if it is none of those."""
    if (kind := kind_of(folder)) not in kinds:
        raise ValueError(f"{folder} is of model_type {kind!r}, no {what}; expected {', '.join(kinds)}")
    return str(kind)


def load_network(
    folder: Path,
    *,
    auto_model: Any = AutoModelForZeroShotObjectDetection,
    auto_processor: Any = AutoProcessor,
    expected: str = _EXPECTED,
) -> tuple[Any, Any]:
    """Model and processor; code in the folder is never run, and weights are safetensors only.

    A small image shows now what packages the processor needs, not after the first hour.

    Raises:
        ValueError: it cannot be loaded, or needs a package.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = auto_processor.from_pretrained(folder, **options)
        images = getattr(processor, "image_processor", processor)
        images(np.zeros((32, 32, 3), np.uint8), return_tensors="pt")
        model = auto_model.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **options)
    except ImportError as error:  # transformers names the package, and the command that installs it
        raise ValueError(f"{folder} needs a package: {' '.join(str(error).split())}") from error
    except Exception as error:  # each of its parts has its own kinds
        raise ValueError(f"{folder} cannot be loaded; expected {expected}: {error}") from error
    return model, processor
