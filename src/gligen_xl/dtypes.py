"""Number formats by the names that people know them by."""

from __future__ import annotations

from .suggestions import did_you_mean

DTYPES = ("float32", "float16", "bfloat16")  # as torch calls them
_SHORT = {"fp32": "float32", "float": "float32", "full": "float32", "f32": "float32",
          "fp16": "float16", "half": "float16", "f16": "float16", "bf16": "bfloat16"}  # fmt: skip


def dtype_name(text: str) -> str:
    """Return torch's name of a number format: "fp16", "half" and "torch.float16" are "float16".

    Raises:
        ValueError: there is no such format.
    """
    name = text.strip().lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        known = [*DTYPES, "fp32", "fp16", "bf16", "half"]
        raise ValueError(f"{text!r} is no number format; expected one of {', '.join(known)}{did_you_mean(name, known)}")
    return name
