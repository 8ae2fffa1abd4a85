"""Images of layouts as files, OUT/pictures/WAY/KEY.png: their names, their seeds, and making those that are lacking.

    layouts = keyed(protocol.layouts)
    way = ImageSet.grounded(beta=1.0, guidance_scale=5.0)
    generate_images(pipeline, layouts, "out/pictures/beta-1", way, steps=30)

An image that is there is never made again: the same call goes on after a kill, and several processes share a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..generate import generate
from ..images.decode import ENDINGS
from ..images.draw import METADATA_KEY, png_metadata
from ..io import whole_file
from ..layout import Layout
from ..pipelines.grounding import GroundingMixin
from ..pipelines.schedule import GroundingSchedule

Kind = Literal["grounded", "off", "shuffled", "real", "empty"]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # of items, what they are of, and their number

SWEPT = ("beta", "guidance_scale")


def no_progress(items: Iterable[Any], name: str, total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class ImageSet:
    """A way of generating images.

    Args:
        name: of its folder and in reports.
        settings: beta and guidance_scale; of images without grounding only the second, of other programs' none.
    """

    name: str
    kind: Kind
    settings: Mapping[str, float] = field(hash=False)

    @classmethod
    def grounded(cls, beta: float, guidance_scale: float, *, swept: str = "beta") -> ImageSet:
        """Args: swept: the setting that it is named for."""
        settings = {"beta": beta, "guidance_scale": guidance_scale}
        return cls(f"{swept}-{settings[swept]:.12g}", "grounded", settings)

    @classmethod
    def off(cls, guidance_scale: float) -> ImageSet:
        return cls("off", "off", {"guidance_scale": guidance_scale})


def plan_image_sets(
    betas: Sequence[float], guidance_scale: float, sweep: Mapping[str, Sequence[float]] | None = None, *, off: bool
) -> list[ImageSet]:
    """Return a grounded set for each beta and each value of a sweep, none twice; with `off`, also one without
    grounding.

    Args:
        sweep: further values of beta, or of guidance_scale at the first beta.
        off: a beta of 0 asks for the same images, and is left out then.

    Raises:
        ValueError: no beta, or a value that is none.
    """
    sweep = sweep or {}
    if unknown := sorted(set(sweep) - set(SWEPT)):
        raise ValueError(f"a sweep of {unknown[0]!r}; expected one of {', '.join(SWEPT)}")
    if not betas:
        raise ValueError("no beta to evaluate")
    image_sets = [ImageSet.grounded(beta, guidance_scale) for beta in [*betas, *sweep.get("beta", ())]]
    image_sets += [
        ImageSet.grounded(betas[0], value, swept="guidance_scale") for value in sweep.get("guidance_scale", ())
    ]
    for image_set in image_sets:
        GroundingSchedule.parse(image_set.settings["beta"])
        if not 0 <= (scale := image_set.settings["guidance_scale"]) < float("inf"):
            raise ValueError(f"guidance_scale is {scale}; expected a number of at least 0")
    distinct: dict[tuple[float, ...], ImageSet] = {}
    for image_set in image_sets:
        distinct.setdefault(tuple(image_set.settings.values()), image_set)
    if not off:
        return list(distinct.values())
    distinct.pop((0.0, guidance_scale), None)
    return [*distinct.values(), ImageSet.off(guidance_scale)]


# Names and seeds ----------------------------------------------------------------------------------------------------


def keyed(layouts: Sequence[Layout]) -> dict[str, Layout]:
    """Return layouts by the names of their images: the id as far as a file may be called so, else the number.

    Raises:
        ValueError: two would have the same name.
    """
    by_key: dict[str, Layout] = {}
    numbers: dict[str, int] = {}
    for number, layout in enumerate(layouts):
        key = _key(number, layout)
        if (other := numbers.setdefault(key.lower(), number)) != number:
            raise ValueError(
                f"the images of layouts {other} and {number} would both be called {key}.png; "
                "give each layout an id of its own"
            )
        by_key[key] = layout
    return by_key


def _key(number: int, layout: Layout) -> str:
    if layout.id is None:
        return f"{number:06d}"
    safe = re.sub(r"[^\w.-]", "_", layout.id, flags=re.ASCII)[:80].lstrip(".")
    if safe and safe == layout.id:
        return safe
    return f"{safe}-{hashlib.sha256(layout.id.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"


def seeded(layout: Layout, seed: int) -> Layout:
    """Give a layout the seed of its image: its own, or one that follows from `seed` and from what the layout says. So
    the noise is the same in whatever order, part or process the image is generated. Layouts that say the same have the
    same noise."""
    if layout.seed is not None:
        return layout
    said = [seed, layout.id, layout.prompt, layout.phrases, layout.boxes]
    digest = hashlib.sha256(json.dumps(said).encode()).digest()
    return replace(layout, seed=int.from_bytes(digest[:6], "big"))  # 48 bits: exact in every program that reads JSON


def find_files(folder: Path, keys: Iterable[str]) -> dict[str, Path]:
    """Return the image of each key that has one, whatever its format.

    Raises:
        ValueError: a key has two.
    """
    wanted, files = set(keys), {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.stem in wanted and path.suffix[1:].lower() in ENDINGS:
            if path.stem in files:
                raise ValueError(f"{folder} holds {files[path.stem].name} and {path.name}; leave one of the two")
            files[path.stem] = path
    return files


# Generating ---------------------------------------------------------------------------------------------------------


def generate_images(
    pipeline: GroundingMixin,
    layouts: Mapping[str, Layout],
    folder: str | Path,
    image_set: ImageSet,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    part: tuple[int, int] = (1, 1),
    progress: Progress = no_progress,
) -> int:
    """Write the images that `folder` lacks, as KEY.png; how they were made is in the text of each.

    An image is the same, to rounding, whatever is there already and whatever is made beside it.

    Args:
        layouts: all of them, by key.
        part: (k, n): every n-th layout from the k-th, 1 to n; n such calls, in any number of processes, do all.

    Returns:
        How many were made.

    Raises:
        ValueError: an image that is there is of another layout, or was made in another way.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    folder = Path(folder)
    requests = {key: seeded(layout, seed) for key, layout in layouts.items()}
    abouts = {
        key: {
            "layout": layout.to_dict(),
            "steps": steps,
            "grounded": image_set.kind == "grounded",
            **image_set.settings,
        }
        for key, layout in requests.items()
    }
    there = _check_there(folder, abouts)
    mine = [key for key in list(requests)[part[0] - 1 :: part[1]] if key not in there]
    if not mine:
        return 0
    mine.sort(key=lambda key: _form(requests[key]))  # a batch is of one form

    def made() -> Iterator[str]:
        for first in range(0, len(mine), batch_size):
            # Another process may have been faster.
            batch = [key for key in mine[first : first + batch_size] if not (folder / f"{key}.png").exists()]
            images = generate(
                pipeline,
                [requests[key] for key in batch],
                beta=image_set.settings.get("beta", 0.0),
                grounded=image_set.kind == "grounded",
                batch_size=batch_size,
                num_inference_steps=steps,
                guidance_scale=image_set.settings["guidance_scale"],
            )
            for key, image in zip(batch, images, strict=True):
                _write(folder, key, image, abouts[key])
                yield key

    return sum(1 for _ in progress(made(), image_set.name, len(mine)))


