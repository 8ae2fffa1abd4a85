"""gligen-xl prepare"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import Namespace

from ..worlds import NAMES
from .common import WITHOUT_BOXES, Parser, parse_part, quiet_imports, say, usable_device
from .values import UsageError, check_out, check_source, count, device, dtype

HELP = "Images to shards, for training: COCO, YOLO, Pascal VOC, Hugging Face, webdatasets, SA-1B, or your own."


def parse(parser: Parser, words: list[str]) -> tuple[Namespace]:
    from ..prepare.sources import BOX_FORMATS, KINDS  # a third of a second that other commands need not wait

    parser.add_argument(
        "source", help="folder of images and annotations, or of .tar archives; or a file: data.yaml, .jsonl, .json"
    )
    parser.add_argument("--out", required=True, help="folder for the shards; the same command goes on after a kill")
    parser.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="of the source")
    parser.add_argument("--box_format", choices=BOX_FORMATS, help="of boxes that do not say it themselves")
    parser.add_argument("--instances", help="COCO: the JSON file of annotations; the source is the folder of images")
    parser.add_argument("--classes", help="JSON or YAML of category -> phrase, or null to leave it out")
    parser.add_argument("--images", help="folder of the images, where they do not stand with their annotations")
    parser.add_argument("--split", help="of the source, as train, val, test; by default all of it")
    parser.add_argument("--unit_size", type=count, default=10_000, help="images a shard, of sources without archives")

    parser.add_argument("--resolution", action="append", default=[], help="pixels, by default 512; once for each")
    parser.add_argument("--buckets", action="store_true", help="SDXL's aspect-ratio buckets in place of centre crops")
    parser.add_argument(
        "--flip",
        choices=["no", "both", "random"],
        default="no",
        help="mirrored images, unless left or right is named",
    )
    parser.add_argument("--fast_jpeg", action="store_true", help="decode JPEGs at reduced size where that is enough")
    parser.add_argument("--min_side", type=int, default=0, help="leave out images with a shorter side, pixels")
    parser.add_argument("--min_share", type=float, default=0.5, help="of a box's area that has to be in the crop")
    parser.add_argument("--min_boxes", type=int, default=0, help="leave out images with fewer")

    parser.add_argument("--without_boxes", action="store_true", help=WITHOUT_BOXES)

    parser.add_argument("--captions", help="joined by image id: tar(.gz) of .txt, parquet, JSONL, COCO captions JSON")
    parser.add_argument(
        "--detector", help="finds the boxes: a zero-shot detector of transformers, folder or repository"
    )
    parser.add_argument("--box_threshold", type=float, help="of the detector, by default 0.2")
    parser.add_argument("--text_threshold", type=float, help="of the detector, by default 0.2")
    parser.add_argument("--detect_text", help='what to detect, as "a dog. a cat."; by default the caption')

    parser.add_argument("--vae", help="folder, repository, or shapes; by default SDXL's fp16-safe one")
    parser.add_argument("--latents", choices=["sample", "mean"], default="sample", help="of the VAE's posterior")
    parser.add_argument("--seed", type=int, default=0, help="of samples and random flips")
    parser.add_argument(
        "--dtype", type=dtype, default="float32", help="of VAE and detector, as fp16; overflows are repeated"
    )
    parser.add_argument("--at_once", type=count, default=1, help="images a pass of a network; may change last bits")

    parser.add_argument("--device", type=device, help="cpu, cuda, ...; by default the best there is")
    parser.add_argument("--batch_size", type=count, default=8, help="images detected and encoded together")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes; 0 decodes beside the rest")
    parser.add_argument("--part", default="1/1", help="k/n: only every n-th unit, for arrays of jobs")
    parser.add_argument("--runner", choices=["local", "ray"], default="local", help="ray: units on a Ray cluster")
    parser.add_argument(
        "--runners", type=count, help="with ray: units at a time; by default as many as there is room for"
    )
    arguments = parser.parse_args(words)
    arguments.resolution = [_resolution(text, arguments.vae) for text in arguments.resolution] or [512]
    arguments.part = parse_part(arguments.part)
    return (arguments,)


def _resolution(text: str, vae: str | None) -> int:
    """Pixels. Of the usual VAE they are a multiple of 8; another one is asked when it is loaded."""
    if not text.strip().isascii() or not text.strip().isdecimal():
        raise UsageError(f"--resolution is {text}; expected pixels, as 512")
    if vae is None and int(text) % 8:
        raise UsageError(f"--resolution is {text}; expected a multiple of 8 pixels, as 512")
    return int(text)


def _check_paths(arguments: Namespace) -> None:
    """Refuse, before anything is loaded, what is not there or cannot be written."""
    if arguments.vae is not None:
        check_source("vae", arguments.vae, "VAE", file=True, known=NAMES)
    if arguments.detector is not None:
        check_source("detector", arguments.detector, "detector", known=NAMES)
    if arguments.runners is not None and arguments.runner != "ray":
        raise UsageError(
            f"runners is {arguments.runners} with runner {arguments.runner!r}; --runners is of --runner ray"
        )
    check_out(arguments.out)


def run(arguments: Namespace) -> None:
    _check_paths(arguments)
    from tqdm import tqdm

    from ..prepare.sources import open_source

    units = open_source(
        arguments.source,
        kind=arguments.kind,
        box_format=arguments.box_format,
        instances=arguments.instances,
        classes=arguments.classes,
        images=arguments.images,
        split=arguments.split,
        other_uses=[path for path in (arguments.out, arguments.captions) if path],
        unit_size=arguments.unit_size,
    )
    settings = _settings(arguments)
    quiet_imports()
    from ..prepare.run import prepare
    from ..prepare.runners import Machine

    machine = Machine(
        workers=arguments.workers,
        device=usable_device(arguments.device),
        batch_size=arguments.batch_size,
        runner=arguments.runner,
        runners=arguments.runners,
    )
    part = arguments.part
    weight = sum(unit.weight for unit in units[part[0] - 1 :: part[1]])
    form = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with _interrupts() as check, tqdm(total=weight, desc="prepare", bar_format=form, disable=None) as bar:
        report = prepare(
            units, arguments.out, settings, machine,
            source=_name(arguments), part=part, progress=_Shown(bar, check),
        )  # fmt: skip
    say(report)
    if report.failed:
        raise ValueError(f"{len(report.failed)} of {len(units)} units failed; the same command tries those again")
    if report.in_work and not report.whole:
        return
    if not report.total.seen:
        raise ValueError(f"no image was found in {arguments.source}")
    if not report.total.used:
        raise ValueError("no image could be used; the reasons are above")
    if not arguments.without_boxes:
        report.total.statistics.check(arguments.source, _advice(arguments, report.total.dropped_boxes))


def _advice(arguments: Namespace, dropped: Mapping[str, int]) -> str:
    """What to look at where no image has a box."""
    if arguments.detector:
        return "the detector saw nothing; lower its thresholds, or say by --detect-text what to look for"
    if dropped:
        most = max(dropped, key=dropped.__getitem__)
        return f"boxes were dropped ({most}: {dropped[most]:,}); look whether box_format is that of the source"
    return "no annotation was read; see which forms are understood (docs/prepare.md), or find boxes by --detector"


def _name(arguments: Namespace) -> str:
    """What the units are of, wherever the command is given."""
    source = str(Path(arguments.source).resolve())
    instances = f" with {Path(arguments.instances).resolve()}" if arguments.instances else ""
    return f"{source}{instances}{f', split {arguments.split}' if arguments.split else ''}"


def _settings(arguments: Namespace) -> Any:
    from ..data.shards import SDXL_VAE
    from ..prepare.framing import Framing
    from ..prepare.settings import Settings

    names = ("flip", "min_share", "min_boxes", "captions", "detector", "box_threshold", "text_threshold", "detect_text",
             "latents", "seed", "dtype", "at_once")  # fmt: skip
    framing = Framing(
        resolutions=tuple(arguments.resolution),
        buckets=arguments.buckets,
        fast_jpeg=arguments.fast_jpeg,
        min_side=arguments.min_side,
    )
    return Settings(framing=framing, vae=arguments.vae or SDXL_VAE, **{name: arguments[name] for name in names})


class _Shown:
    """Weight and images on a progress bar: how far, how fast, how long still. Where there is none, as in a job's
    file, a line a minute."""

    EVERY = 60.0  # seconds between lines

    def __init__(self, bar: Any, check: Callable[[], None]):
        self.bar, self.check, self.images, self.weight, self.before = bar, check, 0, 0, 0
        self.began = self.said = time.monotonic()
        self._silent = getattr(bar, "disable", False)  # tqdm has no clock then

    def __call__(self, weight: int, images: int) -> None:
        self.check()
        self.images += images
        self.weight += weight
        if not images and not self.images:
            self.before += weight  # done before: no part of the speed
            self.bar.initial = self.before
        now = time.monotonic()
        elapsed = now - self.began if self._silent else self.bar.format_dict["elapsed"]
        text = f"prepare: {self.images} images, {self.images / (elapsed or 1e-9):.1f}/s"
        if not self._silent:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(weight)
        elif now - self.said >= self.EVERY:
            self.said = now
            print(f"{text}, {100 * self.weight / max(self.bar.total or 0, 1):.0f}%", file=sys.stderr, flush=True)


@contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM are KeyboardInterrupts; the function given raises one that has come.

    It has to be asked now and then: an exception that a signal raises within a weak reference's callback is swallowed.
    """
    came = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    former = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
