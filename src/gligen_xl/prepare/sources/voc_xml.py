"""Reads an annotation of Pascal VOC: an XML file, without entities and without any other file.

<annotation>
  <filename>a.jpg</filename>
  <size><width>80</width><height>40</height></size>
  <object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax><ymax>40</ymax></bndbox></object>
</annotation>
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

MAX_DEPTH, MAX_TEXT, MAX_OBJECTS = 32, 4096, 20_000  # elements within each other, characters of one, objects

# Elements whose texts are used, by the path below <annotation>. Parts of objects (a head, a hand) have boxes, too.
_OF_IMAGE: Mapping[tuple[str, ...], str] = {
    ("filename",): "filename",
    ("size", "width"): "width",
    ("size", "height"): "height",
}
_OF_OBJECT: Mapping[tuple[str, ...], str] = {("name",): "name"} | {
    ("bndbox", side): side for side in ("xmin", "ymin", "xmax", "ymax")
}


class XmlError(ValueError):
    """An annotation that cannot be read, and why."""


@dataclass
class VocAnnotation:
    """Texts of an annotation: of the image, and of each of its objects. What the file does not say is missing."""

    image: dict[str, str] = field(default_factory=dict)
    objects: list[dict[str, str]] = field(default_factory=list)


def read_xml(contents: bytes) -> VocAnnotation:
    """Read an annotation.

    Raises:
        XmlError: it is no XML, declares a document type or entities, is none of Pascal VOC, or is out of bounds.
    """
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.EntityDeclHandler = _refuse_doctype
    parser.StartElementHandler = reader.begin
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(contents, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        if isinstance(error, XmlError):
            raise
        message = f"it is no XML that can be read: {error}; expected UTF-8, or the encoding that it declares"
        raise XmlError(message) from error
    return reader.annotation


def is_voc(head: bytes) -> bool:
    """Tell whether a file that begins so is an annotation of Pascal VOC: its first element tells."""
    first: list[str] = []

    def begin(name: str, attributes: Mapping[str, str]) -> None:
        first.append(name)
        parser.StartElementHandler = None

    parser = expat.ParserCreate()
    parser.StartElementHandler = begin
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(head, False)
    except XmlError:  # refused when it is read; what it is called is told by its text
        return b"<annotation" in head
    except (expat.ExpatError, LookupError, ValueError):
        pass
    return first[:1] == ["annotation"]


def _refuse_doctype(*_: Any) -> None:
    raise XmlError("it declares a document type or an entity, which annotations have no use for; remove <!DOCTYPE ...>")


class _Reader:
    """Keeps the texts that are used."""

    def __init__(self) -> None:
        self.annotation = VocAnnotation()
        self._path: list[str] = []
        self._text = ""
        self._of: dict[str, str] = self.annotation.image

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        if not self._path and name != "annotation":
            raise XmlError(f"its first element is <{name[:40]}>; expected <annotation>, as Pascal VOC has it")
        self._path.append(name)
        self._text = ""
        if len(self._path) > MAX_DEPTH:
            raise XmlError(f"its elements are more than {MAX_DEPTH} deep")
        if self._path == ["annotation", "object"]:
            if len(self.annotation.objects) >= MAX_OBJECTS:
                raise XmlError(f"it has more than {MAX_OBJECTS} objects")
            self._of = {}
            self.annotation.objects.append(self._of)

    def text(self, text: str) -> None:
        if len(self._text) < MAX_TEXT:
            self._text += text

    def end(self, name: str) -> None:
        in_object = self._path[1:2] == ["object"]
        path, uses = (self._path[2:], _OF_OBJECT) if in_object else (self._path[1:], _OF_IMAGE)
        if key := uses.get(tuple(path)):
            (self._of if in_object else self.annotation.image).setdefault(key, self._text.strip())
        self._path.pop()
        self._text = ""
