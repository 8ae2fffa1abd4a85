"""The command line: `gligen-xl generate | train | evaluate | shapes | version`. It parses, builds and calls.

Each command has a function that makes its parser and one that runs it; what is heavy is imported when it is run, so
that `--help` and errors come at once. Wrong input ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from . import __version__
from .files import whole_file
from .layout import Layout, read_layouts

if TYPE_CHECKING:
    from .pipelines import StableDiffusionXLGLIGENPipeline

TRACEBACK = "GLIGEN_XL_TRACEBACK"  # environment variable: set, errors come with where they arose


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{message.strip()}  (see {self.prog} --help)") from ex


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for wrong input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name = words[0].lstrip("-")
    try:
        if name not in COMMANDS:
            raise UsageError(f"there is no command {words[0]!r}; there are {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        parser = Parser(prog=f"gligen-xl {name}", description=command.help, default_env=False)
        return command.run(*command.parse(parser, words[1:])) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get(TRACEBACK):
            raise
        text = " ".join(str(error).split())
        print(f"gligen-xl {name}: error: {text or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    lines = [f"gligen-xl {__version__}: put objects where you draw them", "", "commands:"]
    lines += [f"  {name:<10} {command.help.splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "first steps:",
        '  gligen-xl generate --prompt "grass with a red circle" --phrase "a red circle" --box 0.1 0.5 0.5 0.9',
        "  gligen-xl generate --layout layouts.jsonl --draw",
        "  gligen-xl COMMAND --help",
    ]
    return "\n".join(lines)


# Shared by commands that generate -----------------------------------------------------------------------------------


def _model_arguments(parser: Parser) -> None:
    parser.add_argument("--model", default="shapes", help="pipeline folder, Hub repository, or shapes (embedded, tiny)")
    parser.add_argument("--adapter", help="adapter folder or Hub repository, in place of the one of the model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; by default the best there is")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on a GPU")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance; 1 is none; by default 5, for shapes 2"
    )
    parser.add_argument("--seed", type=int, default=0, help="picture k has seed + k, unless its layout has its own")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures made at once")


def _load(arguments: Namespace) -> StableDiffusionXLGLIGENPipeline:
    if arguments.guidance_scale is None:
        arguments.guidance_scale = 2.0 if arguments.model == "shapes" else 5.0
    for name in ("steps", "batch_size"):
        if arguments[name] < 1:
            raise UsageError(f"--{name} is {arguments[name]}; expected at least 1")
    if not 0 <= arguments.seed < 2**62:
        raise UsageError(f"--seed is {arguments.seed}; expected 0 to 2**62 - 1")
    _quiet_imports()
    import torch

    from .pipelines import StableDiffusionXLGLIGENPipeline

    device = arguments.device or _best_device()
    dtype = arguments.dtype or ("float16" if device.startswith("cuda") else "float32")
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained(arguments.model, dtype=getattr(torch, dtype))
    if arguments.adapter:
        pipeline.load_gligen_adapter(arguments.adapter)
    try:
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use the device {device!r}: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _quiet_imports() -> None:
    """Keep the libraries' notes about what is not installed off the terminal; warnings and errors still come."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _watched(items: Iterable[Any], name: str, total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=name, total=total, unit="picture")


# generate -----------------------------------------------------------------------------------------------------------


def _parse_generate(parser: Parser, words: list[str]) -> tuple[Namespace, list[Layout], float | list[float]]:
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
    _model_arguments(parser)
    arguments = parser.parse_args(words)
    return arguments, _requested_layouts(arguments), _beta(arguments.beta)


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
    if arguments.count < 1:
        raise UsageError(f"--count is {arguments.count}; expected at least 1")
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


