"""A short name for the weights of a model."""

from __future__ import annotations

import hashlib

import torch

from .attach import is_quantised


def fingerprint(model: torch.nn.Module) -> str:
    """Of names, shapes and the first numbers of each tensor; of quantised ones without their numbers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        first = [] if is_quantised(value) else value.flatten()[:8].float().tolist()
        digest.update(f"{name} {tuple(value.shape)} {first}".encode())
    return digest.hexdigest()[:12]
