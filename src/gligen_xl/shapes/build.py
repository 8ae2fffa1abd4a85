"""Make the embedded model from nothing: VAE, then shards of latents, then text encoders and U-Net.

    gligen-xl shapes build --out runs/shapes

Each stage resumes from its last checkpoint; every picture, caption and noise follows from the seed and the number of
samples seen. The adapter comes afterwards, from the ordinary trainer (`gligen-xl train shapes`).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from ..data.batch import Augmentation, Batch, ShardDataset, batches
from ..data.order import SampleOrder
from ..data.shards import Row, find_shards, write_shard
from ..files import whole_folder
from ..train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from ..train.ema import EMA
from .model import (
    LATENT_SIZE,
    TEXT_WIDTH,
    new_scheduler,
    new_text_encoders,
    new_tokenizer,
    new_unet,
    new_vae,
)
from .world import (
    BACKGROUNDS,
    COLOURS,
    PICTURE_SIZE,
    PLACES,
    SHAPES,
    draw,
    generator,
    sample_scene,
    scene_layout,
)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How one part of the model is trained: cosine decay over `samples`, after a short warm-up."""

    samples: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.998
    warmup_steps: int = 100
    checkpoint_every: int = 200  # steps
    log_every: int = 50  # steps


def run_stage(
    folder: Path, modules: nn.Module, config: StageConfig, loss: Callable[[int, int], dict[str, Tensor]], seed: int
) -> None:
    """Train `modules` and leave them holding their averages. Resumes from `folder`; done stages load and return.

    Args:
        loss: (first, count) -> named losses of the samples first .. first + count; "loss" is what falls.
    """
    trained = {name: value for name, value in modules.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMA(trained, config.ema_decay)
    position = 0
    if checkpoints := list_checkpoints(folder):
        tensors, state = load_checkpoint(checkpoints[-1])
        modules.load_state_dict(tensors["model"])
        ema.load(tensors["ema"], state["ema_steps"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        position = state["position"]
    total_steps = config.samples // config.batch_size
    sums: dict[str, float] = {}
    seconds, clock = 0.0, time.perf_counter()
    while (step := position // config.batch_size) < total_steps:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        rate = config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((seed << 32) + position)
        losses = loss(position, config.batch_size)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ema.update()
        position += config.batch_size
        step += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % config.log_every == 0:
            seconds = time.perf_counter() - clock
            row = {name: round(value / config.log_every, 5) for name, value in sums.items()}
            row |= {"samples": position, "samples_per_s": round(config.log_every * config.batch_size / seconds, 1)}
            with (folder / "log.jsonl").open("a") if folder.exists() else _created(folder / "log.jsonl") as log:
                log.write(json.dumps(row) + "\n")
            print(folder.name, row, flush=True)
            sums, clock = {}, time.perf_counter()
        if step % config.checkpoint_every == 0 or step == total_steps:
            tensors = {"model": modules.state_dict(), "ema": ema.average, "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(folder, position, tensors, {"ema_steps": ema.steps, "seed": seed}, keep=1)
    ema.copy_to_parameters()


def _created(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def pictures(seed: int, first: int, count: int) -> Tensor:
    """Drawn scenes (count, 3, 64, 64), -1..1."""
    drawn = np.stack([np.asarray(draw(sample_scene(seed, index))) for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


VAE = StageConfig(samples=24_000, batch_size=8, learning_rate=2e-3)


def train_vae(out: Path, seed: int = 1, config: StageConfig = VAE):
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        x = pictures(seed, first, count).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # Squared error, not absolute: the median of a picture is its background, and objects are the minority.
        error = F.mse_loss(decoded, x)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + 1e-4 * divergence, "mse": error, "kl": divergence}

    run_stage(out / "vae", vae, config, loss, seed)
    return vae


# Shards -------------------------------------------------------------------------------------------------------------

SHARD_PICTURES = 10_000


@torch.no_grad()
def write_shards(vae: AutoencoderKL, out: Path, count: int, *, seed: int, places: float = 0.5) -> None:
    """Draw and encode `count` scenes of `seed` into shards under `out`; whole shards that stand there are kept.

    Args:
        places: share of the captions that say where things are.
    """
    vae = vae.eval()
    for first in range(0, count, SHARD_PICTURES):
        size = min(SHARD_PICTURES, count - first)
        stem = out / f"shapes-{seed}-{first:07d}-{size}"
        if stem.with_name(stem.name + ".parquet").exists():
            continue
        latents = []
        for start in tqdm(range(first, first + size, 100), desc=stem.name, unit_scale=100, unit="pictures"):
            x = pictures(seed, start, min(100, first + size - start)).contiguous(memory_format=torch.channels_last)
            latents.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().numpy())
        rows = [_row(seed, index, places) for index in range(first, first + size)]
        metadata = {
            "resolution": str(PICTURE_SIZE),
            "downsampling": str(PICTURE_SIZE // LATENT_SIZE),
            "vae": "shapes",
            "scaling_factor": str(vae.config.scaling_factor),
        }
        write_shard(stem, np.ascontiguousarray(np.concatenate(latents)), rows, metadata)


def _row(seed: int, index: int, places: float) -> Row:
    scene = sample_scene(seed, index)
    said = generator("places", seed, index).random() < places
    layout = scene_layout(scene, seed=seed, index=index, places=bool(said))
    return Row(
        image_id=f"shapes-{seed}-{index}",
        caption=layout.prompt,
        boxes=list(layout.boxes),
        scores=[1.0] * len(layout.boxes),
        phrases=list(layout.phrases),
        original_height=PICTURE_SIZE,
        original_width=PICTURE_SIZE,
    )


# Text encoders and U-Net --------------------------------------------------------------------------------------------


class Attributes(nn.Module):
    """Reads a scene off a caption's pooled embedding: background, and each colour's shape and place (if said).

    Only a teacher: it makes the text encoders tell words and their order apart, and is thrown away.
    """

    def __init__(self, width: int):
        super().__init__()
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.shape = nn.Linear(width, len(COLOURS) * (len(SHAPES) + 1))
        self.place = nn.Linear(width, len(COLOURS) * 10)

    def loss(self, pooled: Tensor, targets: dict[str, Tensor]) -> Tensor:
        shape = self.shape(pooled).unflatten(-1, (len(COLOURS), -1)).transpose(1, 2)
        place = self.place(pooled).unflatten(-1, (len(COLOURS), -1)).transpose(1, 2)
        return (
            F.cross_entropy(self.background(pooled), targets["background"], ignore_index=-1)
            + F.cross_entropy(shape, targets["shape"])
            + F.cross_entropy(place, targets["place"])
        )


def attributes(caption: str) -> tuple[int, list[int], list[int]]:
    """What a caption or a phrase says: background (-1: nothing), and by colour its shape and its place (0: nothing)."""
    background = next((k for k, name in enumerate(BACKGROUNDS) if name in caption.split()), -1)
    shape, place_ = [0] * len(COLOURS), [0] * len(COLOURS)
    for colour, form, rest in re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})((?: (?!and|,)\w+)*)", caption):
        k = list(COLOURS).index(colour)
        shape[k] = 1 + SHAPES.index(form)
        said = [1 + n for n, words in enumerate(PLACES.values()) if re.match(rf" {words}(?! (?:left|right))", rest)]
        place_[k] = said[0] if said else 0
    return background, shape, place_


@dataclass
class TextTower:
    """Both tokenizers and text encoders, used as SDXL uses them."""

    tokenizers: list[CLIPTokenizer]
    encoders: nn.ModuleList

    def __call__(self, captions: list[str | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Captions (None: dropped) -> hidden states (B, T, 128), pooled (B, 64), and the first encoder's pooled."""
        texts = [caption or "" for caption in captions]
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0] if output[0].ndim == 2 else output.pooler_output)
        keep = torch.tensor([caption is not None for caption in captions], dtype=torch.float32)
        return torch.cat(hidden, -1) * keep[:, None, None], pooled[1] * keep[:, None], pooled[0] * keep[:, None]


BASE = StageConfig(samples=400_000, batch_size=64, learning_rate=1e-3, ema_decay=0.999, checkpoint_every=250)
TEXT = StageConfig(samples=150_000, batch_size=128, learning_rate=2e-3, checkpoint_every=500)


class Base(nn.Module):
    """What the base stage trains: U-Net, text encoders and their two throw-away teachers."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = new_unet()
        self.encoders = nn.ModuleList(new_text_encoders(tokenizer))
        self.teachers = nn.ModuleList([Attributes(TEXT_WIDTH), Attributes(TEXT_WIDTH)])


def text_loss(base: Base, text: TextTower, captions: list[str]) -> Tensor:
    """How badly the attributes of `captions` can be read off both pooled embeddings."""
    background, shape, place_ = zip(*(attributes(caption) for caption in captions), strict=True)
    targets = {"background": torch.tensor(background), "shape": torch.tensor(shape), "place": torch.tensor(place_)}
    _, pooled, first = text(list(captions))
    return base.teachers[0].loss(first, targets) + base.teachers[1].loss(pooled, targets)


def train_text(out: Path, base: Base, text: TextTower, shards: Path, seed: int = 2, config: StageConfig = TEXT) -> None:
    """The text encoders alone, on captions and phrases, until attributes can be read off them."""
    rows = [row for shard in find_shards(shards) for row in shard.rows("caption", "phrases")]
    base.unet.requires_grad_(False)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        chosen = generator("text", seed, first).integers(len(rows), size=count)
        captions = [rows[n]["phrases"][0] if k % 8 == 7 else rows[n]["caption"] for k, n in enumerate(chosen)]
        return {"loss": text_loss(base, text, captions)}

    run_stage(out / "text", base, config, loss, seed)
    base.unet.requires_grad_(True)


def train_base(out: Path, base: Base, text: TextTower, shards: Path, seed: int = 3, config: StageConfig = BASE) -> None:
    """U-Net and text encoders together: the scheduler's own target, and a little of the text lesson to hold the rest."""
    dataset = ShardDataset(shards, Augmentation(drop_caption=0.0), seed)
    order = SampleOrder(dataset.groups, config.batch_size, seed)
    scheduler = DDPMScheduler.from_config(new_scheduler().config)
    loader = _Endless(dataset, order, config.samples)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        batch = loader.batch(first)
        timesteps = (batch.time * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(batch.latents, batch.noise, timesteps)
        target = scheduler.get_velocity(batch.latents, batch.noise, timesteps)
        hidden, pooled, _ = text(batch.captions)
        predicted = base.unet(
            noisy,
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.size},
        ).sample
        denoising = F.mse_loss(predicted, target)
        lesson = text_loss(base, text, [caption for caption in batch.captions if caption])
        return {"loss": denoising + 0.02 * lesson, "denoising": denoising, "text": lesson}

    run_stage(out / "base", base, config, loss, seed)


class _Endless:
    """The loader's batches one after another; the first one asked for decides where it starts."""

    def __init__(self, dataset: ShardDataset, order: SampleOrder, stop: int):
        self._arguments = dataset, order, stop
        self._iterator: Iterator[Batch] | None = None

    def batch(self, position: int) -> Batch:
        if self._iterator is None:
            dataset, order, stop = self._arguments
            self._iterator = iter(batches(dataset, order, start=position, stop=stop))
        return next(self._iterator)


def build(out: Path, *, shard_pictures: int = 60_000) -> None:
    """Every stage, one after another; those that are done are passed over."""
    vae = train_vae(out)
    shards = out / "shards"
    latents = vae.encode(pictures(9, 0, 200).contiguous(memory_format=torch.channels_last)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    write_shards(vae, shards, shard_pictures, seed=4)
    tokenizer = new_tokenizer(out / "tokenizer")
    torch.manual_seed(2)
    base = Base(tokenizer)
    text = TextTower([tokenizer, tokenizer], base.encoders)
    train_text(out, base, text, shards)
    train_base(out, base, text, shards)
    assemble(out / "model", vae, base, tokenizer)


def assemble(folder: Path, vae: AutoencoderKL, base: Base, tokenizer: CLIPTokenizer) -> None:
    """The parts as an ordinary SDXL pipeline folder, in float16."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=base.encoders[0],
        text_encoder_2=base.encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=base.unet,
        scheduler=new_scheduler(),
        add_watermarker=False,
    )
    with whole_folder(folder) as partial:
        pipeline.to(torch.float16).save_pretrained(partial)
