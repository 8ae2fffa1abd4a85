"""The configuration of a training run. Every field can be set in a recipe (YAML) and on the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..data.batch import Augmentation
from ..data.mixture import turns_of


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Form of a new adapter (see `gligen_xl.adapter.AdapterConfig`) and how it begins; slots are those of the data.

    Args:
        blocks: which transformer blocks may carry a fuser: all, or the first of each group.
        every: a fuser on every k-th of them.
        grounding_logit_bias: added to the logits of the grounding tokens; 0 is the published form.
        bias_share: over this first share of the run the bias falls linearly to 0, so that the finished adapter has the
            published form; by default it stays.
        gate_init: tanh of every gate at the start; 0 changes nothing of the base's pictures until it is trained.
        fuser_init: "fresh" weights, or those of the block's own "self_attention" (see `gligen_xl.train.start`).
        grounding_share: of the fusers' attention that goes to the grounding tokens at the start, through the weights
            alone (see `gligen_xl.train.start`); by default what fresh weights give, about a hundredth.
    """

    blocks: Literal["all", "first"] = "all"
    every: int = 1
    grounding_logit_bias: float = 0.0
    bias_share: float | None = None
    gate_init: float = 0.0
    fuser_init: Literal["fresh", "self_attention"] = "fresh"
    grounding_share: float | None = None

    def __post_init__(self) -> None:
        if self.bias_share is not None and not 0 < self.bias_share <= 1:
            raise ValueError(f"bias_share is {self.bias_share}; expected a share of the run, above 0 and up to 1")
        if self.bias_share is not None and not self.grounding_logit_bias:
            raise ValueError("bias_share is set, but grounding_logit_bias is 0: there is nothing to fade out")
        if not -1 < self.gate_init < 1:
            raise ValueError(f"gate_init is {self.gate_init}; expected the tanh of a gate, between -1 and 1")
        if self.grounding_share is not None and not 0 < self.grounding_share < 1:
            raise ValueError(f"grounding_share is {self.grounding_share}; expected a share between 0 and 1")
        if self.grounding_share is not None and self.grounding_logit_bias:
            raise ValueError("grounding_share and grounding_logit_bias are two ways to the same; choose one")

    def logit_bias(self, position: int, samples: int) -> float:
        """The logit bias at `position` of `samples`."""
        if self.bias_share is None:
            return self.grounding_logit_bias
        return self.grounding_logit_bias * max(0.0, 1 - position / (self.bias_share * samples))

    @property
    def starts_fresh(self) -> bool:
        """Whether a new adapter is as GLIGEN's begins."""
        return self.gate_init == 0 and self.fuser_init == "fresh" and self.grounding_share is None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the loss makes of the errors (see `gligen_xl.train.objective`); the defaults are GLIGEN's recipe.

    Args:
        snr_gamma: of min-SNR weighting, usually 5; by default every timestep counts alike.
        noisy_bias: timesteps t in 0-1 are drawn with the density (1 + b) t**b; 0 is uniform, 1 favours noisy ones.
        box_weight: what latent pixels inside of boxes count against those outside.
    """

    snr_gamma: float | None = None
    noisy_bias: float = 0.0
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise ValueError(f"objective.snr_gamma is {self.snr_gamma}; expected a positive number, usually 5")
        if not 0 <= self.noisy_bias < math.inf:
            raise ValueError(f"objective.noisy_bias is {self.noisy_bias}; expected 0 or a positive number")
        if not 0 < self.box_weight < math.inf:
            raise ValueError(f"objective.box_weight is {self.box_weight}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW over the adapter's parameters.

    Args:
        optimizer: "adamw8bit" keeps the moments in 8 bits (bitsandbytes, extra 8bit): a quarter of their memory.
        learning_rate: after the warm-up.
        gate_learning_rate: of the gates; by default as all.
        beta1: decay of AdamW's first moment.
        beta2: decay of its second moment.
        weight_decay: of all but the gates.
        max_grad_norm: gradients are scaled down to this norm.
        warmup_samples: the rate grows linearly over these first samples, then stays.
        decay_share: over this last share of the run the rate falls linearly to 0; 0 is constant to the end.
        ema_decay: of the average that is validated and shipped; 0 is the adapter as it is.
        attention_weight: of the attention supervision at the start (see `gligen_xl.train.attention`); 0 is without,
            as published.
        attention_share: over this first share of the run it falls linearly to 0.
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
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share is {self.decay_share}; expected a share between 0 and 1")

    def attention(self, position: int, samples: int) -> float:
        """Weight of the attention supervision at `position` of `samples`."""
        return self.attention_weight * max(0.0, 1 - position / max(self.attention_share * samples, 1))

    def rate(self, position: int, samples: int) -> float:
        """Factor on the learning rates at `position` of `samples`."""
        warm = min(1.0, (position + 1) / max(self.warmup_samples, 1))
        decay_samples = self.decay_share * samples
        return warm * min(1.0, (samples - position) / decay_samples if decay_samples else 1.0)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is looked at while training; all counts in samples of the run or pictures.

    Args:
        data: folder of held-out shards, or "shapes:COUNT"; without, there is no validation.
        every: samples between validations.
        gain_every: samples between looks at the grounding gain alone, which costs little; by default only with all.
        loss_samples: held-out samples for the grounding gain.
        pictures: held-out layouts to generate, with grounding on and off.
        steps: denoising steps of those pictures.
        guidance_scale: of those pictures.
        detector: finds the objects again, for box metrics; "shapes" for the shapes world.
    """

    data: str | None = None
    every: int = 320_000
    gain_every: int | None = None
    loss_samples: int = 256
    pictures: int = 16
    steps: int = 30
    guidance_scale: float = 5.0
    detector: Literal["shapes"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("loss_samples", 1), ("pictures", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; expected at least {least}")
        if self.gain_every is not None and self.gain_every < 1:
            raise ValueError(f"validation.gain_every is {self.gain_every}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are GLIGEN-XL's recipe at 512.

    Args:
        model: the base: a pipeline folder, a Hub repository, or "shapes".
        data: folder of shards, or a URL of one (hf://datasets/OWNER/NAME/FOLDER, s3://BUCKET/FOLDER); or
            "shapes:COUNT", pictures of the shapes world, drawn and encoded into `out` first. Several with their
            weights, as {shards-a: 0.9, shards-b: 0.1}, are mixed in that proportion of samples.
        out: folder of the run; a run that stands there is continued.
        init_adapter: what to start from, in place of a fresh adapter: an adapter folder, that of a run, or any other
            form that `gligen-xl convert` reads (pipeline or gated U-Net folder, GLIGEN file, Hub repository).
        resolution: pixels that the data has to be prepared for, that of other sizes is refused; by default any.
        samples: length of the run, in samples seen.
        batch_size: samples of one optimizer step, over all processes.
        micro_batch: samples of one forward pass on one process; by default its whole share of the batch. Less takes
            less memory and gives the same step.
        seed: everything random follows from it and the position.
        precision: of the frozen base and the computation; the adapter itself is kept in float32.
        gradient_checkpointing: less memory, a third more time.
        compile: the U-Net by torch.compile. The first steps take minutes, so does a new size of latents.
        compile_backend: of torch.compile; "eager" and "aot_eager" only trace, to find what does not compile.
        gradient_compression: gradients pass between the processes as they are, or as bfloat16: half the traffic.
        shard_optimizer: each process keeps moments and average of its share of the adapter alone; the weights are the
            same to the bit, and exchanged once more a step.
        process_timeout: seconds that a process waits for the others before it ends with an error; more than a
            validation and a checkpoint take.
        skip_limit: steps of which loss or gradients are not finite are left out; so many in a row end the run.
        workers: data loading processes.
        window: samples are mixed within so many shards at a time; by default within all, or as many of a URL's as half
            of the cache holds, 16 at most.
        cache_gb: of the disk for the latents of shards from a URL, 10**9 bytes each; in GLIGEN_XL_CACHE or ~/.cache.
        log_every: optimizer steps between lines of metrics.jsonl.
        checkpoint_every: samples between checkpoints.
        keep_checkpoints: how many of the newest stay.
        keep_every: beside them, the first checkpoint of every so many samples stays for good.
        track: trackers of accelerate to report to; by default tensorboard, where it is installed.
    """

    data: dict[str, float] | str
    out: str
    model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    init_adapter: str | None = None
    resolution: int | None = None
    samples: int = 32_000_000
    batch_size: int = 64
    micro_batch: int | None = None
    seed: int = 0
    precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    gradient_compression: Literal["no", "bf16"] = "no"
    shard_optimizer: bool = False
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
        for name in (
            "samples", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "process_timeout",
            "skip_limit",
        ):  # fmt: skip
            if (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("resolution", "micro_batch", "keep_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1, or none")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch is {self.micro_batch}, more than the batch of {self.batch_size}")
        if self.compile and (self.optimization.attention_weight or self.adapter.bias_share is not None):
            raise ValueError(
                "compile is on beside optimization.attention_weight or adapter.bias_share, which change the fusers at "
                "every step: each would be compiled anew; leave one or the other out"
            )
        if self.samples < self.batch_size:
            raise ValueError(f"samples is {self.samples}, less than one batch of {self.batch_size}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2**31 - 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; expected 0 or more")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; expected at least 1 shard")
        if not self.cache_gb > 0:
            raise ValueError(f"cache_gb is {self.cache_gb}; expected a positive number")
        if not self.sources:
            raise ValueError("data names no folder; expected one, or several as {FOLDER: WEIGHT}")
        turns_of(list(self.sources.values()))
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
        return asdict(self)


_MAY_CHANGE = {
    "out", "data", "resolution", "micro_batch", "gradient_checkpointing", "compile", "compile_backend",
    "shard_optimizer", "process_timeout", "skip_limit", "workers", "cache_gb", "log_every", "checkpoint_every",
    "keep_checkpoints", "keep_every", "track", "validation",
}  # fmt: skip


def check_same_run(former: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to continue a run with settings that would have made it another one."""
    current = config.to_dict()
    for name in sorted(set(current) - _MAY_CHANGE):
        was, now = former.get(name), current[name]
        if isinstance(now, dict) and isinstance(was, dict):
            for key in now:
                if was.get(key) != now[key]:
                    _refuse(f"{name}.{key}", was.get(key), now[key], config.out)
        elif was != now:
            _refuse(name, was, now, config.out)


def _refuse(name: str, was: Any, now: Any, out: str) -> None:
    raise ValueError(
        f"the run in {out} was begun with {name} {was!r}, now it is {now!r}; "
        "continue it with its own settings, or choose another folder"
    )
