"""Setting up a run: the frozen base, the data and its order, the validator, and the state that training changes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..adapter import adapter_parameters, load_adapter_state_dict
from ..adapter.weights import fingerprint
from ..data.dataset import ShardDataset
from ..data.loader import Loader, batches
from ..data.sampler import MixtureOrder, SampleOrder
from ..detect.detectors import find_detector
from ..pipelines import GroundingMixin
from .base import check_fit, fresh_adapter, load_base
from .checkpoint import RunIdentity, TrainState
from .conditioning import Conditioner
from .config import TrainConfig
from .data import held_out_folder, held_out_in_words, open_data, source_statistics, world_of
from .ema import EMA
from .init import init_adapter_weights
from .objective import denoising_loss
from .optimizer import AdapterOptimizer
from .processes import Processes
from .resume import ResumePoint
from .signals import StopRequest
from .step import Denoiser
from .step_stats import StepStats
from .validate import Validator
from .zero import ZeroPartition

# The base and the data ----------------------------------------------------------------------------------------------


def prepare_base(
    config: TrainConfig, accelerator: Accelerator, processes: Processes, resume: ResumePoint
) -> tuple[Any, str]:
    """Load the frozen base and attach the adapter.

    Returns:
        The pipeline, and the fingerprint of its U-Net without the adapter.
    """
    pipeline = load_base(config, accelerator.device, draws=processes.is_main)
    base = fingerprint(pipeline.unet)
    resume.check_base(base)
    fresh_adapter(pipeline, config, resume.form)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline, base


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The samples of a run and their order.

    Attributes:
        windows: of each source, how many shards are mixed at a time; None is all.
        validation: folder or URL of the shards to validate on; None takes held-out images of the training's data.
        notes: what the log says about the data.
    """

    dataset: ShardDataset
    order: SampleOrder | MixtureOrder
    weights: list[float]
    windows: list[int | None]
    validation: str | Path | None
    held_out: dict[str, Any] | None
    notes: list[str]

    def image_ids(self, first: int) -> list[str]:
        """Return the ids of the batch that begins after `first` samples, in its order."""
        numbers = self.order.batch(first // self.order.batch_size)
        return [self.dataset.row(int(number)).image_id for number in numbers]


def prepare_data(config: TrainConfig, pipeline: Any, processes: Processes, resume: ResumePoint) -> TrainingData:
    """Open the data of the run, drawing what has to be drawn, and checks that it is what the run was begun with."""
    share = resume.held_out_share
    with processes.main_first():  # the others find what it draws
        dataset = open_data(config, pipeline, share)
        validation = held_out_folder(config, pipeline)
    digest, weights = dataset.held_out_digest(), list(config.sources.values())
    notes = [*source_statistics(config, dataset), *held_out_in_words(config, share, dataset.held_out)]
    check_fit(dataset, pipeline, config.resolution)
    resume.check_data(dataset.groups, weights)
    resume.check_held_out(digest)
    windows = resume.state.get("windows") or dataset.windows(config.window)
    return TrainingData(
        dataset=dataset,
        order=dataset.order(config.batch_size, config.seed, weights=weights, windows=windows),
        weights=weights,
        windows=windows,
        validation=validation,
        held_out={"share": share, "digest": digest} if share else None,
        notes=notes,
    )


def open_loader(
    config: TrainConfig, data: TrainingData, accelerator: Accelerator, request: StopRequest, start: int, stop: int
) -> Loader:
    """Return this process's share of every batch from `start` to `stop` samples seen."""
    return batches(
        data.dataset, data.order, start=start, stop=stop, workers=config.workers,
        rank=accelerator.process_index, ranks=accelerator.num_processes, timeout=config.process_timeout,
        stop_requested=lambda: request.came,
    )  # fmt: skip


def prepare_validator(
    config: TrainConfig, pipeline: GroundingMixin, data: TrainingData, conditioner: Conditioner, scheduler: Any
) -> Validator:
    """Make the validator of the main process, with the detector that the settings or the world name."""
    name, world = config.validation.detector, world_of(config)
    validator = Validator(
        config.validation, data.validation or data.dataset, pipeline, conditioner, scheduler,
        config.augmentation, config.batch_size, config.seed, int(config.cache_gb * 1e9),
    )  # fmt: skip
    if name != "none" and validator.layouts and (chosen := name or world):
        detector = find_detector(chosen, device=pipeline.unet.device)
        validator.use_detector(detector, optional=None if name else f"the {world} world")
    check_fit(validator.dataset, pipeline)
    return validator


# What changes -------------------------------------------------------------------------------------------------------


def prepare_state(
    config: TrainConfig, denoiser: Denoiser, data: TrainingData, processes: Processes, resume: ResumePoint, stop: int
) -> TrainState:
    """Initialise adapter, optimizer and average of a new run, or restores those of the checkpoint."""
    unet, accelerator = denoiser.unet, denoiser.accelerator
    if not resume.checkpoint and not config.init_adapter:

        def run_unet() -> None:
            first = data.dataset.batch([(int(number), k) for k, number in enumerate(data.order.batch(0)[:4])])
            denoising_loss(unet, denoiser.scheduler, first, denoiser.conditioner(first), config.objective.at(0, stop))

        with accelerator.autocast():
            init_adapter_weights(unet, config.adapter, run_unet)
    parameters = adapter_parameters(unet)
    if resume.checkpoint:
        load_adapter_state_dict(unet, resume.tensors["weights"], source=str(resume.checkpoint))
    partition = ZeroPartition(parameters, processes, sharded=config.shard_optimizer, offloaded=config.offload_optimizer)
    state = TrainState(
        samples_seen=resume.samples_seen,
        parameters=parameters,
        partition=partition,
        optimizer=AdapterOptimizer(
            parameters, config.optimization, accelerator.scaler, partition.own, processes.count > 1
        ),
        ema=EMA(partition.own, config.optimization.ema_decay),
        stats=StepStats(
            accelerator, resume.samples_seen, config.batch_size, resume.tensors.get("log"), resume.state.get("log")
        ),
    )
    if resume.checkpoint:
        state.load(resume.tensors, resume.state)
        resume.tensors.clear()  # which are as large as three adapters
    return state


def wrap_model(config: TrainConfig, unet: Any, accelerator: Accelerator) -> Any:
    """Compile the U-Net, if asked to, and wraps it for several processes."""
    if config.compile:
        unet.compile(backend=config.compile_backend)  # in place: names of weights stay
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # accelerate's only way
        return accelerator.prepare(unet)


def run_identity(config: TrainConfig, base: str, data: TrainingData) -> RunIdentity:
    """Return what the run writes down about itself in every checkpoint."""
    return RunIdentity(
        base=base,
        groups=data.dataset.groups,
        held_out=data.held_out,
        weights=data.weights,
        windows=data.windows,
        config=config.to_dict(),
    )
