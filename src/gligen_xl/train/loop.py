"""The training loop: a frozen base, a trainable adapter, and a position.

    train(TrainConfig(data="shards", out="runs/mine"))

The state of a run is one integer, the samples seen: order, noise, dropouts and learning rate follow from it and the
seed. Calling `train` again continues a run that stands in `out`, and ends with the same bits as if it had never
stopped.

    runs/mine/config.json            the resolved configuration and library versions
    runs/mine/metrics.jsonl          one line every `log_every` steps, one every validation
    runs/mine/checkpoint-00064000/   the average so far, which loads as an adapter; weights, optimizer, state
    runs/mine/validation/            images with grounding on and off, boxes drawn
    runs/mine/adapter/               the finished adapter: the average
    runs/mine/report.html            all of it on one page, after every validation and at the end
"""

from __future__ import annotations

import warnings
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor

from ..adapter import (
    adapter_config,
    adapter_parameters,
    gate_values,
    load_adapter_state_dict,
    save_adapter,
    set_grounding_logit_bias,
)
from ..adapter.io import CONFIG_NAME, describe_adapter
from ..adapter.weights import fingerprint
from ..data.dataset import Batch
from ..data.loader import batches
from ..device import deterministic_algorithms
from ..versions import versions
from .accumulate import micro_batches, spoiled_unless_finite
from .attention import watch_attention
from .base import check_fit, fresh_adapter, load_base
from .checkpoint import save_checkpoint
from .conditioning import Conditioner
from .config import Objective, TrainConfig
from .data import held_out_folder, held_out_in_words, open_data, source_statistics, world_of
from .ema import EMA
from .init import start_adapter
from .log import RunLog
from .objective import denoising_loss, timesteps_of
from .optimizer import AdapterOptimizer
from .processes import Processes, make_accelerator
from .report import refresh_report
from .resume import Reached
from .run_lock import only_run_in
from .signals import StopRequest, steps_begin, stop_requests
from .step_stats import Steps
from .validate import Validator
from .zero import Shares

FINISHED = "adapter"  # the folder of the finished adapter


def train(config: TrainConfig) -> Path:
    """Train an adapter, or continue the run that stands in `config.out`.

    Returns:
        `out/adapter`, finished; or another folder, where the run was asked to stop (Ctrl-C, SIGTERM): that of its last
        checkpoint, or `out`.

    Raises:
        ValueError: the run in `out` was begun with other settings, or is still at work; or data and base do not fit.
        FloatingPointError: so many steps in a row as `skip_limit` were not finite. The last checkpoint stands.
        OSError: a checkpoint could not be written, as when the disk is full. The one before stands.
        RuntimeError: another process of the run is gone.
    """
    accelerator = make_accelerator(config)
    processes = Processes(accelerator, config.process_timeout)
    with (
        processes,
        only_run_in(Path(config.out), is_main=processes.is_main),
        deterministic_algorithms(config.deterministic),
        stop_requests() as request,
    ):
        return _go_on(config, accelerator, processes, Reached.of(config, processes), request)


