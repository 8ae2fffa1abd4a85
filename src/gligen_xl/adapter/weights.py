"""Checks of weights: whether they fit a model, are finite, are not quantised; and the fingerprint of a model.

Every error names the file or model and the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: object) -> None:
    """Check that weights have the names and shapes of a model, and are floating-point.

    Raises:
        ValueError: they do not; it names `source` and the first tensor that is wrong.
    """
    for name in sorted(expected.keys() & state.keys()):
        if is_quantised(state[name]):
            raise ValueError(
                f"{source} holds {name} as {kind_of(state[name])}; expected floating-point weights, not quantised "
                "ones. Quantise a base without them: modules_to_not_convert=['fuser', 'position_net']"
            )
        if expected[name].shape != state[name].shape:
            raise ValueError(
                f"{source} does not fit this U-Net: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(expected[name].shape)}; it is for another base model"
            )
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors, such as {missing[0]}"] if missing else []
        parts += [f"has {len(unknown)} that the U-Net does not, such as {unknown[0]}"] if unknown else []
        why = "is for another base model" if unknown else "is incomplete, or for another base model"
        raise ValueError(f"{source} does not fit this U-Net: it {' and '.join(parts)}; it {why}")


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Refuse floating-point weights with a value that is NaN or infinite; those on "meta" have no values to check.

    Raises:
        ValueError: names `source` and the tensor.
    """
    for name, value in weights.items():
        if value.is_meta or not value.is_floating_point() or not value.numel():
            continue
        value = value.detach().float() if value.itemsize == 1 else value.detach()  # float8 has no norm
        if not torch.linalg.vector_norm(value, ord=torch.inf).isfinite():
            raise ValueError(f"{source}: {name} holds values that are not finite numbers; download or make it again")


def missing_tensors(source: object, missing: list[str], where: str = "") -> ValueError:
    """Make the error for weights that lack tensors."""
    number = f"{len(missing)} tensors, such as {missing[0]}" if len(missing) > 1 else missing[0]
    return ValueError(f"{source} is incomplete: it lacks {number}{where}; download or make it again")


def is_quantised(value: Tensor) -> bool:
    """Tell whether a weight is no plain floating-point tensor: torchao and bitsandbytes have classes of their own."""
    return type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point()


def kind_of(value: Tensor) -> str:
    return f"{type(value).__name__} of {value.dtype}"


def fingerprint(model: nn.Module) -> str:
    """Hash the names, shapes and first eight numbers of a model's tensors; of quantised ones names and shapes only."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        first = [] if is_quantised(value) else value.flatten()[:8].float().tolist()
        digest.update(f"{name} {tuple(value.shape)} {first}".encode())
    return digest.hexdigest()[:12]
