"""gligen-xl evaluate"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ..layout import read_layouts
from .common import Parser, UsageError, load, model_arguments, watched

HELP = "Measure how well boxes are followed."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    parser.add_argument("--layouts", default="shapes", help="shapes (held-out scenes), or a JSON or JSONL file")
    parser.add_argument("--count", type=int, help="how many, the first ones; by default 256 scenes, or the whole file")
    parser.add_argument("--detector", default="shapes", help="what finds the objects: shapes")
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0, 0.4], help="shares of the steps to evaluate")
    parser.add_argument("--no_controls", action="store_true", help="leave out grounding off and shuffled layouts")
    parser.add_argument("--out", default="evaluation", help="folder for report.json, report.md and grid.png")
    model_arguments(parser)
    parser.set_defaults(steps=20, batch_size=16)
    return (parser.parse_args(words),)


def run(arguments: Namespace) -> None:
    from ..evaluate import evaluate_layouts, find_detector, held_out_layouts, write_report
    from ..versions import versions

    detector = find_detector(arguments.detector)
    if arguments.layouts == "shapes":
        layouts = held_out_layouts(256 if arguments.count is None else arguments.count)
    else:
        layouts = read_layouts(arguments.layouts)
        if arguments.count is not None and not 1 <= arguments.count <= len(layouts):
            raise UsageError(f"--count is {arguments.count}; {arguments.layouts} holds {len(layouts)} layouts")
        layouts = layouts[: arguments.count]
    Path(arguments.out).mkdir(parents=True, exist_ok=True)  # rather found out now than after an hour
    pipeline = load(arguments)
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
        progress=lambda pictures, name: watched(pictures, name, len(layouts)),
    )
    about = {"model": arguments.model, "adapter": arguments.adapter, "versions": versions()}
    write_report(report, arguments.out, **about)
    print(f"\n{report.table()}\nwritten to {arguments.out}")
