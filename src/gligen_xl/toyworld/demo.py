"""The demonstration: a handful of layouts on the embedded model, with grounding on and off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..evaluate import find_detector, point_metrics, score_image
from ..generate import generate
from ..images.draw import draw_boxes, grid
from ..io import whole_file
from ..layout import Layout, write_layouts
from ..pipelines import StableDiffusionXLGLIGENPipeline

LAYOUTS = [
    Layout(
        id="one",
        prompt="an image of grass with a red circle",
        phrases=["a red circle"],
        boxes=[[0.1, 0.6, 0.4, 0.9]],
    ),
    Layout(
        id="two",
        prompt="a yellow star and a purple ring on sand",
        phrases=["a yellow star", "a purple ring"],
        boxes=[[0.55, 0.08, 0.93, 0.46], [0.08, 0.5, 0.5, 0.92]],
    ),
    Layout(
        id="three",
        prompt="snow with a blue square, a pink triangle and a black cross",
        phrases=["a blue square", "a pink triangle", "a black cross"],
        boxes=[[0.05, 0.08, 0.4, 0.43], [0.58, 0.1, 0.94, 0.46], [0.32, 0.56, 0.7, 0.94]],
    ),
    Layout(
        id="row",
        prompt="the sea with a red square, a yellow square and a pink square",
        phrases=["a red square", "a yellow square", "a pink square"],
        boxes=[[0.02, 0.35, 0.32, 0.65], [0.35, 0.35, 0.65, 0.65], [0.68, 0.35, 0.98, 0.65]],
    ),
    Layout(
        id="four",
        prompt="the night with a cyan circle, a yellow star, a pink ring and a red triangle",
        phrases=["a cyan circle", "a yellow star", "a pink ring", "a red triangle"],
        boxes=[[0.08, 0.08, 0.42, 0.42], [0.58, 0.08, 0.92, 0.42], [0.08, 0.58, 0.42, 0.92], [0.58, 0.58, 0.92, 0.92]],
    ),
    Layout(
        id="large",
        prompt="grass with a purple ring",
        phrases=["a purple ring"],
        boxes=[[0.4, 0.06, 0.94, 0.6]],
    ),
]


def demo(out: str | Path, *, steps: int = 30, seed: int = 0) -> str:
    """Generate the layouts, write images, `grid.png`, `table.md` and `layouts.jsonl` into `out`.

    Returns:
        The table, and the mean IoU of requested and drawn boxes with grounding on and off.
    """
    out = Path(out)
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    pipeline.set_progress_bar_config(disable=True)
    detector = find_detector("shapes")
    drawn: dict[str, list[Image.Image]] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, suffix in (("with grounding", ""), ("without", "-off")):
        images = generate(
            pipeline,
            LAYOUTS,
            beta=1.0,
            grounded=name == "with grounding",
            seed=seed,
            batch_size=len(LAYOUTS),
            num_inference_steps=steps,
            guidance_scale=2.0,
        )
        drawn[name] = list(tqdm(images, desc=name, total=len(LAYOUTS), unit="image", disable=None))
        found = detector.detect(drawn[name], LAYOUTS)
        scores = [score_image(layout, "", here, detector) for layout, here in zip(LAYOUTS, found, strict=True)]
        metrics[name] = point_metrics([score for of_image in scores for score in of_image.objects])
        for layout, image in zip(LAYOUTS, drawn[name], strict=True):
            with whole_file(out / f"{layout.id}{suffix}.png") as partial:
                image.save(partial, format="PNG")
    with whole_file(out / "grid.png") as partial:
        rows = [list(map(draw_boxes, images, LAYOUTS)) for images in drawn.values()]
        captions = ["with grounding", "without: the same prompts and noise"]
        grid(rows, captions=captions).save(partial, format="PNG")
    table = _table(metrics)
    with whole_file(out / "table.md") as partial:
        partial.write_text(table, encoding="utf-8")
    write_layouts(out / "layouts.jsonl", LAYOUTS)
    on, off = (of_way["mean_iou"] for of_way in metrics.values())
    return (
        f"{table}\nmean IoU of requested and drawn boxes: {on:.2f} with grounding, {off:.2f} without\n"
        f"images in {out}, all of them in {out / 'grid.png'}"
    )


def _table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table; shares are in percent."""
    names = {"mean_iou": "mean IoU", "recall_50": "found", "colour": "colour", "shape": "shape", "success": "all right"}
    lines = ["| | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(names)]
    for image_set, values in metrics.items():
        cells = [f"{values[name]:.3f}" if name == "mean_iou" else f"{100 * values[name]:.1f} %" for name in names]
        lines.append(f"| {image_set} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{len(LAYOUTS)} layouts, {metrics['without']['objects']} objects.\n"
