"""The configuration of a training run. Every field can be set in a recipe (YAML) and on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from ..data.dataset import Augmentation
from ..data.sampler import draws_per_block
from ..dtypes import dtype_name
from ..limits import MAX_BATCH, MAX_IMAGES, MAX_SIDE, MAX_WORKERS
from ..redact import redacted_values
from ..worlds import DATA_FORM, drawn_count
from .expected import AT_LEAST_1, POSITIVE, Expected, check_values, up_to
from .options import AdapterOptions, Objective, Optimization, Validation

_SHORT_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # as accelerate calls them


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run. By default, rates, lengths and dropouts are those of GLIGEN-XL at 512; recipe `sdxl-512`
    also sets fp16, gradient checkpointing, 32 slots and data loading processes.

    Args:
        model: base model: a pipeline folder, a Hub repository, or "shapes".
        data: folder of shards, or a URL of one (hf://datasets/OWNER/NAME/FOLDER, s3://BUCKET/FOLDER); or
            "shapes:COUNT", images of the shapes world, which are drawn and encoded into `out` first. Several sources
            with weights, as {shards-a: 0.9, shards-b: 0.1}, are mixed in that proportion of samples.
        out: folder of the run; an existing run in it is continued.
        variant: variant of the base's files, such as fp16; by default the plain files.
        without_boxes: allow data in which no image has a usable box, which is otherwise an error.
        init_adapter: adapter to start from in place of a fresh one: an adapter folder, a run folder, or any other form
            that `gligen-xl convert` reads (pipeline or gated U-Net folder, GLIGEN file, Hub repository).
        resolution: resolution in pixels that the data must be prepared for; by default any.
        samples: length of the run, in samples seen.
        batch_size: samples per optimizer step, over all processes.
        micro_batch: samples per forward pass of a process; by default its whole share of the batch. A smaller number
            takes less memory and gives the same step.
        seed: everything random follows from it and the number of samples seen.
        precision: precision of the frozen base and of the computation: no (float32), fp16 or bf16, by any of their
            names; the adapter itself is kept in float32.
        deterministic: use kernels that add in the same order each time, so that an interrupted run on a GPU ends with
            the same bits as an uninterrupted one. A CPU does so anyway.
        gradient_checkpointing: take less memory and a third more time.
        compile: compile the U-Net with torch.compile. The first steps take minutes, as does every new size of latents.
        compile_backend: backend of torch.compile; "eager" and "aot_eager" only trace, to find what does not compile.
        gradient_compression: exchange gradients between the processes as they are (no), or as bfloat16 with half the
            traffic.
        shard_optimizer: divide moments and average among the processes (ZeRO). The weights are the same, bit for bit,
            and are exchanged once more per step.
        offload_optimizer: keep moments, average and a copy of the weights in main memory, where the CPU steps them.
            Takes 45 % less GPU memory (SDXL, by the dry run) and more time, and rounds differently than a GPU.
        process_timeout: seconds that a process waits for the others, or for a batch of a loading process, before it
            ends with an error; must exceed the time of a validation and a checkpoint.
        skip_limit: end the run after so many steps in a row with a loss or gradients that are not finite; such steps
            are skipped.
        workers: number of data loading processes.
        window: number of shards within which samples are mixed at a time; by default all, or as many shards of a URL as
            half the cache holds, at most 16.
        cache_gb: gigabytes (10**9 bytes) of disk for the latents of shards from a URL, in GLIGEN_XL_CACHE or ~/.cache.
        log_every: optimizer steps between lines of metrics.jsonl.
        checkpoint_every: samples between checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.
        keep_every: also keep the first checkpoint of every so many samples for good.
        track: trackers of accelerate to report to; by default tensorboard, if it is installed.
    """

    data: dict[str, float] | str
    out: str
    model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    variant: str | None = None
    without_boxes: bool = False
    init_adapter: str | None = None
    resolution: int | None = None
    samples: int = 32_000_000
    batch_size: int = 64
    micro_batch: int | None = None
    seed: int = 0
    precision: Literal["no", "fp16", "bf16", "fp32", "float32", "float16", "half", "bfloat16"] = "no"
    deterministic: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    gradient_compression: Literal["no", "bf16", "bfloat16"] = "no"
    shard_optimizer: bool = False
    offload_optimizer: bool = False
    process_timeout: int = 1800
    skip_limit: int = 10
    workers: int = 0
    window: int | None = None
    cache_gb: float = 20.0
    log_every: int = 50
    checkpoint_every: int = 64_000
    keep_checkpoints: int = 2
    keep_every: int | None = None
    track: list[Literal["tensorboard", "wandb", "trackio", "comet_ml"]] | None = None
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    augmentation: Augmentation = field(default_factory=Augmentation)
    objective: Objective = field(default_factory=Objective)
    optimization: Optimization = field(default_factory=Optimization)
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        for name in ("precision", "gradient_compression"):  # one name each, to be compared and written down
            if getattr(self, name) != "no":
                object.__setattr__(self, name, _SHORT_NAMES[dtype_name(getattr(self, name))])
        check_values(
            self,
            resolution=Expected(
                f"a positive multiple of 8 pixels, up to {MAX_SIDE}",
                lambda value: 0 < value <= MAX_SIDE and value % 8 == 0,
            ),
            samples=up_to(2**62),  # samples seen are a number of 64 bits
            batch_size=up_to(MAX_BATCH),
            micro_batch=up_to(MAX_BATCH),
            seed=Expected("0 to 2**31 - 1", lambda value: 0 <= value < 2**31),
            process_timeout=AT_LEAST_1,
            skip_limit=AT_LEAST_1,
            workers=up_to(MAX_WORKERS, least=0),
            window=AT_LEAST_1,
            cache_gb=POSITIVE,
            log_every=AT_LEAST_1,
            checkpoint_every=AT_LEAST_1,
            keep_checkpoints=AT_LEAST_1,
            keep_every=AT_LEAST_1,
        )
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch is {self.micro_batch}, more than the batch of {self.batch_size}")
        if self.compile and (self.optimization.attention_weight or self.adapter.bias_share is not None):
            raise ValueError(
                "compile is on beside optimization.attention_weight or adapter.bias_share, which change the fusers at "
                "every step: each would be compiled anew; leave one or the other out"
            )
        if self.offload_optimizer and self.optimization.optimizer == "adamw8bit":
            raise ValueError(
                "offload_optimizer is on beside optimizer adamw8bit, whose moments are for a GPU's memory; choose one"
            )
        if self.samples < self.batch_size:
            raise ValueError(f"samples is {self.samples}, less than one batch of {self.batch_size}")
        for name, source in [*(("data", source) for source in self.sources), ("validation.data", self.validation.data)]:
            count = drawn_count(source or "")
            if count is not None and not (count.isdecimal() and len(count) < 9 and 0 < int(count) <= 100 * MAX_IMAGES):
                raise ValueError(f"{name} is {source!r}; expected a folder of shards, or {DATA_FORM} as shapes:50000")
        if not self.sources:
            raise ValueError("data names no folder; expected one, or several as {FOLDER: WEIGHT}")
        draws_per_block(list(self.sources.values()))
        if self.init_adapter and not self.adapter.starts_fresh:
            raise ValueError(
                "gate_init, fuser_init and grounding_share say how a new adapter begins; leave them out beside "
                f"init_adapter {self.init_adapter}"
            )

    @property
    def sources(self) -> dict[str, float]:
        """Weights by folder."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are saved, shown and compared: without the passwords and keys of addresses."""
        return redacted_values(asdict(self))


