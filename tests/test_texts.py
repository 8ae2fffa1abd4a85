"""Texts on every way in: UTF-8, with or without a byte order mark; what is none is left out or refused, by name."""

import codecs
import io
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import sdxl_vae
from PIL import Image

from gligen_xl.io import decode_text, read_json
from gligen_xl.layout import Layout, read_layouts
from gligen_xl.prepare.captions.table import CaptionTable
from gligen_xl.prepare.framing import Framing
from gligen_xl.prepare.item import BAD_TEXT, Item, Skipped, text_fault
from gligen_xl.prepare.run import prepare
from gligen_xl.prepare.runners import Machine
from gligen_xl.prepare.settings import Settings
from gligen_xl.prepare.sources import open_source
from gligen_xl.prepare.sources.rows import CAPTION_NOT_UTF8, NOT_JSON, NOT_UTF8, WRONG_CAPTION
from gligen_xl.recipes import read_settings

BOM = codecs.BOM_UTF8


def put(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def image():
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(stream, "PNG")
    return stream.getvalue()


def items(path, **options):
    return [item for unit in open_source(path, **options) for item in unit.items()]


def used(found):
    return {item.image_id: item for item in found if isinstance(item, Item)}


def skipped(found):
    return {item.image_id: (item.reason, item.detail) for item in found if isinstance(item, Skipped)}


# Bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a", "é\r\n", "漢字 🐕"])
def test_utf8_is_read_with_and_without_its_mark(text):
    assert decode_text(text.encode()) == decode_text(BOM + text.encode()) == text


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ("né".encode("latin-1"), "byte 1 is 0xe9, of another encoding"),
        ("né".encode("cp1252"), "save it as UTF-8"),
        ("né".encode("utf-16"), "mark of UTF-16"),
        (codecs.BOM_UTF16_BE + "né".encode("utf-16-be"), "mark of UTF-16"),
        ("né".encode("utf-32"), "mark of UTF-32"),
        ("né".encode("utf-16-be"), "byte 0 is NUL"),
        ("漢字".encode("shift_jis"), "of another encoding"),
        (b"\xed\xa0\x80", "byte 0 is 0xed"),
        (b"ab\xf0\x9f", "byte 2 is 0xf0"),
    ],
)
def test_other_encodings_are_told(contents, says):
    with pytest.raises(ValueError, match=says):
        decode_text(contents)


def test_what_is_no_text():
    for text in ("", "a\tb\nc\r\v\f", "é", "\u200f\u2028", "\ufeff", "🐕"):
        assert text_fault(text) == ""
    for text in ("\0", "a\x1b[0m", "\x08", "\x7f", "\x85", "\x9f", "a\ud83d", "\udc80"):
        assert f"U+{ord(next(c for c in text if c != 'a')):04X}" in text_fault(text)


# Marks at the beginning ----------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_read_everywhere(tmp_path):
    layout = {"prompt": "café", "phrases": ["a"], "boxes": [[0, 0, 0.5, 0.5]]}
    line = json.dumps(layout, ensure_ascii=False)
    expected = [Layout.from_dict(layout)]
    assert read_layouts(put(tmp_path / "a.json", BOM + line.encode())) == expected
    assert read_layouts(put(tmp_path / "b.json", BOM + f"[{line}]".encode())) == expected
    both = BOM + line.encode() + b"\r\n" + BOM + line.encode()  # two files one behind the other
    assert read_layouts(put(tmp_path / "c.jsonl", both)) == expected * 2
    assert read_json(put(tmp_path / "d.json", BOM + b'{"a": 1}')) == {"a": 1}
    assert read_settings(put(tmp_path / "e.yaml", BOM + b"samples: 3\n")) == {"samples": 3}
    for name, contents in {
        "caps.jsonl": '{"id": "a", "text": "café"}',
        "caps.json": '{"a": "café"}',
        "txt/a.txt": "café",
    }.items():
        path = put(tmp_path / name, BOM + contents.encode())
        with CaptionTable.open(path if path.suffix != ".txt" else path.parent, tmp_path / "cache") as table:
            assert table.get("a") == "café"


