"""gligen-xl: put objects where you draw them.

    from gligen_xl import StableDiffusionXLGLIGENPipeline

Names are imported on first use, so that `import gligen_xl` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .quiet import hold_back_notes

if TYPE_CHECKING:
    from .adapter import AdapterConfig
    from .layout import Layout
    from .pipelines import (
        StableDiffusionGLIGENInpaintPipeline,
        StableDiffusionGLIGENPipeline,
        StableDiffusionXLGLIGENControlNetImg2ImgPipeline,
        StableDiffusionXLGLIGENControlNetPipeline,
        StableDiffusionXLGLIGENImg2ImgPipeline,
        StableDiffusionXLGLIGENInpaintPipeline,
        StableDiffusionXLGLIGENPipeline,
    )

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "Layout",
    "StableDiffusionGLIGENInpaintPipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionXLGLIGENControlNetImg2ImgPipeline",
    "StableDiffusionXLGLIGENControlNetPipeline",
    "StableDiffusionXLGLIGENImg2ImgPipeline",
    "StableDiffusionXLGLIGENInpaintPipeline",
    "StableDiffusionXLGLIGENPipeline",
    "__version__",
]

hold_back_notes()

_HOMES = {"AdapterConfig": ".adapter", "Layout": ".layout"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, ".pipelines"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
