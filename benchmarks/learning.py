"""What makes an adapter follow boxes sooner, and what a smaller one costs, on the shapes world.

Every variant is trained from a fresh adapter, once per seed, and looked at on held-out layouts. Runs lie in
runs/learning; one that is finished is not trained again, one that was stopped goes on.

python benchmarks/learning.py                                                   # all of it: five hours of one core
python benchmarks/learning.py --only "supervised, noisier" --samples 51200 --decay 0.5 --look 6400
python benchmarks/learning.py --report                                          # the table of what there is
python benchmarks/learning.py --sizes                                           # parameters and times by placement
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gligen_xl.adapter import AdapterConfig, adapter_config, adapter_parameters, attach, detach, fusers
from gligen_xl.data.dataset import Augmentation
from gligen_xl.generate import generate
from gligen_xl.pipelines import StableDiffusionXLGLIGENPipeline
from gligen_xl.toyworld.data import write_shards
from gligen_xl.toyworld.layouts import held_out_layouts
from gligen_xl.toyworld.world import TRAINING_SEED, VALIDATION_SEED
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import AdapterOptions, Optimization, Validation

ROOT = Path("runs/learning")
GATES = {"optimization.gate_learning_rate": 1.5e-2}  # ten times the others
SUPERVISED = {**GATES, "optimization.attention_weight": 0.1}
NOISIER = {"objective.noisy_bias": 3.0}
BIAS = {"adapter.grounding_logit_bias": 2.0}
GATE = {"adapter.gate_init": 0.1}
# One change each. By itself none of them learns to follow boxes in so few samples, so each is seen beside supervision.
CHANGES: dict[str, dict[str, Any]] = {
    "noisy": {"objective.noisy_bias": 1.0},
    "noisier": NOISIER,
    "bias": BIAS,
    "bias annealed": {**BIAS, "adapter.bias_share": 0.7},
    "share": {"adapter.grounding_share": 0.5},
    "gate": GATE,
    "self-attention": {"adapter.fuser_init": "self_attention"},
    "min-SNR": {"objective.snr_gamma": 5.0},
    "box weight": {"objective.box_weight": 4.0},
    "no EMA": {"optimization.ema_decay": 0.0},
    "every 2": {"adapter.every": 2},
    "first": {"adapter.blocks": "first"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "gates": GATES,
    "published, bias": BIAS,
    "published, noisier": NOISIER,
    "supervised": SUPERVISED,
    **{f"supervised, {name}": {**SUPERVISED, **change} for name, change in CHANGES.items()},
    "supervised, noisier, bias": {**SUPERVISED, **NOISIER, **BIAS},
    "supervised, noisier, gate": {**SUPERVISED, **NOISIER, **GATE},
    "supervised, noisier, longer": {**SUPERVISED, **NOISIER, "optimization.attention_share": 1.0},
    "supervised, noisier at first": {**SUPERVISED, **NOISIER, "objective.noisy_share": 0.7},
    "supervised, noisier at first, longer": {
        **SUPERVISED,
        **NOISIER,
        "objective.noisy_share": 0.7,
        "optimization.attention_share": 1.0,
    },
    "supervised, noisier, batch 16": {**SUPERVISED, **NOISIER, "batch_size": 16},
}


def config_of(name: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    """A run of GLIGEN's recipe at the rate of this small model, with what the variant changes."""
    config = TrainConfig(
        model="shapes",
        data=str(ROOT / "data" / f"shapes-{options.pictures}"),
        out=str(ROOT / _length(options) / f"{name.replace(', ', '+').replace(' ', '-')}-{seed}"),
        samples=options.samples,
        batch_size=32,
        seed=seed,
        checkpoint_every=options.every,
        keep_checkpoints=1,
        log_every=50,
        track=[],
        adapter=AdapterOptions(),
        augmentation=Augmentation(drop_caption=0.1, slots=6),
        optimization=Optimization(
            learning_rate=1.5e-3,
            beta2=0.99,
            warmup_samples=1_600,
            ema_decay=0.985,
            attention_share=0.7,
            decay_share=options.decay,
        ),
        validation=Validation(
            data=str(ROOT / "data" / "held-out"),
            every=options.look,
            gain_every=options.every,
            pictures=options.layouts,
            steps=20,
            guidance_scale=2.0,
            detector="shapes",
        ),
    )
    for path, value in VARIANTS[name].items():
        group, _, field = path.rpartition(".")
        change = {group: replace(getattr(config, group), **{field: value})} if group else {field: value}
        config = replace(config, **change)
    return config


def _length(options: argparse.Namespace) -> str:
    """The folder of runs of this length."""
    return f"{options.samples}-decay-{options.decay}" if options.decay else str(options.samples)


def draw_data(images: int) -> None:
    """Training and held-out shards, once for all runs."""
    vae = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes").vae
    write_shards(vae, ROOT / "data" / f"shapes-{images}", images, seed=TRAINING_SEED, captions="ground")
    write_shards(vae, ROOT / "data" / "held-out", 256, seed=VALIDATION_SEED, captions="plain")


# The tables ---------------------------------------------------------------------------------------------------------


