"""The data of a run: folders of shards, or shards of the shapes world that are drawn first."""

from __future__ import annotations

from pathlib import Path

from ..data.batch import ShardDataset
from ..fingerprint import fingerprint
from ..pipelines import GroundingMixin
from .config import TrainConfig


def open_data(config: TrainConfig, pipeline: GroundingMixin) -> ShardDataset:
    """All sources of a run, in their order; what has to be drawn is drawn into its folder."""
    folders = [_folder(source, pipeline, Path(config.out) / "data") for source in config.sources]
    return ShardDataset(folders, config.augmentation, config.seed, cache_bytes=int(config.cache_gb * 1e9))


def held_out_folder(config: TrainConfig, pipeline: GroundingMixin) -> str | Path | None:
    """Where the shards for validation are; None without."""
    data = config.validation.data
    return data and _folder(data, pipeline, Path(config.out) / "validation-data", held_out=True)


def _folder(data: str, pipeline: GroundingMixin, drawn: Path, *, held_out: bool = False) -> str | Path:
    """The folder of shards that `data` names; "shapes:COUNT" draws them first, with the base's own VAE."""
    kind, _, count = data.partition(":")
    if kind != "shapes":
        return data
    from ..shapes.data import write_shards
    from ..shapes.world import TRAINING_SEED, VALIDATION_SEED

    folder = drawn / f"shapes-{count}-{fingerprint(pipeline.vae)}"
    if held_out:
        write_shards(pipeline.vae, folder, int(count), seed=VALIDATION_SEED, captions="plain")
    else:
        write_shards(pipeline.vae, folder, int(count), seed=TRAINING_SEED, captions="ground")
    return folder
