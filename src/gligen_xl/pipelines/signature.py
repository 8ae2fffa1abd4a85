"""The arguments of a grounded call, as `inspect`, `help()` and editors see them: diffusers' own, then ours by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, overload

from torch import Tensor

from ..layout import Layout

P = ParamSpec("P")
FORMER_ARGUMENTS = ("callback", "callback_steps")  # of earlier versions, which diffusers still reads


class GroundedCall(Protocol[P]):
    """For type checkers and editors: a call that takes the arguments of diffusers' pipeline, and ours by name."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    @overload
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        gligen_phrases: Sequence[str] | Sequence[Sequence[str]] | None = None,
        gligen_boxes: Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]] | None = None,
        gligen_layouts: Layout | Sequence[Layout] | None = None,
        gligen_phrase_embeds: Tensor | Sequence[Tensor] | None = None,
        gligen_scheduled_sampling_beta: float | Sequence[float] = 0.3,
        gligen_inpaint_image: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any: ...


def grounded_call(method: Callable[Concatenate[Any, P], Any]) -> Callable[[Any], GroundedCall[P]]:
    """Give a declaration the type of a grounded call over diffusers' `method`."""
    raise NotImplementedError  # never run: it is used under TYPE_CHECKING only


def with_merged_signature(own: Callable, plain: Callable) -> Callable:
    """Make `own`, a call that passes on to `plain` what it does not know, show the arguments of both.

    Those of `plain` come first and keep their order, so that positional arguments mean the same; then those that
    `own` adds, by name alone.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it becomes the method of that name
        return own(self, *args, **kwargs)

    theirs = list(inspect.signature(plain).parameters.values())
    names = {parameter.name for parameter in theirs}
    ours = [
        parameter
        for parameter in inspect.signature(own).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in names
    ]
    last = [parameter for parameter in theirs if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    merged = [parameter for parameter in theirs if parameter not in last]
    __call__.__signature__ = inspect.Signature([*merged, *ours, *last])  # type: ignore[attr-defined]
    __call__.__qualname__, __call__.__module__ = own.__qualname__.replace("_call", "__call__"), own.__module__
    of_plain = f"All other arguments are those of {plain.__qualname__}:"
    __call__.__doc__ = f"{inspect.getdoc(own)}\n\n{of_plain}\n\n{inspect.getdoc(plain) or ''}"
    return __call__


def bound_arguments(own: Callable, plain: Callable, prompt: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call as diffusers' method `plain` would take them.

    Raises:
        TypeError: neither `plain` nor `own` has such an argument; diffusers itself ignores some silently.
    """
    signature = inspect.signature(plain)
    positional = ([prompt] if prompt is not None or args else []) + list(args)
    call = signature.bind_partial(*positional, **kwargs).arguments
    further = [name for name, value in signature.parameters.items() if value.kind is inspect.Parameter.VAR_KEYWORD]
    for extra in (call.pop(name, {}) for name in further):
        if unknown := sorted(set(extra) - set(FORMER_ARGUMENTS)):
            known = dict.fromkeys([*signature.parameters, *inspect.signature(own).parameters])
            names = ", ".join(name for name in known if name not in ("self", "args", "kwargs"))
            raise TypeError(f"unknown arguments {unknown}; this pipeline takes {names}")
        call |= extra
    return call
