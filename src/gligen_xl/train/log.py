"""What a run says while it goes: progress bar, metrics.jsonl, trackers, validation images.

    {"kind": "train", "samples": 3200, "loss": 0.31, "loss_q1": ..., "grad_norm": ..., "gates": {BLOCK: ...}, ...}
    {"kind": "validation", "samples": 320000, "grounding_gain": 0.02, ...}
    {"kind": "skipped", "samples": 3264, "first": 3200, "of_batch": [7], "image_ids": ["sa_223750"]}   a step left out

"samples" is how many the run has seen by then. A step that was left out is noticed with the next line that is due.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.workers import Stuck
from ..escape import printable
from ..io import naming, whole_file, write_json
from ..redact import redacted
from ..versions import versions
from .config import TrainConfig
from .report import refresh_report
from .step_stats import Skipped, StepStats
from .validate import describe

_LOGGER = logging.getLogger(__name__)
CLOCKED = ("samples_per_s", "waiting", "peak_memory_gb")  # what depends on the machine's day, not on the run

LINES = "metrics.jsonl"

_T = TypeVar("_T")


class RunLog:
    """A context for the length of a run; on other processes than the main one it stays silent.

    Args:
        position: where the run starts. Lines of metrics.jsonl after it are taken back.
        steps: what the steps give; shared with the checkpoints.
        image_ids: of the batch that begins at a position, in its order.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        position: int,
        steps: StepStats,
        image_ids: Callable[[int], list[str]],
    ):
        self.accelerator, self.config, self.start = accelerator, config, position
        self.steps, self.image_ids = steps, image_ids
        self.out, self.main = Path(config.out), accelerator.is_main_process
        self._clock = _Clock()

    def __enter__(self) -> RunLog:
        self.file = None
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", {"config": self.config.to_dict(), "versions": versions()})
            truncate_metrics(self.out / LINES, self.start)
            self.file = (self.out / LINES).open("a", encoding="utf-8")
        self.accelerator.init_trackers("tracking")
        seconds = 0.1 if sys.stderr.isatty() else 30  # in a file each writing stays
        self.bar = tqdm(
            mininterval=seconds,
            maxinterval=max(seconds, 10),
            total=self.config.samples,
            initial=self.start,
            unit="sample",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.main,
        )
        self._clock = _Clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with suppress(OSError):
            self.bar.close()
        if kind is None:
            if self.file:
                with naming(self.out / LINES):
                    self.file.close()
            with naming(self.out / "tracking"):
                self.accelerator.end_training()
            return
        with suppress(Exception):  # the error that is on its way says more
            if self.file:
                self.file.close()
            for tracker in self.accelerator.trackers:  # another process may be gone: nothing that waits for it
                tracker.finish()

    def say(self, text: str) -> None:
        if self.main:
            with suppress(OSError):  # a terminal that is gone ends no run
                self.bar.write(printable(redacted(text)))

    def waiting_for(self, batches: Iterable[_T], *, alone: bool = True) -> Iterator[_T]:
        """Yield the batches; the time until each comes counts as waiting for data.

        Args:
            alone: no other process makes the steps too: they may end early, where the run is asked to stop and no
                batch comes.
        """
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator, None)
            except Stuck as error:
                if not alone:
                    raise
                self.say(str(error))
                return
            self._clock.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that the block takes out of the time of training."""
        began = time.perf_counter()
        yield
        self._clock.began += time.perf_counter() - began

    def step(self, position: int, losses: Tensor, quarters: Tensor, norm: Tensor) -> bool:
        """Take note of the step that ended at `position` (see `StepStats.add`); returns whether a line is due."""
        self.steps.add(losses, quarters, norm)
        self._clock.steps += 1
        with suppress(OSError):
            self.bar.update(self.config.batch_size)
        return position // self.config.batch_size % self.config.log_every == 0

    def look(self) -> None:
        """See whether steps were left out since the last look.

        Raises:
            FloatingPointError: so many in a row that the run should end.
        """
        for skipped in self.steps.fetch():
            self._record_skipped(skipped)
            if skipped.in_a_row >= self.config.skip_limit:
                raise FloatingPointError(
                    f"{skipped.in_a_row} steps in a row had a loss or gradients that are not finite, the last one that "
                    f"of {skipped.samples_seen} samples seen; the adapter is as it was before them. "
                    f"{self.out / 'metrics.jsonl'} names their samples. The last checkpoint stands: go on from it with "
                    "a higher skip_limit, or begin another run with init_adapter CHECKPOINT and a lower learning rate, "
                    "or bf16 in place of fp16"
                )

    def settle(self) -> None:
        """Look, and have all lines on the disk itself, before a checkpoint that begins after them."""
        self.look()
        if self.file:
            with naming(self.out / LINES):
                os.fsync(self.file.fileno())

    def write(self, position: int, factor: float, gates: Mapping[str, float]) -> None:
        """Write the line that is due.

        Args:
            factor: of the learning rate. gates: |tanh| of every gate, by name.
        """
        self.look()
        means, mean_gate = self.steps.means(), sum(gates.values()) / len(gates)
        row = {
            **means,
            "learning_rate": self.config.optimization.learning_rate * factor,
            "gate_mean": mean_gate,
            "gates": gates_by_block(gates),
            "skipped": self.steps.skipped,
            **self._clock.speed(self.config.batch_size),
        }
        if self.accelerator.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 1e9
        self.steps.clear()
        self._clock = _Clock()
        self._record("train", position, row)
        loss = f"{means['loss']:.4f}" if means["loss"] else "none"
        self.bar.set_postfix(loss=loss, gate=f"{mean_gate:.3f}", refresh=False)

    def validation(self, position: int, metrics: dict[str, float], image: Image.Image | None) -> None:
        """Write the results of the validation at `position`; look first, so that lines stay in order."""
        self._record("validation", position, metrics)
        self.say(f"{position:>9} samples: {describe(metrics)}")
        if self.main and image is not None:
            with whole_file(self.out / "validation" / f"{position:08d}.png") as partial:
                image.save(partial, format="PNG")
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    values = {"validation": np.asarray(image)[None]}
                    tracker.log_images(values, step=position, dataformats="NHWC")  # type: ignore[attr-defined]
        if self.main:
            refresh_report(self.out)

    def _record_skipped(self, skipped: Skipped) -> None:
        if not self.main:
            return
        position = skipped.samples_seen + self.config.batch_size
        scaler = self.config.precision == "fp16" and not skipped.samples  # at work, and no image is the cause
        images = [] if scaler else self.image_ids(skipped.samples_seen)
        named = [images[k] for k in skipped.samples] or images
        row = {"first": skipped.samples_seen, "of_batch": skipped.samples, "image_ids": named}
        self._record("skipped", position, row)
        if scaler:
            why = "its gradients overflowed in fp16: the loss scaler is finding its range"
        else:
            what = "a loss was" if skipped.samples else "gradients were"
            why = f"{what} not finite (images {', '.join(named[:8])}{', ...' if len(named) > 8 else ''})"
        self.say(f"{position:>9} samples: left out the last step, as {why}")

    def _record(self, kind: str, position: int, values: Mapping[str, Any]) -> None:
        if self.file:
            written = {name: _finite(value) for name, value in values.items()}
            with naming(self.out / LINES):
                self.file.write(json.dumps({"kind": kind, "samples": position, **written}) + "\n")
                self.file.flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        with naming(self.out / "tracking"):
            self.accelerator.log(numbers, step=position)


class _Clock:
    """Time since the last line, in seconds."""

    def __init__(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def speed(self, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {"samples_per_s": self.steps * batch_size / seconds, "waiting": self.waited / seconds}


def gates_by_block(gates: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of the two gates of each block, by the block's name in the U-Net."""
    blocks: dict[str, list[float]] = {}
    for name, value in gates.items():
        blocks.setdefault(name.split(".fuser.")[0], []).append(value)
    return {name: float(f"{sum(values) / len(values):.6g}") for name, values in blocks.items()}


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_metrics(path: Path, position: int) -> None:
    """Leave out the lines after `position`, which a continued run will write again, and those that are broken.

    Half of a last line is what a kill leaves; of other broken ones a warning tells.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept, broken = [], 0
    for line in lines:
        try:
            if json.loads(line)["samples"] <= position:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += bool(line.strip()) and line is not lines[-1]
    if broken:
        _LOGGER.warning("%s: %s lines are broken and were left out", path, broken)
    with whole_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
