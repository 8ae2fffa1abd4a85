"""Evaluation: the same layouts and noise with grounding on, partly on, off, and against layouts of other pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from ..generate import generate
from ..layout import Layout
from ..pipelines.grounding import GroundingMixin
from ..pipelines.schedule import GroundingSchedule
from ..shapes.world import HELD_OUT_SEED, sample_scene, scene_layout
from .boxes import summarize
from .detectors import Detector
from .report import SHUFFLED, Condition, Report


def held_out_layouts(count: int, seed: int = HELD_OUT_SEED) -> list[Layout]:
    """Layouts of the shapes world that no training has seen; their prompts never say where anything is."""
    if count < 1:
        raise ValueError(f"{count} layouts; expected at least 1")
    return [scene_layout(sample_scene(seed, k), seed=seed, index=k, places=False) for k in range(count)]


def evaluate_layouts(
    pipeline: GroundingMixin,
    layouts: Sequence[Layout],
    detector: Detector,
    *,
    betas: Sequence[float] = (1.0, 0.4),
    controls: bool = True,
    seed: int = 0,
    steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 16,
    progress: Callable[[Iterable[Image.Image], str], Iterable[Image.Image]] | None = None,
) -> Report:
    """Generate every layout under each condition, and score it.

    Conditions: each of `betas`; and with `controls` "off" (the same prompts and noise without boxes), and "shuffled"
    (the pictures of the first beta scored against the next picture's layout), which says what chance would give.

    Raises:
        ValueError: layouts without boxes, or phrases that the detector does not know, before anything is generated.
    """
    for k, layout in enumerate(layouts):
        if not layout.boxes:
            raise ValueError(f"layout {layout.id or k} has no boxes; there is nothing to evaluate")
        detector.score(Image.new("RGB", (8, 8)), layout)  # complains about phrases now rather than after an hour
    if not betas:
        raise ValueError("no beta to evaluate")
    for beta in betas:
        GroundingSchedule.parse(beta)  # complains now, too
    watch = progress or (lambda pictures, _: pictures)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "batch_size": batch_size, "seed": seed}

    def condition(name: str, pictures: Sequence[Image.Image], against: Sequence[Layout]) -> Condition:
        scores = [detector.score(picture, layout) for picture, layout in zip(pictures, against, strict=True)]
        return Condition(name, summarize([s for of_layout in scores for s in of_layout]), scores, list(pictures))

    conditions = []
    for beta in betas:
        name = f"beta {beta:g}"
        pictures = list(watch(generate(pipeline, layouts, beta=beta, **settings), name))
        conditions.append(condition(name, pictures, layouts))
    if controls:
        pictures = list(watch(generate(pipeline, layouts, grounded=False, **settings), "off"))
        conditions.append(condition("off", pictures, layouts))
        if len(layouts) > 1:
            shuffled = [*layouts[1:], layouts[0]]
            conditions.append(condition(SHUFFLED, conditions[0].pictures, shuffled))
    return Report(list(layouts), conditions, {**settings, "betas": list(betas)})
