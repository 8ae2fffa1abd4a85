"""The groups of settings of a training run: the form of the adapter, the objective, the optimizer, the validation.

Every field can be set in a recipe (YAML) and on the command line, as `optimization.learning_rate`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..limits import MAX_IMAGES, MAX_STEPS
from .expected import (
    AT_LEAST_1,
    COUNT,
    DECAY,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SHARE_OF_RUN,
    Expected,
    check_values,
    up_to,
)


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
        check_values(
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
        """Return the logit bias after `samples_seen` of `samples`."""
        if self.bias_share is None:
            return self.grounding_logit_bias
        return self.grounding_logit_bias * max(0.0, 1 - samples_seen / (self.bias_share * samples))

    @property
    def starts_fresh(self) -> bool:
        """Tell whether a new adapter is initialised as GLIGEN's."""
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
        check_values(
            self, "objective.", snr_gamma=usual, noisy_bias=NOT_NEGATIVE, noisy_share=SHARE_OF_RUN, box_weight=POSITIVE
        )
        if self.noisy_share is not None and not self.noisy_bias:
            raise ValueError("objective.noisy_share is set, but noisy_bias is 0: there is nothing to fade out")

    def at(self, samples_seen: int, samples: int) -> Objective:
        """Return the objective after `samples_seen` of `samples`, with a constant bias."""
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
        check_values(
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
        """Return the weight of the attention supervision after `samples_seen` of `samples`."""
        return self.attention_weight * max(0.0, 1 - samples_seen / max(self.attention_share * samples, 1))

    def rate(self, samples_seen: int, samples: int) -> float:
        """Return the factor on the learning rates after `samples_seen` of `samples`."""
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
        check_values(
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
        """Tell whether there is a validation."""
        return self.data is not None or self.held_out > 0
