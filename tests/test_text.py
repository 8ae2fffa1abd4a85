"""Text of others is shown and not obeyed; what is written down has no secrets, and what is shared no folders."""

import ast
import html
import re

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gligen_xl.charts import Curve, chart
from gligen_xl.escape import file_name, html_text, markdown, markdown_code, printable, python_string, visible
from gligen_xl.images.draw import draw_boxes, grid
from gligen_xl.layout import Layout
from gligen_xl.page import page, tiles
from gligen_xl.redact import clean_model_folder, public, public_name, public_text, redacted, redacted_values

BIDI = [chr(k) for k in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)]
CONTROLS = ["\x00", "\x07", "\x08", "\x1b", "\x7f", "\x9b", "\ufeff", "\ud800"]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=60)


@pytest.mark.parametrize("sign", BIDI + CONTROLS)
def test_what_is_hidden_is_shown(sign):
    for write in (visible, printable, html_text, markdown, markdown_code, python_string):
        written = write(f"a{sign}b")
        assert sign not in written
        assert f"{ord(sign):02x}" in written.lower()
    assert sign not in file_name(f"a{sign}b")


def test_what_others_read_stays():
    for text in ("Grün, 狗, كلب, 👩‍👩‍👧, a - b", "x_y (z) 1.5 [68.0, 74.1]"):
        assert visible(text) == printable(text) == text
    assert visible("a\n\tb\r\nc") == "a\n\tb\nc"
    assert printable(" a\n\tb\u2028c ") == "a b c"


@given(TEXTS)
def test_every_text_is_one_literal_of_python(text):
    written = python_string(text)
    assert ast.literal_eval(written) == text
    assert written.isascii()
    assert len(written.splitlines()) == 1


@given(TEXTS)
def test_every_text_is_one_line_that_can_be_written(text):
    for written in (printable(text), markdown(text), markdown_code(text, cell=True)):
        written.encode()
        assert len(f"|{written}|".splitlines()) == 1


def test_text_stays_text_in_markdown():
    for text, written in (
        ("<img src=x>", "&lt;img src=x>"),
        ("&lt;", "&amp;lt;"),
        ("a|b", "a\\|b"),
        ("`x` *y* ~z~ $q$", "\\`x\\` \\*y\\* \\~z\\~ \\$q\\$"),
        ("_a_ b_c", "\\_a\\_ b_c"),
        ("[a](javascript:x)", "[a\\](javascript:x)"),
        ("[a]: //x", "[a\\]: //x"),
        ("# a", "\\# a"), ("- a", "\\- a"), ("1. a", "1\\. a"), ("> a", "\\> a"), ("---", "\\---"), ("-", "-"),
        ("back\\slash", "back\\\\slash"),
        ("see https://a.b", "see https&#58;//a.b"),
    ):  # fmt: skip
        assert markdown(text) == written
    assert markdown_code("a`b``c") == "```a`b``c```"
    assert markdown_code("`a`") == "`` `a` ``"
    assert (markdown_code("a|b"), markdown_code("a|b", cell=True)) == ("`a|b`", "`a\\|b`")


def test_text_stays_text_in_pages_and_drawings():
    evil = "</title><script>x</script>\"' \u202e\x1b[31m"
    whole = page(evil, kicker=evil, head=tiles([(evil, evil, evil)]), sections=[])
    whole += chart([Curve(evil, [(0.0, 1.0), (1.0, 2.0)])], end=1.0, write=str, over=evil, label=evil)
    assert "<script" not in whole
    assert "\u202e" not in whole
    assert "\x1b" not in whole
    assert whole.count("\\u202e") >= 8
    assert html.escape("\"'") in whole


def test_labels_are_drawn_on_one_line_whatever_they_hold():
    """Line breaks, halves of surrogate pairs and the like would end the drawing with an error, or be obeyed."""
    image = Image.new("RGB", (256, 256), "white")

    def drawn(text, phrase=None):
        layout = Layout(phrases=[phrase or text], boxes=[[0.1, 0.5, 0.9, 0.9]])
        shown = grid([[draw_boxes(image, layout)]], columns=[text], captions=[text])
        return np.asarray(shown)

    for hidden, seen in (("\u202eabc", "\\u202eabc"), ("a\nb\tc", "a b c")):
        np.testing.assert_array_equal(drawn(hidden), drawn(seen))
    np.testing.assert_array_equal(drawn("\ud800x", "a dog"), drawn("\\ud800x", "a dog"))  # no phrase can hold that
    assert drawn("x" * 10_000).shape == drawn("x").shape


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("one/../x", "one_.._x"),
        ("../../etc", "_.._etc"),
        ("a\nb\0c", "a_b_c"),
        (".hidden", "hidden"),
        ("Grün 1", "Grün_1"),
    ],
)
def test_ids_as_names_of_files(text, name):
    assert file_name(text) == name


