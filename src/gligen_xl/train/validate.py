"""Validation: does the adapter use its boxes yet?

The training loss does not tell: boxes are learned suddenly, after a long time in which nothing seems to move. What
moves first is the *grounding gain*, 1 - loss(boxes) / loss(no boxes) on held-out samples with the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from ..adapter import gate_values
from ..data.dataset import Augmentation, Batch, ShardDataset
from ..detect.detection import Detector
from ..detect.matching import score_image
from ..detect.metrics import point_metrics
from ..generate import generate
from ..images.draw import draw_boxes, grid
from ..layout import Layout
from ..pipelines import GroundingMixin
from .conditioning import Conditioner
from .objective import denoising_loss
from .options import Validation

_SHOWN = 8  # images in the grid
_LEAST = 64  # losses: of fewer samples each is taken several times, with other noise


class Validator:
    """Measures the adapter on the pipeline's U-Net; its state does not change between calls.

    Args:
        data: folder of held-out shards, or a URL of one; or the data of the training, whose held-out images are taken.
        cache_bytes: of the disk, for shards from a URL.
        augmentation: that of the training, for its slots and its least box score.
    """

    def __init__(
        self,
        options: Validation,
        data: str | Path | ShardDataset,
        pipeline: GroundingMixin,
        conditioner: Conditioner,
        scheduler: DDPMScheduler,
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        cache_bytes: int,
    ):
        self.options, self.pipeline, self.conditioner, self.scheduler = options, pipeline, conditioner, scheduler
        self.batch_size, self.seed = batch_size, seed
        whole = Augmentation(
            drop_grounding=0, drop_caption=0, min_score=augmentation.min_score, slots=augmentation.slots
        )
        if isinstance(data, ShardDataset):
            self.dataset = data.held_out_samples(whole)
        else:
            self.dataset = ShardDataset(data, whole, seed, cache_bytes=cache_bytes)
        layouts = (self._layout(number) for number in range(len(self.dataset)))
        self.layouts = list(islice((layout for layout in layouts if layout.boxes), options.pictures))
        self.notes: list[str] = []  # for the log
        self.detector: Detector | None = None

    def use_detector(self, detector: Detector, *, optional: str | None = None) -> None:
        """Measure boxes with this detector, which has to know all phrases of the layouts.

        Args:
            optional: what the detector belongs to, if the validation may do without it.

        Raises:
            ValueError: it does not know a phrase, and is not optional.
        """
        for phrase in (phrase for layout in self.layouts for phrase in layout.phrases):
            try:
                detector.query(phrase)  # an error now, not after hours
            except ValueError:
                if optional is None:
                    raise
                self.notes.append(
                    f"validation: grounding gain and images alone, as the detector of {optional} does not know "
                    f"{phrase!r} (validation.detector names another one)"
                )
                return
        self.detector = detector

    def _layout(self, number: int) -> Layout:
        """Return a held-out sample as a layout, with the boxes that training would keep and the size of its image."""
        shard, index = self.dataset.find(number)
        row, (_, height, width) = self.dataset.row(number), shard.latent_shape
        chosen = self.dataset.augmentation.choose(row.scores)
        try:
            return Layout(
                prompt=row.caption,
                phrases=[row.phrases[k] for k in chosen],
                boxes=[row.boxes[k] for k in chosen],
                height=height * shard.downsampling,
                width=width * shard.downsampling,
                id=row.image_id,
            )
        except ValueError as error:
            raise ValueError(f"row {index} of shard {shard.stem}: {error}") from error

    def __call__(self, *, gain_only: bool = False) -> tuple[dict[str, float], Image.Image | None]:
        """Return metrics by name, and an image of the first layouts with grounding on and off.

        Args:
            gain_only: measure losses and gates alone, which takes seconds.
        """
        metrics = self.losses()
        gates = gate_values(self.pipeline.unet)
        metrics["gate_mean"] = sum(gates.values()) / len(gates)
        metrics["gate_largest"] = max(gates.values())
        if gain_only or not self.layouts:
            return metrics, None
        settings = {
            "num_inference_steps": self.options.steps,
            "guidance_scale": self.options.guidance_scale,
            "batch_size": min(self.batch_size, 16),
            "seed": self.seed,
        }
        on = list(generate(self.pipeline, self.layouts, beta=1.0, **settings))
        off = list(generate(self.pipeline, self.layouts, grounded=False, **settings))
        if self.detector:
            for name, images in (("on", on), ("off", off)):
                detections = zip(self.layouts, self.detector.detect(images, self.layouts), strict=True)
                scores = [score_image(layout, "", of_image, self.detector) for layout, of_image in detections]
                summary = point_metrics([score for of_image in scores for score in of_image.objects])
                del summary["objects"]
                metrics |= {f"{name}_{key}": value for key, value in summary.items()}
        rows = [
            [draw_boxes(image, layout) for image in (on[k], off[k])] for k, layout in enumerate(self.layouts[:_SHOWN])
        ]
        prompts = [layout.prompt for layout in self.layouts[:_SHOWN]]
        return metrics, grid(rows, columns=["grounding on", "off"], captions=prompts)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Measure held-out loss with and without boxes, and the grounding gain, whole and by quarter of the timesteps.

        Samples are spread over all of the data; their times (k + 1/2) / n are shared out once and for all, so that
        the quarters hold equally many.
        """
        with_boxes, without, times = [], [], []
        for batch in self._batches():
            for losses, grounded in ((with_boxes, True), (without, False)):
                conditioning = self.conditioner(batch, grounded=grounded)
                losses.append(denoising_loss(self.pipeline.unet, self.scheduler, batch, conditioning).cpu())
            times.append(batch.time)
        on, off, time = torch.cat(with_boxes), torch.cat(without), torch.cat(times)
        metrics = {"loss": on.mean().item(), "loss_no_boxes": off.mean().item(), "grounding_gain": _gain(on, off)}
        for k in range(4):
            if (quarter := (time * 4).long() == k).any():
                metrics[f"grounding_gain_q{k + 1}"] = _gain(on[quarter], off[quarter])
        return metrics

    def _batches(self) -> Iterator[Batch]:
        """Yield the held-out samples, always the same with the same noise; each batch has one latent shape."""
        count = min(self.options.loss_samples, max(len(self.dataset), _LEAST))
        numbers = np.arange(count) * len(self.dataset) // count
        times = (np.random.default_rng(self.seed).permutation(count) + 0.5) / count
        groups = np.searchsorted(np.cumsum(self.dataset.groups), numbers, side="right")
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            for first in range(0, len(members), self.batch_size):
                part = members[first : first + self.batch_size]
                batch = self.dataset.batch([(int(numbers[k]), int(k)) for k in part])
                yield replace(batch, time=torch.from_numpy(times[part]))


def _gain(on: torch.Tensor, off: torch.Tensor) -> float:
    return 1 - (on.mean() / off.mean()).item()


def describe(metrics: dict[str, Any]) -> str:
    """Return one line for the terminal."""
    parts = [f"grounding gain {100 * metrics['grounding_gain']:.1f} %", f"gates {metrics['gate_mean']:.3f}"]
    if "on_mean_iou" in metrics:
        parts.append(f"mean IoU {metrics['on_mean_iou']:.2f} on, {metrics['off_mean_iou']:.2f} off")
        parts.append(f"recall@0.5 {metrics['on_recall_50']:.2f} on, {metrics['off_recall_50']:.2f} off")
    return ", ".join(parts)
