"""The largest sizes that are accepted from outside, and checks of files that would not fit in memory.

The bounds are far above what any model, image or data set of the field has, and far below what fills a machine: a
larger value is a typing error, or a file made to do harm. They are checked before anything is allocated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_SIDE = 8192  # pixels of a generated image or of training; SDXL is made for 1024
MAX_BOXES = 10_000  # of one image; data sets have up to about 4,000
MAX_PROMPT = 100_000  # characters; text encoders read about 77 tokens
MAX_PHRASE = 10_000  # characters
MAX_NAME = 10_000  # characters of an id
MAX_SLOTS = 4096  # grounding tokens an image; published models have 30
MAX_WIDTH = 65_536  # of a token or an embedding; the widest language models have 16,384
MAX_IMAGES = 1_000_000  # of one command
MAX_STEPS = 10_000  # denoising steps; the published schedules have 1,000
MAX_BATCH = 65_536  # images of one step, over all processes
MAX_WORKERS = 1024  # processes

MAX_SETTINGS = 4 * 2**20  # bytes of a JSON file of settings; as Python objects it takes up to thirty times as much
MAX_TENSOR_HEADER = 16 * 2**20  # bytes; the header of SDXL in one file has 0.4 MB
MAX_UNPACKED = 2**28  # bytes that even the smallest file may take in memory
EXPANSION = 64  # bytes in memory per byte of a larger file


def memory_limit(size: int) -> int:
    """Return how many bytes a file of `size` bytes may take in memory."""
    return max(MAX_UNPACKED, EXPANSION * size)


def check_safetensors(*files: Path) -> None:
    """Refuse safetensors files with an absurdly large header, which readers would convert to objects.

    Raises:
        ValueError: names the file.
    """
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if MAX_TENSOR_HEADER < length <= path.stat().st_size - 8:  # a longer one is damaged: the reader says so
            raise ValueError(f"{path} has a header of {length} bytes; expected at most {MAX_TENSOR_HEADER}")


def check_torch_file(path: Path) -> None:
    """Refuse a checkpoint with compressed members, which torch does not write: they may unpack to any size.

    Raises:
        ValueError: names the file.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        members = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile:
        return  # the reader says what is wrong
    total = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or total > path.stat().st_size:
        raise ValueError(
            f"{path} of {path.stat().st_size} bytes unpacks to {total}; expected a checkpoint as torch.save writes it, "
            "which is not compressed"
        )


# Models ---------------------------------------------------------------------------------------------------------------

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
    from .io import read_json

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
