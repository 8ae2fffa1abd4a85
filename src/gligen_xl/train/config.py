"""The configuration of a training run. Every field can be set in a recipe (YAML) and on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..data.batch import Augmentation
from ..data.mixture import turns_of


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Form of a new adapter (see `gligen_xl.adapter.AdapterConfig`); slots are those of the data.

    Args:
        every: a fuser on every k-th transformer block.
        grounding_logit_bias: added to the logits of the grounding tokens; 0 is the published form.
    """

    every: int = 1
    grounding_logit_bias: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW over the adapter's parameters.

    Args:
        learning_rate: after the warm-up.
        gate_learning_rate: of the gates; by default as all.
        beta1: decay of AdamW's first moment.
        beta2: decay of its second moment.
        weight_decay: of all but the gates.
        max_grad_norm: gradients are scaled down to this norm.
        warmup_samples: the rate grows linearly over these first samples, then stays.
        decay_share: over this last share of the run the rate falls linearly to 0; 0 is constant to the end.
        ema_decay: of the average that is validated and shipped.
        attention_weight: of the attention supervision at the start (see `gligen_xl.train.attention`); 0 is without,
            as published.
        attention_share: over this first share of the run it falls linearly to 0.
    """

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
        loss_samples: held-out samples for the grounding gain.
        pictures: held-out layouts to generate, with grounding on and off.
        steps: denoising steps of those pictures.
        guidance_scale: of those pictures.
        detector: finds the objects again, for box metrics; "shapes" for the shapes world.
    """

    data: str | None = None
    every: int = 320_000
    loss_samples: int = 256
    pictures: int = 16
    steps: int = 30
    guidance_scale: float = 5.0
    detector: Literal["shapes"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("loss_samples", 1), ("pictures", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are GLIGEN-XL's recipe at 512.

    Args:
        model: the base: a pipeline folder, a Hub repository, or "shapes".
        data: folder of shards, or a URL of one (hf://datasets/OWNER/NAME/FOLDER, s3://BUCKET/FOLDER); or
            "shapes:COUNT", pictures of the shapes world, drawn and encoded into `out` first. Several with their
            weights, as {shards-a: 0.9, shards-b: 0.1}, are mixed in that proportion of samples.
        out: folder of the run; a run that stands there is continued.
        init_adapter: an adapter folder to start from, in place of a fresh one.
        samples: length of the run, in samples seen.
        batch_size: samples of one optimizer step, over all processes.
        seed: everything random follows from it and the position.
        precision: of the frozen base and the computation; the adapter itself is kept in float32.
        gradient_checkpointing: less memory, a third more time.
        workers: data loading processes.
        window: samples are mixed within so many shards at a time; by default within all, or as many of a URL's as half
            of the cache holds, 16 at most.
        cache_gb: of the disk for the latents of shards from a URL, 10**9 bytes each; in GLIGEN_XL_CACHE or ~/.cache.
        log_every: optimizer steps between lines of metrics.jsonl.
        checkpoint_every: samples between checkpoints.
        keep_checkpoints: how many of the newest stay.
        track: trackers of accelerate to report to; by default tensorboard, where it is installed.
    """

    data: dict[str, float] | str
    out: str
    model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    init_adapter: str | None = None
    samples: int = 32_000_000
    batch_size: int = 64
    seed: int = 0
    precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    workers: int = 0
    window: int | None = None
    cache_gb: float = 20.0
    log_every: int = 50
    checkpoint_every: int = 64_000
    keep_checkpoints: int = 2
    track: list[Literal["tensorboard", "wandb", "trackio", "comet_ml"]] | None = None
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
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

    @property
    def sources(self) -> dict[str, float]:
        """Weights by folder."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_MAY_CHANGE = {
    "out", "data", "workers", "cache_gb", "log_every", "checkpoint_every", "keep_checkpoints", "track", "validation",
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
