"""What a detector's outputs mean: boxes, best first, each with the words that it shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .detection import Detection

MARKS = (".", "?", "!")  # each ends a sentence


@dataclass(frozen=True)
class Tokens:
    """A text in tokens: where in it each begins and ends, and the number of its word (None: not of the text)."""

    text: str
    spans: tuple[tuple[int, int], ...]
    words: tuple[int | None, ...]

    def phrase(self, scores: np.ndarray, threshold: float) -> str:
        """Return the words above `threshold` of the sentence that holds the highest score; whole words, as they are
        spelt.

        A box shows one thing, while captions name the same thing in several sentences: GroundingDINO's way to keep
        these apart (`remove_combined`). A mark belongs to the sentence that it ends.

        Args:
            scores: (at least tokens,) 0-1.
        """
        best = int(scores[: len(self.spans)].argmax())
        begin, end = best, best
        while begin > 0 and not self._parts(begin - 1):
            begin -= 1
        while end < len(self.spans) and not self._parts(end):
            end += 1
        chosen = {self.words[k] for k in range(begin, end) if scores[k] > threshold}
        phrase, last = "", None
        for k in range(begin, end):
            if self.words[k] in chosen:
                start, stop = self.spans[k]
                phrase += self.text[start:stop] if start == last else " " + self.text[start:stop]
                last = stop
        return phrase.strip(" ,;:-")

    def _parts(self, k: int) -> bool:
        return self.words[k] is None or self.text[slice(*self.spans[k])] in MARKS


def candidates(text: str) -> tuple[str, ...]:
    """Return the parts of a text between commas and sentence marks, each once."""
    parts = (part.strip() for part in re.split(r"[,.?!]", text.lower()))
    return tuple(dict.fromkeys(part for part in parts if part))


def collect(boxes: np.ndarray, scores: np.ndarray, phrases: Sequence[str]) -> list[Detection]:
    """Return detections of boxes (n, 4) xyxy, clipped to the image, best first. Boxes that are not finite, or have no
    area or no phrase, are left out."""
    clipped = boxes.clip(0, 1)  # NaN stays
    usable = np.isfinite(boxes).all(-1) & np.isfinite(scores) & (clipped[:, 2:] > clipped[:, :2]).all(-1)
    order = [k for k in np.argsort(-scores, kind="stable").tolist() if usable[k] and phrases[k]]
    return [Detection(tuple(clipped[k].tolist()), str(phrases[k]), float(scores[k])) for k in order]
