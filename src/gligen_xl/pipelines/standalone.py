"""Phrases in boxes for Stable Diffusion (XL): a pipeline in one file, which needs diffusers and transformers only.

`gligen-xl export` writes it into its folders, together with a U-Net with `attention_type="gated"`:

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    image = pipeline("grass with a dog", gligen_phrases=["a dog"], gligen_boxes=[[0.1, 0.6, 0.4, 0.9]]).images[0]

The library gligen-xl, which loads the same folders, does more: adapters to load and scale, inpainting in boxes,
image-to-image, ControlNets.
"""

import inspect
import math
from contextlib import contextmanager

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


class GroundingMixin:
    """Adds `gligen_phrases` (or `gligen_phrase_embeds`), `gligen_boxes` and `gligen_scheduled_sampling_beta` to a
    text-to-image call."""

    _grounding = None  # of the call that runs: tokens, shares of the steps, U-Net evaluations so far

    def __init_subclass__(cls, **settings):
        """Show diffusers' arguments and then these in the signature of each class's call."""
        super().__init_subclass__(**settings)
        own = GroundingMixin.__call__
        theirs = inspect.signature(super().__call__)
        further = [value for value in theirs.parameters.values() if value.kind is value.VAR_KEYWORD]
        named = [value for value in inspect.signature(own).parameters.values() if value.kind is value.KEYWORD_ONLY]
        parameters = [value for value in theirs.parameters.values() if value not in further]

        def call(self, *args, **kwargs):
            return own(self, *args, **kwargs)

        call.__signature__ = inspect.Signature([*parameters, *named, *further])
        call.__name__, call.__doc__ = "__call__", own.__doc__
        cls.__call__ = call

    def __call__(
        self,
        *args,
        gligen_phrases=None,
        gligen_boxes=None,
        gligen_phrase_embeds=None,
        gligen_scheduled_sampling_beta=0.3,
        **kwargs,
    ):
        """Generate images, each phrase in its box.

        Args:
            gligen_phrases: a list of strings for all images, or a list of them for each prompt or image.
            gligen_boxes: nested like the phrases; a box is (x0, y0, x1, y1), 0-1, from the top left.
            gligen_phrase_embeds: instead of phrases, what `encode_gligen_phrases` returned for them: (n, phrase_dim),
                or a list of such. Then no text encoder is needed.
            gligen_scheduled_sampling_beta: share of the steps that are grounded, or shares (on, decay, off).

        Raises:
            ValueError: boxes that cannot be drawn; no model has run by then.
        """
        call = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        on, decay = _shares(gligen_scheduled_sampling_beta)
        if gligen_phrase_embeds is not None:
            if gligen_phrases is not None:
                raise ValueError("gligen_phrase_embeds replace gligen_phrases; give one of the two")
            gligen_phrases = self._checked_embeds(gligen_phrase_embeds)
        layouts = self._layouts(call, gligen_phrases, gligen_boxes)
        if not any(len(phrases) for phrases, _ in layouts):
            return super().__call__(**call)
        self._grounding = {"tokens": self._tokens(layouts), "on": on, "decay": decay, "evaluation": 0}
        users = call.get("callback_on_step_end")
        if isinstance(users, (PipelineCallback, MultiPipelineCallbacks)):
            call["callback_on_step_end_tensor_inputs"] = users.tensor_inputs
        elif users is None:
            call["callback_on_step_end_tensor_inputs"] = []

        def count(pipeline, evaluation, timestep, tensors):
            self._grounding["evaluation"] = evaluation + 1
            return users(pipeline, evaluation, timestep, tensors) if users is not None else {}

        call["callback_on_step_end"] = count
        try:
            with self._exact_boxes(), self._faded() as fade:
                self._grounding["fade"] = fade
                return super().__call__(**call)
        finally:
            self._grounding = None

    @torch.no_grad()
    def encode_gligen_phrases(self, phrases):
        """Embed phrases, for `gligen_phrase_embeds` of a call: (n, phrase_dim), or a list of such for lists of them."""
        if isinstance(phrases, str) or not len(phrases):
            raise ValueError(f"phrases is {phrases!r}; expected a list of strings")
        if isinstance(phrases[0], str):
            return self._embed(phrases, self._execution_device)
        embeddings = self._embed([phrase for each in phrases for phrase in each], self._execution_device)
        return list(embeddings.split([len(each) for each in phrases]))

    def _checked_embeds(self, embeds):
        width = self.unet.position_net.null_positive_feature.shape[0]
        nested = isinstance(embeds, (list, tuple)) or embeds.ndim == 3
        for rows in embeds if nested else [embeds]:
            if rows.ndim != 2 or rows.shape[1] != width or not rows.isfinite().all():
                raise ValueError(
                    f"gligen_phrase_embeds of shape {tuple(rows.shape)}; expected (n, {width}) of finite numbers"
                )
        return embeds

    @property
    def cross_attention_kwargs(self):
        """diffusers' own, with the grounding tokens while they are on. The sampling loop reads it at every step."""
        own, grounding = super().cross_attention_kwargs, self._grounding
        if grounding is None or not getattr(self, "_num_timesteps", 0):
            return own
        steps = self._step(self._num_timesteps - 1) + 1
        num_on, num_decay = (int(grounding[name] * steps + 1e-6) for name in ("on", "decay"))
        num_on = max(num_on, grounding["on"] > 0)  # of few steps, the first decides the layout
        step = self._step(grounding["evaluation"])
        if step >= num_on + num_decay - (num_decay > 0):  # the last of the fading steps has faded to nothing
            return own
        if num_decay:
            grounding["fade"](1.0 if step < num_on else 1 - (step - num_on + 1) / num_decay)
        tokens = grounding["tokens"]
        if self.do_classifier_free_guidance:  # the negative half stands first, with every slot empty
            tokens = {name: torch.cat([torch.zeros_like(value), value]) for name, value in tokens.items()}
        return {**(own or {}), "gligen": tokens}

    def _step(self, evaluation):
        """Return the step of a U-Net evaluation: some schedulers run it twice a step, PNDM in its first."""
        if isinstance(self.scheduler, PNDMScheduler):
            if self.scheduler.config.skip_prk_steps:
                return max(evaluation - 1, 0)
            return evaluation // 4 if evaluation < 12 else evaluation - 9
        return evaluation // self.scheduler.order

    def _layouts(self, call, phrases, boxes):
        """Check the layouts, and return (phrases, boxes) for every image of the call."""
        if (phrases is None) != (boxes is None):
            raise ValueError("give gligen_phrases and gligen_boxes together, one box per phrase")
        if phrases is None or not len(phrases):
            return []
        if isinstance(phrases, str):
            raise ValueError(f"gligen_phrases is the string {phrases!r}; expected a list of strings")
        prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
        number = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, (list, tuple)) else 1
        images = number * (call.get("num_images_per_prompt") or 1)
        if isinstance(phrases[0], str) or getattr(phrases, "ndim", 0) == 2:
            layouts = [(phrases, boxes)] * images
        else:
            if len(phrases) != len(boxes) or len(phrases) not in (number, images):
                raise ValueError(
                    f"{len(phrases)} lists of phrases and {len(boxes)} of boxes for {number} prompts, {images} "
                    "images; expected one list for all, one per prompt, or one per image"
                )
            repeats = images // len(phrases)
            layouts = [layout for layout in zip(phrases, boxes) for _ in range(repeats)]  # noqa: B905
        slots = self.config.gligen_slots
        for of_image, its_boxes in layouts:
            if len(of_image) != len(its_boxes):
                raise ValueError(f"{len(of_image)} phrases but {len(its_boxes)} boxes; give one box per phrase")
            if len(of_image) > slots:
                raise ValueError(f"a layout has {len(of_image)} objects, the model {slots} slots")
            for box in its_boxes:
                x0, y0, x1, y1 = (float(value) for value in box)
                if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):  # NaN fails too
                    raise ValueError(
                        f"the box {list(box)} is not (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
                    )
        return layouts

    @torch.no_grad()
    def _tokens(self, layouts):
        """Make the position net's inputs: boxes (B, N, 4), masks (B, N), positive_embeddings (B, N, D), all float32."""
        slots, device = self.config.gligen_slots, self._execution_device
        if any(isinstance(phrases, torch.Tensor) for phrases, _ in layouts):
            embeddings = torch.cat([rows.to(device) for rows, _ in layouts]).float()
        else:
            embeddings = self._embed([phrase for phrases, _ in layouts for phrase in phrases], device).float()
        shape = (len(layouts), slots)
        tokens = {
            "boxes": torch.zeros(*shape, 4, device=device),
            "masks": torch.zeros(*shape, device=device),
            "positive_embeddings": torch.zeros(*shape, embeddings.shape[1], device=device),
        }
        first = 0
        for k, (phrases, boxes) in enumerate(layouts):
            n = len(phrases)
            tokens["boxes"][k, :n] = torch.as_tensor(boxes, dtype=torch.float32).reshape(n, 4).to(device)
            tokens["masks"][k, :n] = 1
            tokens["positive_embeddings"][k, :n] = embeddings[first : first + n]
            first += n
        return tokens

    def _embed(self, phrases, device):
        """Embed phrases by the pooled output of each text encoder, projected if the encoder has a projection."""
        parts = []
        for number in ("", "_2"):
            encoder, tokenizer = getattr(self, f"text_encoder{number}", None), getattr(self, f"tokenizer{number}", None)
            if f"text_encoder{number}" in self.config and (encoder is None or tokenizer is None):
                raise ValueError(
                    f"phrases need text_encoder{number} and its tokenizer, which this pipeline is without; give "
                    "gligen_phrase_embeds, made with encode_gligen_phrases before they were freed"
                )
            if encoder is not None:
                texts = self.maybe_convert_prompt(list(phrases), tokenizer)
                ids = tokenizer(
                    texts, padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
                ).input_ids.to(device)
                output = encoder(ids)
                parts.append(output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
        return torch.cat(parts, dim=-1)

    @contextmanager
    def _exact_boxes(self):
        """Run the position net in float32 within the block: in half precision a box would be off by a hundredth."""
        net, dtype = self.unet.position_net, self.unet.dtype
        net.float()
        handle = net.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        try:
            yield
        finally:
            handle.remove()
            net.to(dtype)

    @contextmanager
    def _faded(self):
        """Yield a function that multiplies every gate, tanh(alpha), as trained; at the end the gates are as trained."""
        alphas = [value for name, value in self.unet.named_parameters() if ".fuser.alpha_" in name]
        trained = [value.detach().clone() for value in alphas]

        def fade(factor):
            for value, was in zip(alphas, trained):  # noqa: B905
                value.data.copy_(was if factor == 1 else torch.atanh(factor * was.float().tanh()))

        try:
            yield fade
        finally:
            fade(1)


class StableDiffusionXLGLIGENPipeline(GroundingMixin, StableDiffusionXLPipeline):
    """Text-to-image with SDXL, each phrase in its box."""

    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet,
        scheduler,
        image_encoder=None,
        feature_extractor=None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker=None,
        gligen_slots: int = 30,
    ):
        parts = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler)
        super().__init__(*parts, image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker)
        self.register_to_config(gligen_slots=gligen_slots)


class StableDiffusionGLIGENPipeline(GroundingMixin, StableDiffusionPipeline):
    """Text-to-image with Stable Diffusion 1.x or 2.x, each phrase in its box."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker,
        feature_extractor,
        image_encoder=None,
        requires_safety_checker: bool = True,
        gligen_slots: int = 30,
    ):
        parts = (vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor)
        super().__init__(*parts, image_encoder, requires_safety_checker)
        self.register_to_config(gligen_slots=gligen_slots)


def _shares(beta):
    """Return (on, decay) for a share of the steps or a triple (on, decay, off)."""
    numbers = [float(value) for value in (beta if isinstance(beta, (list, tuple)) else [beta])]
    if len(numbers) not in (1, 3) or not all(math.isfinite(value) and 0 <= value <= 1 for value in numbers):
        raise ValueError(f"gligen_scheduled_sampling_beta is {beta!r}; expected 0 to 1, or three such (on, decay, off)")
    if len(numbers) == 3 and abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(f"gligen_scheduled_sampling_beta is {beta!r}; its three shares must sum to 1")
    return numbers[0], numbers[1] if len(numbers) == 3 else 0.0