def test_long_ids_as_names_of_files(tmp_path):
    names = {file_name("狗" * 500 + end) for end in "ab"}
    assert len(names) == 2
    for name in names:
        assert len(name.encode()) <= 80
        (tmp_path / f".0000-{name}-boxes.png.1234567.partial").write_text("")


# Secrets and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:SECRET@bucket/a", "s3://...@bucket/a"),
        ("s3://KEY:SEC/RET+x@bucket/a", "s3://...@bucket/a"),
        ("simplecache::s3://KEY:SECRET@bucket", "simplecache::s3://...@bucket"),
        ("https://me:SECRET@host:80/x", "https://...@host:80/x"),
        ("https://h/x?token=SECRET", "https://h/x?token=..."),
        ("https://h/x?X-Amz-Signature=SECRET&versionId=3", "https://h/x?X-Amz-Signature=...&versionId=3"),
        ("https://h/x?sv=1&sig=SECRET", "https://h/x?sv=...&sig=..."),
        ("https://h/x?SECRET", "https://h/x?..."),
        ("https://h/x#access_token=SECRET", "https://h/x#..."),
        ("cannot open 's3://KEY:SECRET@b/x': no", "cannot open 's3://...@b/x': no"),
        ("token hf_SECRETSECRETSECRETSECRET", "token ..."),
    ],
)
def test_addresses_say_nothing_secret(text, shown):
    assert redacted(text) == shown == redacted(shown)
    assert "SECRET" not in public_name(text)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("s3://KEY:SECRET@bucket/a", "no KEY:SECRET@bucket/a"),
        ("s3://KEY:SEC/RET@bucket/a", "no such bucket KEY with SEC/RET"),
        ("https://h/x?sig=SECRET&revision=3", "GET /x SECRET 3"),
        ("s3://KEY:SECRET@", "KEY:SECRET@"),
    ],
)
def test_errors_that_hold_an_address_in_parts(address, error):
    shown = redacted(error, of=address)
    assert not any(word in shown for word in ("KEY", "SEC"))
    assert redacted("a 3 b", of=address) == "a 3 b"


@pytest.mark.parametrize(
    "text",
    ["hf://datasets/me/set@main/train", "http://localhost:8080/a@2", "s3://bucket/part-?.tar", "az://container@account/x",
     "/data/a@b:c", "shapes:50000", "me@example.org"],
)  # fmt: skip
def test_addresses_without_secrets_stay(text):
    assert redacted(text) == text


def test_settings_that_became_alike_keep_their_weights():
    data = {"/a/shards": 0.5, "/b/shards": 0.3, "s3://K:S@x/shards": 0.2}
    assert public({"data": data}) == {"data": {"shards": 0.5, "shards (2)": 0.3, "shards (3)": 0.2}}
    assert redacted_values({"data": {"s3://A:B@x": 1, "s3://C:D@x": 2}}) == {
        "data": {"s3://...@x": 1, "s3://...@x (2)": 2}
    }


def test_only_places_lose_their_folders():
    value = {"note": "cats/dogs", "prompt": "/imagine/a cat", "other": "/home/me/x", "told": "see /home/me/a.txt: no"}
    assert public(value) == {"note": "cats/dogs", "prompt": "/imagine/a cat", "other": "x", "told": "see a.txt: no"}
    assert public({"adapter": "owner/name", "model": "/x/models--a--b/snapshots/1f/"}) == {
        "adapter": "owner/name", "model": "a/b"
    }  # fmt: skip
    assert public_text("[Errno 13] Permission denied: '/home/me/a.png'") == "[Errno 13] Permission denied: 'a.png'"
    assert public_text("1/2 of https://a.b/c and C:\\Users\\me\\x.png") == "1/2 of https://a.b/c and x.png"


def test_a_scale_behind_a_file_does_not_make_it_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "style.safetensors").write_text("")
    lora = ["loras/style.safetensors=0.8", "owner/name=0.5"]
    assert public({"lora": lora}) == {"lora": ["style.safetensors=0.8", "owner/name=0.5"]}


def test_settings_of_a_model_folder_forget_where_it_was_loaded_from(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_name_or_path": "/home/me/base/unet", "sample_size": 64}')
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "owner/base", "unet": ["diffusers", "X"]}')
    clean_model_folder(tmp_path)
    assert yaml.safe_load((tmp_path / "unet" / "config.json").read_text()) == {
        "_name_or_path": "unet",
        "sample_size": 64,
    }
    assert re.search('"owner/base"', (tmp_path / "model_index.json").read_text())


@pytest.mark.parametrize("text", ["x" * 10**6, "a://" * 10**5, "/a" * 10**5, "hf_" * 10**5, "~a" * 10**5])
def test_long_texts_are_redacted_in_no_time(text, nothing_hangs):
    assert len(redacted(text)) <= len(text)
    assert len(public_text(text)) <= len(text)


def test_an_address_behind_a_long_word_is_redacted():
    assert redacted("a" * 100 + "s3://KEY:SECRET@bucket/b") == "a" * 100 + "s3://...@bucket/b"
