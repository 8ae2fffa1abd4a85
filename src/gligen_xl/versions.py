"""The versions of the software that results depend on."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Return the versions of Python, this library, and those that it uses, by name."""
    names = ("gligen-xl", "torch", "diffusers", "transformers", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
