"""The data that a run trains and validates on: folders of shards, or images of the shapes world, drawn first."""

from __future__ import annotations

from pathlib import Path

from ..adapter.weights import fingerprint
from ..data.box_statistics import BoxStatistics, of_shards
from ..data.dataset import ShardDataset
from ..data.held_out import HeldOut
from ..pipelines import GroundingMixin
from ..worlds import drawn_count, find_world
from .config import TrainConfig


def is_drawn(source: str) -> bool:
    """Tell whether the images of a source are drawn when the run begins."""
    return drawn_count(source) is not None


def world_of(config: TrainConfig) -> str | None:
    """Return the embedded world of the model or, failing that, of the data; None if neither has one."""
    names = [config.model, *(source.partition(":")[0] for source in filter(is_drawn, config.sources))]
    return next((name for name in names if find_world(name)), None)


def validation_data(config: TrainConfig) -> str | None:
    """Return the data to validate on, unless it is held out of the training's own data."""
    if config.validation.data is None and config.validation.held_out and all(map(is_drawn, config.sources)):
        name = next(iter(config.sources)).partition(":")[0]
        world = find_world(name)
        assert world is not None
        return f"{name}:{world.DRAWN_FOR_VALIDATION}"
    return config.validation.data


def shares_held_out(config: TrainConfig, share: float) -> list[float]:
    """Return the share of images of each source that is kept out of the training; 0 for drawn images."""
    return [0.0 if is_drawn(source) else share for source in config.sources]


def open_data(config: TrainConfig, pipeline: GroundingMixin, held_out: float = 0.0) -> ShardDataset:
    """Open all sources of a run, in their order, and draws images into the run's folder if a source asks for it.

    Args:
        held_out: share of the images that is kept out of the training.
    """
    folders = [_folder(source, pipeline, Path(config.out) / "data") for source in config.sources]
    return ShardDataset(
        folders,
        config.augmentation,
        config.seed,
        cache_bytes=int(config.cache_gb * 1e9),
        held_out=shares_held_out(config, held_out),
    )


def held_out_folder(config: TrainConfig, pipeline: GroundingMixin) -> str | Path | None:
    """Return where the shards for validation are; None without validation, or with held-out training images."""
    data = validation_data(config)
    return data and _folder(data, pipeline, Path(config.out) / "validation-data", held_out=True)


def _folder(data: str, pipeline: GroundingMixin, drawn: Path, *, held_out: bool = False) -> str | Path:
    """Return the folder of shards that `data` names; "shapes:COUNT" draws them first, with the base's own VAE."""
    name, _, count = data.partition(":")
    if (world := find_world(name)) is None or not count:
        return data
    folder = drawn / f"{name}-{count}-{fingerprint(pipeline.vae)}"
    world.write_shards(pipeline.vae, folder, int(count), held_out=held_out)
    return folder


# In words -----------------------------------------------------------------------------------------------------------


def boxes_in_words(source: str, statistics: BoxStatistics, min_score: float) -> str:
    return f"{source}: {statistics} (of a score above {min_score:g})"


def check_boxes(config: TrainConfig, source: str, statistics: BoxStatistics, scored: BoxStatistics) -> None:
    """Refuse a source of which no image has a usable box.

    Args:
        statistics: of all boxes. scored: of those with a score above `augmentation.min_score`.

    Raises:
        ValueError: no image has a usable box.
    """
    if config.without_boxes:
        return
    if statistics.boxes and not scored.boxes:
        least = f"{config.augmentation.min_score:g} or less (augmentation.min_score)"
        scored.check(source, f"its {statistics.boxes:,} boxes have scores of {least}")
    scored.check(source, "prepare it again, and look at what its report says of boxes")


def source_statistics(config: TrainConfig, dataset: ShardDataset) -> list[str]:
    """Describe how many boxes the images of each source have.

    Raises:
        ValueError: a source has no usable box.
    """
    lines = []
    for source, shards in zip(config.sources, dataset.sources, strict=True):
        min_score = config.augmentation.min_score
        scored = of_shards(shards, min_score)
        check_boxes(config, source, of_shards(shards), scored)
        lines.append(boxes_in_words(source, scored, min_score))
    return lines


def held_out_in_words(config: TrainConfig, share: float, parts: list[HeldOut]) -> list[str]:
    """Describe the data to validate on, for the log and the dry run.

    Args:
        share: share of the images kept out of the training. parts: held-out images of each source.
    """
    if data := validation_data(config):
        return [f"validation: on {data}"]
    if not share:
        return ["validation: none (validation.held_out 0.05 takes it from the training's data)"]
    held = {source: part for source, part in zip(config.sources, parts, strict=True) if part.images}
    if not held:
        count = sum(part.of for part in parts)
        return [f"validation: on the {count} images of the training itself, too few to keep any out of it"]
    counts = ", ".join(f"{part.images} of {source}" for source, part in held.items())
    return [f"validation: on images that are kept out of the training (validation.held_out {share:g}): {counts}"]
