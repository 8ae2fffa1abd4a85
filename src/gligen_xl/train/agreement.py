"""Whether a run agrees with what it starts from: an adapter, or what it was before it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapter import AdapterConfig
from .config import TrainConfig


def check_form(form: AdapterConfig, config: TrainConfig, phrase_dim: int | None = None) -> None:
    """Whether `config.init_adapter` is of the form that the run asks for.

    Args:
        form: of the adapter.
        phrase_dim: width of the base's phrase embeddings; None where it is not to be compared.
    """
    if form.inpaint:
        raise ValueError(
            f"{config.init_adapter} is an inpainting adapter, whose first convolution training has nothing for; "
            "begin from one for text and boxes"
        )
    if phrase_dim not in (None, form.phrase_dim):
        raise ValueError(
            f"{config.init_adapter} reads phrase embeddings of width {form.phrase_dim}, the base's text encoders "
            f"give {phrase_dim}: it is for another base model"
        )
    for name in ("blocks", "every", "grounding_logit_bias"):
        if (there := getattr(form, name)) != (here := getattr(config.adapter, name)):
            raise ValueError(f"{config.init_adapter} has {name} {there}, the run adapter.{name} {here}; set them alike")


# The base is known by its fingerprint; what an adapter began from no longer matters.
_MAY_CHANGE = {
    "out", "data", "model", "variant", "without_boxes", "init_adapter", "resolution", "micro_batch",
    "deterministic", "gradient_checkpointing",
    "compile", "compile_backend", "shard_optimizer", "offload_optimizer", "process_timeout", "skip_limit", "workers",
    "cache_gb", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "track", "validation",
}  # fmt: skip


def check_same_run(former: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to continue a run with settings that would have made it another one.

    What `former` does not name, as the program did not know it then, counts as the default.
    """
    current, usual = config.to_dict(), TrainConfig(data=config.data, out=config.out).to_dict()
    for name in sorted(set(current) - _MAY_CHANGE):
        was, now = former.get(name, usual[name]), current[name]
        if isinstance(now, dict) and isinstance(was, dict):
            for key in now:
                if (before := was.get(key, usual[name][key])) != now[key]:
                    _refuse(f"{name}.{key}", before, now[key], config.out)
        elif was != now:
            _refuse(name, was, now, config.out)


def _refuse(name: str, was: Any, now: Any, out: str) -> None:
    raise ValueError(
        f"the run in {out} was begun with {name} {was!r}, now it is {now!r}; "
        "continue it with its own settings, or choose another folder"
    )
