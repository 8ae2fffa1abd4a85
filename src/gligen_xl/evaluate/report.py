"""What an evaluation found: JSON for programs, a table for people, pictures for the eye."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import whole_file, write_json
from ..layout import Layout
from ..show import draw_boxes, grid
from .boxes import ObjectScore

_SHOWN = 8  # layouts in the picture grid
SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Condition:
    """One way of generating the layouts: its metrics, the scores of every object, and the pictures."""

    name: str
    metrics: dict[str, float]
    scores: list[list[ObjectScore]]
    pictures: list[Image.Image]


@dataclass(frozen=True)
class Report:
    layouts: list[Layout]
    conditions: list[Condition]
    settings: dict[str, Any]

    def metrics(self) -> dict[str, dict[str, float]]:
        return {condition.name: condition.metrics for condition in self.conditions}

    def table(self) -> str:
        """Markdown; shares in percent."""
        names = [name for name in self.conditions[0].metrics if name != "objects"]
        lines = [
            "| | " + " | ".join(name.replace("_", " ") for name in names) + " |",
            "|---|" + "---:|" * len(names),
        ]
        for condition in self.conditions:
            cells = [_cell(name, condition.metrics[name]) for name in names]
            lines.append(f"| {condition.name} | " + " | ".join(cells) + " |")
        objects = self.conditions[0].metrics["objects"]
        return "\n".join(lines) + f"\n\n{len(self.layouts)} layouts, {objects} objects.\n"

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "layout": layout.to_dict(),
                "scores": {
                    condition.name: [{"iou": round(s.iou, 4), **s.attributes} for s in condition.scores[k]]
                    for condition in self.conditions
                    if condition.name != SHUFFLED  # those belong to another layout
                },
            }
            for k, layout in enumerate(self.layouts)
        ]
        return {"settings": self.settings, "metrics": self.metrics(), "pictures": rows}

    def grid(self) -> Image.Image:
        """The first layouts, a row each, under every condition; boxes are drawn."""
        shown = [condition for condition in self.conditions if condition.name != SHUFFLED]
        rows = [
            [draw_boxes(condition.pictures[k], layout) for condition in shown]
            for k, layout in enumerate(self.layouts[:_SHOWN])
        ]
        return grid(rows, columns=[c.name for c in shown], captions=[layout.prompt for layout in self.layouts[:_SHOWN]])


def _cell(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "mean_iou" else f"{100 * value:.1f} %"


def write_report(report: Report, folder: str | Path, **about: Any) -> None:
    """Write `report.json`, `report.md` and `grid.png`; `about` is added to the JSON (model, versions)."""
    folder = Path(folder)
    write_json(folder / "report.json", {**about, **report.to_dict()})
    with whole_file(folder / "report.md") as partial:
        partial.write_text(report.table(), encoding="utf-8")
    with whole_file(folder / "grid.png") as partial:
        report.grid().save(partial, format="PNG")
