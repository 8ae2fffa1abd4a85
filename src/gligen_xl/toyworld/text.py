"""Text of the embedded model: both encoders used as SDXL uses them, and the teacher that makes them listen.

A caption's loss in denoising teaches a fresh text encoder very slowly. So it first learns to have a caption's facts
read off its pooled embedding: which background, which colours in which shapes, and where.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .world import BACKGROUNDS, COLOURS, PLACES, SHAPES


class Attributes(nn.Module):
    """Reads a scene off a caption's pooled embedding: background, and each colour's shape and place (if said).

    Only a teacher: it makes the text encoders tell words and their order apart, and is thrown away.
    """

    def __init__(self, width: int):
        super().__init__()
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.shape = nn.Linear(width, len(COLOURS) * (len(SHAPES) + 1))
        self.place = nn.Linear(width, len(COLOURS) * 10)

    def forward(self, pooled: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Return the sum of the three cross entropies."""
        shape = self.shape(pooled).unflatten(-1, (len(COLOURS), -1)).transpose(1, 2)
        place = self.place(pooled).unflatten(-1, (len(COLOURS), -1)).transpose(1, 2)
        return (
            F.cross_entropy(self.background(pooled), targets["background"], ignore_index=-1)
            + F.cross_entropy(shape, targets["shape"])
            + F.cross_entropy(place, targets["place"])
        )


def attributes(caption: str) -> tuple[int, list[int], list[int]]:
    """Parse a caption or phrase: background (-1 for none), and shape and place of each colour (0 for none)."""
    background = next((k for k, name in enumerate(BACKGROUNDS) if name in caption.split()), -1)
    shape, place_ = [0] * len(COLOURS), [0] * len(COLOURS)
    for colour, form, rest in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})((?: (?!and|,)\w+)*)", caption):
        k = list(COLOURS).index(colour)
        shape[k] = 1 + SHAPES.index(form)
        said = [1 + n for n, words in enumerate(PLACES.values()) if re.match(rf" {words}(?! (?:left|right))", rest)]
        place_[k] = said[0] if said else 0
    return background, shape, place_


@dataclass
class TextTower:
    """Both tokenizers and text encoders, used as SDXL uses them."""

    tokenizers: list[CLIPTokenizer]
    encoders: nn.ModuleList

    def __call__(self, captions: list[str | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Captions (None: dropped) -> hidden states (B, T, 128), pooled (B, 64), and the first encoder's pooled."""
        texts = [caption or "" for caption in captions]
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0] if output[0].ndim == 2 else output.pooler_output)
        keep = torch.tensor([caption is not None for caption in captions], dtype=torch.float32)
        return torch.cat(hidden, -1) * keep[:, None, None], pooled[1] * keep[:, None], pooled[0] * keep[:, None]