def test_a_byte_order_mark_is_read_in_every_source(tmp_path):
    row = {"file_name": "a.png", "text": "café", "boxes": [[0, 0, 0.5, 0.5]], "phrases": ["x"], "box_format": "xyxy"}
    put(tmp_path / "rows/a.png", image())
    put(tmp_path / "rows/metadata.jsonl", BOM + json.dumps(row, ensure_ascii=False).encode())
    assert used(items(tmp_path / "rows"))["a"].caption == "café"
    put(tmp_path / "rows/l.jsonl", BOM + json.dumps({"image": "a.png", "prompt": "café"}).encode())
    assert used(items(tmp_path / "rows/l.jsonl"))["a"].caption == "café"
    put(tmp_path / "plain/a.png", image())
    put(tmp_path / "plain/a.txt", BOM + "café".encode())
    assert used(items(tmp_path / "plain"))["a"].caption == "café"
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 16, 16]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    put(tmp_path / "i.json", BOM + json.dumps(content).encode())
    put(tmp_path / "classes.yaml", BOM + "dog: a café\n".encode())
    found = items(tmp_path / "plain", instances=tmp_path / "i.json", classes=tmp_path / "classes.yaml")
    assert used(found)["1"].phrases == ("a café",)


@pytest.mark.parametrize("read", [read_json, read_layouts, read_settings])
def test_files_of_other_encodings_are_named(tmp_path, read):
    for form in ("utf-16", "utf-32", "latin-1"):
        path = put(tmp_path / f"{form}.json", '{"prompt": "café"}'.encode(form))
        with pytest.raises(
            ValueError, match=rf"{form}\.json is not (a text file in UTF-8|valid JSON): .*save it as UTF-8"
        ):
            read(path)


# Captions ------------------------------------------------------------------------------------------------------------


