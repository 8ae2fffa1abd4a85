"""The report of a run: one HTML page with curves and images that needs nothing beside it.

    write_report("runs/mine")          # runs/mine/report.html

It is made from what stands in the folder of the run, while the run goes on or after.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from ..charts import SMOOTHED, Curve, chart, short
from ..io import whole_file
from ..page import charts, figure, page, text, tiles
from ..redact import public, redacted
from .curves import heat_strip
from .record import Row, RunRecord, evenly, image_bytes, read_run, series
from .summary import METRICS, duration, in_words, percent, plain

REPORT_NAME = "report.html"
_IMAGES = 4  # of the validation: the first, the last, and some between
_IMAGE_SIZE = {"width": 540, "height": 2400}  # pixels, at most
_NAMED = 8  # skipped steps that are listed, and images of each
_ROWS = 24  # of the table of validations


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run.

    Raises:
        FileNotFoundError: it is not the folder of a run.
    """
    run = read_run(folder)
    path = run.folder / REPORT_NAME
    with whole_file(path) as partial:
        partial.write_text(report_page(run), encoding="utf-8")
    return path


def refresh_report(folder: str | Path) -> None:
    """`write_report` while a run goes on: where it fails, as on a full disk, the run does not."""
    try:
        write_report(folder)
    except Exception as error:  # whatever it is, days of training are worth more
        warnings.warn(f"the report of {folder} was not written: {redacted(str(error))}", stacklevel=2)


def report_page(run: RunRecord) -> str:
    run = replace(run, config=public(run.config))  # pages are shared
    name = run.folder.resolve().name
    end = float(max(run.config.get("samples") or 0, run.samples, 1))
    sections = [
        ("Do boxes count?", _boxes(run, end)),
        ("Images", _images(run)),
        ("Training", _training(run, end)),
        ("Gates", _gates(run, end)),
        ("Speed", _speed(run, end)),
        ("Validations in numbers", _table(run.validations)),
        ("Settings", _settings(run)),
    ]
    note = f"<p class=note>{run.unread} broken lines of metrics.jsonl were left out.</p>" if run.unread else ""
    return page(
        name,
        kicker="gligen-xl training run",
        head=f"<p class=lead>{text(in_words(run))}</p>\n{_tiles(run)}",
        sections=sections,
        foot=f"{note}<p>Smooth lines are means over {100 * SMOOTHED:g} % of the run around each place; the shade or "
        "thin line behind them is the range of the logged values. The outermost hundredth of these may lie outside of "
        "the frame.</p>",
    )


# Parts --------------------------------------------------------------------------------------------------------------


def _tiles(run: RunRecord) -> str:
    """Return the figures to look at first."""
    last = run.measured
    cells = []
    if run.samples:
        whole = run.config.get("samples")
        cells.append(("samples", short(run.samples), f"of {short(whole)}" if whole else ""))
    if seconds := run.seconds:
        cells.append(("time in steps", duration(seconds), f"{run.samples / seconds:.3g} samples/s"))
    if "grounding_gain" in last:
        cells.append(("grounding gain", percent(last["grounding_gain"]), "of held-out loss"))
    for name, label, write in (("mean_iou", "mean IoU", plain), ("recall_50", "recall@0.5", percent)):
        if f"on_{name}" in last:
            off = f"off {write(last[f'off_{name}'])}" if f"off_{name}" in last else ""
            cells.append((label, write(last[f"on_{name}"]), off))
    if gates := series(run.training, "gate_mean") or series(run.validations, "gate_mean"):
        cells.append(("mean gate", plain(gates[-1][1]), "|tanh α|, 0 to 1"))
    if run.skipped:
        cells.append(("skipped steps", short(len(run.skipped)), "not finite"))
    return tiles(cells)


def _boxes(run: RunRecord, end: float) -> str:
    rows = run.validations
    quarters = [Curve(_quarter(k), series(rows, f"grounding_gain_q{k}"), f"s{k}") for k in range(1, 5)]
    return charts(
        figure(
            "Grounding gain",
            "share of the held-out loss that the boxes take away, same noise",
            chart([Curve("", series(rows, "grounding_gain"))], end=end, write=percent, zero=True, reach=0.01),
        ),
        figure(
            "Grounding gain by noise",
            "the same by quarter of the timesteps",
            chart(quarters, end=end, write=percent, zero=True, reach=0.01),
        ),
        *(
            figure(
                METRICS[name],
                "of images of held-out layouts, grounding on and off",
                chart(
                    [Curve("on", series(rows, f"on_{name}")), Curve("off", series(rows, f"off_{name}"), "c2")],
                    end=end,
                    write=plain if name == "mean_iou" else percent,
                    zero=True,
                    reach=1.0,
                ),
            )
            for name in ("mean_iou", "recall_50")
        ),
        figure(
            "Held-out loss",
            "mean squared error, with boxes and without, same noise",
            chart(
                [Curve("boxes", series(rows, "loss")), Curve("none", series(rows, "loss_no_boxes"), "c2")],
                end=end,
                write=plain,
            ),
        ),
    )


