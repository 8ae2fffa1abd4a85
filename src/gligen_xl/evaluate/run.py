"""Evaluation: the same layouts and noise with grounding on, partly on and off, beside images that bound the figures.

    conditions = evaluate_layouts(pipeline, find_protocol("shapes"), find_detector("shapes"), "out")

Generating (`generate_all`) and scoring (`score_all`) are apart: each goes on where it was stopped, and the second takes
images of any program (`find_images`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..detect.cache import DetectionCache, Seen
from ..detect.detection import Detection
from ..detect.detectors import Detector
from ..detect.matching import ImageScore, score_image
from ..images.decode import ImageError, decode
from ..layout import Box, Layout
from ..pipelines.grounding import GroundingMixin
from .binding import bind, check_slots, generation_settings, only_one_at, write_keyed
from .clip import ClipScorer
from .protocols import Protocol
from .real_images import Photographs
from .sampling import (
    SWEPT,
    Kind,
    Progress,
    Way,
    copy_images,
    find_files,
    find_ways,
    generate_images,
    keyed,
    read_about,
    unwatched,
)

Beside = Callable[[Layout], Sequence[tuple[str, Box]]]
MISSING = "missing"
_AT_ONCE = 16  # images in memory


@dataclass(frozen=True)
class Condition:
    """The images of one way of making them, scored.

    Args:
        settings: beta and guidance_scale, where they are known.
        images: scores of those that could be read.
        paths: image files by key.
        unread: why not, of those that are missing or damaged; they are in no metric.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    images: tuple[ImageScore, ...]
    paths: Mapping[str, Path]
    unread: Mapping[str, str]


def evaluate_layouts(
    pipeline: GroundingMixin,
    protocol: Protocol,
    detector: Detector,
    out: str | Path,
    *,
    betas: Sequence[float] = (1.0, 0.4),
    controls: bool = True,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 16,
    progress: Progress = unwatched,
) -> list[Condition]:
    """Generate the layouts of a protocol in each way, and score them.

    Args:
        out: the folder; what stands there already is not made again.
        controls: with grounding off, shuffled layouts, real and empty images; see `score_all`.
    """
    layouts = keyed(protocol.layouts)
    check_phrases(layouts, detector)
    ways = find_ways(betas, guidance_scale, off=controls)
    generate_all(
        pipeline, layouts, out, ways, steps=steps, seed=seed, batch_size=batch_size,
        about={"guidance_scale": guidance_scale}, progress=progress,
    )  # fmt: skip
    images = {way: image_folder(out, way.name) for way in ways}
    return score_all(protocol, images, out, detector, controls=controls, progress=progress)


def check_phrases(layouts: Mapping[str, Layout], detector: Detector) -> None:
    """Complain before an hour of generating rather than after it.

    Raises:
        ValueError: a layout without boxes, or a phrase that the detector cannot look for.
    """
    for key, layout in layouts.items():
        if not layout.boxes:
            raise ValueError(f"layout {key} has no boxes; there is nothing to evaluate")
        for phrase in layout.phrases:
            detector.query(phrase)


def image_folder(out: str | Path, name: str) -> Path:
    return Path(out) / "pictures" / name


# Generating ---------------------------------------------------------------------------------------------------------


def generate_all(
    pipeline: GroundingMixin,
    layouts: Mapping[str, Layout],
    out: str | Path,
    ways: Sequence[Way],
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    part: tuple[int, int] = (1, 1),
    about: Mapping[str, Any] | None = None,
    progress: Progress = unwatched,
) -> int:
    """Make the images that `out` lacks, of every way, or a part of them.

    Args:
        part: see `generate_images`.
        about: what else the images depend on, as the names of model and adapter; another in the same folder is
            refused.

    Returns:
        How many were made.
    """
    check_slots(pipeline, layouts)
    bind(out, layouts, generation_settings(pipeline, **(about or {}), steps=steps, seed=seed))
    with only_one_at(out, part):
        return sum(
            generate_images(
                pipeline, layouts, image_folder(out, way.name), way,
                steps=steps, seed=seed, batch_size=batch_size, part=part, progress=progress,
            )
            for way in ways
        )  # fmt: skip


# Images of other programs -----------------------------------------------------------------------------------------


