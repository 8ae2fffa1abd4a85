"""What a run says while it goes: progress bar, metrics.jsonl, trackers, validation pictures."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..files import whole_file, write_json
from ..versions import versions
from .config import TrainConfig
from .validate import describe


class RunLog:
    """A context for the length of a run; on other processes than the main one it stays silent.

    Args:
        position: where the run starts. Lines of metrics.jsonl after it are taken back.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, position: int):
        self.accelerator, self.config, self.start = accelerator, config, position
        self.out, self.main = Path(config.out), accelerator.is_main_process
        self.factor = 0.0
        self._clear()

    def __enter__(self) -> RunLog:
        self.file = None
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", {"config": self.config.to_dict(), "versions": versions()})
            truncate_metrics(self.out / "metrics.jsonl", self.start)
            self.file = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self.accelerator.init_trackers("tracking")
        self.bar = tqdm(
            total=self.config.samples,
            initial=self.start,
            unit="sample",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.main,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        self.accelerator.end_training()

    def _clear(self) -> None:
        self.losses: list[Tensor] = []  # kept on their device: the computation need not wait for us
        self.norms: list[Tensor] = []
        self.began = time.perf_counter()

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)

    def step(self, position: int, loss: Tensor, norm: Tensor, factor: float) -> bool:
        """Take note of a step; returns whether a line is due."""
        self.losses.append(loss.detach())
        self.norms.append(norm.detach())
        self.factor = factor
        self.bar.update(self.config.batch_size)
        return position // self.config.batch_size % self.config.log_every == 0

    def check(self, position: int) -> tuple[float, float]:
        """The means of loss and gradient norm since the last line.

        Raises:
            FloatingPointError: one of them is not finite, so that the adapter is no longer either.
        """
        if not self.losses:
            return 0.0, 0.0
        means = torch.stack([torch.stack(values).mean() for values in (self.losses, self.norms)])
        loss, norm = self.accelerator.gather(means[None]).mean(0).tolist()  # type: ignore[union-attr]
        # The scaler of fp16 passes over a step whose gradients overflow.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.scaler is not None):
            raise FloatingPointError(
                f"loss {loss}, gradient norm {norm} at {position} samples. The last checkpoint in {self.out} stands; "
                "begin another run with init_adapter CHECKPOINT and a lower learning rate, or bf16 in place of fp16"
            )
        return loss, norm

    def write(self, position: int, gate_mean: float) -> None:
        """The line that is due, once the loss is checked."""
        loss, norm = self.check(position)
        row = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.config.optimization.learning_rate * self.factor,
            "gate_mean": gate_mean,
            "samples_per_s": len(self.losses) * self.config.batch_size / (time.perf_counter() - self.began),
        }
        self._clear()
        self._record("train", position, row)
        self.bar.set_postfix(loss=f"{loss:.4f}", gate=f"{gate_mean:.3f}")

    def validation(self, position: int, metrics: dict[str, float], picture: Image.Image | None) -> None:
        self._record("validation", position, metrics)
        self.say(f"{position:>9} samples: {describe(metrics)}")
        if self.main and picture is not None:
            with whole_file(self.out / "validation" / f"{position:08d}.png") as partial:
                picture.save(partial, format="PNG")
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    values = {"validation": np.asarray(picture)[None]}
                    tracker.log_images(values, step=position, dataformats="NHWC")  # type: ignore[attr-defined]
        self.began = time.perf_counter()

    def _record(self, kind: str, position: int, values: dict[str, float]) -> None:
        if self.file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.file.write(json.dumps({"kind": kind, "samples": position, **finite}) + "\n")
            self.file.flush()
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=position)


def truncate_metrics(path: Path, position: int) -> None:
    """Leave out the lines after `position`, which a continued run will write again, and a half-written last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["samples"] <= position:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with whole_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
