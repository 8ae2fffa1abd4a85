"""The training loop: a frozen base, a trainable adapter, and a position.

    train(TrainConfig(data="shards", out="runs/mine"))

The state of a run is one integer, the samples seen: order, noise, dropouts and learning rate follow from it and the
seed. Calling `train` again continues a run that stands in `out`, and ends with the same bits as if it had never
stopped.

    runs/mine/config.json            the resolved configuration and library versions
    runs/mine/metrics.jsonl          one line every `log_every` steps, one every validation
    runs/mine/checkpoint-00064000/   the average so far, which loads as an adapter; weights, optimizer, state
    runs/mine/validation/            pictures with grounding on and off, boxes drawn
    runs/mine/adapter/               the finished adapter: the average
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor

from ..adapter import (
    AdapterConfig,
    adapter_config,
    adapter_parameters,
    attach,
    detach,
    gate_values,
    is_attached,
    load_adapter_state_dict,
    save_adapter,
)
from ..adapter.store import CONFIG_NAME, describe_adapter, read_adapter
from ..data.batch import ShardDataset
from ..data.loader import batches
from ..phrases import phrase_width
from ..pipelines import StableDiffusionXLGLIGENPipeline
from ..versions import versions
from .attention import watch_attention
from .checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from .conditioning import Conditioner
from .config import TrainConfig, check_same_run
from .ema import EMA
from .log import RunLog
from .objective import denoising_loss
from .validate import Validator


def train(config: TrainConfig) -> Path:
    """Train an adapter, or continue the run that stands in `config.out`.

    Returns:
        The folder of the finished adapter; or of the last checkpoint, if the run was asked to stop (Ctrl-C, SIGTERM).

    Raises:
        ValueError: the run in `out` was begun with other settings, or data and base do not fit.
        FloatingPointError: the loss is no longer finite. The last checkpoint stands.
    """
    out = Path(config.out)
    checkpoints = list_checkpoints(out)
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {"position": 0, "ema_steps": 0}
    if checkpoints:
        tensors, state = load_checkpoint(checkpoints[-1])
        check_same_run(state["config"], config)

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on a CPU do not hear of each other
        mixed_precision=config.precision,
        log_with=_trackers(config) or None,
        project_dir=out,
    )
    pipeline = load_base(config, accelerator.device)
    unet, base = pipeline.unet, fingerprint(pipeline.unet)
    if checkpoints and state["base"] != base:
        raise ValueError(f"the run in {out} was begun on another base than what {config.model} is now")
    _fresh_adapter(pipeline, config, AdapterConfig.from_dict(state["adapter"]) if checkpoints else None)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    conditioner = Conditioner(pipeline)
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)

    with accelerator.main_process_first():  # what it draws, the others find
        data = [_data_folder(source, pipeline, out / "data") for source in config.sources]
        held_out = config.validation.data and _data_folder(
            config.validation.data, pipeline, out / "validation-data", held_out=True
        )
        cache_bytes = int(config.cache_gb * 1e9)
        dataset = ShardDataset(data, config.augmentation, config.seed, cache_bytes=cache_bytes)
    check_fit(dataset, pipeline)
    weights = list(config.sources.values())
    if checkpoints and state["groups"] != dataset.groups:
        raise ValueError(
            f"the run in {out} was begun on {sum(state['groups'])} samples, {config.data} now holds {len(dataset)}; "
            f"give back the former data, or begin another run with init_adapter {checkpoints[-1]}"
        )
    if state.get("weights", weights) != weights:
        raise ValueError(f"the run in {out} was begun with data of the weights {state['weights']}, not {weights}")
    windows = state.get("windows") or dataset.windows(config.window)
    order = dataset.order(config.batch_size, config.seed, weights=weights, windows=windows)
    stop = config.samples // config.batch_size * config.batch_size
    validator = None
    if held_out:
        validator = Validator(
            config.validation, held_out, pipeline, conditioner, scheduler,
            config.augmentation, config.batch_size, config.seed, cache_bytes,
        )  # fmt: skip
        check_fit(validator.dataset, pipeline)

    parameters = adapter_parameters(unet)
    optimizer = _optimizer(parameters, config)
    ema = EMA(parameters, config.optimization.ema_decay)
    position = state["position"]
    if checkpoints:
        load_adapter_state_dict(unet, tensors["weights"], source=str(checkpoints[-1]))
        ema.load(tensors["gligen_adapter"], state["ema_steps"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    loader = batches(
        dataset, order, start=position, stop=stop, workers=config.workers,
        rank=accelerator.process_index, ranks=accelerator.num_processes,
    )  # fmt: skip
    model, prepared = accelerator.prepare(unet, optimizer)

    def checkpoint() -> Path:
        groups = {"gligen_adapter": ema.average, "weights": parameters, "optimizer": optimizer_tensors(optimizer)}
        state = {
            "adapter": adapter_config(unet).to_dict(),
            "base": base,
            "ema_steps": ema.steps,
            "groups": dataset.groups,
            "weights": weights,
            "windows": windows,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "config": config.to_dict(),
            "versions": versions(),
        }
        documents = {CONFIG_NAME: describe_adapter(adapter_config(unet), about())}
        return save_checkpoint(out, position, groups, state, keep=config.keep_checkpoints, documents=documents)

    def about() -> dict[str, Any]:
        training = {"training": config.to_dict(), "versions": versions()}
        return {"base_model": config.model, "samples": position, **training}

    with _stop_request() as stop_request, RunLog(accelerator, config, position) as log:
        for batch in loader:
            factor = config.optimization.rate(position, stop)
            for group in prepared.param_groups:
                group["lr"] = group["base_lr"] * factor
            conditioning = conditioner(batch)
            weight = config.optimization.attention(position, stop)
            supervised = watch_attention(unet, batch.boxes, batch.mask, batch.latents.shape[-2:])
            with supervised if weight else nullcontext() as attention:
                with accelerator.autocast():
                    loss = denoising_loss(model, scheduler, batch, conditioning).mean()
                    guided = loss + weight * attention.mean() if attention else loss
                accelerator.backward(guided)  # watched still: gradient checkpointing runs the fusers again
            norm: Any = accelerator.clip_grad_norm_(parameters.values(), config.optimization.max_grad_norm)
            prepared.step()
            prepared.zero_grad()
            ema.update()
            position += config.batch_size

            if log.step(position, loss, norm, factor):
                gates = gate_values(unet)
                log.write(position, sum(gates.values()) / len(gates))
            if validator and (_crosses(position, config.validation.every, config.batch_size) or position == stop):
                if accelerator.is_main_process:
                    with ema.applied():
                        log.validation(position, *validator())
                accelerator.wait_for_everyone()
            stopped = _agreed(accelerator, stop_request.came)
            if _crosses(position, config.checkpoint_every, config.batch_size) or position == stop or stopped:
                log.check(position)
                saved = checkpoint() if accelerator.is_main_process else out
                accelerator.wait_for_everyone()
                if stopped and position < stop:
                    log.say(f"stopped at {position} of {stop} samples; the same command continues from {saved}")
                    return saved

    finished = out / "adapter"
    if accelerator.is_main_process:
        save_adapter(unet, finished, state=ema.average, metadata=about())
    return finished


# Base and adapter ---------------------------------------------------------------------------------------------------


def load_base(config: TrainConfig, device: torch.device) -> StableDiffusionXLGLIGENPipeline:
    """The frozen base, without the adapter it may have come with."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained(config.model, dtype=dtype)
    if is_attached(pipeline.unet):
        detach(pipeline.unet)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval().to(device)
    if dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # SDXL's overflows in half precision
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fingerprint(model: torch.nn.Module) -> str:
    """A short name for the weights of a model: of names, shapes and the first numbers of each tensor."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        first = value.flatten()[:8].float().tolist()
        digest.update(f"{name} {tuple(value.shape)} {first}".encode())
    return digest.hexdigest()[:12]


def check_fit(dataset: ShardDataset, pipeline: StableDiffusionXLGLIGENPipeline) -> None:
    """Whether latents are those of the base's VAE, as far as shape and scale tell."""
    channels, scale = pipeline.unet.config["in_channels"], pipeline.vae.config["scaling_factor"]
    for shard in dataset.shards:
        if shard.latent_shape[0] != channels:
            raise ValueError(f"{shard.stem} holds latents of {shard.latent_shape[0]} channels, the base has {channels}")
        if abs(float(shard.metadata.get("scaling_factor") or scale) / scale - 1) > 1e-3:
            raise ValueError(
                f"{shard.stem} holds latents scaled by {shard.metadata['scaling_factor']}, the base's VAE by {scale}: "
                "they come from another VAE; prepare the pictures again with that of the base"
            )