def _run_generate(arguments: Namespace, layouts: list[Layout], beta: float | list[float]) -> None:
    pipeline = _load(arguments)
    from .generate import generate, picture_seed
    from .show import draw_boxes, png_metadata

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
    )
    for k, picture in enumerate(_watched(pictures, "generate", len(layouts))):
        layout = layouts[k]
        about = {
            "layout": layout.to_dict(),
            "seed": picture_seed(layout, arguments.seed, k),
            "beta": beta,
            "steps": arguments.steps,
            "guidance_scale": arguments.guidance_scale,
            "model": arguments.model,
            "adapter": arguments.adapter,
        }
        name = f"{first + k:04d}" + (f"-{_file_name(layout.id)}" if layout.id else "")
        versions = [("", picture)] + ([("-boxes", draw_boxes(picture, layout))] if arguments.draw else [])
        for suffix, version in versions:
            with whole_file(out / f"{name}{suffix}.png") as partial:
                version.save(partial, format="PNG", pnginfo=png_metadata(about))
    print(f"{len(layouts)} pictures in {out}")


def _first_free_number(folder: Path) -> int:
    """Pictures of an earlier command stay; numbering goes on after them."""
    numbers = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)[:80].lstrip(".")


# train --------------------------------------------------------------------------------------------------------------


def _parse_train(parser: Parser, words: list[str]) -> tuple[Any]:
    _quiet_imports()
    from .recipes import find_recipe, recipe_names
    from .train.config import TrainConfig

    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--quick", action="store_true", help="the recipe's short form: learning begins, in minutes")
    parser.add_argument("--settings", action="config", help="another YAML file, over the recipe")
    parser.add_class_arguments(TrainConfig)
    if not words or words[0].startswith("-"):
        parser.parse_args(words)  # --help, or the error that the recipe is missing
        raise UsageError("name the recipe first: gligen-xl train RECIPE ...")
    recipe = find_recipe(words[0], quick="--quick" in words)
    parsed = parser.parse_args(["--settings", str(recipe), *words])
    try:
        arguments = parser.instantiate(parsed)
    except TypeError as error:
        raise ValueError(f"{words[0]} holds a setting of the wrong kind: {error}") from error
    return (TrainConfig(**{field.name: arguments[field.name] for field in fields(TrainConfig)}),)


def _run_train(config: Any) -> None:
    import yaml

    from .train.loop import train

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    print(f"\n{train(config)}")


# evaluate -----------------------------------------------------------------------------------------------------------


def _parse_evaluate(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("--layouts", default="shapes", help="shapes (held-out scenes), or a JSON or JSONL file")
    parser.add_argument("--count", type=int, help="how many, the first ones; by default 256 scenes, or the whole file")
    parser.add_argument("--detector", default="shapes", help="what finds the objects: shapes")
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0, 0.4], help="shares of the steps to evaluate")
    parser.add_argument("--no_controls", action="store_true", help="leave out grounding off and shuffled layouts")
    parser.add_argument("--out", default="evaluation", help="folder for report.json, report.md and grid.png")
    _model_arguments(parser)
    parser.set_defaults(steps=20, batch_size=16)
    return (parser.parse_args(words),)


def _run_evaluate(arguments: Namespace) -> None:
    from .evaluate import evaluate_layouts, find_detector, held_out_layouts, write_report
    from .versions import versions

    detector = find_detector(arguments.detector)
    if arguments.layouts == "shapes":
        layouts = held_out_layouts(256 if arguments.count is None else arguments.count)
    else:
        layouts = read_layouts(arguments.layouts)
        if arguments.count is not None and not 1 <= arguments.count <= len(layouts):
            raise UsageError(f"--count is {arguments.count}; {arguments.layouts} holds {len(layouts)} layouts")
        layouts = layouts[: arguments.count]
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # rather found out now than after an hour
    pipeline = _load(arguments)
    report = evaluate_layouts(
        pipeline,
        layouts,
        detector,
        betas=arguments.beta,
        controls=not arguments.no_controls,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
        progress=lambda pictures, name: _watched(pictures, name, len(layouts)),
    )
    about = {"model": arguments.model, "adapter": arguments.adapter, "versions": versions()}
    write_report(report, arguments.out, **about)
    print(f"\n{report.table()}\nwritten to {arguments.out}")


