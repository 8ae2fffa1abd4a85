"""Images for people: boxes over images, and grids of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..escape import printable
from ..layout import Layout
from ..redact import public
from ..versions import versions

METADATA_KEY = "gligen-xl"

_PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
_LETTERS = 1000  # of a label, which no image is wide enough for
_SMALLEST_SIDE = 256  # smaller images are enlarged before lines and letters go on them


def enlarged(image: Image.Image, smallest_side: int = _SMALLEST_SIDE) -> Image.Image:
    """Return the image, a whole number of times larger if its shorter side is below `smallest_side` pixels."""
    factor = -(-smallest_side // min(image.size))
    if factor <= 1:
        return image.copy()
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def draw_boxes(image: Image.Image, layout: Layout) -> Image.Image:
    """Return a copy of the image with the layout's boxes and phrases on it; small images are enlarged first."""
    canvas = enlarged(image.convert("RGB"))
    pen = ImageDraw.Draw(canvas)
    width = max(2, min(canvas.size) // 160)
    font = ImageFont.load_default(max(11, min(canvas.size) // 28))
    for k, (phrase, box) in enumerate(zip(layout.phrases, layout.boxes, strict=True)):
        colour = _PALETTE[k % len(_PALETTE)]
        x0, x1 = (round(x * (canvas.width - 1)) for x in (box[0], box[2]))
        y0, y1 = (round(y * (canvas.height - 1)) for y in (box[1], box[3]))
        pen.rectangle((x0, y0, x1, y1), outline="white", width=width + 2)
        pen.rectangle((x0 + 1, y0 + 1, max(x1 - 1, x0 + 1), max(y1 - 1, y0 + 1)), outline=colour, width=width)
        _label(pen, phrase, (x0, y0), colour, font, canvas.size)
    return canvas


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Return text on a coloured ground, above the corner where there is room and below it where there is not."""
    text = _shortened(text, font, size[0])
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((x, y, x + width, y + height), fill=ImageColor.getrgb(colour))
    pen.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)


def grid(
    rows: Sequence[Sequence[Image.Image]], *, columns: Sequence[str] = (), captions: Sequence[str] = (), gap: int = 8
) -> Image.Image:
    """Return images in rows, each cell as large as the largest image.

    Args:
        columns: a heading for each column. captions: a line of text above each row. gap: pixels between cells.
    """
    if not rows or not any(rows):
        raise ValueError("a grid needs at least one image")
    cell_width = max(image.width for row in rows for image in row)
    cell_height = max(image.height for row in rows for image in row)
    count = max(len(row) for row in rows)
    letters = max(12, cell_height // 18)  # pixels
    font, line = ImageFont.load_default(letters), int(letters * 1.7)
    heading, caption = line if columns else 0, line if captions else 0
    width = gap + count * (cell_width + gap)
    canvas = Image.new("RGB", (width, heading + gap + len(rows) * (caption + cell_height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, text in enumerate(columns):
        words = _shortened(text, font, cell_width)
        pen.text((gap + k * (cell_width + gap), gap // 2), words, fill="black", font=font)
    y = heading + gap
    for k, row in enumerate(rows):
        if captions:
            pen.text((gap, y), _shortened(captions[k], font, width - 2 * gap), fill="#444444", font=font)
        for j, image in enumerate(row):
            canvas.paste(image.convert("RGB"), (gap + j * (cell_width + gap), y + caption))
        y += caption + cell_height + gap
    return canvas


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text on one line, cut off where it would be wider than so many pixels."""
    text = printable(text[:_LETTERS])
    if font.getlength(text) <= width:
        return text
    fitting, too_many = 0, len(text)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fits = font.getlength(text[:middle] + " ...") <= width
        fitting, too_many = (middle, too_many) if fits else (fitting, middle)
    return text[:fitting] + " ..."


def png_metadata(about: Mapping[str, Any]) -> PngInfo:
    """Return how an image was made, with library versions, as JSON in the PNG's text entry "gligen-xl".

    Images are shared: paths of this machine are left out of it, and of each its last name stays.
    """
    info = PngInfo()
    text = json.dumps({**public(about), "versions": versions()}, ensure_ascii=False)
    info.add_itxt(
        METADATA_KEY, text.encode("utf-8", "backslashreplace").decode()
    )  # half of a surrogate pair is escaped
    return info