def copy_images(
    layouts: Mapping[str, Layout],
    folder: str | Path,
    image_of: Callable[[Layout], Image.Image],
    kind: Kind,
    *,
    version_of: Callable[[Layout], str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, str]:
    """Write those images that `folder` lacks, as KEY.png, where they are not generated: real ones, and empty ones.

    Args:
        version_of: of what an image is a copy; those of another version are copied anew.

    Returns:
        Why there is none, of each layout that has none.
    """
    folder = Path(folder)
    abouts: dict[str, dict[str, Any]] = {
        key: {"layout": layout.to_dict(), "picture": kind} for key, layout in layouts.items()
    }
    there = _check_there(folder, abouts)
    if version_of is not None:
        for key, layout in layouts.items():
            with suppress(OSError):  # it fails again when it is copied
                abouts[key]["version"] = version_of(layout)
        there = {key for key in there if read_about(folder / f"{key}.png").get("version") == abouts[key].get("version")}
    lacking = [key for key in layouts if key not in there]
    failed = {}
    for key in progress(lacking, kind, len(lacking)) if lacking else ():
        try:
            image = image_of(layouts[key])
        except (OSError, ValueError) as error:
            failed[key] = str(error)
        else:
            _write(folder, key, image, abouts[key])
    return failed


def _form(layout: Layout) -> tuple[int, int, bool]:
    return layout.width or 0, layout.height or 0, layout.negative_prompt is None


def _write(folder: Path, key: str, image: Image.Image, about: Mapping[str, Any]) -> None:
    with whole_file(folder / f"{key}.png") as partial:
        image.save(partial, format="PNG", pnginfo=png_metadata(about))


def _check_there(folder: Path, abouts: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the keys of the images that exist, after checking that their texts say what `abouts` say."""
    files = {key: path for key in abouts if (path := folder / f"{key}.png").exists()}
    for key, path in files.items():
        about = read_about(path)
        for name, now in abouts[key].items() if about else ():
            if (was := about.get(name)) == now:
                continue
            of = f"another {name}"
            if isinstance(was, dict) and isinstance(now, dict):  # a layout: in what?
                field = next(field for field in (*now, *was) if was.get(field) != now.get(field))
                of, was, now = f"{of}: with other {field}", was.get(field), now.get(field)
            raise ValueError(
                f"{path} is an image of {of} ({was!r:.200}, now {now!r:.200}); choose another folder for other images"
            )
    return set(files)


def read_about(path: Path) -> dict[str, Any]:
    """Return what an image's text says about how it was made; nothing if it is another program's, or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            about = json.loads(image.info.get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
