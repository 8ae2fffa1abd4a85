"""CLIP score: does an image show what its prompt says, and the part in each box what its phrase says?

The score is 100 * max(cosine, 0) of CLIP's embeddings of image and text, as most papers on text-to-image models and
torchmetrics give it. CLIPScore's own (arXiv 2104.08718) is 2.5 * max(cosine, 0), of texts that begin with "A photo
depicts": divide by 40 for its scale; its words are left out here. Figures of different CLIP models cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from ..detect.colour import pixel_box
from ..detect.networks import FILES, check_kind, load_network
from ..detect.weights import check_tokenizer, checksum, title
from ..hub import local_folder
from ..layout import Layout

_EXPECTED = "config.json, preprocessor_config.json, a tokenizer and weights in .safetensors"


@dataclass(frozen=True)
class ClipScore:
    """Of the whole image against its prompt (None: it has none), and of each box against its phrase; 0-100."""

    clip: float | None
    clip_objects: tuple[float, ...]


class ClipScorer:
    """Scores images; each text is embedded once.

    A whole image is seen as CLIP's own processor shows it: resized to the shorter side, and cut to the middle square.
    The part in a box is stretched to that square, so that nothing of a long box is cut off (as COCO-MIG's local CLIP
    score); a box of less than a pixel counts as the pixel that it touches.

    Attributes:
        settings: what the scores depend on, for reports.
        cut_texts: number of the texts that were longer than CLIP reads (77 tokens), and were cut.
    """

    def __init__(
        self,
        name: str,
        checksum: str,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.name, self.processor, self.device, self.batch_size = name, processor, device, batch_size
        self.model = model.to(device).eval()
        self.settings = {"clip": name, "clip_checksum": checksum, "clip_scale": "100 * max(cosine, 0)"}
        self.cut_texts = 0
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def load(
        cls,
        name: str | Path = "openai/clip-vit-large-patch14",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        local_files_only: bool = False,
    ) -> ClipScorer:
        """Load CLIP from a folder or a Hub repository, with weights in .safetensors.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: it is no CLIP model.
        """
        folder = local_folder(name, "CLIP model", FILES, local_files_only=local_files_only)
        check_kind(folder, ("clip",), "CLIP model")
        check_tokenizer(folder)
        model, processor = load_network(folder, auto_model=CLIPModel, auto_processor=CLIPProcessor, expected=_EXPECTED)
        return cls(title(name, folder), checksum(folder), model, processor, device=device, batch_size=batch_size)

    def score(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[ClipScore]:
        """Return one score for each image; it does not depend on the other images, except for rounding."""
        seen: list[Image.Image] = []
        texts: list[str] = []
        for image, layout in zip(images, layouts, strict=True):
            if layout.prompt.strip():
                seen.append(image.convert("RGB"))
                texts.append(layout.prompt)
            seen += [self._part(image, box) for box in layout.boxes]
            texts += layout.phrases
        scores = iter(self._scores(seen, texts))
        return [
            ClipScore(next(scores) if layout.prompt.strip() else None, tuple(next(scores) for _ in layout.boxes))
            for layout in layouts
        ]

    def _part(self, image: Image.Image, box: Sequence[float]) -> Image.Image:
        side = self.model.config.vision_config.image_size
        part = image.convert("RGB").crop(pixel_box(box, *image.size))
        return part.resize((side, side), Image.Resampling.BICUBIC)

    @torch.inference_mode()
    def _scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        self._embed([text for text in dict.fromkeys(texts) if text not in self._texts])
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            inputs = self.processor.image_processor(list(images[batch]), return_tensors="pt").to(self.device)
            embedded = _unit(self.model.get_image_features(**inputs))
            cosine = (embedded * torch.stack([self._texts[text] for text in texts[batch]])).sum(-1)
            scores += (100 * cosine.clamp(min=0)).tolist()
        return scores

    def _embed(self, texts: Sequence[str]) -> None:
        tokenizer = self.processor.tokenizer
        longest = min(tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            lengths = [len(ids) for ids in tokenizer(batch, verbose=False).input_ids]
            self.cut_texts += sum(length > longest for length in lengths)
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            inputs = inputs.to(self.device)
            self._texts.update(zip(batch, _unit(self.model.get_text_features(**inputs)), strict=True))


def _unit(features: Any) -> torch.Tensor:
    """(n, width), each of length 1."""
    return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1)
