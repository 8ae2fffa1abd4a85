"""The page of an evaluation: one HTML file with its figures, curves and images that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image

from ..charts import Curve, chart
from ..detect.matching import ImageScore
from ..images.decode import ImageError, decode
from ..images.draw import enlarged
from ..page import charts, figure, page, text
from ..redact import public
from . import report_words as words
from .ap import AP_NAMES
from .metrics import Estimate
from .report import Report, plain_json
from .report_marks import COLOURS, boxes_over, heat_map, strip
from .sampling import SWEPT
from .slices import POSITIONS, Slice

if TYPE_CHECKING:
    from .compare import Comparison
    from .run import Condition

_HEADLINE = 4  # metrics to look at first
_IMAGES = 5  # best ones, and as many of the worst
_IMAGE_SIDE = 256  # pixels, at most
_SLICED = "success"
_GROUPINGS = {
    "size": ("By size of the box", "share of the image's area"),
    "objects": ("By number of objects", "in the image"),
    "frequency": ("By frequency of the phrase", "number of the objects of these layouts that have it"),
}


def report_page(report: Report, about: Mapping[str, Any]) -> str:
    """Args: about: versions of libraries, and what else was used."""
    sections = [
        ("All conditions", _conditions(report)),
        ("Difference from the other evaluation", "".join(_compared(report, one) for one in report.compared or ())),
        *(
            (f"Over {text(_plain(swept))}", _curves(report, swept, conditions))
            for swept in SWEPT
            if (conditions := swept_conditions(report.conditions, swept))
        ),
        (f"Best and worst images of {text(report.conditions[0].name)}", _images(report)),
        ("Where boxes are followed", _slices(report)),
        ("Settings", _settings(report, about)),
    ]
    settings = report.settings
    name = settings.get("adapter") or settings.get("model") or settings.get("pictures") or "pictures"
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in words.notes(report))
    return page(
        f"{name} on {report.protocol.name}",
        kicker="gligen-xl evaluation: how well are boxes followed?",
        head=f"<p class=lead>{text(words.about(report))}</p>\n{_unread(report)}"
        f"<p class=bounds>{text(words.bounds(report))}</p>\n{_headline(report)}",
        sections=sections,
        foot=f"{notes}<p>{text(words.DEFINITIONS)}</p>",
        style=Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
    )


# Figures ------------------------------------------------------------------------------------------------------------


def _unread(report: Report) -> str:
    if not (lines := words.unread(report)):
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<div class=warning><b>Images that could not be read are in no figure.</b><ul>{items}</ul></div>\n"


def _headline(report: Report) -> str:
    """Return the protocol's first metrics of the first condition, beside its controls and bounds."""
    first, *others = report.conditions
    controls = {condition.kind: condition.name for condition in others if condition.kind != "grounded"}
    cells = []
    for name in [name for name in report.names if name in report.metrics[first.name]][:_HEADLINE]:
        estimate = report.metrics[first.name][name]
        beside = {
            kind: report.metrics[control][name].value
            for kind, control in controls.items()
            if name in report.metrics[control]
        }
        items = "".join(
            f"<li><span><span class='key {kind}'></span>{text(controls[kind])}</span> {words.value(name, value)}</li>"
            for kind, value in beside.items()
        )
        cells.append(
            f"<div><dt>{text(_heading(name))}</dt><dd>{words.value(name, estimate.value)} "
            f"<span class=range-text>{words.interval(name, estimate)}</span></dd>"
            f"<dd class=beside>{strip(estimate, *_scale(report, name), beside)}<ul>{items}</ul></dd></div>"
        )
    if not cells:
        return ""
    return f"<h2>{text(first.name)}</h2><dl class=headline>{''.join(cells)}</dl>"


def _scale(report: Report, name: str) -> tuple[float, float]:
    if words.is_share(name):
        return 0.0, 1.0
    values = [of_one[name].value for of_one in report.metrics.values() if name in of_one]
    return min(0.0, *values), max(values)


