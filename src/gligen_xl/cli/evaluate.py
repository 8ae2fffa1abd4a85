"""gligen-xl evaluate"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ..escape import printable
from ..redact import redacted
from ..suggestions import did_you_mean
from ..worlds import NAMES
from .common import (
    Parser,
    best_device,
    check_generation,
    load,
    model_arguments,
    parse_part,
    quiet_imports,
    refuse_beside,
    say,
    settle_guidance,
    usable_device,
    watched,
)
from .values import UsageError, check_file, check_folder, check_out, check_source, count, is_there

if TYPE_CHECKING:
    from ..detect.detectors import Detector
    from ..evaluate.clip import ClipScorer
    from ..evaluate.protocol import Protocol
    from ..evaluate.run import Condition
    from ..evaluate.sampling import ImageSet
    from ..layout import Layout

HELP = "Measure how well boxes are followed."
UNREAD = 1  # exit code

ENDINGS = f"""The same command goes on where it was stopped. Exit codes: 0 everything is generated, or scored; {UNREAD}
the report stands, but images are missing or damaged: it names them; 2 an error; 130 an interrupt."""


def parse(parser: Parser, words: list[str]) -> tuple[Namespace, tuple[int, int] | None, dict[str, list[float]]]:
    parser.epilog = ENDINGS
    add = parser.add_argument
    add("--layouts", default=NAMES[0], help=f"{', '.join((*NAMES, *COCO))}, or a file")
    add("--coco", help="folder of COCO's annotations and images")
    add(
        "--layout_seed",
        type=int,
        default=0,
        help="of layouts that are drawn: coco-mig and coco-position without a file",
    )
    add("--real", help="with a file of layouts: folder of their real images, named by id")
    add("--count", type=count, help="how many layouts, the first ones; by default all, and 256 of shapes")
    add("--out", default="evaluation", help="folder for images, detections and the report")
    add("--beta", type=float, nargs="+", help="shares of the steps to evaluate; by default 1 and 0.4, with a sweep 1")
    add("--sweep", action="append", default=[], help="beta=0,0.2,0.4,1 or guidance_scale=1,2,5; may be repeated")
    add("--no_controls", action="store_true", help="leave out grounding off, shuffled, real and empty images")
    add("--part", help="1/4: generate the first of four parts, and stop; four such commands do all")
    add("--generate_only", action="store_true", help="write the images, and stop")
    add("--pictures", help="score the images of this folder, KEY.png or WAY/KEY.png; nothing is generated")
    add("--detector", help="shapes, a folder or a Hub repository; by default that of the protocol")
    add("--threshold", type=float, help="score from which on a detection counts; by default the detector's")
    add("--segmenter", help="for colours: a folder or repository of SAM, in place of an ellipse in the box")
    add("--clip", help="measure CLIP scores with this model: a folder or a Hub repository")
    add("--fid", help="measure FID and KID from the images of this folder")
    add("--fid_python", help="the interpreter that has clean-fid, where it is not this one")
    add("--compare", help="folder of another evaluation of the same layouts: differences from it")
    model_arguments(parser)
    parser.set_defaults(steps=20, batch_size=16)
    arguments = parser.parse_args(words)
    part = None if arguments.part is None else parse_part(arguments.part)
    sweep: dict[str, list[float]] = {}
    for text in arguments.sweep:
        name, values = _sweep(text)
        sweep[name] = sweep.get(name, []) + values
    _check(arguments, parser)
    arguments.beta = arguments.beta or ([1.0] if sweep else [1.0, 0.4])
    _check_values(arguments, sweep)
    _check_paths(arguments)
    if part is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("--part shares the work out, as torchrun does; give one of the two")
    return arguments, part, sweep


def _sweep(text: str) -> tuple[str, list[float]]:
    name, _, values = text.partition("=")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise UsageError(f"--sweep is {text!r}; expected beta=0,0.4,1 or guidance_scale=1,2,5") from None


DRAWN = ("coco-position", "coco-mig")  # where the folder has no published file
COCO = ("coco", "coco-2014", "coco-2017", *DRAWN)
SWEPT = ("beta", "guidance_scale")
# What is refused beside --pictures, and beside --generate_only and --part.
GENERATING = (
    "model", "config", "variant", "adapter", "dtype", "offload", "steps", "guidance_scale", "seed", "batch_size",
    "beta", "sweep", "part", "generate_only",
)  # fmt: skip
SCORING = ("detector", "threshold", "segmenter", "clip", "fid", "fid_python", "compare")


def _check(arguments: Namespace, parser: Parser) -> None:
    """Refuse what would be ignored."""

    def refuse(names: Iterable[str], why: str) -> None:
        refuse_beside(arguments, parser, names, why)

    layouts = arguments.layouts
    if arguments.pictures:
        refuse(GENERATING, "is of generating, but --pictures are there already; give one of the two")
    if arguments.generate_only or arguments.part:
        refuse(SCORING, "is of scoring, which comes after --generate_only and --part; leave it out")
    if not arguments.fid:
        refuse(["fid_python"], "is the interpreter for --fid; give both")
    if layouts not in COCO:
        refuse(["coco"], f"is the folder of layouts that begin with coco; --layouts is {layouts}")
    if layouts not in DRAWN:
        refuse(["layout_seed"], f"is of coco-mig and coco-position, whose layouts are drawn; --layouts is {layouts}")
    if layouts in (*NAMES, *COCO):
        refuse(["real"], f"is of layouts in a file; --layouts is {layouts}")
    if arguments.no_controls or arguments.generate_only or arguments.part:
        refuse(["real"], "is for the control of real images, which is not scored here; leave it out")


def _check_values(arguments: Namespace, sweep: Mapping[str, Sequence[float]]) -> None:
    """Check the shares of the steps, and what a sweep varies."""
    from ..pipelines.schedule import GroundingSchedule

    for name in sweep:
        if name not in SWEPT:
            raise UsageError(
                f"a sweep of {name!r}; expected one of {', '.join(SWEPT)}, as --sweep beta=0,0.4,1"
                f"{did_you_mean(name, SWEPT)}"
            )
    for beta in [*arguments.beta, *sweep.get("beta", ())]:
        try:
            GroundingSchedule.parse(beta)
        except ValueError as error:
            raise UsageError(str(error).replace("gligen_scheduled_sampling_beta", "--beta")) from None
    for scale in sweep.get("guidance_scale", ()):
        if not 0 <= scale < float("inf"):
            raise UsageError(f"--sweep guidance_scale is {scale}; expected a number of at least 0")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UsageError(f"--threshold is {arguments.threshold}; expected a score between 0 and 1")


def _check_paths(arguments: Namespace) -> None:
    """Folders and files that are named have to be there, before anything is loaded."""
    if arguments.layouts not in (*NAMES, *COCO):
        if not is_there(arguments.layouts):
            raise FileNotFoundError(
                f"no layout file {arguments.layouts}, and no such protocol; there are {', '.join((*NAMES, *COCO))}"
                f"{did_you_mean(arguments.layouts, (*NAMES, *COCO))}"
            )
        check_file("layouts", arguments.layouts, "a layout file")
    if arguments.pictures:
        check_folder(arguments.pictures, "a folder of images")
    else:
        check_generation(arguments)
    if arguments.coco:
        check_folder(arguments.coco, "the folder of COCO's annotations and images")
    if arguments.real:
        check_folder(arguments.real, "a folder of images")
    if arguments.compare and not is_there(arguments.compare):
        raise FileNotFoundError(f"{arguments.compare} is no evaluation (--compare): there is no such folder")
    for name, what in (("clip", "CLIP model"), ("segmenter", "segmenter")):
        if arguments[name]:
            check_source(name, arguments[name], what)
    if arguments.detector and arguments.detector not in NAMES and "/" not in arguments.detector:
        if not is_there(arguments.detector):
            raise UsageError(
                f"no detector {arguments.detector!r}; expected 'shapes', a folder, or a Hub repository (owner/name)"
                f"{did_you_mean(arguments.detector, NAMES)}"
            )
    elif arguments.detector:
        check_source("detector", arguments.detector, "detector", known=NAMES)
    check_out(arguments.out)


def run(arguments: Namespace, part: tuple[int, int] | None, sweep: Mapping[str, list[float]]) -> int:
    quiet_imports()
    from ..evaluate import find_protocol
    from ..evaluate.run import check_phrases, find_images, image_folder
    from ..evaluate.sampling import keyed, plan_image_sets

    protocol = find_protocol(
        arguments.layouts,
        coco=arguments.coco,
        images=arguments.real,
        count=arguments.count,
        seed=arguments.layout_seed,
    )
    if arguments.layout_seed and "layout_seed" not in protocol.parameters:
        raise UsageError(f"--layout_seed is of drawn layouts; these are of {protocol.parameters['file']}")
    layouts = keyed(protocol.layouts)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    _look_at_others(arguments, protocol)
    if arguments.pictures:
        images, settings = find_images(arguments.pictures, layouts), _said_of(arguments.pictures)
        return _score(arguments, protocol, images, *_judges(arguments, protocol), settings)

    _settle(arguments)
    image_sets = plan_image_sets(arguments.beta, arguments.guidance_scale, sweep, off=not arguments.no_controls)
    with _processes(part) as (mine, scores):
        judges = _judges(arguments, protocol) if scores and not arguments.generate_only else None
        if judges is not None:
            check_phrases(layouts, judges[0])
        settings = _generate(arguments, layouts, image_sets, mine)
    if judges is None:
        return 0
    images = {image_set: image_folder(arguments.out, image_set.name) for image_set in image_sets}
    return _score(arguments, protocol, images, *judges, settings)


def _look_at_others(arguments: Namespace, protocol: Protocol) -> None:
    """Tell whether --fid and --compare name what they should."""
    from ..evaluate.compare import layouts_of
    from ..evaluate.fid import images_in

    comes = protocol.real is not None and not arguments.no_controls
    if arguments.fid and not (comes and Path(arguments.fid).resolve() == _real_images(arguments)):
        images_in(arguments.fid)
    if arguments.compare:
        layouts_of(arguments.compare)


def _real_images(arguments: Namespace) -> Path:
    """Return the folder in which the real images of this evaluation are, or will be."""
    from ..evaluate.run import image_folder

    return image_folder(arguments.out, "real").resolve()


def _settle(arguments: Namespace) -> None:
    """Fill in the defaults that `load` would use, and give each process a GPU of its own."""
    settle_guidance(arguments)
    if arguments.device is None and (device := best_device()) == "cuda":
        arguments.device = f"{device}:{os.environ.get('LOCAL_RANK', 0)}"


@contextmanager
def _processes(part: tuple[int, int] | None) -> Iterator[tuple[tuple[int, int], bool]]:
    """Return the part of the work that is this process's, and whether it scores: --part, or as torchrun shares it out.
    Then the first process goes on when all have come to the end of the block."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if part is not None:
        yield part, False
    elif count == 1:
        yield (1, 1), True
    else:
        from datetime import timedelta

        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(days=10))
        try:
            yield (rank + 1, count), rank == 0
            dist.barrier()
        finally:
            dist.destroy_process_group()