def _fresh_adapter(
    pipeline: StableDiffusionXLGLIGENPipeline, config: TrainConfig, form: AdapterConfig | None = None
) -> None:
    """Attach an adapter in float32: of `form`, whose weights a checkpoint has; the one to start from; or a new one,
    initialised from the seed."""
    torch.manual_seed(config.seed)
    weights = None
    phrase_dim = phrase_width([pipeline.text_encoder, pipeline.text_encoder_2])
    if form is not None:
        pass
    elif config.init_adapter:
        form, weights, _ = read_adapter(config.init_adapter)
        if form.phrase_dim != phrase_dim:
            raise ValueError(
                f"{config.init_adapter} reads phrase embeddings of width {form.phrase_dim}, the base's text encoders "
                f"give {phrase_dim}: it is for another base model"
            )
        for name in ("every", "grounding_logit_bias"):
            if (there := getattr(form, name)) != (here := getattr(config.adapter, name)):
                raise ValueError(
                    f"{config.init_adapter} has {name} {there}, the run adapter.{name} {here}; set them alike"
                )
        form = replace(form, slots=config.augmentation.slots)
    else:
        form = AdapterConfig(
            cross_attention_dim=pipeline.unet.config["cross_attention_dim"],
            phrase_dim=phrase_dim,
            slots=config.augmentation.slots,
            every=config.adapter.every,
            grounding_logit_bias=config.adapter.grounding_logit_bias,
        )
    attach(pipeline.unet, form, dtype=torch.float32)
    if weights is not None:
        load_adapter_state_dict(pipeline.unet, weights, source=str(config.init_adapter))
    pipeline.unet.train()


