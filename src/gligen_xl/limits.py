"""The largest sizes that are accepted from outside, and checks of files that would not fit in memory.

The bounds are far above what any model, image or data set of the field has, and far below what fills a machine: a
larger value is a typing error, or a file made to do harm. They are checked before anything is allocated.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

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
