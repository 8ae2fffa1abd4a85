"""A training step by part, ours against the plain way, in one run and turn by turn.

The plain way encodes the captions one by one and each image's phrases alone, padded to 77 tokens, as published
training scripts do, and steps torch's AdamW and diffusers' EMAModel as they come. Ours is that of `gligen-xl train`.
Both have the same U-Net, batches and noise; loss and gradients are compared before anything is timed. The U-Net has
SDXL's proportions at about a third of its width, the text encoders somewhat more of theirs.

Phrases come in two streams: all of them distinct, and drawn from a vocabulary by Zipf's law, as those of photographs
are about. Of the second, the phrases of some batches are encoded before the timing starts: a run is in that state after
its first minutes.

python benchmarks/train.py
python benchmarks/train.py --latents 48 --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from models import SMALL_TEXT, SMALL_UNET, SMALL_VAE, parts, peak_memory
from torch import Tensor

from gligen_xl import AdapterConfig, StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import adapter_parameters, attach
from gligen_xl.data.dataset import Augmentation, Batch, ShardDataset
from gligen_xl.data.loader import batches
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Row
from gligen_xl.toyworld.model import new_tokenizer
from gligen_xl.toyworld.world import vocabulary
from gligen_xl.train.conditioning import Conditioner
from gligen_xl.train.ema import EMA
from gligen_xl.train.objective import denoising_loss
from gligen_xl.train.optimizer import AdapterOptimizer
from gligen_xl.train.options import Optimization

BATCH, OBJECTS, SLOTS = 4, 8, 30
VOCABULARY = 20_000  # phrases, of which the k-th comes in proportion to 1 / k
PARTS = ("data", "captions", "phrases", "forward", "backward", "optimizer", "average")
TARGETS = {"phrases": 10.0, "distinct": 1.08, "zipf": 1.10}


# Data ---------------------------------------------------------------------------------------------------------------


def words() -> list[str]:
    """Those that the tokenizer holds as one token, as CLIP's holds most words."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = new_tokenizer(Path(folder))
    return [word for word in vocabulary() if len(tokenizer(word).input_ids) == 3]


def phrase(number: int, words: list[str]) -> str:
    """One of many distinct phrases: of three words, of four every fourth time, of eight every fiftieth."""
    size = len(words)
    own = [words[number % size], words[number // size % size], words[number // size**2 % size]]
    further = 5 if number % 50 == 0 else int(number % 4 == 0)
    return " ".join([*own, *words[:further]])


def write_data(folder: Path, stream: str, images: int, side: int) -> None:
    rng = np.random.default_rng(0)
    if stream == "zipf":
        chances = 1 / np.arange(1, VOCABULARY + 1)
        numbers = rng.choice(VOCABULARY, (images, OBJECTS), p=chances / chances.sum())
    else:
        numbers = np.arange(images * OBJECTS).reshape(images, OBJECTS)
    latents = rng.standard_normal((images, 4, side, side), np.float32).astype(np.float16)
    corners, known = rng.uniform(0, 0.5, (images, OBJECTS, 2)), words()
    rows = [
        Row(
            image_id=str(k),
            caption=" ".join(rng.choice(known, 50)),
            boxes=[(x, y, x + 0.3, y + 0.3) for x, y in corners[k].tolist()],
            scores=[0.5] * OBJECTS,
            phrases=[phrase(number, known) for number in numbers[k].tolist()],
            original_height=8 * side,
            original_width=8 * side,
        )
        for k in range(images)
    ]
    metadata = {"resolution": str(8 * side), "vae": "random", "scaling_factor": str(SMALL_VAE["scaling_factor"])}
    write_shard(folder / "a", latents, rows, metadata)


def read_data(folder: Path) -> Iterator[Batch]:
    """Every image has its boxes, half of them their caption."""
    dataset = ShardDataset(folder, Augmentation(drop_grounding=0, drop_caption=0.5, slots=SLOTS), seed=0)
    return iter(batches(dataset, dataset.order(BATCH, 0), start=0, stop=len(dataset)))


# Two ways to train --------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by part."""

    now = staticmethod(time.perf_counter)

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds[name] = self.now() - began


def new_pipeline(side: int) -> StableDiffusionXLGLIGENPipeline:
    made = parts(SMALL_UNET | {"sample_size": side}, SMALL_VAE, SMALL_TEXT, torch.float32, max_tokens=77)
    pipeline = StableDiffusionXLGLIGENPipeline(**made, add_watermarker=False)
    width = SMALL_UNET["cross_attention_dim"]
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    torch.manual_seed(0)
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=width, phrase_dim=width, slots=SLOTS))
    for name, value in adapter_parameters(pipeline.unet).items():
        if ".alpha_" in name:
            value.data.fill_(0.1)  # open: every weight has a gradient
    pipeline.unet.train()
    return pipeline


