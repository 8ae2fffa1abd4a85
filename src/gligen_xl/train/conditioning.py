"""Conditioning of the U-Net in training: captions as the pipeline encodes them, grounding tokens, sizes.

Nothing here waits for a GPU: numbers go to it through `to_device`, and nothing is read back.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from ..data.dataset import Batch
from ..device import to_device
from ..pipelines import GroundingMixin
from ..pipelines.encoders import text_parts
from ..text_embeddings import embed_phrases, phrase_width
from .phrase_cache import PhraseCache


class Captions(NamedTuple):
    hidden: Tensor  # (B, T, D)
    pooled: Tensor  # (B, P); P is 0 without SDXL


class Conditioner:
    """Encodes batches with the frozen text encoders of a pipeline, of SDXL or of Stable Diffusion 1.x / 2.x.

    Embeddings of phrases are kept, the least recently used going first: phrases repeat far more than captions do.
    A kept one has the bits that it would have if it were encoded anew, so that a resumed run, whose `Conditioner`
    begins empty, goes on as the former would have.

    Args:
        cache_size: how many phrases are kept, on the device of the first text encoder: 20,000 of SDXL's take 164 MB in
            float32, 82 MB in half precision.
    """

    def __init__(self, pipeline: GroundingMixin, cache_size: int = 20_000):
        self._is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
        self._zero_for_dropped = self._is_xl and pipeline.config["force_zeros_for_empty_prompt"]
        self._tokenizers, self._text_encoders = text_parts(pipeline)
        width = phrase_width(self._text_encoders)
        self._cache = PhraseCache(cache_size, width, self.device, self._text_encoders[0].dtype)

    @property
    def device(self) -> torch.device:
        return self._text_encoders[0].device

    @torch.no_grad()
    def __call__(self, batch: Batch, *, grounded: bool = True) -> dict[str, Any]:
        """Keyword arguments of the U-Net's forward.

        Args:
            grounded: with boxes; without, every slot holds the null token.
        """
        batch = batch.to(self.device)
        captions = self.captions(batch.captions)
        conditioning: dict[str, Any] = {
            "encoder_hidden_states": captions.hidden,
            "cross_attention_kwargs": {
                "gligen": {
                    "boxes": batch.boxes,
                    "masks": batch.mask if grounded else torch.zeros_like(batch.mask),
                    "positive_embeddings": self.phrases(batch),
                }
            },
        }
        if self._is_xl:
            sizes = batch.size.to(captions.hidden.dtype)
            conditioning["added_cond_kwargs"] = {"text_embeds": captions.pooled, "time_ids": sizes}
        return conditioning

    # Captions ---------------------------------------------------------------------------------------------------

    def captions(self, captions: list[str | None]) -> Captions:
        """The embeddings that the pipeline's `encode_prompt` gives; of a dropped caption those that it takes for no
        negative prompt, so that guidance meets what was trained: zeros on SDXL, else those of the empty string.

        Each distinct caption is encoded once, all in one call, the empty one once in a run.
        """
        distinct = list(dict.fromkeys(caption for caption in captions if caption is not None))
        rows = {caption: row for row, caption in enumerate([None, *distinct])}
        place = to_device(torch.tensor([rows[caption] for caption in captions]), self.device)
        parts = [self._dropped, self._encode(distinct)] if distinct else [self._dropped]
        return Captions(*(torch.cat(kind)[place] for kind in zip(*parts, strict=True)))

    @cached_property
    def _dropped(self) -> Captions:
        """Of one dropped caption."""
        hidden, pooled = self._encode([""])
        if self._zero_for_dropped:
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        return Captions(hidden, pooled)

    def _encode(self, captions: list[str]) -> Captions:
        """Encode as `encode_prompt` does, without waiting for the device and reading each caption twice."""
        hidden: list[Tensor] = []
        pooled = torch.empty(len(captions), 0, device=self.device)
        for tokenizer, encoder in zip(self._tokenizers, self._text_encoders, strict=True):
            limit = tokenizer.model_max_length
            tokens = tokenizer(captions, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            output = encoder(to_device(tokens.input_ids, encoder.device), output_hidden_states=self._is_xl)
            if self._is_xl:
                hidden.append(output.hidden_states[-2])
                pooled = output[0]  # of the second: projected
            else:
                hidden.append(output.last_hidden_state)
        return Captions(torch.cat(hidden, dim=-1), pooled)

    # Phrases ----------------------------------------------------------------------------------------------------

    def phrases(self, batch: Batch) -> Tensor:
        """Phrase embeddings padded to the slots, (B, N, phrase_dim): zeros where there is none."""
        distinct = list(dict.fromkeys(phrase for phrases in batch.phrases for phrase in phrases))
        table, row = self._cache.table(distinct, self._encode_phrases)
        slots = batch.mask.shape[1]
        rows = [[row[phrase] for phrase in phrases] + [0] * (slots - len(phrases)) for phrases in batch.phrases]
        return table[to_device(torch.tensor(rows), table.device)]

    def _encode_phrases(self, phrases: list[str]) -> Tensor:
        shapes = _SHAPES_CPU if self.device.type == "cpu" else _SHAPES_GPU
        return embed_phrases(phrases, self._tokenizers, self._text_encoders, shapes=shapes)


# (rows, tokens) in which phrases are encoded. Most have four words or fewer, which is 6 tokens; longer ones are rare,
# and to fill up a group costs a CPU as much as to encode more. A GPU takes as long for a few rows as for many.
_SHAPES_CPU = ((32, 6), (1, 12), (1, 24), (1, 77))
_SHAPES_GPU = ((64, 6), (64, 12), (32, 24), (8, 77))