def _go_on(
    config: TrainConfig, accelerator: Accelerator, processes: Processes, reached: Reached, request: StopRequest
) -> Path:
    """From what is reached to the end, or until it is asked to stop."""
    out, config = Path(config.out), reached.settled()

    # The frozen base, and the adapter on it
    pipeline = load_base(config, accelerator.device, draws=processes.is_main)
    unet, base = pipeline.unet, fingerprint(pipeline.unet)
    reached.check_base(base)
    fresh_adapter(pipeline, config, reached.form)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    conditioner = Conditioner(pipeline)
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)

    # The data, and its order
    with processes.main_first():  # what it draws, the others find
        dataset = open_data(config, pipeline, reached.held_out_share)
        validation = held_out_folder(config, pipeline)
    share, digest = reached.held_out_share, dataset.held_out_digest()
    told = [*source_statistics(config, dataset), *held_out_in_words(config, share, dataset.held_out)]
    validates = config.validation.wanted
    check_fit(dataset, pipeline, config.resolution)
    weights = list(config.sources.values())
    reached.check_data(dataset.groups, weights)
    reached.check_held_out(digest)
    windows = reached.state.get("windows") or dataset.windows(config.window)
    order = dataset.order(config.batch_size, config.seed, weights=weights, windows=windows)
    stop = config.samples // config.batch_size * config.batch_size
    validator = None
    if validates and processes.is_main:
        validator = Validator(
            config.validation, validation or dataset, pipeline, conditioner, scheduler,
            config.augmentation, config.batch_size, config.seed, int(config.cache_gb * 1e9),
            world=world_of(config),
        )  # fmt: skip
        check_fit(validator.dataset, pipeline)
        told += validator.notes

    # What changes in a run
    if not reached.checkpoint and not config.init_adapter:

        def look() -> Tensor:
            first = dataset.batch([(int(number), k) for k, number in enumerate(order.batch(0)[:4])])
            return denoising_loss(unet, scheduler, first, conditioner(first), config.objective.at(0, stop))

        with accelerator.autocast():
            start_adapter(unet, config.adapter, look)
    parameters = adapter_parameters(unet)
    if reached.checkpoint:
        load_adapter_state_dict(unet, reached.tensors["weights"], source=str(reached.checkpoint))
    shares = Shares(parameters, processes, sharded=config.shard_optimizer, offloaded=config.offload_optimizer)
    optimizer = AdapterOptimizer(parameters, config.optimization, accelerator.scaler, shares.own, processes.count > 1)
    ema = EMA(shares.own, config.optimization.ema_decay)
    position = reached.position
    steps = Steps(accelerator, position, config.batch_size, reached.tensors.get("log"), reached.state.get("log"))
    if reached.checkpoint:
        ema.load(reached.tensors["gligen_adapter"], reached.state["ema_steps"])
        optimizer.load(reached.tensors["optimizer"], reached.state["scaler"])
        reached.tensors.clear()  # as large as three adapters
    if config.compile:
        unet.compile(backend=config.compile_backend)  # in place: names of weights stay
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # accelerate's only way
        model: Any = accelerator.prepare(unet)
    loader = batches(
        dataset, order, start=position, stop=stop, workers=config.workers,
        rank=accelerator.process_index, ranks=accelerator.num_processes, timeout=config.process_timeout,
        asked=lambda: request.came,
    )  # fmt: skip

    def backward(batch: Batch, objective: Objective, weight: float) -> Tensor:
        """The gradients of a process's share of a batch, part by part; returns the losses, (b,)."""
        losses = []
        for part, conditioning, last in micro_batches(batch, conditioner(batch), config.micro_batch):
            watched = watch_attention(unet, part.boxes, part.mask, part.latents.shape[-2:])
            together = nullcontext() if last else accelerator.no_sync(model)  # gradients are exchanged once a step
            with together, watched if weight else nullcontext() as seen:
                with accelerator.autocast():
                    loss = denoising_loss(model, scheduler, part, conditioning, objective)  # (b,)
                    guided = loss + weight * seen.mean() if seen else loss
                # Watched still: gradient checkpointing runs the fusers again.
                accelerator.backward(spoiled_unless_finite(guided.sum() / len(batch.positions)))
            losses.append(loss.detach())
        return torch.cat(losses)

    def image_ids(first: int) -> list[str]:
        return [dataset.row(int(number)).image_id for number in order.batch(first // config.batch_size)]

    def about() -> dict[str, Any]:
        training = {"training": config.to_dict(), "versions": versions()}
        return {"base_model": config.model, "samples": position, **training}

    def checkpoint() -> Path:
        groups = {
            "gligen_adapter": shares.collect(ema.average),
            "weights": parameters,
            "optimizer": shares.collect(optimizer.tensors()),
            "log": steps.tensors(),
        }
        if not processes.is_main:
            return out
        state = {
            "adapter": adapter_config(unet).to_dict(),
            "base": base,
            "ema_steps": ema.steps,
            "groups": dataset.groups,
            "held_out": {"share": share, "digest": digest} if share else None,
            "weights": weights,
            "windows": windows,
            "log": steps.state(),
            "scaler": optimizer.scaler_state(),
            "config": config.to_dict(),
            "versions": versions(),
        }
        return save_checkpoint(
            out, position, groups, state, keep=config.keep_checkpoints, keep_every=config.keep_every,
            documents={CONFIG_NAME: describe_adapter(adapter_config(unet), about())},
        )  # fmt: skip

    def due(every: int | None) -> bool:
        """Whether the step that ended at `position` passed a multiple of `every`."""
        return every is not None and position // every > (position - config.batch_size) // every

    def stopped_after(saved: Path) -> Path:
        log.say(f"stopped at {position} of {stop} samples; the same command continues from {saved}")
        return saved

    with RunLog(accelerator, config, position, steps, image_ids) as log, closing(iter(loader)) as upcoming:
        if 0 < position < stop:
            log.say(f"continues from {reached.checkpoint}, {position:,} of {stop:,} samples")
        for line in told:
            log.say(line)
        steps_begin()
        if processes.any(request.came):
            log.say("stopped before the first step; the same command begins again")
            return out
        for batch in log.waiting_for(upcoming, alone=processes.count == 1):
            factor, objective = config.optimization.rate(position, stop), config.objective.at(position, stop)
            batch = batch.to(accelerator.device)
            losses = backward(batch, objective, config.optimization.attention(position, stop))
            optimizer.set_rate(factor)
            norm = optimizer.step()
            shares.spread()
            ema.update(norm.isfinite())
            position += config.batch_size
            set_grounding_logit_bias(unet, config.adapter.logit_bias(position, stop))

            times = timesteps_of(scheduler, batch, objective.noisy_bias)
            quarters = times * 4 // scheduler.config["num_train_timesteps"]
            if log.step(position, losses, quarters, norm):
                log.write(position, factor, gate_values(unet))
            whole = due(config.validation.every) or position == stop
            if validates and (whole or due(config.validation.gain_every)):
                log.look()
                with log.paused():
                    with ema.applied():
                        shares.spread()
                        if validator:
                            log.validation(position, *validator(gain_only=not whole))
                        processes.wait()
                    shares.spread()
            stopped = processes.any(request.came)
            if due(config.checkpoint_every) or position == stop or stopped:
                with log.paused():
                    log.settle()
                    saved = checkpoint()
                    processes.wait()
                if stopped and position < stop:
                    return stopped_after(saved)
        if position < stop:  # no batch came, and the run was asked to stop
            log.settle()
            return stopped_after(checkpoint() if position > reached.position else reached.checkpoint or out)
        average = shares.collect(ema.average)

    finished = out / FINISHED
    if processes.is_main:
        for left in finished.glob(".*.partial"):  # of a run that was killed here
            left.unlink()
        save_adapter(unet, finished, state=average, metadata=about())
        refresh_report(out)
    return finished
