"""The training loop: a frozen base, a trainable adapter, and the number of samples seen.

    train(TrainConfig(data="shards", out="runs/mine"))

The state of a run is one integer, the samples seen: order, noise, dropouts and learning rate follow from it and the
seed. Calling `train` again resumes the run in `out`, and ends with the same bits as a run that never stopped.

    runs/mine/config.json            the resolved configuration and library versions
    runs/mine/metrics.jsonl          one line every `log_every` steps, one every validation
    runs/mine/checkpoint-00064000/   the average so far, which loads as an adapter; weights, optimizer, state
    runs/mine/validation/            images with grounding on and off, boxes drawn
    runs/mine/adapter/               the finished adapter: the average
    runs/mine/report.html            all of it on one page, after every validation and at the end

`gligen_xl.train.setup` makes what the loop works with, `gligen_xl.train.step` is one step of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DDPMScheduler

from ..adapter import adapter_config, gate_values, save_adapter, set_grounding_logit_bias
from ..device import deterministic_algorithms
from ..workdir import exclusive
from .conditioning import Conditioner
from .config import TrainConfig
from .log import RunLog
from .objective import timesteps_of
from .processes import Processes, make_accelerator
from .report import refresh_report
from .resume import ResumePoint
from .setup import open_loader, prepare_base, prepare_data, prepare_state, prepare_validator, run_identity, wrap_model
from .signals import StopRequest, steps_begin, stop_requests
from .step import Denoiser, train_step

FINISHED = "adapter"  # the folder of the finished adapter
PATIENCE = 20.0  # seconds to wait for the folder: loading processes outlive a killed run by some, and hold its lock


def train(config: TrainConfig) -> Path:
    """Train an adapter, or resumes the run in `config.out`.

    Returns:
        `out/adapter` of a finished run. Of one that was asked to stop (Ctrl-C, SIGTERM), the folder of its last
        checkpoint, or `out` if there is none.

    Raises:
        ValueError: the run in `out` was begun with other settings, or is still at work; or data and base do not fit.
        FloatingPointError: `skip_limit` steps in a row were not finite. The last checkpoint remains.
        OSError: a checkpoint could not be written, as when the disk is full. The one before remains.
        RuntimeError: another process of the run is gone.
    """
    accelerator = make_accelerator(config)
    processes = Processes(accelerator, config.process_timeout)
    with (
        processes,
        only_run_in(Path(config.out)) if processes.is_main else nullcontext(),
        deterministic_algorithms(config.deterministic),
        stop_requests() as request,
    ):
        return _run(config, accelerator, processes, ResumePoint.load(config, processes), request)


def _run(
    config: TrainConfig, accelerator: Accelerator, processes: Processes, resume: ResumePoint, request: StopRequest
) -> Path:
    """Train from the resume point to the end, or until the run is asked to stop."""
    out, config = Path(config.out), resume.settled_config()
    batch_size, stop = config.batch_size, config.samples // config.batch_size * config.batch_size

    pipeline, base = prepare_base(config, accelerator, processes, resume)
    unet, conditioner = pipeline.unet, Conditioner(pipeline)
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    data = prepare_data(config, pipeline, processes, resume)
    validator = None
    if config.validation.enabled and processes.is_main:
        validator = prepare_validator(config, pipeline, data, conditioner, scheduler)
    denoiser = Denoiser(unet=unet, model=unet, scheduler=scheduler, conditioner=conditioner, accelerator=accelerator)
    state = prepare_state(config, denoiser, data, processes, resume, stop)
    denoiser = replace(denoiser, model=wrap_model(config, unet, accelerator))
    loader = open_loader(config, data, accelerator, request, state.samples_seen, stop)
    identity = run_identity(config, base, data)

    def save_checkpoint() -> Path:
        return state.save(
            out, adapter_config(unet), identity,
            is_main=processes.is_main, keep=config.keep_checkpoints, keep_every=config.keep_every,
        )  # fmt: skip

    with (
        RunLog(accelerator, config, state.samples_seen, state.stats, data.image_ids) as log,
        closing(iter(loader)) as upcoming,
    ):
        if 0 < state.samples_seen < stop:
            log.say(f"continues from {resume.checkpoint}, {state.samples_seen:,} of {stop:,} samples")
        for note in [*data.notes, *(validator.notes if validator else ())]:
            log.say(note)
        steps_begin()
        if processes.any(request.came):
            log.say("stopped before the first step; the same command begins again")
            return out

        for batch in log.waiting_for(upcoming, alone=processes.count == 1):
            batch, seen = batch.to(accelerator.device), state.samples_seen
            rate, objective = config.optimization.rate(seen, stop), config.objective.at(seen, stop)
            losses, norm = train_step(
                denoiser, batch, state, objective=objective, rate=rate, micro_batch=config.micro_batch,
                attention_weight=config.optimization.attention(seen, stop),
            )  # fmt: skip
            state.samples_seen = seen = seen + batch_size
            set_grounding_logit_bias(unet, config.adapter.logit_bias(seen, stop))

            times = timesteps_of(scheduler, batch, objective.noisy_bias)
            quarters = times * 4 // scheduler.config["num_train_timesteps"]
            if log.step(seen, losses, quarters, norm):
                log.write(seen, rate, gate_values(unet))

            is_last = seen == stop
            validates_all = is_last or _is_due(config.validation.every, seen, batch_size)
            validates_gain = validates_all or _is_due(config.validation.gain_every, seen, batch_size)
            if config.validation.enabled and validates_gain:
                log.look()
                with log.paused():
                    with state.ema.applied():
                        state.partition.broadcast()
                        if validator:
                            log.validation(seen, *validator(gain_only=not validates_all))
                        processes.wait()
                    state.partition.broadcast()

            stopped = processes.any(request.came)
            if is_last or stopped or _is_due(config.checkpoint_every, seen, batch_size):
                with log.paused():
                    log.settle()
                    saved = save_checkpoint()
                    processes.wait()
                if stopped and not is_last:
                    return _say_stopped(log, saved, seen, stop)

        if state.samples_seen < stop:  # no batch came, and the run was asked to stop
            log.settle()
            saved = save_checkpoint() if state.samples_seen > resume.samples_seen else resume.checkpoint or out
            return _say_stopped(log, saved, state.samples_seen, stop)
        average = state.partition.gather(state.ema.average)

    finished = out / FINISHED
    if processes.is_main:
        for leftover in finished.glob(".*.partial"):  # of a run that was killed here
            leftover.unlink()
        save_adapter(unet, finished, state=average, metadata=identity.adapter_metadata(state.samples_seen))
        refresh_report(out)
    return finished


def only_run_in(out: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run: two runs would remove each other's checkpoints.

    Raises:
        ValueError: another run is at work there, or the folder cannot be made.
    """
    busy = f"another run is at work in {out}; wait for it, or end its processes, or choose another folder"
    return exclusive(out / ".lock", busy, PATIENCE)


def _is_due(every: int | None, samples_seen: int, batch_size: int) -> bool:
    """Tell whether the last step passed a multiple of `every`."""
    return every is not None and samples_seen // every > (samples_seen - batch_size) // every


def _say_stopped(log: RunLog, saved: Path, samples_seen: int, stop: int) -> Path:
    log.say(f"stopped at {samples_seen} of {stop} samples; the same command continues from {saved}")
    return saved