TEXTS = {
    "latin-1": ("un café".encode("latin-1"), CAPTION_NOT_UTF8, "byte 6 is 0xe9"),
    "utf-16": ("a dog".encode("utf-16"), CAPTION_NOT_UTF8, "mark of UTF-16"),
    "utf-16-le": ("a dog".encode("utf-16-le"), CAPTION_NOT_UTF8, "byte 1 is NUL"),
    "nul": (b"a\0dog", CAPTION_NOT_UTF8, "byte 1 is NUL"),
    "escape": (b"a\x1bdog", BAD_TEXT, "U+001B at character 1"),
    "c1": ("a\x85dog".encode(), BAD_TEXT, "U+0085"),
    "long": (b"x" * (2**16 + 1), WRONG_CAPTION, "has more than 65536 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_captions_beside_images_that_are_no_text_leave_them_out(tmp_path, name):
    contents, reason, told = TEXTS[name]
    for stem in "ab":
        put(tmp_path / f"set/{stem}.png", image())
    text = put(tmp_path / "set/a.txt", contents)
    found = items(tmp_path / "set")
    ((image_id, (why, detail)),) = skipped(found).items()
    assert (list(used(found)), image_id, why) == (["b"], "a", reason)
    assert detail.startswith(str(text))
    assert told in detail
    before = open_source(tmp_path / "set")[0].identity()
    put(text, b"good")
    assert used(items(tmp_path / "set"))["a"].caption == "good"
    assert open_source(tmp_path / "set")[0].identity() != before


ROWS = {
    "nul": {"text": "a\0dog"},
    "phrase": {"phrases": ["a\x1bdog"], "boxes": [[0, 0, 1, 1]]},
    "half": {"text": "a \ud83d"},
    "half a phrase": {"phrases": ["\udc00"], "boxes": [[0, 0, 1, 1]]},
    "delete": {"text": "a\x7f"},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_whose_texts_hold_control_characters_are_left_out(tmp_path, name):
    put(tmp_path / "a.png", image())
    row = {"file_name": "a.png", "box_format": "xyxy", "image_id": "it"} | ROWS[name]
    put(tmp_path / "metadata.jsonl", json.dumps(row) + "\n" + json.dumps({"file_name": "a.png"}))
    found = items(tmp_path)
    assert (list(used(found)), skipped(found)["it"][0]) == (["a"], BAD_TEXT)
    assert "U+" in skipped(found)["it"][1]


def test_lines_of_other_encodings_are_left_out_and_a_whole_file_refused(tmp_path):
    put(tmp_path / "a.png", image())
    line = json.dumps({"file_name": "a.png", "text": "café"}, ensure_ascii=False) + "\n"
    path = put(tmp_path / "metadata.jsonl", line.encode("latin-1") + line.encode())
    found = items(tmp_path)
    assert skipped(found)["metadata.jsonl row 1"][0] == NOT_UTF8
    assert used(found)["a"].caption == "café"
    for form in ("utf-16", "utf-32", "utf-16-le", "utf-16-be"):
        put(path, line.encode(form))
        with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8 text: .*save it as UTF-8"):
            items(tmp_path)


def test_strings_of_a_table_that_are_no_utf8_are_left_out(tmp_path):
    put(tmp_path / "a.png", image())
    texts = pa.array([b"good", "café".encode("latin-1"), b"a\0b", b"fine"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    table = pa.table({"file_name": ["a.png"] * 4, "text": column, "id": ["w", "x", "y", "z"]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    found = items(tmp_path)
    assert list(used(found)) == ["w", "z"]
    told = skipped(found)
    assert told["metadata.parquet row 2"][0] == NOT_UTF8
    assert "caf\\xe9" in told["metadata.parquet row 2"][1]
    assert told["y"] == (BAD_TEXT, "'a\\x00b' has U+0000 at character 1; expected text")
    assert len(open_source(tmp_path)[0].identity()["images"]) == 64


def test_texts_with_a_broken_line_are_told_with_what_they_say(tmp_path):
    put(tmp_path / "a.png", image())
    put(tmp_path / "metadata.jsonl", "{'file_name': 'a.png'}\n" + json.dumps({"file_name": "a.png"}))
    ((why, detail),) = skipped(items(tmp_path)).values()
    assert why == NOT_JSON
    assert detail.startswith("\"{'file_name': 'a.png'}\": Expecting property name enclosed in double quotes")


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_joined_captions_with_control_characters_are_counted_by_name(tmp_path, form):
    texts, path = {"a": "good", "b": "a\0dog", "c": "\x1b[31m"}, tmp_path / f"caps.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), path)
    elif form == "json":
        put(path, json.dumps(texts))
    else:
        put(path, "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()))
    with CaptionTable.open(path, tmp_path / "cache") as table:
        assert [table.get(key) for key in "abc"] == ["good", None, None]
        assert (table.counts.refused, table.counts.example) == (2, "b")


def test_joined_captions_of_other_encodings_are_refused_by_name(tmp_path):
    texts = pa.array([b"good", "café".encode("latin-1")], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    pq.write_table(pa.table({"id": ["a", "b"], "text": column}), tmp_path / "a.parquet")
    put(tmp_path / "b.jsonl", '{"id": "a", "text": "b"}\n'.encode("utf-16"))
    put(tmp_path / "c.json", '{"a": "b"}'.encode("utf-16"))
    put(tmp_path / "d.txt", "a dog".encode("utf-16"))
    for name, says in {
        "a.parquet": r"a\.parquet has a text that is not UTF-8",
        "b.jsonl": r"b\.jsonl, line 1 is not JSON: .*UTF-16",
        "c.json": r"c\.json is not JSON: .*UTF-16",
        "d.txt": r"d\.txt is not UTF-8 text: .*UTF-16",
    }.items():
        with pytest.raises(ValueError, match=says):
            CaptionTable.open(tmp_path / name, tmp_path / "cache")


def test_the_report_tells_one_example_whole(tmp_path):
    sdxl_vae().save_pretrained(tmp_path / "vae")
    for stem in "abc":
        put(tmp_path / f"set/{stem}.png", image())
    for stem in "ab":
        put(tmp_path / f"set/{stem}.txt", "a dog".encode("utf-16"))
    how = Settings(framing=Framing(resolutions=(32,)), vae=str(tmp_path / "vae"))
    report = prepare(open_source(tmp_path / "set"), tmp_path / "out", how, Machine())
    text = tmp_path / "set/a.txt"
    told = f"{tmp_path / 'set/a.png'}: {text}: it begins with the byte order mark of UTF-16; save it as UTF-8"
    assert report.total.skipped == {CAPTION_NOT_UTF8: {"count": 2, "examples": ["a", "b"], "example": told}}
    assert f"  skipped, its caption is not UTF-8: 2 (as a, b)\n    {told}\n" in str(report)
    for stem in "ab":
        (tmp_path / f"set/{stem}.txt").unlink()
    caps = put(tmp_path / "caps.jsonl", '{"id": "a", "text": "x"}\n{"id": "b", "text": "\\u0007"}')
    report = prepare(
        open_source(tmp_path / "set"), tmp_path / "two", replace(how, captions=str(caps)), Machine()
    )  # fmt: skip
    assert "with control characters, or no file of the archive: 1 (as b)" in str(report)
