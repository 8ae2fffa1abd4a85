"""Adapters to the Hub: of a run, of one of its checkpoints, or of any folder; with a model card and images.

publish_adapter("runs/mine", "someone/mine", license="openrail++")
stage_adapter("runs/mine", "to-look-at", repository="someone/mine", license="openrail++")     # the same, not sent
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import read_adapter, write_adapter
from ..adapter.io import CONFIG_NAME, only_weights
from ..hub import upload
from ..io import read_json, whole_folder
from ..redact import public, redacted
from .card import CardFacts, is_repository, model_card
from .checkpoint import last_whole_adapter, list_checkpoints
from .record import RunRecord, image_bytes, is_run, read_run

CARD_NAME = "README.md"
_GATES = (".alpha_attn", ".alpha_dense")
_IMAGE_SIZE = {"width": 1600, "height": 6400, "quality": 90}


@dataclass(frozen=True)
class Source:
    """An adapter folder, and the run that it is of."""

    adapter: Path
    run: RunRecord | None


def publish_adapter(
    source: str | Path,
    repository: str,
    *,
    license: str,  # noqa: A002 - the Hub's name
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter with its card and images, as `stage_adapter` writes them.

    Args:
        private: of a repository that is made; the owner's default otherwise.
        token: by default the one of HF_TOKEN or `hf auth login`.

    Returns:
        The address of what was uploaded.

    Raises:
        OSError: no token, no network, no right to write there.
    """
    found = find_source(source)
    about = {"repository": repository, "license": license, "base_model": base_model, "dtype": dtype}
    with tempfile.TemporaryDirectory(dir=found.adapter.parent, prefix=".push-") as folder:  # where there is room for it
        stage_adapter(source, Path(folder) / "adapter", **about)
        try:
            return str(
                upload(Path(folder) / "adapter", repository, "Upload a GLIGEN adapter", private=private, token=token)
            )
        except Exception as error:  # of the network and of the Hub: each library has its own kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            reason = redacted(reason.replace(token, "...") if token else reason)
            raise OSError(
                f"{repository} was not uploaded: {reason}. It takes a network and a token with the right to write "
                "there (hf auth login, or HF_TOKEN); --dry_run FOLDER writes what would be uploaded"
            ) from error


def stage_adapter(
    source: str | Path,
    folder: str | Path,
    *,
    repository: str,
    license: str,  # noqa: A002 - the Hub's name
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the folder that is uploaded: the adapter, its card, images of its first and last validation.

    Paths of this machine are left out of it: of each its last name stays.

    Args:
        source: folder of a run (its finished adapter, else its last checkpoint's average), a checkpoint, or any adapter
            folder.
        folder: a new one.
        base_model: the repository of the base, where the run had it from a folder.
        dtype: to save in; as it is by default.

    Raises:
        FileNotFoundError: `source` holds no adapter.
        ValueError: a name is none of the Hub, or `folder` is not empty.
    """
    for name in filter(None, (repository, base_model)):
        if not is_repository(name):
            raise ValueError(f"{name!r} does not name a repository of the Hub; expected OWNER/NAME")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; choose a new folder")
    found = find_source(source)
    form, state, about = read_adapter(found.adapter, only_weights(found.adapter))
    about = public(about) | ({"base_model": base_model} if base_model else {})
    run = found.run and replace(found.run, config=public(found.run.config))
    with whole_folder(folder) as partial:
        write_adapter(partial, form, state, about, dtype=dtype)
        facts = CardFacts(
            repository=repository,
            license=license,
            form=form,
            parameters=sum(value.numel() for value in state.values()),
            about=about,
            base_model=base if isinstance(base := about.get("base_model"), str) else None,
            gate=_mean_gate(state),
            run=run,
            images=_write_images(run, partial) if run else {},
        )
        (partial / CARD_NAME).write_text(model_card(facts), encoding="utf-8")
    return folder


def _mean_gate(state: Mapping[str, Tensor]) -> float | None:
    """Return mean |tanh| of the gates among an adapter's weights."""
    gates = [value.double().tanh().abs().mean().item() for name, value in state.items() if name.endswith(_GATES)]
    return sum(gates) / len(gates) if gates else None


def find_source(source: str | Path) -> Source:
    """Return the adapter that is meant, and its run up to there."""
    folder = Path(source)
    if not (folder / CONFIG_NAME).is_file():
        if not is_run(folder):
            raise FileNotFoundError(f"{folder} is neither the folder of a run nor an adapter (it has no {CONFIG_NAME})")
        finished = folder / "adapter"
        whole = finished if (finished / CONFIG_NAME).is_file() else last_whole_adapter(folder)
        if whole is None:
            raise FileNotFoundError(f"the run in {folder} has no finished adapter and no checkpoint yet")
        folder = whole
    of_run = folder.resolve().name == "adapter" or folder.resolve() in list_checkpoints(folder.resolve().parent)
    if not of_run or not is_run(folder.resolve().parent):
        return Source(folder, None)
    description = read_json(folder / CONFIG_NAME)
    samples = description.get("samples") if isinstance(description, dict) else None
    run = read_run(folder.resolve().parent)
    return Source(folder, run if not isinstance(samples, int) else run.until(samples))


def _write_images(run: RunRecord, folder: Path) -> dict[str, int]:
    """Return the images of the first and the last validation that can be read; file -> samples seen."""
    readable = {}
    for order in (sorted(run.images), sorted(run.images, reverse=True)):
        for samples in order:
            with suppress(OSError):  # half of a file: the next one is taken
                readable[samples] = readable.get(samples) or image_bytes(run.images[samples], **_IMAGE_SIZE)
                break
    written = {}
    for samples, image in sorted(readable.items()):
        file = f"images/validation-{samples:08d}.jpg"
        (folder / "images").mkdir(exist_ok=True)
        (folder / file).write_bytes(image)
        written[file] = samples
    return written
