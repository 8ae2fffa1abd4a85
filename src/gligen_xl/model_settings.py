"""The settings of a model, checked before it is built: absurd sizes would fill the memory of the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .io import read_json
from .limits import MAX_WIDTH

_MODEL_LIMITS = {
    # layers
    "layers_per_block": 64,  # published U-Nets and VAEs: 1 to 4
    "transformer_layers_per_block": 64,  # SDXL: 10
    "reverse_transformer_layers_per_block": 64,
    "num_hidden_layers": 512,  # the deepest language models have 126
    "num_layers": 512,
    "encoder_layers": 512,
    "decoder_layers": 512,
    # widths
    "block_out_channels": MAX_WIDTH,
    "hidden_size": MAX_WIDTH,
    "d_model": MAX_WIDTH,
    "projection_dim": MAX_WIDTH,
    "cross_attention_dim": MAX_WIDTH,
    "encoder_hid_dim": MAX_WIDTH,
    "projection_class_embeddings_input_dim": MAX_WIDTH,
    "addition_time_embed_dim": MAX_WIDTH,
    "time_embedding_dim": MAX_WIDTH,
    "intermediate_size": 4 * MAX_WIDTH,
    "attention_head_dim": MAX_WIDTH,
    "num_attention_heads": MAX_WIDTH,
    "in_channels": MAX_WIDTH,
    "out_channels": MAX_WIDTH,
    "latent_channels": MAX_WIDTH,
    "norm_num_groups": MAX_WIDTH,
    # tables
    "vocab_size": 2**22,  # the largest in use: 256,000
    "max_position_embeddings": 2**22,
    "num_class_embeds": 2**22,
    "num_train_timesteps": 2**20,  # 1,000
    "sample_size": 2**16,
    "image_size": 2**16,
}
_MANY_BLOCKS = 64  # items of a list such as block_out_channels; SDXL: 3
_MAX_PARAMETERS = 2**33  # in one layer


def check_model_settings(folder: Path) -> None:
    """Refuse a model, or a pipeline of several, whose settings have absurd sizes, before it is built.

    Raises:
        ValueError: names the file and the setting.
    """
    files = [*folder.glob("config.json"), *folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")]
    for file in sorted(files):
        settings = read_json(file)
        for name, value in _named(settings):
            _check_setting(file, name, value)
        for first, second in (("vocab_size", "hidden_size"), ("hidden_size", "intermediate_size")):
            sizes: list[Any] = [settings.get(first), settings.get(second)] if isinstance(settings, Mapping) else [None]
            if all(map(_is_number, sizes)) and sizes[0] * sizes[1] > _MAX_PARAMETERS:
                raise ValueError(
                    f"{file}: {first} is {sizes[0]}, {second} {sizes[1]}; expected at most {_MAX_PARAMETERS} weights "
                    "in one layer"
                )


def _check_setting(file: Path, name: str, value: Any) -> None:
    limit, numbers = _MODEL_LIMITS[name], list(_numbers(value))
    if too_large := [number for number in numbers if number > limit]:
        raise ValueError(f"{file}: {name} is {too_large[0]}; expected at most {limit}")
    if len(numbers) > _MANY_BLOCKS:
        raise ValueError(f"{file}: {name} has {len(numbers)} items; expected at most {_MANY_BLOCKS}")


def _named(settings: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the settings that have a limit, also those of models within models."""
    if isinstance(settings, Mapping) and depth < 4:
        for name, value in settings.items():
            if name in _MODEL_LIMITS:
                yield name, value
            else:
                yield from _named(value, depth + 1)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif _is_number(value):
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