def _optimizer(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with two groups: weights, and gates with their own rate and no decay."""
    options = config.optimization
    gates = [value for name, value in parameters.items() if ".alpha_" in name]
    others = [value for name, value in parameters.items() if ".alpha_" not in name]
    gate_rate = options.learning_rate if options.gate_learning_rate is None else options.gate_learning_rate
    groups = [
        {"params": others, "lr": options.learning_rate, "base_lr": options.learning_rate},
        {"params": gates, "lr": gate_rate, "base_lr": gate_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)


def _data_folder(
    data: str, pipeline: StableDiffusionXLGLIGENPipeline, drawn: Path, *, held_out: bool = False
) -> str | Path:
    """The folder of shards that `data` names; "shapes:COUNT" draws them first, with the base's own VAE."""
    kind, _, count = data.partition(":")
    if kind != "shapes":
        return data
    from ..shapes.data import write_shards
    from ..shapes.world import TRAINING_SEED, VALIDATION_SEED

    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"data is {data!r}; expected a folder of shards, or shapes:COUNT as shapes:50000")
    folder = drawn / f"shapes-{count}-{fingerprint(pipeline.vae)}"
    if held_out:
        write_shards(pipeline.vae, folder, int(count), seed=VALIDATION_SEED, captions="plain")
    else:
        write_shards(pipeline.vae, folder, int(count), seed=TRAINING_SEED, captions="ground")
    return folder


# Small parts --------------------------------------------------------------------------------------------------------


def _crosses(position: int, every: int, step: int) -> bool:
    """Whether the step that ended at `position` passed a multiple of `every`."""
    return position // every > (position - step) // every


def _agreed(accelerator: Accelerator, came: bool) -> bool:
    """Whether any process was asked to stop; all of them have to stop at the same step."""
    if accelerator.num_processes == 1:
        return came
    flag = torch.tensor(float(came), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)  # type: ignore[operator]


def _trackers(config: TrainConfig) -> Any:
    if config.track is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    for name in config.track:
        if not find_spec(name):
            raise ValueError(f"the tracker {name} is not installed; pip install {name}, or leave it out of track")
    return list(config.track)


@dataclass
class _StopRequest:
    came: bool = False


@contextmanager
def _stop_request() -> Iterator[_StopRequest]:
    """SIGTERM and the first Ctrl-C ask for a checkpoint and an end; a second Ctrl-C ends at once."""
    request = _StopRequest()

    def receive(number: int, frame: FrameType | None) -> None:
        request.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        former = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs this thread has the signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
