"""What the U-Net is conditioned on in training: captions as the pipeline encodes them, grounding tokens, sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging
from torch import Tensor

from ..data.batch import Batch
from ..phrases import embed_phrases, phrase_width


class Conditioner:
    """Encodes batches with the frozen text encoders of a pipeline.

    Embeddings of phrases are kept, the least recently used going first: phrases repeat far more than captions do.

    Args:
        cache_size: how many phrases are kept.
    """

    def __init__(self, pipeline: StableDiffusionXLPipeline, cache_size: int = 20_000):
        self._pipeline: Any = pipeline
        self._tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        self._text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        self._width = phrase_width(self._text_encoders)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_size = cache_size

    @torch.no_grad()
    def __call__(self, batch: Batch, *, grounded: bool = True) -> dict[str, Any]:
        """Keyword arguments of the U-Net's forward.

        Args:
            grounded: with boxes; without, every slot holds the null token.
        """
        hidden, pooled = self.captions(batch.captions)
        device = hidden.device
        return {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.size.to(device, hidden.dtype)},
            "cross_attention_kwargs": {
                "gligen": {
                    "boxes": batch.boxes.to(device),
                    "masks": batch.mask.to(device) if grounded else torch.zeros_like(batch.mask, device=device),
                    "positive_embeddings": self.phrases(batch).to(device),
                }
            },
        }

    def captions(self, captions: list[str | None]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, D) and pooled (B, P). A dropped caption is what the pipeline takes for no negative
        prompt, so that guidance meets what was trained."""
        prompts = [caption or "" for caption in captions]
        distinct = list(dict.fromkeys(prompts))  # every dropped caption is the same one
        with _without_warnings():  # of every caption that is too long, in every batch
            hidden, _, pooled, _ = self._pipeline.encode_prompt(distinct, do_classifier_free_guidance=False)
        place = [distinct.index(prompt) for prompt in prompts]
        hidden, pooled = hidden[place], pooled[place]
        if self._pipeline.config.force_zeros_for_empty_prompt:
            keep = torch.tensor([caption is not None for caption in captions], device=hidden.device).to(hidden.dtype)
            hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
        return hidden, pooled

    def phrases(self, batch: Batch) -> Tensor:
        """Phrase embeddings padded to the slots, (B, N, phrase_dim)."""
        wanted = [phrase for phrases in batch.phrases for phrase in phrases]
        if new := [phrase for phrase in dict.fromkeys(wanted) if phrase not in self._cache]:
            rows = embed_phrases(new, self._tokenizers, self._text_encoders)
            self._cache.update((phrase, row.clone()) for phrase, row in zip(new, rows, strict=True))
        first = self._text_encoders[0]
        padded = torch.zeros(*batch.mask.shape, self._width, device=first.device, dtype=first.dtype)
        if wanted:
            padded[batch.mask.to(first.device) > 0] = torch.stack([self._cache[phrase] for phrase in wanted]).to(
                first.dtype
            )
        for phrase in wanted:
            self._cache.move_to_end(phrase)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return padded


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep diffusers' log to errors inside the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
