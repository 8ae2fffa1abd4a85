"""Grounding for a diffusers pipeline: boxes become tokens (`tokens.py`), which the U-Net reads as long as the schedule
says so.

Nothing of diffusers' sampling loop is repeated here. At every step the loop reads the pipeline's property
`cross_attention_kwargs`; the mixin overrides it and adds the grounding tokens. A callback at the end of each step
counts the steps, and keeps what is outside the boxes when inpainting.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..adapter import GligenAdapter
from ..layout import Layout, validate_phrases
from ..worlds import all_worlds
from .encoders import check_phrase_width, check_prompt_encoders, encode_phrases, missing_encoders
from .inpaint import KeptImage, images_to_keep, kept_image
from .layouts import ImageLayout, image_layouts, nested_phrases, split_layouts, warn_of_unused_settings
from .loading import AdapterLoaderMixin
from .schedule import GroundingSchedule, step_of
from .signature import bound_arguments, with_merged_signature
from .tokens import grounding_tokens, with_negative_half


@dataclass
class _Grounding:
    """The grounding of the call that runs."""

    tokens: dict[str, Tensor]
    schedule: GroundingSchedule
    kept: KeptImage | None = None
    evaluation: int = 0  # of the U-Net; some schedulers run it several times a step


class GroundingMixin(AdapterLoaderMixin):
    """Put before a diffusers class of Stable Diffusion (XL) to give it phrases in boxes."""

    _grounding: _Grounding | None = None

    def _call(
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
    ) -> Any:
        """Generate images, each phrase in its box.

        Args:
            prompt: as for diffusers, whose every other argument is accepted too.
            gligen_phrases: what to draw in each box. One list serves all images; a list of lists gives one to each
                prompt, or to each image (prompts x num_images_per_prompt). If only some images have boxes, those
                without are given null tokens, and are not the plain pipeline's.
            gligen_boxes: nested like the phrases; a box is (x0, y0, x1, y1), 0-1, (0, 0) at the top left. It means the
                same place at any width and height.
            gligen_layouts: instead of both, a `Layout` for all, or a list of them. Their prompts are used if no prompt
                is given; sizes, seeds and negative prompts are the call's.
            gligen_phrase_embeds: instead of phrases, or of those of the layouts, what `encode_gligen_phrases` returned
                for them: (n, phrase_dim) for n boxes of all images, or a list of such, one per prompt or per image.
                Then no text encoder is needed.
            gligen_scheduled_sampling_beta: share of the steps that are grounded, from the first on, and at least that
                one unless it is 0; or the shares (on, decay, off), the gates fading linearly in the second. With a
                strength or `denoising_end`, the share is of the steps that run.
            gligen_inpaint_image: a PIL image, or one for each; cropped at the centre to the shape of the result. What
                is outside the boxes stays as in it. For text-to-image; pipelines that start from an image have
                their own arguments.
            strict: more boxes than the adapter has slots are an error; otherwise the first are used, with a warning.

        Raises:
            ValueError: a layout that cannot be drawn, or boxes without an adapter. No model has run by then.
        """
        plain = super().__call__  # type: ignore[misc]
        call = bound_arguments(GroundingMixin._call, plain, prompt, args, kwargs)
        schedule = GroundingSchedule.parse(gligen_scheduled_sampling_beta)
        if gligen_layouts is not None:
            if gligen_phrases is not None or gligen_boxes is not None:
                raise ValueError("gligen_layouts is used in place of gligen_phrases and gligen_boxes; give one of them")
            prompts, gligen_phrases, gligen_boxes = split_layouts(gligen_layouts)
            warn_of_unused_settings(gligen_layouts, call)
            if call.get("prompt") is None and call.get("prompt_embeds") is None:
                call["prompt"] = prompts
            if gligen_phrase_embeds is not None:
                gligen_phrases = None
        self._check_parts(call)
        layouts = image_layouts(call, gligen_phrases, gligen_phrase_embeds, gligen_boxes)
        grounded = any(len(layout) for layout in layouts)
        if grounded:
            layouts = self._fit_to_adapter(layouts, strict)
            if call.get("padding_mask_crop") is not None:
                raise ValueError("padding_mask_crop crops the image that the boxes refer to; crop it yourself")
        images = None
        if gligen_inpaint_image is not None:
            known = inspect.signature(plain).parameters
            images = images_to_keep(self, call, known, layouts, gligen_inpaint_image)
        for world in all_worlds():
            world.check_call(self, call, layouts)
        if not grounded:
            return plain(**call)
        lora_scale = (call.get("cross_attention_kwargs") or {}).get("scale")
        tokens = grounding_tokens(self, layouts, GligenAdapter.of(self.unet).config, lora_scale)
        grounding = _Grounding(tokens, schedule)
        if images is not None:
            grounding.kept = kept_image(self, call, layouts, images)
            call["latents"] = grounding.kept.noise
        with self._grounded(grounding):
            return plain(**self._with_callback(call, grounding))

    __call__ = _call  # each class over one of diffusers' has its own, which shows the arguments of both

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        following = cls.__mro__[cls.__mro__.index(GroundingMixin) + 1 :]
        plain = next((vars(base)["__call__"] for base in following if "__call__" in vars(base)), None)
        if cls.__call__ is GroundingMixin._call and plain is not None:
            cls.__call__ = with_merged_signature(GroundingMixin._call, plain)

    @torch.no_grad()
    def encode_gligen_phrases(
        self,
        phrases: Sequence[str] | Sequence[Sequence[str]] | Layout | Sequence[Layout],
        *,
        lora_scale: float | None = None,
    ) -> Tensor | list[Tensor]:
        """Embed phrases before a call, to be given to it as `gligen_phrase_embeds`.

        Only the text encoders and tokenizers are needed; afterwards they can be freed.

        Args:
            phrases: as `gligen_phrases` or `gligen_layouts` of the call.
            lora_scale: of LoRAs on the text encoders, as `{"scale": ...}` of the call.

        Returns:
            (n, phrase_dim) for n phrases; for a list of lists or of layouts a list, one tensor for each.

        Raises:
            ValueError: a text encoder is not loaded, or phrases are not strings.
        """
        if missing := missing_encoders(self):
            raise ValueError(f"phrases need {' and '.join(missing)}, which this pipeline is without; embed them before")
        if isinstance(phrases, Layout) or (
            isinstance(phrases, list | tuple) and any(isinstance(one, Layout) for one in phrases)
        ):
            _, phrases, _ = split_layouts(phrases)  # type: ignore[arg-type]
        if not nested_phrases(phrases):
            return encode_phrases(self, list(validate_phrases(phrases)), lora_scale)
        each = [validate_phrases(of_image) for of_image in list(phrases)]  # type: ignore[arg-type]
        together = [phrase for of_image in each for phrase in of_image]
        return list(encode_phrases(self, together, lora_scale).split([len(of_image) for of_image in each]))

    # Before a model runs ----------------------------------------------------------------------------------------

    def _check_parts(self, call: dict[str, Any]) -> None:
        """Check that the parts that this call needs are loaded, and that the U-Net fits the pipeline."""
        for name in ("unet", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"this pipeline is without its {name}; load it before generating")
        if self.vae is None and call.get("output_type", "pil") != "latent":
            raise ValueError("this pipeline is without its vae; load it, or ask for output_type='latent'")
        if self.vae is not None and "Inpaint" not in type(self).__name__:
            reads, given = self.unet.config["in_channels"], self.vae.config["latent_channels"]
            if reads != given:
                raise ValueError(
                    f"this U-Net reads {reads} channels, and {type(self).__name__} gives it {given}; an inpainting "
                    "model of GLIGEN needs its adapter (load_gligen_adapter), another one an Inpaint pipeline"
                )
        check_prompt_encoders(self, call)
        if "gligen" in (call.get("cross_attention_kwargs") or {}):
            raise ValueError(
                "cross_attention_kwargs holds 'gligen', which this pipeline makes of gligen_phrases and gligen_boxes"
            )

    def _fit_to_adapter(self, layouts: list[ImageLayout], strict: bool) -> list[ImageLayout]:
        """Check that the adapter can read the layouts, and drop the objects that it has no slots for."""
        if (adapter := GligenAdapter.find(self.unet)) is None:
            raise ValueError(
                "gligen_boxes were given, but the U-Net carries no GLIGEN adapter; "
                "call pipeline.load_gligen_adapter(folder_or_repository) first (--adapter on the command line)"
            )
        width, slots = adapter.config.phrase_dim, adapter.config.slots
        embeds = [layout.embeds for layout in layouts if layout.embeds is not None]
        if wrong := [rows for rows in embeds if rows.shape[1] != width]:
            raise ValueError(
                f"gligen_phrase_embeds are of width {wrong[0].shape[1]}, the adapter reads {width}; they come from "
                "other text encoders"
            )
        if not embeds:
            if missing := missing_encoders(self, width):
                raise ValueError(
                    f"phrases need {' and '.join(missing)}, which this pipeline is without; embed them before the "
                    "encoders are freed (encode_gligen_phrases), and give them as gligen_phrase_embeds"
                )
            check_phrase_width(self, adapter.config, "the adapter")
        longest = max(layouts, key=len)
        if len(longest) <= slots:
            return layouts
        message = f"a layout has {len(longest)} objects, the adapter {slots} slots"
        if strict:
            raise ValueError(f"{message}; leave some out")
        dropped = ", ".join(map(repr, longest.phrases[slots:]))
        without = f", without {dropped if len(dropped) <= 200 else dropped[:197] + '...'}" if dropped else ""
        warnings.warn(f"{message}; the first {slots} are kept{without}", stacklevel=4)
        return [layout.first(slots) for layout in layouts]

    # While the loop runs ----------------------------------------------------------------------------------------

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """diffusers' own, with the grounding tokens while they are on. The sampling loop reads it at every step."""
        own: dict[str, Any] | None = super().cross_attention_kwargs  # type: ignore[misc]
        if (grounding := self._grounding) is None or not (evaluations := self._num_evaluations()):
            return own
        step, last = (step_of(self.scheduler, k) for k in (grounding.evaluation, evaluations - 1))
        scale = grounding.schedule.scale(step, last + 1)
        if not scale:
            return own
        if grounding.schedule.decay:
            GligenAdapter.of(self.unet).fade(scale)
        tokens = with_negative_half(grounding.tokens) if self.do_classifier_free_guidance else grounding.tokens
        return {**(own or {}), "gligen": tokens}

    def _num_evaluations(self) -> int:
        """Return how often the loop of this call runs the U-Net; 0 before the first call has reached its loop."""
        number = getattr(self, "_num_timesteps", 0)
        end = getattr(self, "denoising_end", None)
        if isinstance(end, float) and 0 < end < 1:  # the ControlNet pipeline counts before it cuts
            whole = self.scheduler.config.num_train_timesteps
            cutoff = round(whole - end * whole)
            number = min(number, int((self.scheduler.timesteps >= cutoff).sum()))
        return number

    @contextmanager
    def _grounded(self, grounding: _Grounding) -> Iterator[None]:
        """Ground the U-Net within the block."""
        self._grounding, adapter = grounding, GligenAdapter.of(self.unet)
        conv = adapter.inpaint_conv
        if conv is not None:  # for the whole call, as in GLIGEN: the schedule ends the fusers alone
            conv.active, conv.kept = True, grounding.kept.channels() if grounding.kept is not None else None
        try:
            yield
        finally:
            self._grounding = None
            if grounding.schedule.decay:
                adapter.fade(1.0)
            if conv is not None:
                conv.active, conv.kept = False, None

    def _with_callback(self, call: dict[str, Any], grounding: _Grounding) -> dict[str, Any]:
        """Add a callback that counts steps, blends the kept image in, and then runs the user's callback."""
        users: Callable | None = call.get("callback_on_step_end")
        inputs: list[str] = ["latents"] if users is not None else []
        if isinstance(users, PipelineCallback | MultiPipelineCallbacks):
            inputs = users.tensor_inputs
        elif users is not None and call.get("callback_on_step_end_tensor_inputs") is not None:
            inputs = call["callback_on_step_end_tensor_inputs"]
        kept = grounding.kept

        def at_step_end(pipeline: Any, evaluation: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            grounding.evaluation = evaluation + 1
            changed = {}
            if kept is not None:
                changed["latents"] = tensors["latents"] = kept.blend(tensors["latents"], self.scheduler, evaluation)
            if users is not None:
                changed |= users(pipeline, evaluation, timestep, {name: tensors[name] for name in inputs})
            return changed

        names = list(dict.fromkeys([*inputs, *(["latents"] if kept is not None else [])]))
        return {**call, "callback_on_step_end": at_step_end, "callback_on_step_end_tensor_inputs": names}
