"""Make the embedded model from nothing: VAE, shards of latents, text encoders with the U-Net, the U-Net alone.

    gligen-xl shapes build --out runs/shapes
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 --no-python gligen-xl shapes build     # faster: docs/LOG.md

Each stage resumes from its last checkpoint: images, captions and noise follow from the seed, the number of samples
seen and, where there are several processes, their number. The adapter comes afterwards, from the ordinary trainer, and
both then go into one folder, that of the shipped weights:

    gligen-xl train shapes --model runs/shapes/model
    gligen-xl shapes pack --out src/gligen_xl/toyworld/weights
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..adapter import GligenAdapter
from ..data.dataset import Augmentation, Batch, ShardDataset
from ..data.loader import batches
from ..data.shards import find_shards
from ..io import read_json, whole_folder, write_json
from ..pipelines import StableDiffusionXLGLIGENPipeline
from ..pipelines.folder import ADAPTER_SUBFOLDER
from ..text_embeddings import embed_phrases
from ..train.objective import denoising_loss
from .data import images, write_shards
from .model import TEXT_WIDTH, new_scheduler, new_text_encoders, new_tokenizer, new_unet, new_vae
from .stage import StageConfig, run_stage
from .text import Attributes, TextTower, attributes
from .world import COLOURS, SHAPES, TRAINING_SEED, generator

VAE = StageConfig(samples=24_000, batch_size=8, learning_rate=2e-3)
DECODER = StageConfig(samples=24_000, batch_size=8, learning_rate=1e-3)
DECODER_NOISE = 0.1  # standard deviation, where latents have 1.4
TEXT = StageConfig(samples=150_000, batch_size=128, learning_rate=2e-3, checkpoint_every=500)
BASE = StageConfig(samples=288_000, batch_size=64, learning_rate=1e-3, ema_decay=0.999, checkpoint_every=250)
UNET = StageConfig(samples=224_000, batch_size=64, learning_rate=7e-4, ema_decay=0.999, checkpoint_every=250)


def train_vae(out: Path, seed: int = 1, config: StageConfig = VAE) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae: Any = new_vae()
    vae.to(memory_format=torch.channels_last)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        x = images(seed, first, count).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        # Squared error, not absolute: the median of an image is its background, and objects are the minority.
        error = F.mse_loss(decoded, x)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + 1e-4 * divergence, "mse": error, "kl": divergence}

    run_stage(out / "vae", vae, config, loss, seed)
    return vae


def train_decoder(out: Path, vae: Any, seed: int = 1, config: StageConfig = DECODER) -> None:
    """Train the decoder alone, on latents with a little noise, as a U-Net leaves some, so that edges survive it.

    The encoder stays, so latents of images stay what they are.
    """
    vae.requires_grad_(False)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        x = images(seed, VAE.samples + first, count).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
        latents = latents + DECODER_NOISE * torch.randn_like(latents)
        return {"loss": F.mse_loss(vae.decode(latents).sample, x)}

    run_stage(out / "decoder", decoder, config, loss, seed)
    vae.requires_grad_(True)


class Base(nn.Module):
    """The modules of the base stage: U-Net, text encoders and two teachers that are thrown away."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = new_unet()
        self.encoders = nn.ModuleList(list(new_text_encoders(tokenizer)))
        self.teachers = nn.ModuleList([Attributes(TEXT_WIDTH), Attributes(TEXT_WIDTH)])


def text_loss(base: Base, captions: list[str | None], pooled: Tensor, first: Tensor) -> Tensor:
    """Return the loss of reading the attributes of captions off both pooled embeddings, (B, 64) each."""
    said = [k for k, caption in enumerate(captions) if caption]
    background, shape, place_ = zip(*(attributes(captions[k] or "") for k in said), strict=True)
    targets = {"background": torch.tensor(background), "shape": torch.tensor(shape), "place": torch.tensor(place_)}
    of_first, of_second = base.teachers[0], base.teachers[1]
    return of_first(first[said], targets) + of_second(pooled[said], targets)


def train_text(out: Path, base: Base, text: TextTower, shards: Path, seed: int = 2, config: StageConfig = TEXT) -> None:
    """Train the text encoders alone, on captions and phrases, until attributes can be read off them."""
    rows = [row for shard in find_shards(shards) for row in shard.rows("caption", "phrases")]
    base.unet.requires_grad_(False)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        chosen = generator("text", seed, first).integers(len(rows), size=count)
        captions = [rows[n]["phrases"][0] if k % 8 == 7 else rows[n]["caption"] for k, n in enumerate(chosen)]
        _, pooled, first_pooled = text(captions)
        return {"loss": text_loss(base, captions, pooled, first_pooled)}

    run_stage(out / "text", base, config, loss, seed)
    base.unet.requires_grad_(True)


def train_base(out: Path, base: Base, text: TextTower, shards: Path, seed: int = 3, config: StageConfig = BASE) -> None:
    """Train U-Net and text encoders together, on the scheduler's own target and with a little of the text loss."""
    denoising = _Denoising(shards, config, seed)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        batch = denoising.batch(first)
        hidden, pooled, first_pooled = text(batch.captions)
        error = denoising.loss(base.unet, batch, hidden, pooled)
        lesson = text_loss(base, batch.captions, pooled, first_pooled)
        return {"loss": error + 0.02 * lesson, "denoising": error, "text": lesson}

    run_stage(out / "base", base, config, loss, seed)


