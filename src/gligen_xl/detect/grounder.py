"""Boxes found in images from their captions, by any zero-shot detector of transformers.

    grounder = find_grounder("IDEA-Research/grounding-dino-base", device="cuda")  # or a local folder
    grounder.ground([image], ["A man rides a bicycle. Trees stand behind him."])

Detectors that ground every word read the caption whole; others look for candidates: the parts of the caption between
its commas and sentence marks. See `networks`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hub import local_folder
from ..worlds import find_world
from .detection import THRESHOLD, CaptionGrounder, Detection
from .networks import (
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
from .outputs import MARKS, candidates


def find_grounder(
    name: str | Path = "IDEA-Research/grounding-dino-base",
    *,
    box_threshold: float | None = None,
    text_threshold: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    text: str | None = None,
    local_files_only: bool = False,
) -> CaptionGrounder:
    """Load a detector by name; thresholds as IGLIGEN's. Code of a repository is never run.

    Args:
        name: a folder, a Hub repository, or "shapes": the exact detector of the embedded world.
        box_threshold: of a box's score. None: `THRESHOLD`.
        text_threshold: of the score that a word needs to be in a box's phrase, where every word is grounded.
        dtype: float32, or bfloat16 or float16 where these do (mixed precision).
        batch_size: images at once.
        text: look for this in every image, whatever its caption says.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it lacks what a detector is made of.
        ValueError: it is no zero-shot detector, or a package that it needs is not installed.
    """
    if world := find_world(name):
        return world.new_grounder()
    of_box, of_text = (THRESHOLD if value is None else value for value in (box_threshold, text_threshold))
    settings = NetworkSettings(of_box, of_text, device, dtype, batch_size)
    folder = local_folder(name, "detector", FILES, local_files_only=local_files_only)
    kind = check_kind(folder, ZERO_SHOT_KINDS, "zero-shot detector")
    model, processor = load_network(folder)
    return (WordGrounder if kind in WORD_KINDS else CandidateGrounder)(model, processor, settings, text)


class NetworkGrounder(CaptionGrounder, Network):
    """A network that is asked for what captions name."""

    def __init__(self, model: Any, processor: Any, settings: NetworkSettings, text: str | None):
        super().__init__(model, processor, settings)
        self.text, self.cut_texts, self.reads_captions = text, 0, text is None

    def ground(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[Detection]]:
        check_inputs(images, captions)
        queries = [self._query(caption if self.text is None else self.text) for caption in captions]
        return self.find(images, queries)

    @abstractmethod
    def _query(self, text: str) -> Any:
        """Return what to look for; it is empty if the text names nothing."""


class WordGrounder(NetworkGrounder, WordNetwork):
    def _query(self, text: str) -> str:
        """Return what to look for; it is empty if the text names nothing."""
        text = text.strip().lower()
        if not text.strip("".join(MARKS) + " "):
            return ""
        encoding = self.processor.tokenizer(text, verbose=False).encodings[0]
        if len(encoding) + (not text.endswith(".")) > self.limit:
            self.cut_texts += 1
            last = self.limit - 3  # there come a full stop and the token of the end
            while last > 1 and encoding.word_ids[last] == encoding.word_ids[last + 1]:
                last -= 1
            text = text[: encoding.offsets[last][1]]
        return text if text.endswith(".") else text + "."


class CandidateGrounder(NetworkGrounder, CandidateNetwork):
    def _query(self, text: str) -> tuple[str, ...]:
        parts = candidates(text)
        self.cut_texts += sum(self.excess(part) > 0 for part in parts)
        return parts


def check_inputs(images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; give one an image")
    for k, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"image {k} is {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
