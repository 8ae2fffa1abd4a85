"""Finds schedulers by their usual names: euler_a, "DPM++ 2M Karras", dpm++2m-sde, or diffusers' class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..suggestions import did_you_mean
from .values import UsageError

_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
_PLUS = {"algorithm_type": "dpmsolver++", "solver_order": 2}

NAMED: Mapping[str, tuple[str, dict[str, Any]]] = {  # class, and settings
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++2m": (_MULTISTEP, _PLUS),
    "dpm++2m-sde": (_MULTISTEP, _SDE),
    "dpm++3m": (_MULTISTEP, {**_PLUS, "solver_order": 3}),
    "dpm++3m-sde": (_MULTISTEP, {**_SDE, "solver_order": 3}),
    "dpm++2s": (_SINGLESTEP, _PLUS),
    "dpm++sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
_SIGMAS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
_OTHER_NAMES = {"eulerancestral": "euler_a", "dpm2ancestral": "dpm2_a", "dpmsolver": "dpm++2m", "dpmpp": "dpm++2m",
                "dpmsolverpp": "dpm++2m", "dpm": "dpm++2m", "dpmpp2": "dpm++2m", "unipcmultistep": "unipc",
                "dpmppmultistep": "dpm++2m", "eulerdiscrete": "euler"}  # fmt: skip


def scheduler_settings(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a scheduler by any of its names, and the settings that differ from the model's own.

    Raises:
        UsageError: no scheduler has that name.
    """
    plain = _plain(name)
    classes = {_plain(kind): kind for kind, _ in NAMED.values()}
    if plain in classes:
        return classes[plain], {}
    if re.fullmatch(r"[A-Z]\w*Scheduler", name):  # another class of diffusers, which may have more
        return name, {}
    sigmas = next((ending for ending in _SIGMAS if plain.endswith(ending) and plain != ending), "")
    known = {_plain(other): other for other in NAMED}
    short = plain.removesuffix(sigmas)
    for form in (short, short.removeprefix("k"), short.removesuffix("scheduler")):
        form = _plain(_OTHER_NAMES.get(form, form))
        if form in known:
            kind, settings = NAMED[known[form]]
            extra = {_SIGMAS[sigmas]: True} if sigmas else {}
            return kind, {**settings, **extra}
    raise UsageError(
        f"--scheduler is {name!r}; expected {', '.join(NAMED)}, some of them with -karras, or a class of diffusers"
        f"{did_you_mean(name, [*NAMED, *classes.values()])}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def new_scheduler(name: str, former: Any) -> Any:
    """Make the scheduler of that name, with the settings of the model's own.

    Raises:
        UsageError: it does not suit the model, has no such sigmas, or needs a package that is missing.
    """
    import inspect

    import diffusers

    class_name, settings = scheduler_settings(name)
    compatible = {kind.__name__ for kind in former.compatibles} | {kind for kind, _ in NAMED.values()}
    if class_name not in compatible or not hasattr(diffusers, class_name):
        raise UsageError(
            f"--scheduler is {name!r}; this model takes {', '.join(sorted(compatible))}"
            f"{did_you_mean(class_name, compatible)}"
        )
    kind = getattr(diffusers, class_name)
    if "_backends" in vars(kind):
        raise UsageError(f"--scheduler {name} needs a package that is not installed: {', '.join(kind._backends)}")
    if lacking := sorted(set(settings) - set(inspect.signature(kind.__init__).parameters)):
        raise UsageError(f"--scheduler {name}: {class_name} has no {lacking[0]}; leave that ending out")
    try:
        return kind.from_config(former.config, **settings)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--scheduler {name}: {' '.join(str(error).split())}") from error
