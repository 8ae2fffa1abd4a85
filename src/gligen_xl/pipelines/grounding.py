"""Grounding for a diffusers pipeline: layouts become tokens, and the U-Net is handed them while the schedule says so.

Nothing of diffusers' sampling loop is repeated here. At every step the loop reads the pipeline's property
`cross_attention_kwargs`; the mixin overrides it and adds the grounding tokens where they are due. A callback at the
end of each step counts the steps, and keeps the outside of the boxes when inpainting.
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
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..adapter import AdapterConfig, adapter_config, fade_adapter, inpaint_conv, is_attached
from ..layout import Layout, validate_phrases
from ..text_embeddings import phrase_width
from ..worlds import all_worlds
from .encoders import absent_encoders, check_prompt_encoders, encode_phrases
from .inpaint import KeptImage, encode_images, fit_images, mask_as_trained, mask_outside
from .layouts import (
    ImageLayout,
    embeds_a_image,
    nested_phrases,
    numbers_of_images,
    one_a_image,
    taken_apart,
    warn_of_unused_settings,
)
from .loading import AdapterLoaderMixin
from .schedule import GroundingSchedule, step_of
from .signature import with_merged_signature

FORMER_ARGUMENTS = ("callback", "callback_steps")  # of former versions, which diffusers still reads


@dataclass
class _Grounding:
    """What one call of the pipeline is grounded with, and how far it has come."""

    tokens: dict[str, Tensor]
    schedule: GroundingSchedule
    kept: KeptImage | None = None
    evaluation: int = 0  # of the U-Net; some schedulers ask it several times a step


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
            gligen_phrases: what stands in each box. One list serves all images; a list of lists gives one to each
                prompt, or to each image (prompts x num_images_per_prompt).
                Beside images with boxes, one with none is given null tokens: it is not the plain pipeline's.
            gligen_boxes: nested like the phrases; a box is (x0, y0, x1, y1), 0-1, (0, 0) at the top left. It means the
                same place at any width and height.
            gligen_layouts: in place of both, a `Layout` for all, or a list of them. Their prompts serve where no prompt
                is given; sizes, seeds and negative prompts are the call's.
            gligen_phrase_embeds: in place of phrases, or of those of the layouts, what `encode_gligen_phrases` gave for
                them: (n, phrase_dim) for n boxes of all images, or a list of such, one a prompt or one an image.
                No text encoder is asked then.
            gligen_scheduled_sampling_beta: share of the steps that are grounded, from the first on, and at least that
                one unless it is 0; or the shares
                (on, decay, off), the gates fading linearly in the second. Of the steps that run: with a strength or
                `denoising_end`, of those.
            gligen_inpaint_image: a PIL image, or one for each; cropped at the centre to the shape of the result. What
                lies outside the boxes stays as in it. For text-to-image; pipelines that start from an image have
                their own ways.
            strict: more boxes than the adapter has slots are an error; otherwise the first are kept, with a warning.

        Raises:
            ValueError: a layout that cannot be drawn, or boxes without an adapter. Nothing has run by then.
        """
        call = _bound(super().__call__, prompt, args, kwargs)  # type: ignore[misc]
        schedule = GroundingSchedule.parse(gligen_scheduled_sampling_beta)
        if gligen_layouts is not None:
            if gligen_phrases is not None or gligen_boxes is not None:
                raise ValueError(
                    "gligen_layouts stands in place of gligen_phrases and gligen_boxes; give one of the two"
                )
            prompts, gligen_phrases, gligen_boxes = taken_apart(gligen_layouts)
            warn_of_unused_settings(gligen_layouts, call)
            if call.get("prompt") is None and call.get("prompt_embeds") is None:
                call["prompt"] = prompts
            if gligen_phrase_embeds is not None:
                gligen_phrases = None
        self._check_parts(call)
        layouts = self._layouts(call, gligen_phrases, gligen_boxes, gligen_phrase_embeds, strict)
        grounded = any(len(layout) for layout in layouts)
        if grounded and call.get("padding_mask_crop") is not None:
            raise ValueError("padding_mask_crop shows the model another image than the boxes are of; crop it yourself")
        images = None
        if gligen_inpaint_image is not None:
            images = self._images_to_keep(call, layouts, gligen_inpaint_image)
        for world in all_worlds():
            world.check_call(self, call, layouts)
        if not grounded:
            return super().__call__(**call)  # type: ignore[misc]
        grounding = _Grounding(self._grounding_tokens(call, layouts), schedule)
        if images is not None:
            grounding.kept = self._kept_image(call, layouts, images)
            call["latents"] = grounding.kept.noise
        with self._grounded(grounding):
            return super().__call__(**self._counting(call))  # type: ignore[misc]

    __call__ = _call  # each class over one of diffusers' has one of its own, which shows the arguments of both

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
        """Embed phrases ahead of a call, to be given to it as `gligen_phrase_embeds`.

        Only the text encoders and tokenizers are needed; afterwards they can be freed.

        Args:
            phrases: as `gligen_phrases` or `gligen_layouts` of the call.
            lora_scale: of LoRAs on the text encoders, as `{"scale": ...}` of the call.

        Returns:
            (n, phrase_dim) for n phrases; of a list of lists or of layouts a list, one tensor for each.

        Raises:
            ValueError: a text encoder is not there, or phrases that are none.
        """
        if absent := absent_encoders(self):
            raise ValueError(f"phrases need {' and '.join(absent)}, which this pipeline is without; embed them before")
        if isinstance(phrases, Layout) or (
            isinstance(phrases, list | tuple) and any(isinstance(one, Layout) for one in phrases)
        ):
            _, phrases, _ = taken_apart(phrases)  # type: ignore[arg-type]
        if not nested_phrases(phrases):
            return encode_phrases(self, list(validate_phrases(phrases)), lora_scale)
        each = [validate_phrases(of_image) for of_image in list(phrases)]  # type: ignore[arg-type]
        wanted = [phrase for of_image in each for phrase in of_image]
        if not wanted:
            raise ValueError("no phrases to embed")
        return list(encode_phrases(self, wanted, lora_scale).split([len(of_image) for of_image in each]))

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """diffusers' own, with the grounding tokens while they are on. Read by the sampling loop at every step."""
        own: dict[str, Any] | None = super().cross_attention_kwargs  # type: ignore[misc]
        if (grounding := self._grounding) is None or not (evaluations := self._num_evaluations()):
            return own
        step, steps = (step_of(self.scheduler, k) for k in (grounding.evaluation, evaluations - 1))
        scale = grounding.schedule.scale(step, steps + 1)
        if not scale:
            return own
        if grounding.schedule.decay:
            fade_adapter(self.unet, scale)
        tokens = grounding.tokens
        if self.do_classifier_free_guidance:  # the negative half stands first, with every slot empty
            tokens = {name: torch.cat([torch.zeros_like(value), value]) for name, value in tokens.items()}
        return {**(own or {}), "gligen": tokens}

    def _num_evaluations(self) -> int:
        """How often the loop of this call asks the U-Net; 0 before the first call has come to its loop."""
        number = getattr(self, "_num_timesteps", 0)
        end = getattr(self, "denoising_end", None)
        if isinstance(end, float) and 0 < end < 1:  # the ControlNet pipeline counts before it cuts
            whole = self.scheduler.config.num_train_timesteps
            cutoff = round(whole - end * whole)
            number = min(number, int((self.scheduler.timesteps >= cutoff).sum()))
        return number

    def _check_channels(self) -> None:
        """A U-Net that reads more than noisy latents belongs into another pipeline, or lacks its adapter."""
        if self.vae is None or "Inpaint" in type(self).__name__:
            return
        reads, given = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        if reads != given:
            raise ValueError(
                f"this U-Net reads {reads} channels, and {type(self).__name__} gives it {given}; an inpainting model "
                "of GLIGEN needs its adapter (load_gligen_adapter), another a pipeline of the Inpaint kind"
            )

    def _check_parts(self, call: dict[str, Any]) -> None:
        """Whether the parts that this call needs are there, before any of them runs."""
        for name in ("unet", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"this pipeline is without its {name}; load it before images are drawn")
        if self.vae is None and call.get("output_type", "pil") != "latent":
            raise ValueError("this pipeline is without its vae; load it, or ask for output_type='latent'")
        self._check_channels()
        check_prompt_encoders(self, call)
        if "gligen" in (call.get("cross_attention_kwargs") or {}):
            raise ValueError(
                "cross_attention_kwargs holds 'gligen', which this pipeline makes of gligen_phrases and gligen_boxes"
            )

    # Layouts ----------------------------------------------------------------------------------------------------

    def _layouts(self, call: dict[str, Any], phrases: Any, boxes: Any, embeds: Any, strict: bool) -> list[ImageLayout]:
        """Checked phrases (or their embeddings) and boxes of every image of the call, in diffusers' order."""
        if phrases is not None and embeds is not None:
            raise ValueError("gligen_phrase_embeds stand in place of gligen_phrases; give one of the two")
        if phrases is None and embeds is None and boxes is not None:
            raise ValueError("gligen_boxes without gligen_phrases; give both, one box a phrase")
        if boxes is None and (phrases is not None or embeds is not None):
            given = "gligen_phrases" if embeds is None else "gligen_phrase_embeds"
            raise ValueError(f"{given} without gligen_boxes; give both, one box a phrase")
        if boxes is None:
            return []
        layouts = []
        if embeds is None:
            layouts = one_a_image(phrases, boxes, *numbers_of_images(call))
            if not any(len(layout) for layout in layouts):
                return layouts
        if not is_attached(self.unet):
            raise ValueError(
                "gligen_boxes were given, but the U-Net carries no GLIGEN adapter; "
                "call pipeline.load_gligen_adapter(folder_or_repository) first (--adapter on the command line)"
            )
        config = adapter_config(self.unet)
        if embeds is None:
            if absent := self._absent_for_phrases(config):
                raise ValueError(
                    f"phrases need {' and '.join(absent)}, which this pipeline is without; embed them before the "
                    "encoders are freed (encode_gligen_phrases), and give gligen_phrase_embeds in their place"
                )
            self._check_phrase_width(config, "the adapter")
        else:
            layouts = embeds_a_image(embeds, boxes, *numbers_of_images(call), config.phrase_dim)
        slots = config.slots
        longest = max(layouts, key=len)
        if len(longest) > slots:
            message = f"a layout has {len(longest)} objects, the adapter {slots} slots"
            if strict:
                raise ValueError(f"{message}; leave some out")
            out = ", ".join(map(repr, longest.phrases[slots:]))
            without = f", without {out if len(out) <= 200 else out[:197] + '...'}" if out else ""
            warnings.warn(f"{message}; the first {slots} are kept{without}", stacklevel=4)
            layouts = [layout.first(slots) for layout in layouts]
        return layouts

    def _absent_for_phrases(self, config: AdapterConfig) -> list[str]:
        """Text encoders that phrases need and that are not there; none where those that are give the whole width."""
        absent, encoders = absent_encoders(self), self._text_parts()[1]
        return absent if absent and phrase_width(encoders) != config.phrase_dim else []

    @torch.no_grad()
    def _grounding_tokens(self, call: dict[str, Any], layouts: list[ImageLayout]) -> dict[str, Tensor]:
        """The position net's inputs for B images with N slots each.

        Returns:
            boxes (B, N, 4) float32, masks (B, N), positive_embeddings (B, N, phrase_dim).
        """
        config, device = adapter_config(self.unet), self._execution_device
        given = [layout.embeds for layout in layouts if layout.embeds is not None]
        if given:
            embeddings = torch.cat([rows.to(device) for rows in given])
        else:
            wanted = [phrase for layout in layouts for phrase in layout.phrases]
            embeddings = encode_phrases(self, wanted, (call.get("cross_attention_kwargs") or {}).get("scale"))
        tokens = {
            "boxes": torch.zeros(len(layouts), config.slots, 4, device=device),
            "masks": torch.zeros(len(layouts), config.slots, device=device),
            "positive_embeddings": torch.zeros(
                len(layouts), config.slots, config.phrase_dim, device=device, dtype=embeddings.dtype
            ),
        }
        first = 0
        for k, layout in enumerate(layouts):
            if n := len(layout):
                tokens["boxes"][k, :n] = torch.tensor(layout.boxes, device=device)
                tokens["masks"][k, :n] = 1
                tokens["positive_embeddings"][k, :n] = embeddings[first : first + n].to(device)
                first += n
        return tokens

    # Inpainting -------------------------------------------------------------------------------------------------

    def _images_to_keep(self, call: dict[str, Any], layouts: list[ImageLayout], image: Any) -> list[Image.Image]:
        """Of the size of the result, one for all or one for each; nothing has run yet."""
        arguments = inspect.signature(super().__call__).parameters  # type: ignore[misc]
        if "strength" in arguments:
            raise ValueError(
                f"gligen_inpaint_image is for text-to-image; {type(self).__name__} starts from its own image"
            )
        if "image" in arguments and not (call.get("height") and call.get("width")):
            raise ValueError("gligen_inpaint_image beside a control image needs height and width")
        if not all(len(layout) for layout in layouts) or not layouts:
            raise ValueError("gligen_inpaint_image keeps what lies outside the boxes; every image needs one or more")
        generators = call.get("generator")
        if isinstance(generators, list) and len(generators) != len(layouts):
            raise ValueError(f"{len(generators)} generators for {len(layouts)} images; expected one for each")
        usual = self.unet.config.sample_size
        usual = (usual, usual) if isinstance(usual, int) else usual
        sizes = zip((call.get("height"), call.get("width")), usual, strict=True)
        height, width = (given or cells * self.vae_scale_factor for given, cells in sizes)
        if height % 8 or width % 8:
            raise ValueError(f"height and width are {height} and {width}; expected multiples of 8")
        return fit_images(image, len(layouts), height, width)

    def _kept_image(self, call: dict[str, Any], layouts: list[ImageLayout], images: list[Image.Image]) -> KeptImage:
        device = self._execution_device
        latents = encode_images(self, images, device).to(self.unet.dtype)
        if (noise := call.get("latents")) is None:
            shape = (len(layouts), *latents.shape[1:])
            noise = randn_tensor(shape, generator=call.get("generator"), device=device, dtype=self.unet.dtype)
        boxes = [layout.boxes for layout in layouts]
        mask, seen = (make(boxes, *latents.shape[2:]).to(latents) for make in (mask_outside, mask_as_trained))
        return KeptImage(latents, noise.to(device), mask, seen)

    # The schedule -----------------------------------------------------------------------------------------------

    @contextmanager
    def _grounded(self, grounding: _Grounding) -> Iterator[None]:
        self._grounding = grounding
        conv = inpaint_conv(self.unet)
        if conv is not None:  # for the whole call, as in GLIGEN: the schedule ends the fusers alone
            conv.active, conv.kept = True, grounding.kept.channels() if grounding.kept is not None else None
        try:
            yield
        finally:
            self._grounding = None
            if grounding.schedule.decay:
                fade_adapter(self.unet, 1.0)
            if conv is not None:
                conv.active, conv.kept = False, None

    def _counting(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments with a callback that counts steps, keeps what is kept, and then runs the user's."""
        users: Callable | None = call.get("callback_on_step_end")
        wanted: list[str] = ["latents"] if users is not None else []
        if isinstance(users, PipelineCallback | MultiPipelineCallbacks):
            wanted = users.tensor_inputs
        elif users is not None and call.get("callback_on_step_end_tensor_inputs") is not None:
            wanted = call["callback_on_step_end_tensor_inputs"]
        grounding = self._grounding
        assert grounding is not None
        kept = grounding.kept

        def count(pipeline: Any, evaluation: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            grounding.evaluation = evaluation + 1
            changed = {}
            if kept is not None:
                changed["latents"] = tensors["latents"] = kept.blend(tensors["latents"], self.scheduler, evaluation)
            if users is not None:
                changed |= users(pipeline, evaluation, timestep, {name: tensors[name] for name in wanted})
            return changed

        inputs = list(dict.fromkeys([*wanted, *(["latents"] if kept is not None else [])]))
        return {**call, "callback_on_step_end": count, "callback_on_step_end_tensor_inputs": inputs}


# The call's arguments -----------------------------------------------------------------------------------------------


def _bound(method: Callable, prompt: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as diffusers' own call would take them; what it does not know is a TypeError."""
    signature = inspect.signature(method)
    given = ([prompt] if prompt is not None or args else []) + list(args)
    call = signature.bind_partial(*given, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # diffusers' own ignores in silence what it does not know
            further = call.pop(name, {})
            if unknown := sorted(set(further) - set(FORMER_ARGUMENTS)):
                known = [*signature.parameters, *inspect.signature(GroundingMixin._call).parameters]
                own = [name for name in dict.fromkeys(known) if name not in ("self", "args", "kwargs")]
                raise TypeError(f"unknown arguments {unknown}; this pipeline takes {', '.join(own)}")
            call |= further
    return call
