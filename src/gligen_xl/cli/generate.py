"""gligen-xl generate"""

from __future__ import annotations

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
from .common import Parser, check_generation, load, model_arguments, refuse_beside, say, settle_guidance, watched
from .loras import add_loras, find_lora, parse_lora
from .schedulers import new_scheduler, scheduler_settings
from .values import UsageError, check_file, check_out, check_source, count, numbers

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines import GroundingMixin

HELP = "Layouts to images."
MULTIPLE = 8  # pixels, of which a side is a multiple


def parse(parser: Parser, words: list[str]) -> tuple[Namespace, list[Layout], float | list[float]]:
    parser.add_argument("--prompt", action="append", help="the whole image, in words; once for each image")
    parser.add_argument("--phrase", action="append", default=[], help="an object; once for each")
    parser.add_argument("--box", action="append", nargs="+", default=[], help="its box: x0 y0 x1 y1 in 0-1")
    parser.add_argument("--layout", help="in place of these, a JSON or JSONL file: prompt, phrases, boxes")
    parser.add_argument("--beta", default="0.3", help="share of the steps with grounding, or on,decay,off shares")
    parser.add_argument("--negative_prompt", help="what should not be in it")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 8")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 8")
    parser.add_argument("--count", type=count, default=1, help="images of each layout")
    parser.add_argument("--draw", action="store_true", help="write a second image of each with its boxes drawn")
    parser.add_argument("--out", default="pictures", help="folder for the PNGs")
    model_arguments(parser, random_seed=True)
    parser.add_argument("--adapter_scale", type=float, default=1.0, help="of the gates: 1 as trained, 0 off")
    parser.add_argument(
        "--lora", action="append", default=[], help="folder, file or repository; PATH=0.8 for its scale"
    )
    parser.add_argument("--scheduler", help="euler_a, dpm++2m-karras, unipc, ..., or a class of diffusers")
    parser.add_argument("--inpaint_image", help="an image whose outside of the boxes is kept")
    parser.add_argument("--image", help="start from this image (image-to-image)")
    parser.add_argument("--mask", help="with --image: white is painted anew, black is kept")
    parser.add_argument("--strength", type=float, help="with --image: how much is painted over, 0-1; by default 0.8")
    parser.add_argument("--controlnet", nargs="+", default=[], help="folders or repositories")
    parser.add_argument("--control_image", nargs="+", default=[], help="one for each ControlNet, in order")
    parser.add_argument("--control_scale", type=float, nargs="+", default=[], help="one for each; 1 by default")
    arguments = parser.parse_args(words)
    arguments.random_seed = _asks_for_a_random_seed(words)
    _check(arguments)
    layouts, beta = _requested_layouts(arguments), _beta(arguments.beta)
    _check_against(arguments, parser, layouts)
    return arguments, layouts, beta


# What is refused before a model is loaded ---------------------------------------------------------------------------


def _check(arguments: Namespace) -> None:
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
    for name in ("image", "mask", "inpaint_image"):
        if arguments[name]:
            check_file(name, arguments[name], "an image")
    for name in arguments.control_image:
        check_file("control_image", name, "an image")
    if arguments.scheduler:
        scheduler_settings(arguments.scheduler)
    if not abs(arguments.adapter_scale) < float("inf"):
        raise UsageError(f"--adapter_scale is {arguments.adapter_scale}; expected a finite number")
    for scale in arguments.control_scale:
        if not abs(scale) < float("inf"):
            raise UsageError(f"--control_scale is {scale}; expected a finite number")
    check_out(arguments.out)


def _check_strength(strength: float, steps: int) -> None:
    if not 0 < strength <= 1:
        raise UsageError(f"--strength is {strength}; expected more than 0, at most 1")
    if int(steps * strength) < 1:  # as diffusers counts them
        raise UsageError(
            f"--strength {strength} of --steps {steps} is less than one step, so nothing would be painted; give at "
            f"least --strength {1 / steps:.4g}, or --steps {int(1 / strength) + (int(1 / strength) * strength < 1)}"
        )