def _generate(
    arguments: Namespace, layouts: Mapping[str, Layout], image_sets: list[ImageSet], part: tuple[int, int]
) -> dict[str, Any]:
    """Generate the images; return the settings that they were generated with."""
    from ..evaluate.output_folder import GENERATION, read_generation
    from ..evaluate.run import generate_all

    about = {name: arguments[name] for name in ("model", "config", "variant", "adapter")}
    about = {name: value and value.rstrip("/") for name, value in about.items()}
    about["guidance_scale"] = arguments.guidance_scale
    pipeline = load(arguments)
    about["dtype"] = str(pipeline.unet.dtype).removeprefix("torch.")
    made = generate_all(
        pipeline,
        layouts,
        arguments.out,
        image_sets,
        steps=arguments.steps,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        part=part,
        about=about,
        progress=watched,
    )
    print(
        f"{made} images made, of {len(layouts)} layouts and {', '.join(image_set.name for image_set in image_sets)}; "
        f"in {Path(arguments.out) / 'pictures'}"
    )
    return read_generation(Path(arguments.out) / GENERATION)


def _judges(arguments: Namespace, protocol: Protocol) -> tuple[Detector, ClipScorer | None]:
    from ..evaluate import find_detector
    from ..evaluate.clip import ClipScorer

    name, device = arguments.detector or protocol.detector, usable_device(arguments.device)
    colour = name not in NAMES and "colour" in protocol.attributes
    if arguments.segmenter and not colour:
        raise UsageError(f"--segmenter is for colours, which {protocol.name} does not judge with {name}; leave it out")
    detector = find_detector(
        name, device=device, threshold=arguments.threshold, colour=colour, segmenter=arguments.segmenter
    )
    return detector, ClipScorer.load(arguments.clip, device=device) if arguments.clip else None


