"""The settings of a preparation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..data.shards import SDXL_VAE
from ..detect.detection import THRESHOLD
from ..limits import MAX_BATCH, MAX_SIDE
from ..worlds import NAMES
from .framing import Framing

WORK_FOLDER = ".prepared"  # beside the shards: what is done, and what is made on the way
_THRESHOLDS = ("box_threshold", "text_threshold")
_OF_A_SOURCE = ("captions", "min_boxes", "detector", "detect_text", *_THRESHOLDS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that shards depend on, beside their source.

    Args:
        framing: resolutions, squares or buckets.
        flip: "both" adds the mirrored image, "random" mirrors half of them. An image whose caption or phrases speak
            of left or right is never mirrored.
        min_share: a box of which less than this share of its area is in the frame is dropped.
        min_boxes: images with fewer boxes are left out.
        captions: joined by image id, in place of those of the source; see `gligen_xl.prepare.captions`.
        detector: finds the boxes, in place of those of the source; see `gligen_xl.detect.grounder`.
        box_threshold, text_threshold: of the detector; None becomes `THRESHOLD`, where it has any.
        detect_text: what it looks for, in place of the caption.
        vae: see `gligen_xl.prepare.encode.load_vae`.
        latents: a sample of the posterior, or its mean.
        seed: of samples and of random flips.
        dtype: that the VAE and the detector compute in.
        at_once: images in one pass of the VAE or the detector. More than one may be faster on a GPU; the last bit
            then depends on their number.
    """

    framing: Framing
    flip: Literal["no", "both", "random"] = "no"
    min_share: float = 0.5
    min_boxes: int = 0
    captions: str | None = None
    detector: str | None = None
    box_threshold: float | None = None
    text_threshold: float | None = None
    detect_text: str | None = None
    vae: str = SDXL_VAE
    latents: Literal["sample", "mean"] = "sample"
    seed: int = 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    at_once: int = 1

    def __post_init__(self) -> None:
        resolutions = self.framing.resolutions
        if not resolutions or min(resolutions) < 1 or len(set(resolutions)) < len(resolutions):
            raise ValueError(f"resolutions are {list(resolutions)}; expected different numbers of pixels, as 512 1024")
        if max(resolutions) > MAX_SIDE or self.at_once > MAX_BATCH:
            raise ValueError(
                f"resolutions are {list(resolutions)}, at_once is {self.at_once}; expected at most {MAX_SIDE} pixels "
                f"and {MAX_BATCH} images"
            )
        for name in ("min_share", "box_threshold", "text_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a share between 0 and 1")
        for name, least in (("min_boxes", 0), ("seed", 0), ("at_once", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        self._check_detector()

    def _check_detector(self) -> None:
        """Refuse settings that the detector does not use, and fill in its thresholds."""
        for name in ("detect_text", *_THRESHOLDS):
            value = getattr(self, name)
            if value is not None and self.detector is None:
                raise ValueError(f"{name} is {value!r} but there is no detector; name one (--detector)")
            if value is not None and self.detector in NAMES:
                raise ValueError(
                    f"{name} is {value!r}, but the detector of {self.detector} has no text and no thresholds; "
                    "leave it out"
                )
        for name in _THRESHOLDS if self.detector not in (None, *NAMES) else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, THRESHOLD)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values.pop("framing"), **values} | {"resolutions": list(self.framing.resolutions)}

    def shared(self) -> dict[str, Any]:
        """Return what all shards of a folder have in common; the rest may differ between its sources."""
        return {name: value for name, value in self.to_dict().items() if name not in _OF_A_SOURCE}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
