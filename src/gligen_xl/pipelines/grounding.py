"""Grounding for a diffusers pipeline: layouts become tokens, and the U-Net is handed them while the schedule says so.

Nothing of diffusers' sampling loop is repeated here. At every step the loop reads the pipeline's property
`cross_attention_kwargs`; the mixin overrides it and adds the grounding tokens where they are due. A callback at the
end of each step counts the steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from huggingface_hub import snapshot_download
from torch import Tensor

from ..adapter import (
    AdapterConfig,
    adapter_config,
    adopt_gated,
    detach,
    detached,
    is_attached,
    load_adapter,
    reattach,
    save_adapter,
    set_adapter_scale,
)
from ..adapter.model import CONFIG_NAME, WEIGHTS_NAME, names_repository
from ..files import read_json, write_json
from ..layout import validate
from ..phrases import embed_phrases, phrase_width
from .schedule import GroundingSchedule

ADAPTER_SUBFOLDER = "gligen_adapter"


@dataclass
class _Grounding:
    """What one call of the pipeline is grounded with, and how far it has come."""

    tokens: dict[str, Tensor]
    schedule: GroundingSchedule
    step: int = 0


class GroundingMixin(DiffusionPipeline):
    """Put before a diffusers text-to-image class to give it phrases in boxes."""

    _grounding: _Grounding | None = None
    _gligen_scale: float = 1.0

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        gligen_phrases: Sequence[str] | Sequence[Sequence[str]] | None = None,
        gligen_boxes: Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]] | None = None,
        gligen_scheduled_sampling_beta: float | Sequence[float] = 0.3,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate pictures, each phrase in its box.

        Args:
            prompt: as for diffusers, whose every other argument is accepted too.
            gligen_phrases: what stands in each box. One list serves all pictures; a list of lists gives one to each
                prompt, or to each picture (prompts x num_images_per_prompt).
            gligen_boxes: nested like the phrases; a box is (x0, y0, x1, y1), 0-1, (0, 0) at the top left.
            gligen_scheduled_sampling_beta: share of the steps that are grounded, from the first on; or the shares
                (on, decay, off), the gates fading linearly in the second.
            strict: more boxes than the adapter has slots are an error; otherwise the first are kept, with a warning.

        Raises:
            ValueError: a layout that cannot be drawn, or boxes without an adapter. Nothing has run by then.
        """
        schedule = GroundingSchedule.parse(gligen_scheduled_sampling_beta)
        layouts = self._layouts(prompt, gligen_phrases, gligen_boxes, kwargs, strict)
        if not any(phrases for phrases, _ in layouts):
            return super().__call__(prompt, **kwargs)  # type: ignore[misc]
        with self._grounded(self._grounding_tokens(layouts), schedule):
            return super().__call__(prompt, **self._counting(kwargs))  # type: ignore[misc]

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """diffusers' own, with the grounding tokens while they are on. Read by the sampling loop at every step."""
        own: dict[str, Any] | None = super().cross_attention_kwargs  # type: ignore[misc]
        steps = getattr(self, "_num_timesteps", None)  # not there before the first loop of the first call
        if (grounding := self._grounding) is None or not steps:
            return own
        scale = grounding.schedule.scale(grounding.step, steps)
        if not scale:
            return own
        if grounding.schedule.decay:
            set_adapter_scale(self.unet, self._gligen_scale * scale)
        tokens = grounding.tokens
        if self.do_classifier_free_guidance:  # the negative half stands first, with every slot empty
            tokens = {name: torch.cat([torch.zeros_like(value), value]) for name, value in tokens.items()}
        return {**(own or {}), "gligen": tokens}

    # Layouts ----------------------------------------------------------------------------------------------------

    def _layouts(
        self, prompt: Any, phrases: Any, boxes: Any, kwargs: dict[str, Any], strict: bool
    ) -> list[tuple[tuple[str, ...], tuple]]:
        """Checked phrases and boxes of every picture of the call, in diffusers' order."""
        if (phrases is None) != (boxes is None):
            given, lacking = (
                ("gligen_boxes", "gligen_phrases") if phrases is None else ("gligen_phrases", "gligen_boxes")
            )
            raise ValueError(f"{given} without {lacking}; give both, one box a phrase")
        if phrases is None:
            return []
        phrases, boxes = _plain(phrases), _plain(boxes)
        embeds = kwargs.get("prompt_embeds")
        num_prompts = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list | tuple) else 1
        per_prompt = kwargs.get("num_images_per_prompt") or 1
        num_pictures = num_prompts * per_prompt
        if _is_nested(phrases):
            if not _is_nested(boxes, depth=3):
                raise ValueError(
                    "gligen_phrases is a list of lists; gligen_boxes must nest alike, a list of boxes each"
                )
            if len(phrases) != len(boxes):
                raise ValueError(f"gligen_phrases are for {len(phrases)} pictures, gligen_boxes for {len(boxes)}")
            if len(phrases) not in (num_prompts, num_pictures):
                raise ValueError(
                    f"{len(phrases)} layouts for {num_prompts} prompts x {per_prompt} pictures; expected one layout "
                    f"for all, {num_prompts} (one a prompt) or {num_pictures} (one a picture)"
                )
            layouts = [_validated(p, b, f"layout {k}: ") for k, (p, b) in enumerate(zip(phrases, boxes, strict=True))]
            repeats = num_pictures // len(layouts)
            layouts = [layout for layout in layouts for _ in range(repeats)]
        else:
            layouts = [_validated(phrases, boxes, "")] * num_pictures
        if not any(phrases for phrases, _ in layouts):
            return layouts
        if not is_attached(self.unet):
            raise ValueError(
                "gligen_boxes were given, but the U-Net carries no GLIGEN adapter; "
                "call pipeline.load_gligen_adapter(folder_or_repository) first"
            )
        slots = adapter_config(self.unet).slots
        if (most := max(len(phrases) for phrases, _ in layouts)) > slots:
            message = f"a layout has {most} objects, the adapter {slots} slots"
            if strict:
                raise ValueError(f"{message}; leave some out")
            warnings.warn(f"{message}; the first {slots} are kept", stacklevel=3)
            layouts = [(phrases[:slots], boxes[:slots]) for phrases, boxes in layouts]
        return layouts

    @torch.no_grad()
    def _grounding_tokens(self, layouts: list[tuple[tuple[str, ...], tuple]]) -> dict[str, Tensor]:
        """The position net's inputs for B pictures with N slots each.

        Returns:
            boxes (B, N, 4) float32, masks (B, N), positive_embeddings (B, N, phrase_dim).
        """
        config, device = adapter_config(self.unet), self._execution_device
        encoders = [
            (self.tokenizer, self.text_encoder),
            (getattr(self, "tokenizer_2", None), getattr(self, "text_encoder_2", None)),
        ]
        tokenizers, text_encoders = zip(*[pair for pair in encoders if pair[1] is not None], strict=True)
        if (width := phrase_width(text_encoders)) != config.phrase_dim:
            raise ValueError(
                f"the adapter reads phrase embeddings of width {config.phrase_dim}, these text encoders give {width}: "
                "it was trained on another base model"
            )
        wanted = [phrase for phrases, _ in layouts for phrase in phrases]
        embeddings = embed_phrases(wanted, tokenizers, text_encoders, device)
        tokens = {
            "boxes": torch.zeros(len(layouts), config.slots, 4, device=device),
            "masks": torch.zeros(len(layouts), config.slots, device=device),
            "positive_embeddings": torch.zeros(
                len(layouts), config.slots, config.phrase_dim, device=device, dtype=embeddings.dtype
            ),
        }
        first = 0
        for k, (phrases, boxes) in enumerate(layouts):
            if n := len(phrases):
                tokens["boxes"][k, :n] = torch.tensor(boxes, device=device)
                tokens["masks"][k, :n] = 1
                tokens["positive_embeddings"][k, :n] = embeddings[first : first + n].to(device)
                first += n
        return tokens

    # The schedule -----------------------------------------------------------------------------------------------

    @contextmanager
    def _grounded(self, tokens: dict[str, Tensor], schedule: GroundingSchedule) -> Iterator[None]:
        self._grounding = _Grounding(tokens, schedule)
        try:
            yield
        finally:
            self._grounding = None
            if schedule.decay:
                set_adapter_scale(self.unet, self._gligen_scale)

    def _counting(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments with a callback that counts steps and then runs the user's."""
        users: Callable | None = kwargs.get("callback_on_step_end")

        def count(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert self._grounding is not None
            self._grounding.step = step + 1
            return users(pipeline, step, timestep, tensors) if users is not None else {}

        kwargs = {**kwargs, "callback_on_step_end": count}
        if isinstance(users, PipelineCallback | MultiPipelineCallbacks):
            kwargs["callback_on_step_end_tensor_inputs"] = users.tensor_inputs
        elif users is None:
            kwargs["callback_on_step_end_tensor_inputs"] = []
        return kwargs

    # The adapter ------------------------------------------------------------------------------------------------

    def load_gligen_adapter(self, source: str | Path, *, subfolder: str | None = None, **hub: Any) -> AdapterConfig:
        """Attach the adapter of a folder or Hub repository, in place of one that is there.

        Args:
            subfolder: where in the folder or repository it lies.
            hub: revision, cache_dir, token, local_files_only.
        """
        former = detach(self.unet) if is_attached(self.unet) else None
        try:
            config = load_adapter(self.unet, source, subfolder=subfolder, **hub)
        except BaseException:
            if former is not None:
                reattach(self.unet, former)
            raise
        self._gligen_scale = 1.0
        return config

    def save_gligen_adapter(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the adapter alone, to be loaded onto any model of this base family."""
        save_adapter(self.unet, folder, dtype=dtype)

    def unload_gligen_adapter(self) -> None:
        """Take the adapter off; the pipeline is the plain one again."""
        detach(self.unet)

    def set_gligen_adapter_scale(self, scale: float) -> None:
        """Multiply the adapter's gates: 1 as trained, 0 off."""
        set_adapter_scale(self.unet, scale)
        self._gligen_scale = float(scale)

    # Folders ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any):  # type: ignore[override]
        """Load a pipeline folder or Hub repository, with its adapter where it has one.

        Understood are an ordinary pipeline, one with an adapter in the subfolder `gligen_adapter`, one whose U-Net was
        saved with `attention_type="gated"` (as `jiuntian/gligen-xl-1024`), and the name "shapes", the embedded model.
        Code that lies in a repository is never run.

        Args:
            kwargs: those of diffusers' `from_pretrained`; `dtype` (or `torch_dtype`) is float32 by default.
        """
        if kwargs.pop("trust_remote_code", False):
            warnings.warn("trust_remote_code is ignored: code of a repository is never run", stacklevel=2)
        # One type for all parts: left to itself, transformers keeps the files' type and diffusers does not.
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or torch.float32)
        folder = _local_folder(pretrained_model_name_or_path, kwargs)
        pipeline = super().from_pretrained(str(folder), **kwargs)
        if (folder / ADAPTER_SUBFOLDER / WEIGHTS_NAME).is_file():
            load_adapter(pipeline.unet, folder, subfolder=ADAPTER_SUBFOLDER)
        elif pipeline.unet.config.attention_type == "gated":
            adopt_gated(pipeline.unet)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' own; a class named together with a file of the repository is read as the class alone."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the plain pipeline, which diffusers loads too, and the adapter in its subfolder beside it."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub would leave the adapter behind; save, then upload the whole folder")
        with detached(self.unet):
            super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory) / "model_index.json"
        plain = next(base for base in type(self).__mro__ if base.__module__.startswith("diffusers."))
        write_json(index, {**read_json(index), "_class_name": plain.__name__})
        adapter = Path(save_directory) / ADAPTER_SUBFOLDER
        if is_attached(self.unet):
            save_adapter(self.unet, adapter)
        else:  # one that a former pipeline left there is not this one's
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (adapter / name).unlink(missing_ok=True)


def _local_folder(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """The pipeline's folder on this machine; what is fetched from the Hub holds no code."""
    if str(name) == "shapes":
        from ..shapes.model import model_folder

        return model_folder()
    if (folder := Path(name)).is_dir():
        return folder
    if not names_repository(name):
        raise FileNotFoundError(
            f"no pipeline folder {name}; expected a folder, a Hub repository (owner/name), or shapes (embedded)"
        )
    hub = {
        key: kwargs.pop(key)
        for key in ("revision", "cache_dir", "token", "local_files_only", "force_download")
        if key in kwargs
    }
    wanted = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
    variants = [] if kwargs.get("variant") else ["*.fp16.*", "*.bf16.*", "*.non_ema.*"]
    return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=variants, **hub))


def _validated(phrases: Any, boxes: Any, where: str) -> tuple[tuple[str, ...], tuple]:
    try:
        return validate(phrases, boxes)
    except ValueError as error:
        raise ValueError(f"gligen {where}{error}") from error


def _plain(value: Any) -> Any:
    """Arrays and tensors, also in lists, as lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_nested(value: Any, depth: int = 2) -> bool:
    """Whether a list holds lists, `depth` deep, as far as its first non-empty items tell."""
    if depth == 1:
        return isinstance(value, Sequence) and not isinstance(value, str)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    inner = [item for item in value if isinstance(item, str) or not isinstance(item, Sequence) or len(item)]
    if not inner:
        return len(value) > 0
    return all(_is_nested(item, depth - 1) for item in inner)
