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

from ..detect.cache import DetectionCache, ImageFile
from ..detect.detection import Detection
from ..detect.detectors import Detector
from ..detect.matching import ImageScore, score_image
from ..images.decode import ImageError, decode
from ..layout import Box, Layout
from ..pipelines.grounding import GroundingMixin
from .clip import ClipScorer
from .output_folder import check_slots, claim_generation, generation_settings, only_one_at, write_keyed
from .protocol import Protocol
from .real_images import RealImages
from .sampling import (
    SWEPT,
    ImageSet,
    Kind,
    Progress,
    copy_images,
    find_files,
    generate_images,
    keyed,
    no_progress,
    plan_image_sets,
    read_about,
)

IgnoredObjects = Callable[[Layout], Sequence[tuple[str, Box]]]
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
    progress: Progress = no_progress,
) -> list[Condition]:
    """Generate the layouts of a protocol in each way, and score them.

    Args:
        out: the folder; what stands there already is not made again.
        controls: with grounding off, shuffled layouts, real and empty images; see `score_all`.
    """
    layouts = keyed(protocol.layouts)
    check_phrases(layouts, detector)
    image_sets = plan_image_sets(betas, guidance_scale, off=controls)
    generate_all(
        pipeline, layouts, out, image_sets, steps=steps, seed=seed, batch_size=batch_size,
        about={"guidance_scale": guidance_scale}, progress=progress,
    )  # fmt: skip
    images = {image_set: image_folder(out, image_set.name) for image_set in image_sets}
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
    image_sets: Sequence[ImageSet],
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    part: tuple[int, int] = (1, 1),
    about: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
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
    claim_generation(out, layouts, generation_settings(pipeline, **(about or {}), steps=steps, seed=seed))
    with only_one_at(out, part):
        return sum(
            generate_images(
                pipeline, layouts, image_folder(out, image_set.name), image_set,
                steps=steps, seed=seed, batch_size=batch_size, part=part, progress=progress,
            )
            for image_set in image_sets
        )  # fmt: skip


# Images of other programs -----------------------------------------------------------------------------------------


def find_images(folder: str | Path, layouts: Mapping[str, Layout]) -> dict[ImageSet, Path]:
    """Return the folders that hold images of the layouts, FOLDER/WAY/KEY.png, or FOLDER/KEY.png; any format will do.

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
        image_set_named("pictures" if path == folder else path.name, read_about(next(iter(files.values())))): path
        for path in (folder, *inner)
        if (files := find_files(path, layouts))
    }
    if not found:
        raise ValueError(
            f"{folder} has no image of these {len(layouts)} layouts; expected {next(iter(layouts))}.png and so on, "
            "there or in folders of it"
        )
    return dict(sorted(found.items(), key=lambda item: rank(item[0])))


def image_set_named(name: str, about: Mapping[str, Any] | None = None) -> ImageSet:
    """Describe a set of images as far as its folder's name and the text of one of its images tell."""
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
    return ImageSet(name, kinds.get(name, "grounded"), settings)


def rank(image_set: ImageSet) -> tuple[Any, ...]:
    """Sort the largest beta first, since others are compared with it; then other sweeps; controls last."""
    kinds = ("grounded", "off", "real", "empty")
    beta = image_set.settings.get("beta", -1.0)
    return kinds.index(image_set.kind), not image_set.name.startswith("beta-"), -beta, image_set.name


# Scoring ------------------------------------------------------------------------------------------------------------


