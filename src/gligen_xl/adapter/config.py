"""The configuration of an adapter: what its weights alone do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..limits import MAX_SLOTS, MAX_WIDTH

Blocks = Literal["all", "first"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The shape and form of an adapter.

    Args:
        cross_attention_dim: width of a grounding token, which is that of the U-Net's text (SDXL 2048, SD 1.x 768).
        phrase_dim: width of a phrase embedding (SDXL 768 + 1280, SD 1.x 768).
        slots: grounding tokens per image. Unused ones are learned nulls that are attended to, so the number is part of
            the model; published weights are trained with 32 and used with 30.
        blocks: the transformer blocks that fusers are put on: "all", or the "first" of each group (of each of the
            U-Net's transformers: 11 of SDXL's 70). "all" is the published form.
        every: a fuser on every k-th of those; 1 is the published form.
        grounding_logit_bias: added to the logits of the grounding tokens in the fusers' attention. A fresh fuser
            spreads its attention over thousands of visual tokens; a bias gives grounding a real share from the start.
            0 is the published form.
        inpaint: whether it has a first convolution that also reads the kept image (GLIGEN's inpainting models).
    """

    cross_attention_dim: int
    phrase_dim: int
    slots: int = 30
    blocks: Blocks = "all"
    every: int = 1
    grounding_logit_bias: float = 0.0
    inpaint: bool = False

    def __post_init__(self) -> None:
        for name in ("cross_attention_dim", "phrase_dim", "slots", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r:.80}; expected a positive integer")
            if value > (limit := MAX_SLOTS if name == "slots" else MAX_WIDTH):
                raise ValueError(f"{name} is {value}; expected at most {limit}")
        if self.blocks not in get_args(Blocks):
            raise ValueError(f"blocks is {self.blocks!r}; expected one of {', '.join(get_args(Blocks))}")
        if not isinstance(self.grounding_logit_bias, int | float) or not abs(self.grounding_logit_bias) < 100:
            raise ValueError(f"grounding_logit_bias is {self.grounding_logit_bias!r}; expected a moderate number")
        if not isinstance(self.inpaint, bool):
            raise ValueError(f"inpaint is {self.inpaint!r}; expected true or false")

    @property
    def published_form(self) -> bool:
        """Tell whether a U-Net of diffusers with `attention_type="gated"` can hold it."""
        return self.blocks == "all" and self.every == 1 and self.grounding_logit_bias == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        if not isinstance(values, Mapping):
            raise ValueError(f"adapter settings are {values!r}; expected names and values")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown adapter settings {unknown}; this version knows {sorted(known)}")
        if missing := sorted({"cross_attention_dim", "phrase_dim"} - set(values)):
            raise ValueError(f"adapter settings {missing} are missing")
        return cls(**values)
