"""The configuration of a training run. Every field can be set in a recipe (YAML) and on the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

from ..data.dataset import Augmentation
from ..data.sampler import draws_per_block
from ..dtypes import dtype_name
from ..limits import MAX_BATCH, MAX_IMAGES, MAX_SIDE, MAX_STEPS, MAX_WORKERS
from ..redact import redacted_values
from ..worlds import DATA_FORM, drawn_count


class Expected(NamedTuple):
    """Describes the values that a setting may have, in words and as a test that NaN does not pass."""

    words: str
    holds: Callable[[float], bool]


_SHORT_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # as accelerate calls them

POSITIVE = Expected("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Expected("0 or a positive number", lambda value: 0 <= value < math.inf)
FINITE = Expected("a finite number", math.isfinite)
SHARE = Expected("a share between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_OF_RUN = Expected("a share of the run, above 0 and up to 1", lambda value: 0 < value <= 1)
DECAY = Expected("0 or more, and less than 1", lambda value: 0 <= value < 1)
COUNT = Expected("0 or more", lambda value: value >= 0)
AT_LEAST_1 = Expected("at least 1", lambda value: value >= 1)


def up_to(limit: int, *, least: int = 1) -> Expected:
    return Expected(f"{least} to {limit}", lambda value: least <= value <= limit)


def _check(options: Any, group: str = "", **expected: Expected) -> None:
    """Refuses a value that is not as expected; None is allowed if it is the default."""
    for name, (words, holds) in expected.items():
        value = getattr(options, name)
        if value is None and options.__dataclass_fields__[name].default is None:
            continue
        if value is None or not holds(value):
            raise ValueError(f"{group}{name} is {value}; expected {words}")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The form of a new adapter (see `gligen_xl.adapter.AdapterConfig`) and its initialisation.

    Args:
        blocks: which transformer blocks may have a fuser: all, or the first of each group.
        every: put a fuser on every k-th of those blocks.
        grounding_logit_bias: constant added to the logits of the grounding tokens; 0 is the published form.
        bias_share: first share of the run over which the bias falls linearly to 0, so that the finished adapter has
            the published form; by default the bias is constant.
        gate_init: tanh of every gate at the start; at 0 an untrained adapter does not change the base's images.
        fuser_init: initialise fusers with "fresh" weights, or with those of the block's own "self_attention" (see
            `gligen_xl.train.init`).
        grounding_share: share of the fusers' attention on the grounding tokens at the start, set through the weights
            alone (see `gligen_xl.train.init`); by default what fresh weights give, about 0.01.
    """

    blocks: Literal["all", "first"] = "all"
    every: int = 1
    grounding_logit_bias: float = 0.0
    bias_share: float | None = None
    gate_init: float = 0.0
    fuser_init: Literal["fresh", "self_attention"] = "fresh"
    grounding_share: float | None = None

    def __post_init__(self) -> None:
        _check(
            self,
            "adapter.",
            every=AT_LEAST_1,
            grounding_logit_bias=FINITE,
            bias_share=SHARE_OF_RUN,
            gate_init=Expected("the tanh of a gate, between -1 and 1", lambda value: -1 < value < 1),
            grounding_share=Expected("a share between 0 and 1", lambda value: 0 < value < 1),
        )
        if self.bias_share is not None and not self.grounding_logit_bias:
            raise ValueError("bias_share is set, but grounding_logit_bias is 0: there is nothing to fade out")
        if self.grounding_share is not None and self.grounding_logit_bias:
            raise ValueError("grounding_share and grounding_logit_bias are two ways to the same; choose one")

    def logit_bias(self, samples_seen: int, samples: int) -> float:
        """Returns the logit bias after `samples_seen` of `samples`."""
        if self.bias_share is None:
            return self.grounding_logit_bias
        return self.grounding_logit_bias * max(0.0, 1 - samples_seen / (self.bias_share * samples))

    @property
    def starts_fresh(self) -> bool:
        """Whether a new adapter is initialised as GLIGEN's."""
        return self.gate_init == 0 and self.fuser_init == "fresh" and self.grounding_share is None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss (see `gligen_xl.train.objective`); the defaults are GLIGEN's recipe.

    Args:
        snr_gamma: gamma of min-SNR weighting, usually 5; by default all timesteps have the same weight.
        noisy_bias: b of the density (1 + b) t**b of timesteps t in 0-1; 0 is uniform, 1 favours noisy timesteps.
        noisy_share: first share of the run over which the bias falls linearly to 0, so that nearly clean timesteps are
            learned as well; by default the bias is constant.
        box_weight: weight of latent pixels inside boxes relative to those outside.
    """

    snr_gamma: float | None = None
    noisy_bias: float = 0.0
    noisy_share: float | None = None
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        usual = Expected("a positive number, usually 5", POSITIVE.holds)
        _check(
            self, "objective.", snr_gamma=usual, noisy_bias=NOT_NEGATIVE, noisy_share=SHARE_OF_RUN, box_weight=POSITIVE
        )
        if self.noisy_share is not None and not self.noisy_bias:
            raise ValueError("objective.noisy_share is set, but noisy_bias is 0: there is nothing to fade out")

    def at(self, samples_seen: int, samples: int) -> Objective:
        """Returns the objective after `samples_seen` of `samples`, with a constant bias."""
        if self.noisy_share is None:
            return self
        left = max(0.0, 1 - samples_seen / (self.noisy_share * samples))
        return replace(self, noisy_bias=self.noisy_bias * left, noisy_share=None)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW over the adapter's parameters.

    Args:
        optimizer: "adamw8bit" keeps the moments in 8 bits (bitsandbytes, extra 8bit), in a quarter of the memory.
        learning_rate: rate after the warm-up.
        gate_learning_rate: rate of the gates; by default that of all weights, and 0 keeps the gates as they are.
        beta1: decay of AdamW's first moment.
        beta2: decay of its second moment.
        weight_decay: decay of all weights except the gates.
        max_grad_norm: clip gradients to this norm.
        warmup_samples: samples over which the rate grows linearly at the start.
        decay_share: last share of the run over which the rate falls linearly to 0; 0 keeps it constant.
        ema_decay: decay of the average of the weights, which is validated and saved; 0 uses the weights themselves.
        attention_weight: weight of the attention supervision at the start (see `gligen_xl.train.attention`); 0, as
            published, turns it off.
        attention_share: first share of the run over which that weight falls linearly to 0.
    """

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 5e-5
    gate_learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_samples: int = 64_000
    decay_share: float = 0.0
    ema_decay: float = 0.9999
    attention_weight: float = 0.0
    attention_share: float = 0.5

    def __post_init__(self) -> None:
        _check(
            self,
            "optimization.",
            learning_rate=POSITIVE,
            gate_learning_rate=NOT_NEGATIVE,
            beta1=DECAY,
            beta2=DECAY,
            weight_decay=NOT_NEGATIVE,
            max_grad_norm=POSITIVE,
            warmup_samples=COUNT,
            decay_share=SHARE,
            ema_decay=DECAY,
            attention_weight=NOT_NEGATIVE,
            attention_share=SHARE_OF_RUN,
        )

    def attention(self, samples_seen: int, samples: int) -> float:
        """Returns the weight of the attention supervision after `samples_seen` of `samples`."""
        return self.attention_weight * max(0.0, 1 - samples_seen / max(self.attention_share * samples, 1))

    def rate(self, samples_seen: int, samples: int) -> float:
        """Returns the factor on the learning rates after `samples_seen` of `samples`."""
        warm = min(1.0, (samples_seen + 1) / max(self.warmup_samples, 1))
        decay_samples = self.decay_share * samples
        return warm * min(1.0, (samples - samples_seen) / decay_samples if decay_samples else 1.0)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation during training.

    Args:
        data: folder of held-out shards, or "shapes:COUNT"; by default images of the training data (see held_out).
        held_out: if data is not set, keep this share of the training images out of the training and validate on them;
            0.05 in every recipe. At least one image and at most 500 of each source are held out; a source of fewer
            than 10 images is validated on its training images. For drawn data ("shapes:COUNT") 256 other scenes are
            drawn. 0 without data turns validation off.
        every: samples between validations.
        gain_every: samples between measurements of the grounding gain alone, which are cheap; by default it is measured
            with everything else only.
        loss_samples: number of held-out samples for the grounding gain.
        pictures: number of held-out layouts to generate, with grounding on and off.
        steps: denoising steps of these images.
        guidance_scale: guidance scale of these images.
        detector: detector for box metrics: a folder or repository (see `gligen_xl.evaluate.find_detector`), or "shapes"
            for the shapes world. It is loaded on the device of the model. By default the shapes detector is used for
            the embedded model, if it knows all phrases; otherwise, and with "none", only grounding gain and images
            are made.
    """

    data: str | None = None
    held_out: float = 0.0
    every: int = 320_000
    gain_every: int | None = None
    loss_samples: int = 256
    pictures: int = 16
    steps: int = 30
    guidance_scale: float = 5.0
    detector: str | None = None

    def __post_init__(self) -> None:
        _check(
            self,
            "validation.",
            held_out=Expected("a share, 0 or more and at most 0.5", lambda value: 0 <= value <= 0.5),
            every=AT_LEAST_1,
            gain_every=AT_LEAST_1,
            loss_samples=up_to(MAX_IMAGES),
            pictures=up_to(MAX_IMAGES, least=0),
            steps=up_to(MAX_STEPS),
            guidance_scale=FINITE,
        )
        for name in ("gain_every", "detector"):
            if not self.enabled and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"validation.{name} is {value}, but validation.data is not set: there is no validation "
                    "(validation.held_out 0.05 takes it from the training's data)"
                )
        if self.detector not in (None, "none") and not self.pictures:
            raise ValueError(f"validation.detector is {self.detector}, but validation.pictures is 0: none to look at")

    @property
    def enabled(self) -> bool:
        """Whether there is a validation."""
        return self.data is not None or self.held_out > 0


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
        _check(
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
        """Returns the settings as they are saved, shown and compared: without the passwords and keys of addresses."""
        return redacted_values(asdict(self))


# Names of settings ---------------------------------------------------------------------------------------------------


def check_names(settings: Mapping[str, Any], source: str) -> None:
    """Refuses names that are no settings of a run, and groups that hold no settings.

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
    """Returns settings with nearly this name, in the same group or another one."""
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(last, {full.rpartition(".")[2] for full in known}, n=1, cutoff=0.75)
    same = [full for best in close for full in known if full.rpartition(".")[2] == best]
    return same or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
