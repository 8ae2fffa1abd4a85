"""Is a box the colour that its phrase names? COCO-MIG's way (MIGC, arXiv 2402.05408, and its public evaluation).

An object is of a colour if at least a fifth of its pixels lie in that colour's range of hue, saturation and value. The
ranges overlap, and leave gaps (purple and grey are none of the seven), so an object may be of several colours, or none.

The published evaluation takes the pixels of a mask: SAM's, asked with the requested box. Here SAM is asked with the box
that was detected (`Segmenter`). Without a segmentation network the ellipse inside that box stands in for the mask: it
holds some background and misses some of the object, so its figures are not those of the published evaluation. The
settings of a report say which of both it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import SamModel, SamProcessor

from ..hub import local_folder
from ..layout import Box
from .networks import FILES, check_kind, load_network
from .weights import checksum, title

SHARE = 0.2  # of an object's pixels, from which on it is of a colour

# Lowest and highest (hue, saturation, value) in OpenCV's units: hue in steps of two degrees (0-180), the others 0-255.
_Range = tuple[tuple[int, int, int], tuple[int, int, int]]
RANGES: Mapping[str, tuple[_Range, ...]] = {
    "red": (((0, 43, 35), (6, 255, 255)), ((156, 43, 35), (180, 255, 255))),
    "brown": (((6, 43, 35), (25, 255, 255)),),
    "yellow": (((20, 43, 35), (34, 255, 255)),),
    "green": (((35, 43, 35), (77, 255, 255)),),
    "blue": (((78, 43, 35), (124, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 35)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
}


def split_colour(phrase: str) -> tuple[str, str]:
    """Return the colour that a phrase names, and the phrase without it: "a red car" is "red" and "a car".

    Raises:
        ValueError: it names no colour, or several, or nothing else.
    """
    words = phrase.split()
    colours = [word for word in words if _word(word) in RANGES]
    if len(colours) != 1 or len(words) == 1:
        raise ValueError(
            f"no colour can be judged of {phrase!r}; where colours are judged, a phrase names one object and one "
            f"colour of {', '.join(RANGES)}, as 'a red car'"
        )
    words.remove(colours[0])
    return _word(colours[0]), " ".join(words)


def _word(word: str) -> str:
    return re.sub(r"\W", "", word).lower()


def colour_shares(pixels: np.ndarray) -> dict[str, float]:
    """Return what share of the pixels (n, 3), RGB uint8, is in each colour's range; 0 where there are no pixels."""
    values = hsv(pixels)
    shares = {}
    for name, ranges in RANGES.items():
        inside = np.zeros(len(values), bool)
        for low, high in ranges:
            inside |= ((values >= low) & (values <= high)).all(-1)
        shares[name] = float(inside.mean()) if inside.size else 0.0
    return shares


def hsv(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) RGB uint8 -> hue 0-180, saturation and value 0-255, rounded as OpenCV does; int."""
    rgb = np.asarray(pixels, np.float64)
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    saturation = np.divide(255 * chroma, value, out=np.zeros_like(value), where=value > 0)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sixth = np.select(  # of the circle
        [value == red, value == green], [(green - blue), (blue - red) + 2 * chroma], (red - green) + 4 * chroma
    )
    hue = 30 * np.divide(sixth, chroma, out=np.zeros_like(value), where=chroma > 0) % 180
    return np.rint(np.stack([hue, saturation, value], axis=-1)).astype(int)


class ColourJudge:
    """Says which colours the objects in boxes are of.

    Args:
        share: of an object's pixels, from which on it is of a colour.
        segmenter: finds the pixels of an object. None: those of the ellipse inside its box.
    """

    def __init__(self, share: float = SHARE, segmenter: Segmenter | None = None):
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; expected a number above 0 and at most 1")
        self.share, self.segmenter = share, segmenter
        mask = segmenter.name if segmenter else "ellipse inside the box"
        self.settings: dict[str, Any] = {"colours": list(RANGES), "colour_share": share, "colour_mask": mask}
        if segmenter:
            self.settings["colour_mask_checksum"] = segmenter.checksum

    def colours(self, image: Image.Image, boxes: Sequence[Box]) -> list[tuple[str, ...]]:
        """Return the colours of the object in each box (xyxy, 0-1), most pixels first."""
        if not boxes:
            return []
        pixels = np.asarray(image.convert("RGB"))
        if self.segmenter is not None:
            every = [pixels[mask] for mask in self.segmenter.masks(pixels, boxes)]
        else:
            every = [_ellipse(pixels, box) for box in boxes]
        found = []
        for of_object in every:
            shares = colour_shares(of_object)
            found.append(tuple(c for c in sorted(shares, key=lambda c: -shares[c]) if shares[c] >= self.share))
        return found


def pixel_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return the pixels that a box (xyxy, 0-1) touches, as (left, top, right, bottom); at least one each way."""
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    right, bottom = (
        max(int(np.ceil(end)), start + 1) for end, start in ((box[2] * width, left), (box[3] * height, top))
    )
    return left, top, min(right, width), min(bottom, height)


def _ellipse(pixels: np.ndarray, box: Box) -> np.ndarray:
    """(n, 3): the pixels whose centres are in the ellipse that touches the sides of a box."""
    left, top, right, bottom = pixel_box(box, pixels.shape[1], pixels.shape[0])
    across, down = (2 * (np.arange(size) + 0.5) / size - 1 for size in (right - left, bottom - top))
    return pixels[top:bottom, left:right][across[None] ** 2 + down[:, None] ** 2 <= 1]


class Segmenter:
    """Masks of the objects in boxes by Segment Anything (SAM, arXiv 2304.02643).

    Of the three masks that SAM proposes for a box the one is taken of which it thinks best.
    """

    def __init__(self, name: str, checksum: str, model: Any, processor: Any, device: torch.device | str = "cpu"):
        self.name, self.checksum, self.processor, self.device = name, checksum, processor, device
        self.model = model.to(device).eval()

    @classmethod
    def load(cls, name: str | Path, *, device: torch.device | str = "cpu", local_files_only: bool = False) -> Segmenter:
        """Load SAM from a folder or a Hub repository, such as facebook/sam-vit-huge.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: it is no SAM.
        """
        folder = local_folder(name, "segmenter", FILES, local_files_only=local_files_only)
        check_kind(folder, ("sam",), "SAM")
        expected = "config.json, preprocessor_config.json and weights in .safetensors"
        model, processor = load_network(folder, auto_model=SamModel, auto_processor=SamProcessor, expected=expected)
        return cls(title(name, folder), checksum(folder), model, processor, device)

    @torch.inference_mode()
    def masks(self, pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
        """(boxes, h, w) bool of an image (h, w, 3), RGB uint8."""
        height, width = pixels.shape[:2]
        corners = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in boxes]
        inputs = self.processor(images=pixels, input_boxes=[corners], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs["input_boxes"] = inputs["input_boxes"].float()
        outputs = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        (masks,) = self.processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        best = outputs.iou_scores[0].argmax(-1).cpu()  # (boxes,)
        return masks[torch.arange(len(boxes)), best].numpy()