def looks(out: Path) -> list[dict[str, float]]:
    """What was seen of a run, by samples."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        if "grounding_gain" in row:
            merged.setdefault(row["samples"], {}).update(row)
    return [merged[samples] for samples in sorted(merged)]


def samples_until(rows: list[dict[str, float]], recall: float) -> float | None:
    """Samples at which recall@0.5 first passes, linearly between looks; at 0 it is what it is without grounding."""
    rows = [row for row in rows if "on_recall_50" in row]
    before, was = 0.0, rows[0]["off_recall_50"] if rows else 0.0
    for row in rows:
        now = row["on_recall_50"]
        if now >= recall:
            return before + (row["samples"] - before) * max(recall - was, 0.0) / max(now - was, 1e-9)
        before, was = row["samples"], now
    return None


def table(options: argparse.Namespace) -> str:
    """A line a variant, its numbers in the order of the seeds."""
    lines = [
        "| variant | samples until recall@0.5 passes 0.5 | 0.8 | recall@0.5 at the end | grounding gain, % | gates |",
        "|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        outs = [Path(config_of(name, seed, options).out) for seed in options.seeds]
        runs = [looks(out) for out in outs if (out / "adapter").is_dir()]
        if not runs:
            continue
        lasts = [rows[-1] for rows in runs]
        cells = [name]
        for recall in (0.5, 0.8):
            found = [samples_until(rows, recall) for rows in runs]
            cells.append("; ".join(f"{n:,.0f}" if n else f"> {options.samples:,}" for n in found))
        cells.append("; ".join(f"{row['on_recall_50']:.2f}" for row in lasts))
        cells.append("; ".join(f"{100 * row['grounding_gain']:.1f}" for row in lasts))
        cells.append("; ".join(f"{row['gate_mean']:.2f}" for row in lasts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(repeats: int = 5) -> str:
    """Fusers, parameters, time of a training step and of an image, by where fusers stand; turn by turn, medians."""
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    pipeline.set_progress_bar_config(disable=True)
    unet, layouts = pipeline.unet, held_out_layouts(8)
    unet.requires_grad_(False)
    form = replace(adapter_config(unet), blocks="all", every=1, slots=6)
    forms = {"all": form, "every 2": replace(form, every=2), "first": replace(form, blocks="first")}
    counts: dict[str, tuple[int, int]] = {}
    steps: dict[str, list[float]] = {name: [] for name in forms}
    images: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, kind in forms.items():
            detach(unet)
            attach(unet, kind)
            for parameter in adapter_parameters(unet).values():
                parameter.requires_grad_(True)
            counts[name] = len(fusers(unet)), sum(value.numel() for value in adapter_parameters(unet).values())
            took = training_step(unet, kind), _timed(lambda: list(generate(pipeline, layouts, num_inference_steps=20)))
            if repeat:  # the first round warms up
                steps[name].append(took[0])
                images[name].append(took[1] / len(layouts))
    lines = [
        "| fusers on | number | parameters | step of 64, s | image of 20 steps, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (number, parameters) in counts.items():
        step, image = statistics.median(steps[name]), statistics.median(images[name])
        lines.append(f"| {name} | {number} | {parameters:,} | {step:.2f} | {image:.2f} |")
    return "\n".join(lines)


def training_step(unet: torch.nn.Module, form: AdapterConfig) -> float:
    """Seconds for forward and backward of 64 samples."""
    config, count = unet.config, 64
    tokens = {
        "boxes": torch.rand(count, form.slots, 4),
        "masks": torch.ones(count, form.slots),
        "positive_embeddings": torch.randn(count, form.slots, form.phrase_dim),
    }
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    conditioning = {
        "encoder_hidden_states": torch.randn(count, 24, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": torch.randn(count, pooled), "time_ids": torch.zeros(count, 6)},
        "cross_attention_kwargs": {"gligen": tokens},
    }
    sample = torch.randn(count, 4, config["sample_size"], config["sample_size"])

    def step() -> None:
        unet(sample, torch.randint(0, 1000, (count,)), **conditioning).sample.square().mean().backward()
        unet.zero_grad()

    return _timed(step)


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=9_600)
    parser.add_argument("--decay", type=float, default=0.0, help="last share of a run over which the rate falls to 0")
    parser.add_argument("--every", type=int, default=1_600, help="samples between looks at the grounding gain")
    parser.add_argument("--look", type=int, default=3_200, help="samples between looks at images")
    parser.add_argument("--layouts", type=int, default=64, help="held-out layouts that are drawn at each look")
    parser.add_argument("--pictures", type=int, default=10_000, help="training images")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--sizes", action="store_true", help="measure where fusers stand, and train nothing")
    options = parser.parse_args()
    if options.sizes:
        print(sizes())
        return
    if not options.report:
        draw_data(options.pictures)
        for seed in options.seeds:
            for name in options.only or VARIANTS:
                config = config_of(name, seed, options)
                if not (Path(config.out) / "adapter").is_dir():
                    print(f"--- {name}, seed {seed}", flush=True)
                    if train(config).name != "adapter":  # it was asked to stop
                        return
    print(table(options))


if __name__ == "__main__":
    main()
