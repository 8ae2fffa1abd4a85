"""Checks before a run, without loading anything: of settings, file headers and folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..adapter import AdapterConfig
from ..adapter.convert import ENDINGS
from ..adapter.io import CONFIG_NAME
from ..data.box_statistics import of_shards
from ..data.held_out import hold_out
from ..data.shards import SDXL_SCALING_FACTOR, Shard, shard_stems
from ..data.streaming import is_remote
from ..hub import names_repository
from ..io import read_json
from ..manifest import check_listed
from ..text_embeddings import phrase_width
from ..worlds import NAMES
from .base import check_adapter_form, check_base_files, check_fit
from .checkpoint import list_checkpoints, read_state
from .config import TrainConfig
from .data import boxes_in_words, check_boxes, held_out_in_words, is_drawn, shares_held_out, validation_data
from .known_bases import PUBLISHED, BaseParts
from .resume import check_same_run, check_state

_PUBLISHED_ADAPTERS = ("jiuntian/gligen-xl-1024",)  # of the recipes; of the published form
_PUBLISHED_FORM = AdapterConfig(cross_attention_dim=2048, phrase_dim=2048)  # the widths are not looked at


def samples_seen_by_run(config: TrainConfig) -> int | None:
    """Return how many samples the run in `config.out` has seen, by its last whole checkpoint; None without one.

    Checks only the sizes of large files.

    Raises:
        ValueError: the run there was begun with other settings.
    """
    for checkpoint in reversed(list_checkpoints(config.out)):
        try:
            state = read_state(checkpoint)
            check_state(checkpoint, state)
        except (OSError, ValueError):  # damaged: the run goes on from the one before
            continue
        check_same_run(state["config"], config)
        return state["position"]
    return None


def check_before(config: TrainConfig, base: BaseParts | None = None) -> list[str]:
    """Refuse what the run of `config` would refuse. Data and repositories that are not on this machine pass.

    Args:
        base: the parts of the base; without them, latents and the widths of an adapter are not checked.

    Returns:
        Notes: how many boxes the images of the data have, and what could not be checked.

    Raises:
        ValueError: settings, data, base or adapter do not fit each other, or the run that stands in `out`.
        FileNotFoundError: the validation's data or the adapter to begin from is not there.
    """
    notes = []
    check_base_files(config)
    if samples_seen_by_run(config) is None and config.init_adapter:
        notes += _check_init_adapter(config.init_adapter, config, base)
    held_out = validation_data(config)
    if held_out and not is_drawn(held_out) and not is_remote(held_out) and not Path(held_out).exists():
        raise FileNotFoundError(f"validation.data {held_out} is not there; expected a folder of held-out shards")
    detector = config.validation.detector
    if detector not in (None, "none", *NAMES) and not Path(detector).is_dir() and not names_repository(detector):
        raise FileNotFoundError(
            f"validation.detector {detector} is not there; expected {', '.join(NAMES)}, none, a folder or a repository"
        )
    for source in config.sources:
        if shards := local_shards(source):
            min_score = config.augmentation.min_score
            scored = of_shards(shards, min_score)
            check_boxes(config, source, of_shards(shards), scored)
            notes.append(boxes_in_words(source, scored, min_score))
    if held_out and not config.without_boxes and (shards := local_shards(held_out)):
        where = f"validation.data {held_out}"
        of_shards(shards, config.augmentation.min_score).check(where, "grounding gain and images are taken of boxes")
    if base is not None:
        for source in config.sources:
            _check_data(source, config.model, base, config.resolution)
        if held_out:
            _check_data(held_out, config.model, base)
    return notes


def validation_in_words(config: TrainConfig) -> list[str]:
    """Describe what a new run of `config` validates on, as far as the data is on this machine."""
    share = config.validation.held_out if config.validation.data is None else 0.0
    sources = zip(config.sources, shares_held_out(config, share), strict=True)
    parts = [hold_out(local_shards(source), part) for source, part in sources]
    if share and not validation_data(config) and not any(part.of for part in parts):
        return [f"validation: on images that are kept out of the training (validation.held_out {share:g})"]
    return held_out_in_words(config, share, parts)


def local_shards(source: str) -> list[Shard]:
    """Open the shards of a folder, without their tables; none if it is not on this machine.

    Raises:
        ValueError: it is a file.
    """
    if is_remote(source) or is_drawn(source) or not Path(source).exists():
        return []
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; expected a folder of shards")
    return [Shard(stem, with_table=False) for stem in shard_stems(source)]


def _check_data(source: str, model: str, base: BaseParts, resolution: int | None = None) -> None:
    """Check that latents on this machine are those of the base's VAE and of the resolution that the run asks for."""
    scale = base.vae.config["scaling_factor"]  # type: ignore[index]
    if model in PUBLISHED and not Path(model).is_dir() and base.unet.config["addition_embed_type"] == "text_time":
        scale = float(SDXL_SCALING_FACTOR)  # which the built-in settings leave out
    shards: Any = SimpleNamespace(shards=local_shards(source))
    parts: Any = SimpleNamespace(unet=base.unet, vae=SimpleNamespace(config={"scaling_factor": scale}))
    check_fit(shards, parts, resolution)


def _check_init_adapter(source: str, config: TrainConfig, base: BaseParts | None) -> list[str]:
    """Checks, without loading it, that the adapter to start from exists and has the form that the run asks for."""
    path = Path(source).expanduser()
    if path.exists():
        form = _form(path)
        check_adapter_form(form or _PUBLISHED_FORM, config, phrase_width(base.text_encoders) if base and form else None)
        return []
    if not names_repository(source):
        raise FileNotFoundError(
            f"init_adapter {source} is not there; expected what the run is to begin from (--init_adapter null: a fresh "
            "adapter)"
        )
    if source in _PUBLISHED_ADAPTERS:
        check_adapter_form(_PUBLISHED_FORM, config)
    return [f"init_adapter {source} is not here; it is fetched when the run begins"]


def _form(path: Path) -> AdapterConfig | None:
    """Read the form of an adapter folder, alone or in a pipeline or a run; None for files of the published form."""
    if path.is_file():
        return None
    for folder in (path, path / "gligen_adapter", path / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            if not any(folder.glob("gligen_adapter*.safetensors")):
                raise FileNotFoundError(f"{folder} is not an adapter folder: it has no weights")
            check_listed(folder, [CONFIG_NAME])
            check_listed(folder, sizes_only=True)
            description = read_json(folder / CONFIG_NAME)
            if not isinstance(description, dict):
                raise ValueError(f"{folder / CONFIG_NAME} does not describe an adapter")
            return AdapterConfig.from_dict(description.get("config", {}))
    if not any(file.name.endswith(ENDINGS) for folder in (path, path / "unet") for file in folder.glob("*")):
        raise FileNotFoundError(f"init_adapter {path} holds no weights; expected an adapter in any of its forms")
    return None