def train_unet(out: Path, base: Base, text: TextTower, shards: Path, seed: int = 4, config: StageConfig = UNET) -> None:
    """Train the U-Net alone, with the text encoders as they now are."""
    base.requires_grad_(False).unet.requires_grad_(True)
    denoising = _Denoising(shards, config, seed)

    def loss(first: int, count: int) -> dict[str, Tensor]:
        batch = denoising.batch(first)
        hidden, pooled, _ = text(batch.captions)
        return {"loss": denoising.loss(base.unet, batch, hidden, pooled)}

    run_stage(out / "unet", base.unet, config, loss, seed)


class _Denoising:
    """Loads this process's batches of a stage in order, from the first that is requested, and computes their loss."""

    def __init__(self, shards: Path, config: StageConfig, seed: int):
        self._dataset = ShardDataset(shards, Augmentation(drop_caption=0.0), seed)
        self._order = self._dataset.order(config.batch_size, seed)
        self._stop = config.samples
        self._scheduler: Any = DDPMScheduler.from_config(new_scheduler().config)
        self._iterator: Iterator[Batch] | None = None

    def batch(self, samples_seen: int) -> Batch:
        if self._iterator is None:
            process = PartialState(cpu=True)
            share: dict[str, Any] = {"rank": process.process_index, "ranks": process.num_processes}
            start = samples_seen // self._order.batch_size * self._order.batch_size
            self._iterator = iter(batches(self._dataset, self._order, start=start, stop=self._stop, **share))
        return next(self._iterator)

    def loss(self, unet: UNet2DConditionModel, batch: Batch, hidden: Tensor, pooled: Tensor) -> Tensor:
        sizes = {"text_embeds": pooled, "time_ids": batch.size}
        conditioning = {"encoder_hidden_states": hidden, "added_cond_kwargs": sizes}
        return denoising_loss(unet, self._scheduler, batch, conditioning).mean()


def build(out: Path, *, shard_images: int = 60_000) -> Path:
    """Run every stage in turn, except those that are done; return the model's folder.

    Args:
        shard_images: drawn and encoded once, for text encoders and U-Net.
    """
    process = PartialState(cpu=True)
    vae: Any = train_vae(out)
    train_decoder(out, vae)
    shards = out / "shards"
    latents = vae.encode(images(9, 0, 200).contiguous(memory_format=torch.channels_last)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    with process.main_process_first():  # the others find them there
        write_shards(vae, shards, shard_images, seed=TRAINING_SEED, captions="places")
        tokenizer = new_tokenizer(out / "tokenizer")
    torch.manual_seed(2)
    base = Base(tokenizer)
    text = TextTower([tokenizer, tokenizer], base.encoders)
    train_text(out, base, text, shards)
    train_base(out, base, text, shards)
    tame_pooled(base, tokenizer)
    train_unet(out, base, text, shards)
    if process.is_main_process:
        assemble(out / "model", vae, base, tokenizer)
    process.wait_for_everyone()
    return out / "model"


@torch.no_grad()
def tame_pooled(base: Base, tokenizer: CLIPTokenizer) -> None:
    """Scale both pooled embeddings to unit variance, as CLIP's are, without changing what the base computes.

    The position net joins them to Fourier features of the box, which stay within -1..1: four times larger, they
    would drown the box. What reads them in the base (the U-Net's size embedding, for the second) is scaled back.
    """
    first, second = cast(CLIPTextModel, base.encoders[0]), cast(CLIPTextModelWithProjection, base.encoders[1])
    phrases = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    halves = embed_phrases(phrases, [tokenizer, tokenizer], [first, second]).split(TEXT_WIDTH, dim=-1)
    for parameter in first.get_submodule("final_layer_norm").parameters():
        parameter.div_(halves[0].std())
    second.text_projection.weight.div_(halves[1].std())
    cast(nn.Linear, base.unet.get_submodule("add_embedding.linear_1")).weight[:, :TEXT_WIDTH].mul_(halves[1].std())


def assemble(folder: Path, vae: Any, base: Base, tokenizer: CLIPTokenizer) -> None:
    """Write the parts as an ordinary SDXL pipeline folder, in float16."""
    parts: dict[str, Any] = {
        "vae": vae.to(memory_format=torch.contiguous_format),
        "text_encoder": base.encoders[0],
        "text_encoder_2": base.encoders[1],
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": base.unet,
        "scheduler": new_scheduler(),
        "add_watermarker": False,
    }
    pipeline = StableDiffusionXLPipeline(**parts)
    with whole_folder(folder) as partial:
        pipeline.to(torch.float16).save_pretrained(partial)


def pack(base: str | Path, adapter: str | Path, out: Path) -> Path:
    """Write a base and its adapter as one pipeline folder, in float16: the form of the shipped weights."""
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained(base, dtype=torch.float16)
    pipeline.load_gligen_adapter(adapter)
    about = {**GligenAdapter.of(pipeline.unet).about, "base_model": "shapes"}
    with whole_folder(out) as partial:
        pipeline.save_pretrained(partial)
        GligenAdapter.of(pipeline.unet).save(partial / ADAPTER_SUBFOLDER, dtype=torch.float16, metadata=about)
        for file in partial.rglob("*.json"):  # where the base came from is a path of this machine
            if "_name_or_path" in (settings := read_json(file)):
                write_json(file, {name: value for name, value in settings.items() if name != "_name_or_path"})
    return out