def find_images(folder: str | Path, layouts: Mapping[str, Layout]) -> dict[Way, Path]:
    """The folders that hold images of the layouts, FOLDER/WAY/KEY.png, or FOLDER/KEY.png; any format will do.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no image in it is called by a key, or a folder in it has the name of a condition that is not
            generated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of images")
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if any(path.name == "shuffled" for path in inner):
        raise ValueError(f"{folder}/shuffled has the name of a control that is made here; call it something else")
    found = {
        way_called("pictures" if path == folder else path.name, read_about(next(iter(files.values())))): path
        for path in (folder, *inner)
        if (files := find_files(path, layouts))
    }
    if not found:
        raise ValueError(
            f"{folder} has no image of these {len(layouts)} layouts; expected {next(iter(layouts))}.png and so on, "
            "there or in folders of it"
        )
    return dict(sorted(found.items(), key=lambda item: rank(item[0])))


def way_called(name: str, about: Mapping[str, Any] | None = None) -> Way:
    """As far as a folder's name tells, and the text of an image in it."""
    settings = {
        swept: value
        for swept in SWEPT
        if isinstance(value := (about or {}).get(swept), int | float) and not isinstance(value, bool)
    }
    swept, _, value = name.rpartition("-")
    if not settings and swept in SWEPT:
        with suppress(ValueError):  # a name that only begins like one of ours
            settings[swept] = float(value)
    settings = {name: value for name, value in settings.items() if math.isfinite(value)}
    kinds: dict[str, Kind] = {"off": "off", "real": "real", "empty": "empty"}
    return Way(name, kinds.get(name, "grounded"), settings)


def rank(way: Way) -> tuple[Any, ...]:
    """The largest beta first, as that is what others are compared with; then other sweeps; controls last."""
    kinds = ("grounded", "off", "real", "empty")
    beta = way.settings.get("beta", -1.0)
    return kinds.index(way.kind), not way.name.startswith("beta-"), -beta, way.name


# Scoring ------------------------------------------------------------------------------------------------------------


def score_all(
    protocol: Protocol,
    images: Mapping[Way, Path],
    out: str | Path,
    detector: Detector,
    *,
    clip: ClipScorer | None = None,
    controls: bool = True,
    progress: Progress = unwatched,
) -> list[Condition]:
    """Score images against their layouts; what is found in them is kept in `out`.

    Args:
        images: their folders.
        controls: also score the first folder's images against layouts of other images ("shuffled": what chance
            gives), real images where the protocol has them ("real": about the most that can be reached), and such
            that hold nothing ("empty": the detector's own inventions).

    Raises:
        ValueError: a phrase that the detector cannot look for, an image whose text says that it is of another layout,
            or no image at all that can be read.
    """
    layouts = keyed(protocol.layouts)
    check_phrases(layouts, detector)
    scorer = _Scorer(Path(out), detector, clip, progress)
    bounds: dict[Kind, Callable[[Layout], Image.Image] | None] = {}
    if controls:
        bounds = {"real": protocol.real, "empty": protocol.empty}
    conditions = [
        scorer(way, layouts, _of_these(find_files(folder, layouts), layouts))
        for way, folder in images.items()
        if (bounds.get(way.kind) is None if controls else way.kind == "grounded")
    ]
    write_keyed(out, layouts)
    if not conditions:
        raise ValueError(f"only images of controls: {', '.join(map(str, images.values()))}")
    if not any(condition.images for condition in conditions):
        key, why = next(iter(conditions[0].unread.items()))
        raise ValueError(
            f"none of {len(layouts)} images of {', '.join(condition.name for condition in conditions)} can be read; "
            f"the first one, {key}: {why}"
        )
    if controls and len(layouts) > 1:
        first = conditions[0]
        conditions.append(scorer(Way("shuffled", "shuffled", {}), shuffled(layouts), first.paths, of=first.name))
    for kind, image_of in bounds.items():
        if image_of is not None:
            folder = image_folder(out, kind)
            photographs = image_of if isinstance(image_of, Photographs) else None
            version_of = photographs and photographs.version
            failed = copy_images(layouts, folder, image_of, kind, version_of=version_of, progress=progress)
            files = {key: path for key, path in find_files(folder, layouts).items() if key not in failed}
            beside = photographs and photographs.beside
            conditions.append(scorer(Way(kind, kind, {}), layouts, files, failed, beside))
    return conditions


