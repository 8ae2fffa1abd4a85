"""Estimates what a run will take before it is launched: parameters, memory of each GPU, checkpoints, epochs.

    print(describe(estimate(config, processes=8)))

Nothing is loaded: the models stand on torch's "meta" device, and one forward and backward pass is counted there (see
`gligen_xl.train.footprint`). How near it comes to a measured run is in docs/train.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import AdapterConfig, adapter_parameters, attach, fusers
from ..adapter.unet import transformer_blocks
from ..text_embeddings import phrase_width
from ..worlds import drawn_count
from .attention import watch_attention
from .base import needs_vae
from .config import TrainConfig
from .footprint import GPUKernels, LiveBytes
from .known_bases import BaseParts, base_parts
from .precheck import check_before, local_shards, validation_in_words

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALL, BLOCK = 4096, 256  # of bitsandbytes: tensors that keep 32-bit moments, and numbers that share a scale


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a run.

    Args:
        parameters: by part.
        memory: bytes of each GPU, by part, at the peak of a step.
        main_memory: bytes of each process that are offloaded to it.
        checkpoint: bytes of one checkpoint, by part.
        kept: checkpoints on the disk at most, one of them being written.
        notes: where the figures come from, and what is not in them, for people.
    """

    config: TrainConfig
    processes: int
    micro_batch: int
    resolution: tuple[int, int]  # (height, width) of the largest images
    parameters: dict[str, int]
    memory: dict[str, int]
    main_memory: dict[str, int]
    checkpoint: dict[str, int]
    kept: int
    notes: list[str]


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """Estimate what the run of `config` takes on so many processes, each with a GPU of its own.

    Raises:
        ValueError: the batch cannot be shared by them, the base cannot be described, or the run would refuse its
            settings, data or adapter (see `gligen_xl.train.precheck`).
        FileNotFoundError: there is no such base, no data for the validation, or no adapter to begin from.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected at least 1")
    if config.batch_size % processes:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be shared by {processes} processes; "
            "set batch_size to a multiple of them"
        )
    micro_batch = min(config.micro_batch or config.batch_size, config.batch_size // processes)
    base = base_parts(config.model)
    notes = check_before(config, base)
    adapter = _put_adapter_on(base, config)
    shape, where_from = latent_shape(config, base)
    sizes = [value.numel() for value in adapter.values()]
    trained, moments = 4 * sum(sizes), moment_bytes(sizes, config.optimization.optimizer)
    kept_by = processes if config.shard_optimizer else 1  # moments and average
    precision = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[config.precision]
    memory = {
        f"base U-Net, {precision}": _bytes(v for k, v in base.unet.named_parameters() if k not in adapter),
        f"text encoders, {precision}": sum(_bytes(encoder.parameters()) for encoder in base.text_encoders),
        "adapter, float32": trained,
        "gradients, float32": trained,
    }
    kept = {
        f"optimizer, {config.optimization.optimizer}": moments // kept_by,
        "average (EMA), float32": trained // kept_by if config.optimization.ema_decay else 0,
    }
    main_memory = {}
    if config.offload_optimizer:
        main_memory = {"weights and gradients, float32": 2 * trained // kept_by, **kept}
    else:
        memory |= kept
    if needs_vae(config):
        memory["VAE, float32"] = 4 * _count([base.vae])
    gradients_stay = processes > 1 or micro_batch * processes < config.batch_size  # in DDP's buckets, or to be added to
    memory["activations, at their peak"] = step_bytes(base, config, shape, micro_batch, gradients_stay)
    fuser_count = _count(fusers(base.unet).values())
    return Estimate(
        config=config,
        processes=processes,
        micro_batch=micro_batch,
        resolution=(shape[1] * base.downsampling, shape[2] * base.downsampling),
        parameters={
            "base U-Net": _count([base.unet]) - sum(sizes),
            "text encoders": _count(base.text_encoders),
            "adapter": sum(sizes),
            f"  fusers, on {len(fusers(base.unet))} of {len(transformer_blocks(base.unet))} blocks": fuser_count,
            "  position net": sum(sizes) - fuser_count,
        },
        memory=memory,
        main_memory=main_memory,
        checkpoint={"average": trained, "weights": trained, "optimizer": moments},
        kept=checkpoints_kept(config) + 1,
        notes=[f"base: {base.source}", where_from, *notes, *validation_in_words(config)],
    )


# Parts of it --------------------------------------------------------------------------------------------------------


def _put_adapter_on(base: BaseParts, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Put the base in the precision of the run, attach an adapter, and return the adapter's parameters."""
    for part in (base.unet, *base.text_encoders):
        nn.Module.to(part.requires_grad_(False), DTYPES[config.precision])
    form = AdapterConfig(
        cross_attention_dim=base.unet.config["cross_attention_dim"],
        phrase_dim=phrase_width(base.text_encoders),
        slots=config.augmentation.slots,
        blocks=config.adapter.blocks,
        every=config.adapter.every,
        grounding_logit_bias=config.adapter.grounding_logit_bias,
    )
    attach(base.unet, form, dtype=torch.float32)
    base.unet.train()
    return adapter_parameters(base.unet)