def _training(run: RunRecord, end: float) -> str:
    rows = run.training
    quarters = [Curve(_quarter(k), series(rows, f"loss_q{k}"), f"s{k}", noisy=True) for k in range(1, 5)]
    single = (
        ("loss", "Loss", "mean squared error of the training batches", False),
        ("grad_norm", "Gradient norm", "before clipping", True),
    )
    drawn = [
        figure(title, what, chart([Curve("", series(rows, name), noisy=True)], end=end, write=plain, log=log))
        for name, title, what, log in single
    ]
    drawn.insert(
        1,
        figure(
            "Loss by noise",
            "by quarter of the timesteps",
            chart(quarters, end=end, write=plain, log=True),
        ),
    )
    rate = chart([Curve("", series(rows, "learning_rate"), dots=False)], end=end, write=plain, zero=True)
    skipped = ""
    if run.skipped:
        counted = [(row["samples"], number) for number, row in enumerate(run.skipped, 1)]
        steps = [(0, 0), *counted, (run.samples, len(counted))]
        skipped = chart([Curve("", steps, "c2", dots=False)], end=end, write=_whole, zero=True)
    shown = charts(
        *drawn,
        figure("Learning rate", "of all but the gates", rate),
        figure("Skipped steps", "in all, as loss or gradients were not finite", skipped),
    )
    return shown + _skipped(run)


def _skipped(run: RunRecord) -> str:
    """Return the last steps that were left out, by the images of their batches."""
    lines = []
    for row in run.skipped[-_NAMED:]:
        names = row.get("image_ids")
        names = [str(name) for name in names] if isinstance(names, list) else []
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        of = f": images {', '.join(names[:_NAMED])}{more}" if names else ""
        lines.append(f"<li>by {row['samples']:,} samples{text(of)}</li>")
    return f"<p>Steps left out last:</p><ul>{''.join(lines)}</ul>\n" if lines else ""


def _gates(run: RunRecord, end: float) -> str:
    curves = [
        Curve("mean", series(run.training, "gate_mean") or series(run.validations, "gate_mean"), dots=False),
        Curve("largest", series(run.validations, "gate_largest"), "c2"),
    ]
    mean = figure("Gates", "|tanh α|: how far fusers are open", chart(curves, end=end, write=plain, zero=True))
    columns = [(row["samples"], row["gates"]) for row in run.training if row.get("gates")]
    if not columns:
        return charts(mean)
    strip, largest = heat_strip(columns, end=end)
    what = f"the same for each of {len(columns[-1][1])} blocks; full colour is {plain(largest)}"
    return charts(mean, figure("Gates by block", what, strip))


def _speed(run: RunRecord, end: float) -> str:
    speed, waiting = (series(run.training, name) for name in ("samples_per_s", "waiting"))
    return charts(
        figure("Speed", "samples a second", chart([Curve("", speed, noisy=True)], end=end, write=short, zero=True)),
        figure(
            "Waiting for data",
            "share of the time in which the computation waited",
            chart([Curve("", waiting, noisy=True)], end=end, write=percent, zero=True, reach=0.1),
        ),
    )


def _images(run: RunRecord) -> str:
    """Show the images of the first validation, of the last one, and of some between, side by side."""
    figures = []
    for samples in evenly(sorted(run.images), _IMAGES):
        try:
            data = base64.b64encode(image_bytes(run.images[samples], **_IMAGE_SIZE)).decode()
        except OSError:  # half of a file, or none any more
            continue
        title = f"after {short(samples)} samples"
        figures.append(
            f"<figure class=image><figcaption>{title}</figcaption>"
            f'<img alt="{title}: images with grounding on and off" src="data:image/jpeg;base64,{data}"></figure>'
        )
    if not figures:
        return ""
    what = "Held-out layouts with their boxes drawn, from the same noise: grounding on, and off."
    return f"<p>{what}</p><div class=images>{''.join(figures)}</div>\n"


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    shown = evenly(list(rows), _ROWS)
    names = list(dict.fromkeys(name for row in shown for name in row if name not in ("kind", "samples")))
    names = [name for name in names if any(isinstance(row.get(name), int | float) for row in shown)]
    head = "".join(f"<th scope=row>{short(row['samples'])}</th>" for row in shown)
    lines = []
    for name in names:
        values, write = (row.get(name) for row in shown), percent if "gain" in name else plain
        cells = "".join(f"<td>{write(v) if isinstance(v, int | float) else ''}</td>" for v in values)
        lines.append(f"<tr><th scope=row>{text(name.replace('_', ' '))}</th>{cells}</tr>")
    left_out = f"<p>{len(shown)} of {len(rows)}.</p>" if len(shown) < len(rows) else ""
    return f"{left_out}<div class=wide><table><tr><th scope=row>samples</th>{head}</tr>{''.join(lines)}</table></div>\n"


def _settings(run: RunRecord) -> str:
    parts = []
    if run.config:
        parts.append(f"<pre>{text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre>")
    if run.versions:
        parts.append(
            f"<p>Made with {text(', '.join(f'{name} {number}' for name, number in run.versions.items()))}.</p>"
        )
    return "".join(parts)


def _quarter(k: int) -> str:
    return f"q{k}" + {1: " clean", 4: " noisy"}.get(k, "")


def _whole(value: float) -> str:
    return short(value) if value == int(value) else ""
