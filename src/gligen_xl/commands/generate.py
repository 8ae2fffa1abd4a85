"""gligen-xl generate"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ..files import whole_file
from ..layout import Layout, read_layouts
from ..limits import MAX_PICTURES
from ..text import file_name, printable
from .common import Parser, UsageError, load, model_arguments, say, watched

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines import GroundingMixin

HELP = "Layouts to pictures."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace, list[Layout], float | list[float]]:
    parser.add_argument("--layout", help="JSON or JSONL file of layouts: prompt, phrases, boxes (0-1, x0 y0 x1 y1)")
    parser.add_argument("--prompt", help="the whole picture, in words")
    parser.add_argument("--negative_prompt", help="what should not be in it")
    parser.add_argument("--phrase", action="append", default=[], help="an object; once for each")
    parser.add_argument("--box", action="append", nargs="+", default=[], help="its box: x0 y0 x1 y1 in 0-1")
    parser.add_argument("--beta", default="0.3", help="share of the steps with grounding, or on,decay,off shares")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--count", type=int, default=1, help="pictures of each layout")
    parser.add_argument("--draw", action="store_true", help="write a second picture of each with its boxes drawn")
    parser.add_argument("--out", default="pictures", help="folder for the PNGs")
    model_arguments(parser)
    parser.add_argument("--adapter_scale", type=float, default=1.0, help="of the gates: 1 as trained, 0 off")
    parser.add_argument(
        "--lora", action="append", default=[], help="folder, file or repository; PATH=0.8 for its scale"
    )
    parser.add_argument("--scheduler", help="a class of diffusers, as EulerDiscreteScheduler")
    parser.add_argument("--inpaint_image", help="a picture whose outside of the boxes is kept")
    parser.add_argument("--image", help="start from this picture (image-to-image)")
    parser.add_argument("--mask", help="with --image: white is painted anew, black is kept")
    parser.add_argument("--strength", type=float, help="with --image: how much is painted over, 0-1; by default 0.8")
    parser.add_argument("--controlnet", nargs="+", default=[], help="folders or repositories")
    parser.add_argument("--control_image", nargs="+", default=[], help="one for each ControlNet, in order")
    parser.add_argument("--control_scale", type=float, nargs="+", default=[], help="one for each; 1 by default")
    arguments = parser.parse_args(words)
    _check(arguments)
    return arguments, _requested_layouts(arguments), _beta(arguments.beta)


def _check(arguments: Namespace) -> None:
    if arguments.mask and not arguments.image:
        raise UsageError("--mask says what of --image is painted anew; give both")
    if arguments.inpaint_image and arguments.image:
        raise UsageError("--inpaint_image starts from noise, --image from a picture; give one of the two")
    if arguments.strength is not None and not arguments.image:
        raise UsageError("--strength is of --image; give both")
    if arguments.image:
        arguments.strength = 0.8 if arguments.strength is None else arguments.strength
    if arguments.strength is not None and not 0 < arguments.strength <= 1:
        raise UsageError(f"--strength is {arguments.strength}; expected more than 0, at most 1")
    for words in arguments.lora:
        _lora(words)
    nets, images, scales = (len(arguments[name]) for name in ("controlnet", "control_image", "control_scale"))
    if images != nets or scales not in (0, nets):
        raise UsageError(f"{nets} --controlnet, {images} --control_image, {scales} --control_scale; give one of each")


def _requested_layouts(arguments: Namespace) -> list[Layout]:
    """What the command asks for, each layout as often as --count says."""
    direct = arguments.prompt is not None or arguments.phrase or arguments.box
    if bool(arguments.layout) == bool(direct):
        raise UsageError("say what to draw: either --layout FILE, or --prompt with --phrase and --box for each object")
    if arguments.layout:
        layouts = read_layouts(arguments.layout)
    else:
        boxes = [_numbers(" ".join(box), "--box") for box in arguments.box]
        layouts = [Layout(prompt=arguments.prompt or "", phrases=arguments.phrase, boxes=boxes)]
    if not 1 <= arguments.count * len(layouts) <= MAX_PICTURES:
        raise UsageError(
            f"--count is {arguments.count}, of {len(layouts)} layouts; expected at least 1, and {MAX_PICTURES} "
            "pictures at most"
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


def _beta(text: str) -> float | list[float]:
    numbers = _numbers(text, "--beta")
    return numbers[0] if len(numbers) == 1 else numbers


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{name} is {text!r}; expected numbers") from None


def run(arguments: Namespace, layouts: list[Layout], beta: float | list[float]) -> None:
    settings = _pictures(arguments)
    start = "mask" if arguments.mask else "image" if arguments.image else "noise"
    pipeline = load(arguments, start=start, controlnets=arguments.controlnet)
    _dress(pipeline, arguments)
    from ..generate import generate, picture_seed
    from ..show import draw_boxes, png_metadata

    out = Path(arguments.out)
    first = _first_free_number(out)
    pictures = generate(
        pipeline,
        layouts,
        beta=beta,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        **settings,
    )
    options = ("steps", "guidance_scale", "model", "config", "variant", "dtype", "adapter", "adapter_scale", "lora")
    options += (
        "scheduler",
        "inpaint_image",
        "image",
        "mask",
        "strength",
        "controlnet",
        "control_image",
        "control_scale",
    )
    used = {name: arguments[name] for name in options if arguments[name] not in (None, [])}
    bar = watched(pictures, "generate", len(layouts))
    since = time.perf_counter()
    for k, picture in enumerate(bar):
        layout, seed = layouts[k], picture_seed(layouts[k], arguments.seed, k)
        about = {"layout": layout.to_dict(), "seed": seed, "beta": beta, **used}
        name = f"{first + k:04d}" + (f"-{file_name(layout.id)}" if layout.id else "")
        versions = [("", picture)] + ([("-boxes", draw_boxes(picture, layout))] if arguments.draw else [])
        for suffix, version in versions:
            with whole_file(out / f"{name}{suffix}.png") as partial:
                version.save(partial, format="PNG", pnginfo=png_metadata(about))
        now = time.perf_counter()
        bar.write(f"{printable(out / name)}.png  seed {seed}  {now - since:.2f} s")
        since = now
    say(f"{len(layouts)} pictures in {out}")


def _pictures(arguments: Namespace) -> dict[str, Any]:
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
    from ..prepare.pictures import PictureError, decode

    try:
        return decode(Path(name))
    except PictureError as error:
        raise ValueError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {name}") from None


def _dress(pipeline: GroundingMixin, arguments: Namespace) -> None:
    """Scale of the adapter, LoRAs, scheduler."""
    import diffusers

    if arguments.adapter_scale != 1:
        pipeline.set_gligen_adapter_scale(arguments.adapter_scale)
    scales = {}
    for k, words in enumerate(arguments.lora):
        (path, scale), name = _lora(words), f"lora{k}"
        try:
            if (file := Path(path)).is_file():
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)  # type: ignore[attr-defined]
            else:
                pipeline.load_lora_weights(path, adapter_name=name)  # type: ignore[attr-defined]
        except ValueError as error:
            if "PEFT" in str(error):
                raise ValueError("LoRAs need peft; pip install 'gligen-xl[lora]'") from error
            raise
        scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))  # type: ignore[attr-defined]
    if arguments.scheduler:
        names = {kind.__name__: kind for kind in pipeline.scheduler.compatibles}
        if arguments.scheduler not in names:
            raise UsageError(f"--scheduler is {arguments.scheduler!r}; this model takes {', '.join(sorted(names))}")
        if getattr(names[arguments.scheduler], "is_dummy", False) or not hasattr(diffusers, arguments.scheduler):
            raise UsageError(f"--scheduler {arguments.scheduler} needs a package that is not installed")
        pipeline.scheduler = names[arguments.scheduler].from_config(pipeline.scheduler.config)


def _lora(words: str) -> tuple[str, float]:
    """Path and scale of PATH or PATH=SCALE."""
    path, _, scale = words.partition("=")
    numbers = _numbers(scale, "the scale of --lora") if scale else [1.0]
    if len(numbers) != 1:
        raise UsageError(f"--lora is {words!r}; expected PATH or PATH=SCALE")
    return path, numbers[0]


def _first_free_number(folder: Path) -> int:
    """Pictures of an earlier command stay; numbering goes on after them."""
    numbers = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