def latent_shape(config: TrainConfig, base: BaseParts) -> tuple[tuple[int, int, int], str]:
    """(C, h, w) of the largest latents, and how that is known: from the data, from the recipe, or from the base."""
    found = [shard.latent_shape for source in config.sources for shard in local_shards(source)]
    if found:
        return max(found, key=lambda shape: shape[1] * shape[2]), "sizes: those of the data"
    channels = int(base.unet.config["in_channels"])
    if config.resolution is not None:
        pixels, where_from = config.resolution, "sizes: the recipe's resolution, as the data is not here"
        if pixels % base.downsampling:
            raise ValueError(f"resolution is {pixels}; this base's VAE wants a multiple of {base.downsampling}")
    else:
        pixels, where_from = (
            base.resolution,
            "sizes: those of the base, as the data is not here (resolution sets others)",
        )
    return (channels, pixels // base.downsampling, pixels // base.downsampling), where_from


def moment_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Return the bytes of AdamW's two moments of tensors of these sizes, in 32 bits or in 8 with scales."""
    if optimizer == "adamw":
        return sum(8 * size for size in sizes)
    return sum(8 * size if size < SMALL else 2 * (size + 4 * -(-size // BLOCK)) for size in sizes)


def step_bytes(
    base: BaseParts, config: TrainConfig, shape: tuple[int, int, int], micro_batch: int, gradients_stay: bool
) -> int:
    """Return the bytes of a forward and backward pass at its peak, without parameters and their gradients.

    Args:
        shape: (C, h, w) of the latents.
        gradients_stay: from step to step; otherwise they come as activations go, and take the same room.
    """
    dtype = DTYPES[config.precision]
    kernels = GPUKernels(dtype if config.precision != "no" else None)
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing(kernels.checkpoint)
    else:
        base.unet.disable_gradient_checkpointing()
    with torch.device("meta"):
        latents = torch.zeros(micro_batch, *shape, dtype=dtype)
        timesteps: Any = torch.zeros(micro_batch, dtype=torch.long)
        conditioning = _conditioning(base, config.augmentation.slots, micro_batch, dtype)
    grounding = conditioning["cross_attention_kwargs"]["gligen"]
    with LiveBytes(base.unet.parameters()) as live:
        watched = watch_attention(base.unet, grounding["boxes"], grounding["masks"], shape[1:])
        with watched if config.optimization.attention_weight else nullcontext() as seen:
            with kernels, torch.device("meta"):
                predicted = base.unet(latents, timesteps, **conditioning).sample
                loss = (predicted.float() - latents).square().sum()
                if seen:
                    loss = loss + seen.mean().sum()
                del predicted
            kernels.leave_autocast()
            loss.backward()
    if gradients_stay:
        return live.peak
    gradients = sum(4 * value.numel() for value in adapter_parameters(base.unet).values())
    return max(live.peak_with_gradients - gradients, 0)


def _conditioning(base: BaseParts, slots: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return conditioning of the U-Net as `gligen_xl.train.conditioning` makes it, without values."""
    settings = base.unet.config
    tokens = base.text_encoders[0].config.max_position_embeddings
    grounding = {
        "boxes": torch.zeros(batch, slots, 4),
        "masks": torch.zeros(batch, slots),
        "positive_embeddings": torch.zeros(batch, slots, phrase_width(base.text_encoders), dtype=dtype),
    }
    conditioning: dict[str, Any] = {
        "encoder_hidden_states": torch.zeros(batch, tokens, settings["cross_attention_dim"], dtype=dtype),
        "cross_attention_kwargs": {"gligen": grounding},
    }
    if settings["addition_embed_type"] == "text_time":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        sizes = torch.zeros(batch, 6, dtype=dtype)
        conditioning["added_cond_kwargs"] = {"text_embeds": torch.zeros(batch, pooled, dtype=dtype), "time_ids": sizes}
    return conditioning


def checkpoints_kept(config: TrainConfig) -> int:
    """Checkpoints that stand on the disk at the end of the run."""
    written = max(1, -(-config.samples // config.checkpoint_every))
    for_good = config.samples // config.keep_every if config.keep_every else 0
    return min(config.keep_checkpoints + for_good, written)


def _bytes(values: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(value.numel() for module in modules for value in module.parameters())


# As text ------------------------------------------------------------------------------------------------------------


def describe(made: Estimate) -> str:
    """Describe the estimate for the terminal."""
    config, (height, width) = made.config, made.resolution
    lines = [*made.notes, "", *_table("parameters", made.parameters, "{:,}")]
    each = f"each of {made.processes} GPUs" if made.processes > 1 else "the GPU"
    head = f"memory of {each} in GiB, {made.micro_batch} samples at a time of {width} x {height} pixels"
    total = {"together": sum(made.memory.values())}
    lines += ["", *_table(head, _scaled(made.memory | total, 2**30), "{:.2f}")]
    lines += ["and about 1 GiB for the device's own libraries; images of a validation are not in it"]
    if made.main_memory:
        total = {"together": sum(made.main_memory.values())}
        head = "main memory of each process in GiB, for what is offloaded"
        lines += ["", *_table(head, _scaled(made.main_memory | total, 2**30), "{:.2f}")]
    one = sum(made.checkpoint.values())
    lines += ["", *_table("a checkpoint in GB", _scaled(made.checkpoint | {"together": one}, 1e9), "{:.2f}")]
    lines += [f"on the disk at most {made.kept} of them, {made.kept * one / 1e9:.1f} GB, in {config.out}"]
    steps = config.samples // config.batch_size
    lines += ["", f"{steps:,} steps of {config.batch_size} samples, {steps * config.batch_size:,} in all"]
    lines += [f"  {line}" for line in _epochs(config)]
    return "\n".join(lines)


def _table(head: str, rows: dict[str, Any], form: str) -> list[str]:
    return [head, *(f"  {name:<34}{form.format(value):>16}" for name, value in rows.items())]


def _scaled(rows: dict[str, int], unit: float) -> dict[str, float]:
    return {name: value / unit for name, value in rows.items()}


def _epochs(config: TrainConfig) -> list[str]:
    """Describe how many epochs each set of data is used for."""
    lines, total = [], sum(config.sources.values())
    for source, weight in config.sources.items():
        drawn = drawn_count(source)
        count = sum(len(shard) for shard in local_shards(source)) if drawn is None else int(drawn)
        if count:
            epochs = config.samples * weight / total / count
            lines.append(f"{source}: {count:,} samples, gone through {epochs:,.1f} times")
        else:
            lines.append(f"{source} is not here, so its epochs are not known")
    return lines
