"""Versions of what results depend on."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """By name: Python, this library, and those under it."""
    names = ("gligen-xl", "torch", "diffusers", "transformers", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