def _said_of(images: str) -> dict[str, Any]:
    """Return what is known of how images were generated; of an evaluation's own images that is everything."""
    from ..evaluate.output_folder import GENERATION, read_generation

    path = Path(images).absolute().parent / GENERATION
    return {"pictures": images, **(read_generation(path) if path.is_file() else {})}


def _score(
    arguments: Namespace,
    protocol: Protocol,
    images: Mapping[ImageSet, Path],
    detector: Detector,
    clip: ClipScorer | None,
    settings: dict[str, Any],
) -> int:
    from ..evaluate import Report, write_report
    from ..evaluate.compare import compare
    from ..evaluate.report_words import terminal_text
    from ..evaluate.run import score_all
    from ..versions import versions

    out = Path(arguments.out)
    conditions = score_all(
        protocol, images, out, detector, clip=clip, controls=not arguments.no_controls, progress=watched
    )
    if clip is not None:
        settings |= clip.settings
    compared, failed = None, []
    try:
        if arguments.compare:
            compared = compare(conditions, arguments.compare, detector, clip)
        if arguments.fid:
            settings["distances"] = _distances(arguments, conditions)
    except (ValueError, OSError) as error:  # the report stands without it
        failed.append(error)
    report = Report(protocol=protocol, detector=detector, conditions=conditions, settings=settings, compared=compared)
    write_report(report, out, versions=versions())
    say(f"\n{terminal_text(report)}\nwritten to {out}")
    if failed:
        raise failed[0]
    unread = [(condition.name, *item) for condition in conditions for item in condition.unread.items()]
    for name, key, why in unread[:10]:
        print(printable(redacted(f"not scored: {name} {key}: {why}")), file=sys.stderr)
    if len(unread) > 10:
        print(f"not scored: {len(unread) - 10} more", file=sys.stderr)
    return UNREAD if unread else 0


def _distances(arguments: Namespace, conditions: list[Condition]) -> dict[str, dict[str, Any]]:
    """FID and KID of the images of each condition from those of --fid."""
    from ..evaluate.fid import distances, images_in

    themselves = Path(arguments.fid).resolve() == _real_images(arguments)
    sets = {
        condition.name: [path for key, path in condition.paths.items() if key not in condition.unread]
        for condition in conditions
        if condition.kind in ("grounded", "off") or (condition.kind == "real" and not themselves)
    }
    sets = {name: files for name, files in sets.items() if len(files) > 1}
    found = distances(
        sets, images_in(arguments.fid), python=arguments.fid_python, device=arguments.device or best_device()
    )
    return {name: asdict(distance) for name, distance in found.items()}
