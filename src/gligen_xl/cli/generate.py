"""gligen-xl generate"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ..escape import file_name, printable
from ..io import whole_file
from ..layout import Layout, read_layouts
from ..limits import MAX_IMAGES
from .common import Parser, check_generation, load, model_arguments, refuse_beside, say, watched
from .loras import add_loras, find_lora, parse_lora
from .schedulers import new_scheduler, scheduler_settings
from .values import UsageError, check_file, check_out, check_source, count, numbers

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines import GroundingMixin

HELP = "Generate images from layouts."
MULTIPLE = 8  # pixels; sides are multiples of it


def parse(parser: Parser, words: list[str]) -> tuple[Namespace, list[Layout], float | list[float]]:
    add = parser.add_argument
    add("--prompt", action="append", help="the whole image, in words; repeat it for several images")
    add("--phrase", action="append", default=[], help="an object; repeat it for each")
    add("--box", action="append", nargs="+", default=[], help="the object's box: x0 y0 x1 y1 in 0-1")
    add("--layout", help="instead of these, a JSON or JSONL file: prompt, phrases, boxes")
    add("--beta", default="0.3", help="share of the steps with grounding, or on,decay,off shares")
    add("--negative_prompt", help="what should not be in the image")
    add("--width", type=int, help="pixels, a multiple of 8")
    add("--height", type=int, help="pixels, a multiple of 8")
    add("--count", type=count, default=1, help="images of each layout")
    add("--draw", action="store_true", help="write a second image of each, with its boxes drawn")
    add("--out", default="pictures", help="folder for the PNGs")
    model_arguments(parser, random_seed=True)
    add("--adapter_scale", type=float, default=1.0, help="multiplies the gates: 1 as trained, 0 off")
    add("--lora", action="append", default=[], help="folder, file or repository; PATH=0.8 sets its scale")
    add("--scheduler", help="euler_a, dpm++2m-karras, unipc, ..., or a class of diffusers")
    add("--inpaint_image", help="an image that is kept outside the boxes")
    add("--image", help="start from this image (image-to-image)")
    add("--mask", help="with --image: white is painted anew, black is kept")
    add("--strength", type=float, help="with --image: how much is painted over, 0-1; by default 0.8")
    add("--controlnet", nargs="+", default=[], help="folders or repositories")
    add("--control_image", nargs="+", default=[], help="one for each ControlNet, in order")
    add("--control_scale", type=float, nargs="+", default=[], help="one for each ControlNet; 1 by default")
    arguments = parser.parse_args(words)
    arguments.random_seed = "--seed=-1" in words or ("--seed", "-1") in pairwise(words)
    _check_options(arguments)
    layouts, beta = _requested_layouts(arguments), _beta(arguments.beta)
    _check_with_layouts(arguments, parser, layouts)
    return arguments, layouts, beta


# Checks before a model is loaded ------------------------------------------------------------------------------------


def _check_options(arguments: Namespace) -> None:
    if arguments.mask and not arguments.image:
        raise UsageError("--mask says what of --image is painted anew; give both")
    if arguments.inpaint_image and arguments.image:
        raise UsageError("--inpaint_image starts from noise, --image from an image; give one of the two")
    if arguments.strength is not None and not arguments.image:
        raise UsageError("--strength is of --image; give both")
    if arguments.image:
        arguments.strength = 0.8 if arguments.strength is None else arguments.strength
        _check_strength(arguments.strength, arguments.steps)
    nets, images, scales = (len(arguments[name]) for name in ("controlnet", "control_image", "control_scale"))
    if images != nets or scales not in (0, nets):
        raise UsageError(f"{nets} --controlnet, {images} --control_image, {scales} --control_scale; give one of each")
    if nets and arguments.mask:
        raise UsageError("there is no pipeline with a ControlNet and a --mask; leave one of them out")
    check_generation(arguments)
    for net in arguments.controlnet:
        check_source("controlnet", net, "ControlNet")
    for words in arguments.lora:
        parse_lora(words)
    for name in ("image", "mask", "inpaint_image", "control_image"):
        images = arguments[name] or []
        for image in [images] if isinstance(images, str) else images:
            check_file(name, image, "an image")
    if arguments.scheduler:
        scheduler_settings(arguments.scheduler)
    for name in ("adapter_scale", "control_scale"):
        scales = arguments[name]
        for scale in scales if isinstance(scales, list) else [scales]:
            if not math.isfinite(scale):
                raise UsageError(f"--{name} is {scale}; expected a finite number")
    check_out(arguments.out)


def _check_strength(strength: float, steps: int) -> None:
    if not 0 < strength <= 1:
        raise UsageError(f"--strength is {strength}; expected more than 0, at most 1")
    if int(steps * strength) < 1:  # as diffusers counts them
        raise UsageError(
            f"--strength {strength} of --steps {steps} is less than one step, so nothing would be painted; give at "
            f"least --strength {1 / steps:.4g}, or --steps {int(1 / strength) + (int(1 / strength) * strength < 1)}"
        )


def _check_with_layouts(arguments: Namespace, parser: Parser, layouts: Sequence[Layout]) -> None:
    """Check options whose meaning depends on the layouts."""
    grounded = [layout for layout in layouts if layout.boxes]
    if not grounded:
        refuse_beside(arguments, parser, ("beta", "adapter_scale"), "is of the boxes, and there are none; leave it out")
        if arguments.draw:
            raise UsageError("--draw draws the boxes, and there are none; leave it out")
    if arguments.inpaint_image and len(grounded) < len(layouts):
        raise UsageError("--inpaint_image keeps what is outside the boxes; every layout needs one or more")
    if arguments.inpaint_image and arguments.controlnet and not all(one.width and one.height for one in layouts):
        raise UsageError("--inpaint_image with --controlnet needs --width and --height")
    if arguments.seed != parser.get_default("seed") and all(layout.seed is not None for layout in layouts):
        raise UsageError(
            f"--seed is {arguments.seed}, but every layout of {arguments.layout} has its own; leave it out"
        )
    scale = arguments.guidance_scale
    if arguments.negative_prompt and scale is not None and scale <= 1:
        raise UsageError(f"--negative_prompt works by guidance, and --guidance_scale {scale:g} is none; give one")
    for layout in layouts if not arguments.image else ():
        for name in ("width", "height"):
            pixels = getattr(layout, name)
            if pixels is not None and pixels % MULTIPLE:
                near = max(round(pixels / MULTIPLE), 1) * MULTIPLE
                raise UsageError(f"{name} is {pixels}; expected a number divisible by {MULTIPLE}, such as {near}")


# Layouts of the command line ----------------------------------------------------------------------------------------


def _requested_layouts(arguments: Namespace) -> list[Layout]:
    """Return the requested layouts, each as often as --count says."""
    direct = arguments.prompt is not None or arguments.phrase or arguments.box
    if arguments.layout and direct:
        raise UsageError("give --layout FILE, or --prompt with --phrase and --box; not both")
    if not arguments.layout and not direct:
        raise UsageError("say what to draw: either --layout FILE, or --prompt with --phrase and --box for each object")
    if arguments.layout:
        check_file("layout", arguments.layout, "a layout file")
        layouts = read_layouts(arguments.layout)
    else:
        boxes = _boxes(arguments.box)
        prompts = arguments.prompt or [""]
        layouts = [Layout(prompt=prompt, phrases=arguments.phrase, boxes=boxes) for prompt in prompts]
    if arguments.count * len(layouts) > MAX_IMAGES:
        raise UsageError(
            f"--count is {arguments.count}, of {len(layouts)} layouts; expected at most {MAX_IMAGES} images"
        )
    settings = ("width", "height", "negative_prompt")
    changes = {name: arguments[name] for name in settings if arguments[name] is not None}
    return [
        replace(layout, **changes, seed=None if layout.seed is None else layout.seed + k)
        for layout in layouts
        for k in range(arguments.count)
    ]


def _boxes(options: list[list[str]]) -> list[list[float]]:
    """Parse the boxes of the command line: one, or several, after each --box."""
    boxes = []
    for words in options:
        values = numbers(" ".join(words), "--box")
        if not values or len(values) % 4:
            raise UsageError(f"--box is {' '.join(words)!r}, {len(values)} numbers; expected four: x0 y0 x1 y1")
        boxes += [values[first : first + 4] for first in range(0, len(values), 4)]
    return boxes


def _beta(text: str) -> float | list[float]:
    from ..pipelines.schedule import GroundingSchedule

    shares = numbers(text, "--beta")
    beta = shares[0] if len(shares) == 1 else shares
    try:
        GroundingSchedule.parse(beta)
    except ValueError as error:
        raise UsageError(str(error).replace("gligen_scheduled_sampling_beta", "--beta")) from None
    return beta


# Generating ---------------------------------------------------------------------------------------------------------


def run(arguments: Namespace, layouts: list[Layout], beta: float | list[float]) -> None:
    settings = _image_arguments(arguments)
    loras = [parse_lora(words) for words in arguments.lora]
    files = [find_lora(path) for path, _ in loras]
    start = "mask" if arguments.mask else "image" if arguments.image else "noise"
    pipeline = load(arguments, start=start, controlnets=arguments.controlnet)
    if arguments.adapter_scale != 1:
        pipeline.set_gligen_adapter_scale(arguments.adapter_scale)
    add_loras(pipeline, files, [scale for _, scale in loras])
    if arguments.scheduler:
        pipeline.scheduler = new_scheduler(arguments.scheduler, pipeline.scheduler)
    if arguments.random_seed:
        print(f"seed {arguments.seed}, drawn at random; repeat these images with --seed {arguments.seed}")
    _generate(arguments, pipeline, layouts, beta, settings)
    say(f"{len(layouts)} images in {arguments.out}")


def _generate(
    arguments: Namespace,
    pipeline: GroundingMixin,
    layouts: Sequence[Layout],
    beta: float | list[float],
    settings: dict[str, Any],
) -> None:
    """Write each image as soon as it is made, with the settings that made it."""
    from ..generate import generate_batches, image_seed
    from ..images.draw import draw_boxes, png_metadata

    out = Path(arguments.out)
    first = _first_free_number(out)
    batches = generate_batches(
        pipeline,
        layouts,
        beta=beta,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        **settings,
    )
    about = _about(arguments) | {"beta": beta}
    k = 0
    with watched([], "generate", len(layouts)) as bar:
        since = time.perf_counter()
        for images in batches:
            seconds = (time.perf_counter() - since) / len(images)
            for image in images:
                layout, seed = layouts[k], image_seed(layouts[k], arguments.seed, k)
                metadata = png_metadata({"layout": layout.to_dict(), "seed": seed, **about})
                name = f"{first + k:04d}" + (f"-{file_name(layout.id)}" if layout.id else "")
                versions = [("", image)]
                if arguments.draw:
                    versions.append(("-boxes", draw_boxes(image, _used(layout, pipeline))))
                for suffix, version in versions:
                    with whole_file(out / f"{name}{suffix}.png") as partial:
                        version.save(partial, format="PNG", pnginfo=metadata)
                bar.write(f"{printable(out / name)}.png  seed {seed}  {seconds:.2f} s")
                bar.update()
                k += 1
            since = time.perf_counter()


def _about(arguments: Namespace) -> dict[str, Any]:
    """Return the options that an image depends on, if they are given."""
    names = (
        "steps", "guidance_scale", "model", "config", "variant", "dtype", "adapter", "adapter_scale", "lora",
        "scheduler", "inpaint_image", "image", "mask", "strength", "controlnet", "control_image", "control_scale",
    )  # fmt: skip
    return {name: arguments[name] for name in names if arguments[name] not in (None, [])}


def _used(layout: Layout, pipeline: GroundingMixin) -> Layout:
    """Return the layout with the boxes that the model was given: as many as the adapter has slots."""
    from ..adapter import GligenAdapter

    if (adapter := GligenAdapter.find(pipeline.unet)) is None:
        return layout
    slots = adapter.config.slots
    return replace(layout, phrases=layout.phrases[:slots], boxes=layout.boxes[:slots])


def _image_arguments(arguments: Namespace) -> dict[str, Any]:
    """Open the images of the options, and return the arguments of the pipeline that they are for."""
    settings: dict[str, Any] = {}
    if arguments.inpaint_image:
        settings["gligen_inpaint_image"] = _open(arguments.inpaint_image)
    if arguments.image:
        settings |= {"image": _open(arguments.image), "strength": arguments.strength}
        if arguments.mask:
            settings["mask_image"] = _open(arguments.mask).convert("L").resize(settings["image"].size)
    if arguments.controlnet:
        images = [_open(name) for name in arguments.control_image]
        scales = arguments.control_scale or [1.0] * len(images)
        single = len(images) == 1
        settings["control_image" if arguments.image else "image"] = images[0] if single else images
        settings["controlnet_conditioning_scale"] = scales[0] if single else scales
    return settings


def _open(name: str) -> Image.Image:
    from ..images.decode import ImageError, decode

    try:
        return decode(Path(name).expanduser())
    except ImageError as error:
        raise ValueError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {name}") from None


def _first_free_number(folder: Path) -> int:
    """Return the number after those of an earlier command's images, which stay."""
    numbers = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