def shuffled(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """To each key the layout of the next one; to the last that of the first."""
    keys = list(layouts)
    return {key: layouts[other] for key, other in zip(keys, [*keys[1:], *keys[:1]], strict=True)}


def _of_these(files: dict[str, Path], layouts: Mapping[str, Layout]) -> dict[str, Path]:
    """The files; of those whose text says what layout they are of, it is this one."""
    for key, path in files.items():
        said = read_about(path).get("layout")
        if not isinstance(said, dict):
            continue
        for name in ("prompt", "phrases", "boxes"):
            if said.get(name) != (now := layouts[key].to_dict()[name]):
                raise ValueError(
                    f"{path} is of a layout with other {name} ({said.get(name)!r:.200}, now {now!r:.200}); "
                    "the names of images and the ids of layouts do not belong together"
                )
    return files


class _Scorer:
    """Looks at images a few at a time."""

    def __init__(self, out: Path, detector: Detector, clip: ClipScorer | None, progress: Progress):
        self.out, self.detector, self.clip, self.progress = out, detector, clip, progress

    def __call__(
        self,
        way: Way,
        layouts: Mapping[str, Layout],
        paths: Mapping[str, Path],
        failed: Mapping[str, str] | None = None,
        beside: Beside | None = None,
        of: str | None = None,
    ) -> Condition:
        """
        Args:
            of: the condition whose images they are; its own by default.
            layouts: that the image of each key is scored against.
            failed: why some are missing.
            beside: see `score_image`.
        """
        kept = all_kept(self.out, of or way.name, self.detector, self.clip)
        unread = {key: MISSING for key in layouts if key not in paths} | dict(failed or {})
        scores: list[ImageScore] = []
        for seen in self.progress(self._look(layouts, paths, kept, unread), f"score {way.name}", len(paths)):
            others = beside(seen.layout) if beside else ()
            scores.append(score_kept(seen.layout, seen.key, [one.find(seen) for one in kept], self.detector, others))
        ordered = {key: unread[key] for key in layouts if key in unread}
        return Condition(way.name, way.kind, way.settings, tuple(scores), paths, ordered)

    def _look(
        self,
        layouts: Mapping[str, Layout],
        paths: Mapping[str, Path],
        kept: Sequence[DetectionCache],
        unread: dict[str, str],
    ) -> Iterator[Seen]:
        """Those images that can be read, after what is in them is kept."""
        keys = [key for key in layouts if key in paths]
        for first in range(0, len(keys), _AT_ONCE):
            every: list[Seen] = []
            images: dict[Seen, Image.Image] = {}
            for key in keys[first : first + _AT_ONCE]:
                try:
                    encoded = paths[key].read_bytes()
                    seen = Seen(key, layouts[key], hashlib.sha256(encoded).hexdigest())
                    if any(one.find(seen) is None for one in kept):
                        images[seen] = decode(encoded)
                    every.append(seen)
                except (ImageError, OSError) as error:
                    unread[key] = str(error)
            for one in kept:
                one.add(every, images)
            yield from every


def all_kept(out: Path, name: str, detector: Detector, clip: ClipScorer | None) -> list[DetectionCache]:
    """What the detector found in the images of that folder, and what CLIP says of them."""

    def detect(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[Any]:
        return [[item.to_dict() for item in found] for found in detector.detect(images, layouts)]

    def detections(found: Any) -> list[Detection]:
        return [Detection.from_dict(item) for item in found]

    folder = out / "detections" / name
    settings, asks = detector.settings, detector.reads_layouts
    kept = [DetectionCache(folder / f"{detector.name}.jsonl", settings, detect, detections, reads_layouts=asks)]
    if clip is not None:

        def compare(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[Any]:
            return [[score.clip, score.clip_objects] for score in clip.score(images, layouts)]

        def similarities(found: Any) -> tuple[float | None, list[float]]:
            whole, objects = found
            return None if whole is None else float(whole), [float(value) for value in objects]  # no prompt, no score

        kept.append(DetectionCache(folder / "clip.jsonl", clip.settings, compare, similarities))
    return kept


def score_kept(
    layout: Layout, key: str, found: Sequence[Any], detector: Detector, beside: Sequence[tuple[str, Box]] = ()
) -> ImageScore:
    """Args: found: as `all_kept` has it, the detector's alone or with CLIP's. beside: see `score_image`."""
    score = score_image(layout, key, [Detection.from_dict(item) for item in found[0]], detector, beside)
    if len(found) == 1:
        return score
    whole, objects = found[1]
    return replace(score, clip=whole, clip_objects=tuple(objects))