# Names of settings ---------------------------------------------------------------------------------------------------


def check_names(settings: Mapping[str, Any], source: str) -> None:
    """Refuse names that are no settings of a run, and groups that hold no settings.

    Args:
        settings: the content of a YAML file.
        source: that file, for the error message.
    """
    groups = {entry.name: entry.default_factory for entry in fields(TrainConfig) if is_dataclass(entry.default_factory)}
    inner = {group: [entry.name for entry in fields(kind)] for group, kind in groups.items()}  # type: ignore[arg-type]
    known = [entry.name for entry in fields(TrainConfig)]
    known += [f"{group}.{name}" for group, names in inner.items() for name in names]
    for name, value in settings.items():
        if name in groups and not isinstance(value, Mapping):
            what = "is empty" if value is None else f"is {value!r}"
            raise ValueError(
                f"{source} holds a setting of the wrong kind: {name} {what}; give it settings, or leave it out"
            )
        for full in [f"{name}.{key}" for key in value] if name in groups else [str(name)]:
            if full not in known:
                near = _near(full, known)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"{source} has {full}, which is no setting of a run{hint} (see --help)")


def _near(name: str, known: list[str]) -> list[str]:
    """Return settings with nearly this name, in the same group or another one."""
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(last, {full.rpartition(".")[2] for full in known}, n=1, cutoff=0.75)
    same = [full for best in close for full in known if full.rpartition(".")[2] == best]
    return same or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