def score_all(
    protocol: Protocol,
    images: Mapping[ImageSet, Path],
    out: str | Path,
    detector: Detector,
    *,
    clip: ClipScorer | None = None,
    controls: bool = True,
    progress: Progress = no_progress,
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
        scorer(image_set, layouts, _of_these(find_files(folder, layouts), layouts))
        for image_set, folder in images.items()
        if (bounds.get(image_set.kind) is None if controls else image_set.kind == "grounded")
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
        conditions.append(scorer(ImageSet("shuffled", "shuffled", {}), shuffled(layouts), first.paths, of=first.name))
    for kind, image_of in bounds.items():
        if image_of is not None:
            folder = image_folder(out, kind)
            real_images = image_of if isinstance(image_of, RealImages) else None
            version_of = real_images and real_images.version
            failed = copy_images(layouts, folder, image_of, kind, version_of=version_of, progress=progress)
            files = {key: path for key, path in find_files(folder, layouts).items() if key not in failed}
            ignored = real_images and real_images.ignored
            conditions.append(scorer(ImageSet(kind, kind, {}), layouts, files, failed, ignored))
    return conditions


def shuffled(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """To each key the layout of the next one; to the last that of the first."""
    keys = list(layouts)
    return {key: layouts[other] for key, other in zip(keys, [*keys[1:], *keys[:1]], strict=True)}


def _of_these(files: dict[str, Path], layouts: Mapping[str, Layout]) -> dict[str, Path]:
    """Check that the files whose text names a layout are of these layouts, and return them."""
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
        image_set: ImageSet,
        layouts: Mapping[str, Layout],
        paths: Mapping[str, Path],
        failed: Mapping[str, str] | None = None,
        ignored: IgnoredObjects | None = None,
        of: str | None = None,
    ) -> Condition:
        """
        Args:
            of: the condition whose images they are; its own by default.
            layouts: that the image of each key is scored against.
            failed: why some are missing.
            ignored: see `score_image`.
        """
        caches = open_caches(self.out, of or image_set.name, self.detector, self.clip)
        unread = {key: MISSING for key in layouts if key not in paths} | dict(failed or {})
        scores: list[ImageScore] = []
        files = self._read(layouts, paths, caches, unread)
        for file in self.progress(files, f"score {image_set.name}", len(paths)):
            answers = [cache.get(file) for cache in caches]
            objects = ignored(file.layout) if ignored else ()
            scores.append(score_detections(file.layout, file.key, answers, self.detector, objects))
        ordered = {key: unread[key] for key in layouts if key in unread}
        return Condition(image_set.name, image_set.kind, image_set.settings, tuple(scores), paths, ordered)

    def _read(
        self,
        layouts: Mapping[str, Layout],
        paths: Mapping[str, Path],
        caches: Sequence[DetectionCache],
        unread: dict[str, str],
    ) -> Iterator[ImageFile]:
        """Yield the images that can be read, once the caches have what is detected in them."""
        keys = [key for key in layouts if key in paths]
        for first in range(0, len(keys), _AT_ONCE):
            files: list[ImageFile] = []
            images: dict[ImageFile, Image.Image] = {}
            for key in keys[first : first + _AT_ONCE]:
                try:
                    encoded = paths[key].read_bytes()
                    file = ImageFile(key, layouts[key], hashlib.sha256(encoded).hexdigest())
                    if any(cache.get(file) is None for cache in caches):
                        images[file] = decode(encoded)
                    files.append(file)
                except (ImageError, OSError) as error:
                    unread[key] = str(error)
            for cache in caches:
                cache.add(files, images)
            yield from files


def open_caches(out: Path, name: str, detector: Detector, clip: ClipScorer | None) -> list[DetectionCache]:
    """Open what the detector found in the images of that name, and what CLIP says of them."""

    def detect(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[Any]:
        return [[item.to_dict() for item in detections] for detections in detector.detect(images, layouts)]

    def check_detections(answer: Any) -> None:
        for item in answer:
            Detection.from_dict(item)

    folder = out / "detections" / name
    path, settings = folder / f"{detector.name}.jsonl", detector.settings
    caches = [DetectionCache(path, settings, detect, check_detections, reads_layouts=detector.reads_layouts)]
    if clip is not None:

        def compare(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[Any]:
            return [[score.clip, score.clip_objects] for score in clip.score(images, layouts)]

        def check_similarities(answer: Any) -> None:
            of_prompt, of_objects = answer
            _ = None if of_prompt is None else float(of_prompt), [float(value) for value in of_objects]

        caches.append(DetectionCache(folder / "clip.jsonl", clip.settings, compare, check_similarities))
    return caches


def score_detections(
    layout: Layout, key: str, answers: Sequence[Any], detector: Detector, ignored: Sequence[tuple[str, Box]] = ()
) -> ImageScore:
    """Score an image by the answers of `open_caches`: the detector's alone, or with CLIP's.

    Args:
        ignored: see `score_image`.
    """
    score = score_image(layout, key, [Detection.from_dict(item) for item in answers[0]], detector, ignored)
    if len(answers) == 1:
        return score
    of_prompt, of_objects = answers[1]
    return replace(score, clip=of_prompt, clip_objects=tuple(of_objects))