def _heading(name: str) -> str:
    return words.label(name) + (", less is better" if name in words.LESS_IS_BETTER else "")


def _conditions(report: Report) -> str:
    heads = "".join(f"<th scope=col>{text(condition.name)}</th>" for condition in report.conditions)
    rows = []
    for name in report.names:
        cells = "".join(_cell(name, report.metrics[condition.name].get(name)) for condition in report.conditions)
        rows.append(f"<tr><th scope=row>{_with_small(words.label(name), _direction(name))}</th>{cells}</tr>")
    images = "".join(f"<td>{len(condition.images):,}</td>" for condition in report.conditions)
    return (
        f"<div class=wide tabindex=0><table class=figures><thead><tr><th scope=col></th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}<tr><th scope=row>images</th>{images}</tr></tbody></table></div>\n"
    )


def _direction(name: str) -> str:
    return "less is better" if name in words.LESS_IS_BETTER else ""


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td>-</td>"
    return f"<td>{_with_small(words.value(name, estimate.value), words.interval(name, estimate))}</td>"


def _with_small(large: str, small: str) -> str:
    return text(large) + (f"<small>{text(small)}</small>" if small else "")


def _compared(report: Report, compared: Comparison) -> str:
    names, difference = report.compared_names(compared), compared.difference
    ends = {name: max(abs(difference[name].low), abs(difference[name].high)) for name in names}
    shares = max((end for name, end in ends.items() if words.is_share(name)), default=0)
    rows = []
    for name in names:
        estimate = difference[name]
        reach = (shares if words.is_share(name) else ends[name]) or 1.0
        beyond = "beyond chance" if estimate.low > 0 or estimate.high < 0 else "may be chance"
        rows.append(
            f"<tr><th scope=row>{text(_heading(name))}</th><td>{words.value(name, estimate.value, sign=True)}</td>"
            f"<td>{words.interval(name, estimate, sign=True)}</td>"
            f"<td class=strip-cell>{strip(estimate, -reach, reach)}</td><td>{beyond}</td></tr>"
        )
    caption = (
        f"<b>{text(compared.condition)} less the other's {text(compared.other)}</b> of the same "
        f"{words.counted(int(difference['pictures'].value), 'layout')}, resampled together; shares in points of percent"
    )
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("metric", "difference", "95 %", "", ""))
    return (
        f"<div class=wide tabindex=0><table class=parts><caption>{caption}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


# Curves -------------------------------------------------------------------------------------------------------------


def swept_conditions(conditions: Sequence[Condition], swept: str) -> list[Condition]:
    """Return the grounded conditions that differ from the first of them in that setting alone, by its value; empty
    where it has one value (without grounding is a beta of 0)."""
    grounded = [condition for condition in conditions if condition.kind == "grounded" and swept in condition.settings]

    def rest(condition: Condition) -> dict[str, Any]:
        return {name: value for name, value in condition.settings.items() if name != swept}

    alike = [condition for condition in grounded if rest(condition) == rest(grounded[0])]
    by_value = {condition.settings[swept]: condition for condition in alike}
    values = len(by_value) + (swept == "beta" and any(condition.kind == "off" for condition in conditions))
    return [by_value[value] for value in sorted(by_value)] if values > 1 else []


def _curves(report: Report, swept: str, conditions: Sequence[Condition]) -> str:
    """Return the first metrics; without grounding is what beta 0 comes to."""
    end = float(conditions[-1].settings[swept])
    figures = []
    for name in [name for name in report.names if name in report.metrics[conditions[-1].name]][:_HEADLINE]:
        measured = [
            (float(condition.settings[swept]), report.metrics[condition.name][name])
            for condition in conditions
            if name in report.metrics[condition.name]
        ]
        levels = {
            condition.kind: report.metrics[condition.name][name]
            for condition in report.conditions
            if (condition.kind == "real" or (condition.kind == "off" and swept == "beta"))  # off has its own guidance
            and name in report.metrics[condition.name]
        }
        if swept == "beta" and "off" in levels and measured[0][0] > 0:
            measured.insert(0, (0.0, levels["off"]))
        ranges = [(estimate.low, estimate.high) for _, estimate in measured]
        main = Curve(
            "",
            [(at, estimate.value) for at, estimate in measured],
            intervals=ranges,
        )
        flat = [
            Curve(kind, [(0.0, level.value), (end, level.value)], f"{style} dashed", dots=False)
            for kind, style in (("off", "c2"), ("real", "s4"))
            if (level := levels.get(kind))
        ]
        said = ", ".join(f"{words.value(name, estimate.value)} at {at:g}" for at, estimate in measured)
        drawing = chart(
            [main, *flat],
            end=end,
            write=lambda number, name=name: _tick(name, number),
            zero=True,
            reach=1.0 if words.is_share(name) and name not in AP_NAMES else None,  # AP is far from 1
            over=_plain(swept),
            label=f"{words.label(name)} over {_plain(swept)}: {said}",
        )
        figures.append(figure(words.label(name), said, drawing))
    return charts(*figures)


def _tick(name: str, number: float) -> str:
    written = words.value(name, number)
    figures, _, unit = written.partition(" ")
    return f"{float(figures):g} {unit}".strip()


def _plain(name: str) -> str:
    return name.replace("_", " ")


# Images -----------------------------------------------------------------------------------------------------------


def ranked(images: Sequence[ImageScore]) -> list[ImageScore]:
    """Best first: by the share of objects that are a success, then by mean IoU."""

    def goodness(image: ImageScore) -> tuple[float, float]:
        number = len(image.objects)
        return (
            sum(score.success for score in image.objects) / number,
            sum(score.iou for score in image.objects) / number,
        )

    return sorted(images, key=lambda image: (*(-value for value in goodness(image)), image.key))


def _images(report: Report) -> str:
    condition = report.conditions[0]
    order = ranked(condition.images)
    if not order:
        return ""
    worst = order[max(len(order) - _IMAGES, _IMAGES) :][::-1]
    parts = [
        "<p>Requested boxes are solid, detected ones dashed, in the colour of the object that they stand for; grey "
        "ones stand for none.</p>"
    ]
    for title, chosen in (("Best", order[:_IMAGES]), ("Worst", worst)):
        if chosen:
            shots = "".join(_shot(report, condition, image) for image in chosen)
            parts.append(f"<h3>{title}</h3><div class=shots>{shots}</div>\n")
    return "".join(parts)


def _shot(report: Report, condition: Condition, image: ImageScore) -> str:
    layout, sure = image.layout, report.sure(image)
    of = {score.assigned: k for k, score in enumerate(image.objects) if score.assigned is not None}
    right = sum(score.success for score in image.objects)
    alt = f"{layout.prompt or 'no prompt'}: {right} of {words.counted(len(layout.boxes), 'requested object')} a success"
    try:
        data = embedded(condition.paths[image.key])
        shown = f'<img alt="{text(alt)}" src="data:image/jpeg;base64,{data}">'
    except (KeyError, OSError, ImageError):
        shown = "<p>The image is no longer there.</p>"
    over = boxes_over(layout.boxes, [(image.detections[number].box, of.get(number)) for number in sure])
    items = []
    for k, (phrase, score) in enumerate(zip(layout.phrases, image.objects, strict=True)):
        wrong = [f"{name} wrong" for name, right in score.attributes.items() if not right]
        said = "not found" if score.assigned is None else ", ".join([f"IoU {score.iou:.2f}", *wrong])
        key = f"<span class=dot-key style='background:var(--o{k % COLOURS})'></span>"
        items.append(f"<li{'' if score.success else ' class=missed'}>{key}{text(phrase)}: {text(said)}</li>")
    if more := len(sure) - len(of):
        items.append(f"<li>{words.counted(more, 'more detection')}</li>")
    return (
        f"<figure><div class=shot>{shown}{over}</div><figcaption><b>{text(image.key)}</b> {text(layout.prompt)}"
        f"</figcaption><ul>{''.join(items)}</ul></figure>"
    )


def embedded(path: Path) -> str:
    """Return an image as JPEG in base64, of at most 256 pixels a side; small ones are enlarged, or their colours would
    smear.

    Raises:
        OSError, ImageError: the file is gone, or is no image.
    """
    image = enlarged(decode(path), _IMAGE_SIDE)
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=82, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# Parts of the objects -----------------------------------------------------------------------------------------------


def _slices(report: Report) -> str:
    first = report.conditions[0]
    groupings = report.slices.get(first.name)
    if not groupings:
        return ""
    others = {
        condition.kind: report.slices[condition.name]
        for condition in report.conditions[1:]
        if condition.name in report.slices
    }
    tables = []
    for grouping, parts in groupings.items():
        if grouping == "position":
            tables.append(_position_map(parts))
            continue
        title, what = _GROUPINGS.get(grouping, (f"By {grouping}", "that is asked for"))
        beside = {kind: {part.name: part for part in of_one.get(grouping, [])} for kind, of_one in others.items()}
        tables.append(_parts_table(title, what, parts, beside))
    return (
        f"<p>Success of {text(first.name)}, with its interval.</p>"
        f"<div class=groups>{''.join(f'<div>{table}</div>' for table in tables)}</div>\n"
    )


def _position_map(parts: Sequence[Slice]) -> str:
    by_name = {part.name: part for part in parts}
    cells = []
    for name in POSITIONS:
        part = by_name.get(name)
        cells.append(part and (part.metrics[_SLICED].value, *_written(part), words.counted(part.objects, "object")))
    return heat_map(cells, 3, "<b>By position</b> the ninth of the image that the box's centre is in")


def _parts_table(title: str, what: str, parts: Sequence[Slice], beside: Mapping[str, Mapping[str, Slice]]) -> str:
    rows = []
    for part in parts:
        values = {kind: of_kind[part.name] for kind, of_kind in beside.items() if part.name in of_kind}
        marks = {kind: other.metrics[_SLICED].value for kind, other in values.items()}
        written = " ".join(f"<small>{word}</small>" if k else word for k, word in enumerate(_written(part)))
        cells = "".join(f"<td>{_written(values[kind])[0] if kind in values else '-'}</td>" for kind in beside)
        mark = strip(part.metrics[_SLICED], 0, 1, marks)
        rows.append(
            f"<tr><th scope=row>{text(part.name)}</th><td>{written}</td><td class=strip-cell>{mark}</td>{cells}"
            f"<td>{part.objects:,}</td></tr>"
        )
    heads = "".join(f"<th scope=col>{head}</th>" for head in _heads(beside))
    return (
        f"<div class=wide tabindex=0><table class=parts><caption><b>{text(title)}</b> {text(what)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heads(beside: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", _SLICED, "")
    for kind in beside:
        yield f"<span class='key {kind}'></span>{kind}"
    yield "objects"


def _written(part: Slice) -> tuple[str, str]:
    estimate = part.metrics[_SLICED]
    return words.value(_SLICED, estimate.value), words.interval(_SLICED, estimate)


# Settings -----------------------------------------------------------------------------------------------------------


def _settings(report: Report, about: Mapping[str, Any]) -> str:
    settings = {
        "protocol": {
            "name": report.protocol.name,
            "paper": report.protocol.paper,
            **public(report.protocol.parameters),
        },
        "detector": {"name": report.detector.name, **report.detector.settings},
        "generation": report.settings,
        **about,
    }
    written = yaml.safe_dump(plain_json(settings), sort_keys=False, allow_unicode=True)
    return f"<pre>{text(written)}</pre>"