def _check_against(arguments: Namespace, parser: Parser, layouts: Sequence[Layout]) -> None:
    """What the options mean only together with the layouts."""
    grounded = [layout for layout in layouts if layout.boxes]
    if not grounded:
        refuse_beside(arguments, parser, ("beta", "adapter_scale"), "is of the boxes, and there are none; leave it out")
        if arguments.draw:
            raise UsageError("--draw draws the boxes, and there are none; leave it out")
    if arguments.inpaint_image and len(grounded) < len(layouts):
        raise UsageError("--inpaint_image keeps what lies outside the boxes; every layout needs one or more")
    if arguments.inpaint_image and arguments.controlnet and not all(one.width and one.height for one in layouts):
        raise UsageError("--inpaint_image beside --controlnet needs --width and --height")
    if arguments.seed != parser.get_default("seed") and all(layout.seed is not None for layout in layouts):
        raise UsageError(
            f"--seed is {arguments.seed}, but every layout of {arguments.layout} has its own; leave it out"
        )
    if arguments.negative_prompt and arguments.guidance_scale is not None and arguments.guidance_scale <= 1:
        raise UsageError(
            f"--negative_prompt works by guidance, and --guidance_scale {arguments.guidance_scale:g} is none; give one"
        )
    for layout in layouts if not arguments.image else ():
        for name in ("width", "height"):
            pixels = getattr(layout, name)
            if pixels is not None and pixels % MULTIPLE:
                near = max(round(pixels / MULTIPLE), 1) * MULTIPLE
                raise UsageError(f"{name} is {pixels}; expected a number divisible by {MULTIPLE}, as {near}")


def _requested_layouts(arguments: Namespace) -> list[Layout]:
    """What the command asks for, each layout as often as --count says."""
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
            f"--count is {arguments.count}, of {len(layouts)} layouts; expected {MAX_IMAGES} images at most"
        )
    settings = ("width", "height", "negative_prompt")
    given = {name: arguments[name] for name in settings if arguments[name] is not None}
    layouts = [Layout.from_dict(layout.to_dict() | given) for layout in layouts]
    repeated = []
    for layout in layouts:
        for k in range(arguments.count):
            seed = {} if layout.seed is None else {"seed": layout.seed + k}
            repeated.append(Layout.from_dict(layout.to_dict() | seed))
    return repeated


def _boxes(given: list[list[str]]) -> list[list[float]]:
    """Boxes of the command line: one, or several, after each --box."""
    boxes = []
    for words in given:
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


def _asks_for_a_random_seed(words: list[str]) -> bool:
    return "--seed=-1" in words or ("--seed", "-1") in pairwise(words)


# Generating ---------------------------------------------------------------------------------------------------------


def run(arguments: Namespace, layouts: list[Layout], beta: float | list[float]) -> None:
    settings = _images(arguments)
    files, scales = [], []
    for words in arguments.lora:
        path, scale = parse_lora(words)
        files.append(find_lora(path))
        scales.append(scale)
    settle_guidance(arguments)
    start = "mask" if arguments.mask else "image" if arguments.image else "noise"
    pipeline = load(arguments, start=start, controlnets=arguments.controlnet)
    if arguments.adapter_scale != 1:
        pipeline.set_gligen_adapter_scale(arguments.adapter_scale)
    add_loras(pipeline, files, scales)
    if arguments.scheduler:
        pipeline.scheduler = new_scheduler(arguments.scheduler, pipeline.scheduler)
    if arguments.random_seed:
        print(f"seed {arguments.seed}, drawn at random; --seed {arguments.seed} makes the same images again")
    _generate(arguments, pipeline, layouts, beta, settings)
    say(f"{len(layouts)} images in {arguments.out}")


def _generate(
    arguments: Namespace,
    pipeline: GroundingMixin,
    layouts: Sequence[Layout],
    beta: float | list[float],
    settings: dict[str, Any],
) -> None:
    """Write each image as it comes, with how it was made."""
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
    """The options that an image depends on, those that were given."""
    names = (
        "steps", "guidance_scale", "model", "config", "variant", "dtype", "adapter", "adapter_scale", "lora",
        "scheduler", "inpaint_image", "image", "mask", "strength", "controlnet", "control_image", "control_scale",
    )  # fmt: skip
    return {name: arguments[name] for name in names if arguments[name] not in (None, [])}


def _used(layout: Layout, pipeline: GroundingMixin) -> Layout:
    """The layout with the boxes that the model was given: as many as the adapter has slots."""
    from ..adapter import adapter_config, is_attached

    if not is_attached(pipeline.unet):
        return layout
    slots = adapter_config(pipeline.unet).slots
    return replace(layout, phrases=layout.phrases[:slots], boxes=layout.boxes[:slots])


def _images(arguments: Namespace) -> dict[str, Any]:
    """What the call of the pipeline is given beside the layouts."""
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
    """Images of an earlier command stay; numbering goes on after them."""
    taken = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*.png")]
    return max((int(number) for number in taken if number.isdecimal()), default=-1) + 1
