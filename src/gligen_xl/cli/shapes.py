"""gligen-xl shapes"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import Namespace

from ..io import whole_file
from .common import Parser, quiet_imports, say
from .values import check_folder, check_out, check_source, count, seed

HELP = "The embedded tiny world: demo, drawing, building its model."


def parse(parser: Parser, words: list[str]) -> tuple[str, Namespace]:
    actions = parser.add_subcommands(dest="action", required=True)
    demo = Parser(description="Generate a handful of layouts with grounding on and off, and say how well it went.")
    demo.add_argument("--out", default="demo", help="folder for images, grid.png and table.md")
    draw = Parser(description="Draw scenes of the world, with their layouts.")
    draw.add_argument("--count", type=count, default=16, help="how many")
    draw.add_argument("--seed", type=seed, default=0, help="another seed, other scenes")
    draw.add_argument("--out", default="scenes", help="folder for images, layouts.jsonl and metadata.jsonl (prepare)")
    build = Parser(description="Train the embedded model from nothing (hours). The same command continues.")
    build.add_argument("--out", default="runs/shapes", help="folder for data, checkpoints and the model")
    actions.add_subcommand("demo", demo, help="images with grounding on and off, and a table")
    actions.add_subcommand("draw", draw, help="scenes with their layouts")
    pack = Parser(description="Put a base and an adapter that was trained on it into one folder, in float16.")
    pack.add_argument("--base", default="runs/shapes/model", help="what shapes build made")
    pack.add_argument("--adapter", default="runs/shapes-adapter/adapter", help="what train made; or a checkpoint")
    pack.add_argument("--out", default="runs/shapes/packed", help="folder; with it, from_pretrained has both")
    actions.add_subcommand("build", build, help="train the embedded model from nothing")
    actions.add_subcommand("pack", pack, help="a base and its adapter into one folder")
    arguments = parser.parse_args(words)
    chosen = arguments[arguments.action]
    check_out(chosen.out)
    if arguments.action == "pack":
        check_folder(chosen.base, "the folder of a pipeline")
        check_source("adapter", chosen.adapter, "adapter")
    return arguments.action, chosen


def run(action: str, arguments: Namespace) -> None:
    if action != "draw":
        quiet_imports()
    if action == "demo":
        from ..toyworld.demo import demo

        print(demo(arguments.out))
    elif action == "build":
        from ..toyworld.build import build

        print(build(Path(arguments.out)))
    elif action == "pack":
        from ..toyworld.build import pack

        print(pack(arguments.base, arguments.adapter, Path(arguments.out)))
    else:
        _draw_scenes(arguments)


def _draw_scenes(arguments: Namespace) -> None:
    from ..layout import write_layouts
    from ..toyworld.world import draw, sample_scene, scene_layout

    out, seed, layouts = Path(arguments.out), arguments.seed, []
    for index in range(arguments.count):
        layouts.append(scene_layout(scene := sample_scene(seed, index), seed=seed, index=index))
        with whole_file(out / f"{layouts[-1].id}.png") as partial:
            draw(scene).save(partial, format="PNG")
    write_layouts(out / "layouts.jsonl", layouts)
    with whole_file(out / "metadata.jsonl") as partial:  # what `prepare` reads
        rows = [
            {"file_name": f"{layout.id}.png", "text": layout.prompt, "phrases": layout.phrases, "boxes": layout.boxes}
            for layout in layouts
        ]
        lines = [json.dumps({**row, "box_format": "xyxy"}, ensure_ascii=False) + "\n" for row in rows]
        partial.write_text("".join(lines), encoding="utf-8")
    say(f"{len(layouts)} scenes in {out}")
