"""A run in words and figures, as its report and its model card say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .record import RunRecord

METRICS = {
    "mean_iou": "Mean IoU",
    "recall_50": "Recall@0.5",
    "recall_75": "Recall@0.75",
}
_OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW in 8 bits"}
_PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def in_words(run: RunRecord) -> str:
    """Say in a few sentences what was trained, on what, how far, and how."""
    config = run.config
    if not config:
        return f"{run.samples:,} samples seen; the settings of the run (config.json) are missing."
    whole, batch = (
        int(numbers(config).get(name) or usual) for name, usual in (("samples", run.samples), ("batch_size", 1))
    )
    state = "finished" if run.finished else "unfinished"
    sentences = [
        f"An adapter for {config.get('model', 'its base')}, trained on {data_in_words(config.get('data'))}.",
        f"{run.samples:,} of {whole:,} samples seen in batches of {batch} ({run.samples // batch:,} steps), {state}.",
    ]
    if start := config.get("init_adapter"):
        sentences.insert(1, f"It began from {start}.")
    return " ".join([*sentences, recipe_in_words(config)])


def data_in_words(data: Any) -> str:
    if isinstance(data, dict):
        weights = numbers(data)
        whole = sum(weights.values()) or 1
        shares = {name: f" ({percent(weights[name] / whole)})" if name in weights else "" for name in data}
        return ", ".join(f"{name}{share}" for name, share in shares.items())
    return str(data)


def numbers(settings: Any) -> dict[str, float]:
    """Return those settings that are numbers; files of others may hold anything."""
    settings = settings if isinstance(settings, Mapping) else {}
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def recipe_in_words(config: dict[str, Any]) -> str:
    """Optimizer, schedule, form of the adapter, dropouts: those that the settings tell."""
    groups = ("optimization", "adapter", "augmentation", "objective")
    options, form, data, objective = (numbers(config.get(name)) for name in groups)
    texts: dict[str, Any] = {}
    for name in ("optimization", "adapter"):
        group = config.get(name)
        texts |= (
            {key: value for key, value in group.items() if isinstance(value, str)} if isinstance(group, Mapping) else {}
        )
    parts = []
    if "learning_rate" in options:
        gates = options.get("gate_learning_rate")
        kind = _OPTIMIZERS.get(texts.get("optimizer", "adamw"), texts.get("optimizer"))
        parts.append(f"{kind} at {options['learning_rate']:g}" + ("" if gates is None else f" (gates {gates:g})"))
    if warmup := options.get("warmup_samples"):
        parts.append(f"warm-up over {warmup:,} samples")
    if decay := options.get("decay_share"):
        parts.append(f"falling to 0 over the last {percent(decay)}")
    if ema := options.get("ema_decay"):
        parts.append(f"average of decay {ema:g}")
    if isinstance(precision := config.get("precision"), str):
        parts.append(f"base in {_PRECISIONS.get(precision, precision)}")
    if gamma := objective.get("snr_gamma"):
        parts.append(f"min-SNR weighting with gamma {gamma:g}")
    if bias := objective.get("noisy_bias"):
        share = objective.get("noisy_share")
        fading = "" if share is None else f", fading over the first {percent(share)}"
        parts.append(f"timesteps drawn with density t**{bias:g}{fading}")
    if (weight := objective.get("box_weight", 1)) != 1:
        parts.append(f"pixels in boxes weighted {weight:g}")
    parts.append(f"a fuser on {blocks_in_words(texts.get('blocks', 'all'), int(form.get('every', 1)))}")
    if bias := form.get("grounding_logit_bias"):
        parts.append(f"grounding logit bias {bias:g}")
    if slots := data.get("slots"):
        parts.append(f"{slots} slots")
    if "drop_grounding" in data and "drop_caption" in data:
        parts.append(
            f"boxes and caption dropped from {percent(data['drop_grounding'])} of the samples, the caption alone from "
            f"{percent(data['drop_caption'])} of the others"
        )
    text = ", ".join(parts)
    return text[0].upper() + text[1:] + "."


def blocks_in_words(blocks: str, every: int, block: str = "block") -> str:
    """On which blocks of the U-Net fusers stand."""
    if blocks == "first":
        return f"the first {block} of each group" + (f", in one group of {every}" if every > 1 else "")
    return f"every {block}" if every == 1 else f"one {block} in {every}"


def duration(seconds: float) -> str:
    """ "41 s", "3 min 12 s", "5 h 20 min", "6 d 4 h"."""
    for above, unit, below, smaller in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= above:
            count, rest = divmod(seconds, above)
            return f"{count:.0f} {unit} {rest // below:.0f} {smaller}"
    return f"{seconds:.0f} s"


def percent(share: float) -> str:
    """Two decimals at most, fewer where the number is large."""
    value = 100 * share
    rounded = round(value, 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0)
    return f"{rounded + 0.0:.10g} %"  # + 0.0: no "-0"


def plain(value: float) -> str:
    """Three digits that count."""
    return f"{value + 0.0:.3g}"