# shapes -------------------------------------------------------------------------------------------------------------


def _parse_shapes(parser: Parser, words: list[str]) -> tuple[str, Namespace]:
    actions = parser.add_subcommands(dest="action", required=True)
    demo = Parser(description="Generate a handful of layouts with grounding on and off, and say how well it went.")
    demo.add_argument("--out", default="demo", help="folder for pictures, grid.png and table.md")
    draw = Parser(description="Draw scenes of the world, with their layouts.")
    draw.add_argument("--count", type=int, default=16, help="how many")
    draw.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    draw.add_argument("--out", default="scenes", help="folder for pictures and layouts.jsonl")
    build = Parser(description="Train the embedded model from nothing (hours). The same command continues.")
    build.add_argument("--out", default="runs/shapes", help="folder for data, checkpoints and the model")
    actions.add_subcommand("demo", demo, help="pictures with grounding on and off, and a table")
    actions.add_subcommand("draw", draw, help="scenes with their layouts")
    pack = Parser(description="Put a base and an adapter that was trained on it into one folder, in float16.")
    pack.add_argument("--base", default="runs/shapes/model", help="what shapes build made")
    pack.add_argument("--adapter", default="runs/shapes-adapter/adapter", help="what train made; or a checkpoint")
    pack.add_argument("--out", default="runs/shapes/packed", help="folder; with it, from_pretrained has both")
    actions.add_subcommand("build", build, help="train the embedded model from nothing")
    actions.add_subcommand("pack", pack, help="a base and its adapter into one folder")
    arguments = parser.parse_args(words)
    return arguments.action, arguments[arguments.action]


def _run_shapes(action: str, arguments: Namespace) -> None:
    _quiet_imports()
    if action == "demo":
        from .demo import demo

        print(demo(arguments.out))
    elif action == "build":
        from .shapes.build import build

        print(build(Path(arguments.out)))
    elif action == "pack":
        from .shapes.build import pack

        print(pack(arguments.base, arguments.adapter, Path(arguments.out)))
    else:
        _draw_scenes(arguments)


def _draw_scenes(arguments: Namespace) -> None:
    from .layout import write_layouts
    from .shapes.world import draw, sample_scene, scene_layout

    if arguments.count < 1:
        raise UsageError(f"--count is {arguments.count}; expected at least 1")
    out, seed, layouts = Path(arguments.out), arguments.seed, []
    if seed < 0:
        raise UsageError(f"--seed is {seed}; expected 0 or more")
    for index in range(arguments.count):
        layouts.append(scene_layout(scene := sample_scene(seed, index), seed=seed, index=index))
        with whole_file(out / f"{layouts[-1].id}.png") as partial:
            draw(scene).save(partial, format="PNG")
    write_layouts(out / "layouts.jsonl", layouts)
    print(f"{len(layouts)} scenes in {out}")


# version ------------------------------------------------------------------------------------------------------------


def _parse_version(parser: Parser, words: list[str]) -> tuple[()]:
    parser.parse_args(words)
    return ()


def _run_version() -> None:
    from .versions import versions

    print("\n".join(f"{name} {number}" for name, number in versions().items()))


@dataclass(frozen=True)
class Command:
    help: str
    parse: Callable[[Parser, list[str]], tuple[Any, ...]]
    run: Callable[..., int | None]


COMMANDS = {
    "generate": Command("Layouts to pictures.", _parse_generate, _run_generate),
    "train": Command("Train an adapter, or continue the run that stands in its folder.", _parse_train, _run_train),
    "evaluate": Command("Measure how well boxes are followed.", _parse_evaluate, _run_evaluate),
    "shapes": Command("The embedded tiny world: demo, drawing, building its model.", _parse_shapes, _run_shapes),
    "version": Command("Versions of this program and of what it rests on.", _parse_version, _run_version),
}


if __name__ == "__main__":
    sys.exit(main())