class Way(ABC):
    """A way to train the adapter of a pipeline. Learning rates are 0: all is computed, and nothing changes."""

    def __init__(self, pipeline: StableDiffusionXLGLIGENPipeline):
        self.pipeline: Any = pipeline
        self.parameters = adapter_parameters(pipeline.unet)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def loss(self, batch: Batch, clock: Clock) -> Tensor:
        with torch.no_grad():
            with clock.part("captions"):
                hidden, pooled = self.captions(batch)
            with clock.part("phrases"):
                phrases = self.phrases(batch)
        conditioning = {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch.size},
            "cross_attention_kwargs": {
                "gligen": {"boxes": batch.boxes, "masks": batch.mask, "positive_embeddings": phrases}
            },
        }
        with clock.part("forward"):
            return denoising_loss(self.pipeline.unet, self.scheduler, batch, conditioning).mean()

    def step(self, batch: Batch, clock: Clock) -> float:
        loss = self.loss(batch, clock)
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            self.optimize()
        with clock.part("average"):
            self.average()
        return loss.item()

    @abstractmethod
    def captions(self, batch: Batch) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def phrases(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def optimize(self) -> None: ...

    @abstractmethod
    def average(self) -> None: ...


class Plain(Way):
    def __init__(self, pipeline: StableDiffusionXLGLIGENPipeline):
        super().__init__(pipeline)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=0.0)
        self.ema = EMAModel(self.parameters.values(), decay=0.9999)

    def captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], []
        for caption in batch.captions:
            of_caption, _, its_pooled, _ = self.pipeline.encode_prompt(caption or "", do_classifier_free_guidance=False)
            keep = float(caption is not None)  # of a dropped one zeros, as SDXL's guidance has it
            hidden.append(of_caption * keep)
            pooled.append(its_pooled * keep)
        return torch.cat(hidden), torch.cat(pooled)

    def phrases(self, batch: Batch) -> Tensor:
        padded = torch.zeros(*batch.mask.shape, SMALL_UNET["cross_attention_dim"])
        for k, phrases in enumerate(batch.phrases):
            rows = []
            for tokenizer, encoder in (
                (self.pipeline.tokenizer, self.pipeline.text_encoder),
                (self.pipeline.tokenizer_2, self.pipeline.text_encoder_2),
            ):
                tokens = tokenizer(phrases, padding="max_length", truncation=True, return_tensors="pt")
                output = encoder(tokens.input_ids)
                rows.append(output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
            padded[k, : len(phrases)] = torch.cat(rows, dim=-1)
        return padded

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def average(self) -> None:
        self.ema.step(self.parameters.values())


class Ours(Way):
    def __init__(self, pipeline: StableDiffusionXLGLIGENPipeline):
        super().__init__(pipeline)
        self.conditioner = Conditioner(pipeline)
        self.optimizer = AdapterOptimizer(self.parameters, Optimization())
        self.optimizer.set_rate(0.0)
        self.ema = EMA(self.parameters, 0.9999)

    def captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.conditioner.captions(batch.captions)

    def phrases(self, batch: Batch) -> Tensor:
        return self.conditioner.phrases(batch)

    def optimize(self) -> None:
        self.optimizer.step()

    def average(self) -> None:
        self.ema.update()


WAYS = {"plain": Plain, "ours": Ours}


# Measuring ----------------------------------------------------------------------------------------------------------


def check_equal(ways: dict[str, Way], batch: Batch) -> None:
    """Loss and gradients of a step, both ways."""
    results = {}
    for name, way in ways.items():
        loss = way.loss(batch, Clock())
        gradients = torch.autograd.grad(loss, list(way.parameters.values()))
        results[name] = loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])
    (plain, expected), (ours, got) = results["plain"], results["ours"]
    error = (got - expected).norm() / expected.norm()
    print(f"loss {ours:.7f}, plain {plain:.7f}; relative difference of the gradient {error:.1e}")
    assert abs(ours / plain - 1) < 1e-5
    assert error < 1e-4


def measure(stream: str, side: int, steps: int, warm: int) -> dict[str, list[dict[str, float]]]:
    """Of each way, the seconds of each step by part."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), stream, BATCH * (1 + warm + steps), side)
        loader, pipeline = read_data(Path(folder)), new_pipeline(side)
        ways = {name: way(pipeline) for name, way in WAYS.items()}
        batch = next(loader)
        check_equal(ways, batch)
        for way in ways.values():  # moments, averages and memory are there from here on
            way.step(batch, Clock())
        seen = set()
        for _, batch in zip(range(warm), loader, strict=False):
            ours = ways["ours"]
            ours.phrases(batch)
            seen.update(name for names in batch.phrases for name in names)
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        kept = 0
        for number in range(steps):
            clock = Clock()
            with clock.part("data"):
                batch = next(loader)
            names = [name for names in batch.phrases for name in names]
            kept += sum(name in seen for name in names)
            seen.update(names)
            losses = {}
            for name in sorted(ways, reverse=number % 2 == 1):  # turn by turn
                clock_of = Clock()
                clock_of.seconds |= clock.seconds
                losses[name] = ways[name].step(batch, clock_of)
                taken[name].append(clock_of.seconds)
            assert abs(losses["ours"] / losses["plain"] - 1) < 1e-5
        if warm:
            print(f"{100 * kept / (steps * BATCH * OBJECTS):.0f} % of the phrases were kept from before")
    return taken


def report(stream: str, taken: dict[str, list[dict[str, float]]]) -> None:
    print(f"  {'milliseconds':<14}{'plain':>9}{'ours':>9}   plain / ours, median of the steps")
    for name in (*PARTS, "whole"):
        plain, ours = ([sum(step.values()) if name == "whole" else step[name] for step in taken[way]] for way in WAYS)
        ratio = statistics.median(a / b for a, b in zip(plain, ours, strict=True))
        target = TARGETS.get(stream if name == "whole" else name)
        times = "".join(f"{1000 * statistics.median(of_way):9.1f}" for of_way in (plain, ours))
        print(f"  {name:<14}{times}   {ratio:.2f}{f', wanted {target:.2f}' if target else ''}")


def memory(way: str, side: int) -> float:
    """GiB at most in a process that trains one way for three steps."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), "distinct", 3 * BATCH, side)
        trained = WAYS[way](new_pipeline(side))
        for batch in read_data(Path(folder)):
            trained.step(batch, Clock())
    return peak_memory()


def count(modules: Any) -> float:
    return sum(value.numel() for module in modules for value in module.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="that are timed, of each way and stream")
    parser.add_argument("--latents", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--warm", type=int, default=500, help="batches of the second stream before the timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu", action="store_true", help="count this process's own time, where others share the machine"
    )
    parser.add_argument("--memory", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    if options.cpu:
        Clock.now = staticmethod(time.process_time)
    if options.memory:
        print(json.dumps(memory(options.memory, options.latents)))
        return
    pipeline = new_pipeline(options.latents)
    adapter = sum(value.numel() for value in adapter_parameters(pipeline.unet).values()) / 1e6
    texts = count([pipeline.text_encoder, pipeline.text_encoder_2])
    print(
        f"U-Net {count([pipeline.unet]):.0f} M, {adapter:.0f} M of them the adapter; text encoders {texts:.0f} M; "
        f"batches of {BATCH} at {options.latents} x {options.latents}, {OBJECTS} phrases an image; "
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    del pipeline
    for stream, warm in (("distinct", 0), ("zipf", options.warm)):
        print(f"\nphrases: {stream}")
        report(stream, measure(stream, options.latents, options.steps, warm))
    peaks = {}
    for way in WAYS:
        words = ["--memory", way, "--latents", str(options.latents), "--threads", str(options.threads)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        peaks[way] = json.loads(done.stdout.splitlines()[-1])
    ratio = peaks["ours"] / peaks["plain"]
    print(f"\npeak memory: plain {peaks['plain']:.2f} GiB, ours {peaks['ours']:.2f} GiB, {ratio:.2f} times")
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
