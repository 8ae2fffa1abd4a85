"""Captions by id: every format gives the same table, in bounded memory, whole or not at all."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gligen_xl.prepare.captions.table import CaptionTable
from gligen_xl.prepare.item import Item
from gligen_xl.prepare.sources import open_source

KNOWN = {"sa_1": "a red circle on grass", "sa_2": "ein grüner Kreis", "sa_30": "two squares, one behind the other"}


def tar_bytes(members, mode="w"):
    """Members (name, bytes), as the library writes them."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def texts(folder=""):
    return [(f"{folder}{key}.txt", text.encode()) for key, text in KNOWN.items()]


def captions_of(table, image_ids):
    return {key: text for key in image_ids if (text := table.get(key)) is not None}


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def columns(ids, captions):
    return {ids: list(KNOWN), captions: list(KNOWN.values())}


def rows(ids, captions, prefix=""):
    return [{ids: prefix + key, captions: text, "other": 1} for key, text in KNOWN.items()]


def write_shards(folder):
    for number, key in enumerate(KNOWN):
        write_parquet(folder / f"{number}.parquet", {"__key__": [f"part/{key}"], "txt": [KNOWN[key]]})
    (folder / "dataset_infos.json").write_text("{}")  # as the Hub has it beside the shards


def write_texts(folder):
    for name, data in texts("part/"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "part" / "sa_1.json").write_text("{}")  # as SA-1B has it beside the images


SOURCES = {
    "published.tar.gz": lambda path: path.write_bytes(tar_bytes(texts("captions/part/"), "w:gz")),
    "plain.tar": lambda path: path.write_bytes(tar_bytes([("a/", b""), *texts("./")][1:])),
    "packed.tar": lambda path: path.write_bytes(tar_bytes(texts(), "w:gz")),  # whatever its name says
    "web.tar": lambda path: path.write_bytes(
        tar_bytes([pair for text in texts() for pair in ((text[0][:-3] + "jpg", b"\xff" * 5000), text)])
    ),
    "keys.parquet": lambda path: write_parquet(path, columns("__key__", "txt")),
    "ids.parquet": lambda path: write_parquet(path, columns("image_id", "caption") | {"key": ["x"] * 3}),
    "shards": lambda path: (path.mkdir(), write_shards(path)),
    "lines.jsonl": lambda path: write_jsonl(path, rows("id", "text")),
    "keys.jsonl": lambda path: write_jsonl(path, rows("__key__", "prompt", "a/b/")),
    "whole.json": lambda path: path.write_text(json.dumps(KNOWN)),
    "texts": lambda path: (path.mkdir(), write_texts(path)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_gives_the_same_table(tmp_path, name):
    SOURCES[name](tmp_path / name)
    with CaptionTable.open(tmp_path / name, tmp_path / "cache") as table:
        assert len(table) == 3
        assert captions_of(table, ["sa_30", "sa_1", "none", "sa_2"]) == KNOWN
        assert table.get("sa_2") == KNOWN["sa_2"]
        assert table.get("none") is None
        assert (table.duplicates, table.counts.empty, table.counts.refused) == (0, 0, 0)


# Images of every kind of source, and captions of every format, both with a part of the ids being folders ------------

IMAGES = ("000/0", "000/1", "001/2", "3", "001/dots.in.4")


def image():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def sources(folder, names):
    """The same images as each kind of source: arguments of `open_source` by kind."""
    files = [(f"{name}.png", image()) for name in names]
    (folder / "a.tar").write_bytes(tar_bytes([("./" + name, data) for name, data in files]))
    for name, data in files:
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(data)
    write_jsonl(folder / "set" / "mine.jsonl", [{"image": name} for name, _ in files])
    images = [{"id": name.removesuffix(".png"), "file_name": name} for name, _ in files]
    (folder / "coco.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "dog"}]}))
    yield "webdataset", {"path": folder / "a.tar"}
    yield "folder", {"path": folder / "set", "kind": "imagefolder"}  # beside a table that is not its own
    yield "layouts", {"path": folder / "set" / "mine.jsonl"}
    yield "coco", {"path": folder / "set", "instances": folder / "coco.json"}
    write_jsonl(folder / "set" / "metadata.jsonl", [{"file_name": f"./{name}"} for name, _ in files])
    yield "imagefolder", {"path": folder / "set"}


def write_caption_files(folder, known):
    """The same captions in each format."""
    for name in ("plain.tar", "packed.tar.gz"):
        members = [(f"./{key}.txt", text.encode()) for key, text in known.items()]
        (folder / name).write_bytes(tar_bytes(members, "w:gz" if "gz" in name else "w"))
    write_parquet(folder / "keys.parquet", {"__key__": list(known), "txt": list(known.values())})
    write_jsonl(folder / "lines.jsonl", [{"image_id": key, "caption": text} for key, text in known.items()])
    (folder / "whole.json").write_text(json.dumps(known))
    annotations = [{"image_id": key, "id": k, "caption": text} for k, (key, text) in enumerate(known.items())]
    (folder / "coco.json").write_text(json.dumps({"annotations": annotations}))
    for key, text in known.items():
        (folder / "texts" / f"{key}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / f"{key}.txt").write_text(text)
    return ["plain.tar", "packed.tar.gz", "keys.parquet", "lines.jsonl", "whole.json", "coco.json", "texts"]


@pytest.mark.parametrize("change", ["same", "bare captions", "deeper captions", "bare images"])
def test_captions_of_every_format_join_images_of_every_source(tmp_path, change):
    def bare(name):
        return name.rpartition("/")[2]

    images = list(map(bare, IMAGES)) if change == "bare images" else IMAGES
    keys = {"bare captions": bare, "deeper captions": "all/of/{}".format}.get(change, str)
    known = {keys(name): f"caption of {bare(name)}" for name in IMAGES}
    for folder in ("pictures", "captions"):
        (tmp_path / folder).mkdir()
    for name in write_caption_files(tmp_path / "captions", known):
        (tmp_path / "pictures" / name).mkdir()
        with CaptionTable.open(tmp_path / "captions" / name, tmp_path / "c") as table:
            assert len(table) == len(IMAGES)
            for kind, source in sources(tmp_path / "pictures" / name, images):
                found = [item for unit in open_source(**source) for item in unit.items()]
                # In a webdataset, names with several dots are refused.
                good = [item.image_id for item in found if isinstance(item, Item)]
                assert len(good) == len(IMAGES) - (kind == "webdataset")
                assert {bare(key): table.get(key) for key in good} == {
                    bare(key): f"caption of {bare(key)}" for key in good
                }


def test_sa1b_joins_captions_in_folders(tmp_path):
    (tmp_path / "captions.tar.gz").write_bytes(tar_bytes(texts("some/dir/"), "w:gz"))
    (tmp_path / "sa_000000.tar").write_bytes(tar_bytes([(f"./{key}.jpg", image()) for key in KNOWN]))
    (unit,) = open_source(tmp_path / "sa_000000.tar")
    with CaptionTable.open(tmp_path / "captions.tar.gz", tmp_path / "c") as table:
        assert {item.image_id: table.get(item.image_id) for item in unit.items()} == KNOWN


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_an_id_is_joined_by_its_end(tmp_path, data):
    """As in so many words: itself, else the only one that ends with it, else the longest that it ends with."""
    ids = st.lists(st.sampled_from(["a", "b", "a0", "a-", "é"]), min_size=1, max_size=4).map("/".join)
    known = {key: f"caption of {key}" for key in data.draw(st.sets(ids, min_size=1, max_size=12))}
    image_id = data.draw(ids)
    deeper = [key for key in known if key.endswith("/" + image_id)]
    shorter = max((key for key in known if image_id.endswith("/" + key)), key=len, default=None)
    expected = image_id if image_id in known else shorter if not deeper else deeper[0] if len(deeper) == 1 else None
    source = tmp_path / f"{time.monotonic_ns()}.json"
    source.write_text(json.dumps(known))
    with CaptionTable.open(source, tmp_path / "c") as table:
        assert table.get(image_id) == (None if expected is None else known[expected])


def test_numbers_are_ids_too(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image_id": [9, 25], "caption": ["a cat", "a dog"]})
    assert captions_of(CaptionTable.open(tmp_path / "a.parquet", tmp_path / "c"), ["9", "25"]) == {
        "9": "a cat",
        "25": "a dog",
    }


def test_coco_gives_the_caption_of_the_lowest_annotation(tmp_path):
    annotations = [
        {"image_id": 9, "id": 70, "caption": "late"},
        {"image_id": 25, "id": 2, "caption": "A dog.\n"},
        {"image_id": 9, "id": 4, "caption": "  "},
        {"image_id": 9, "id": 8, "caption": "A cat\nsits. "},
    ]
    content = {"images": [{"id": 9}, {"id": 25}, {"id": 30}], "annotations": annotations}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    table = CaptionTable.open(tmp_path / "captions.json", tmp_path / "c")
    assert (len(table), table.duplicates) == (2, 0)
    assert captions_of(table, ["9", "25", "30"]) == {"9": "A cat sits.", "25": "A dog."}
    (tmp_path / "instances.json").write_text(json.dumps({"annotations": [{"image_id": 9, "id": 1, "bbox": [0] * 4}]}))
    with pytest.raises(ValueError, match=r"instances\.json: expected COCO captions"):
        CaptionTable.open(tmp_path / "instances.json", tmp_path / "c")


def test_texts_become_one_line_and_what_is_none_is_counted(tmp_path):
    members = [
        ("sa_1.txt", b"\xef\xbb\xbf  The first\r\n  and the  second.\n\n"), ("sa_2.txt", b" \n"), ("sa_3.txt", b""),
        ("sa_4.txt", b"x" * ((1 << 20) + 1)), ("sa_5.txt", b"x" * (1 << 20)), ("._sa_1.txt", b"\x00\x05"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    # The same as JSONL.
    lines = [{"id": name.removesuffix(".txt"), "text": data.decode("utf-8-sig")} for name, data in members[:-1]]
    write_jsonl(tmp_path / "a.jsonl", lines)
    for name in ("a.tar", "a.jsonl"):
        table = CaptionTable.open(tmp_path / name, tmp_path / "c")
        assert table.get("sa_1") == "The first and the  second."
        assert (len(table), table.counts.empty, table.counts.refused) == (2, 2, 1)


def test_the_first_of_several_captions_stays(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"id": key, "text": text}
            for key, text in [("a", ""), ("b", "1"), ("a", "2"), ("a", " 2"), ("b", "3"), ("b", "4")]
        ],
    )
    table = CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c")
    assert captions_of(table, "ab") == {"a": "2", "b": "1"}
    assert (len(table), table.duplicates, table.counts.empty) == (2, 2, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcdé'\"%_"), st.text(max_size=5)), min_size=1, max_size=30))
def test_a_table_is_a_dict_of_first_captions(tmp_path, pairs):
    source = tmp_path / f"{time.monotonic_ns()}.jsonl"
    source.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in pairs), encoding="utf-8")
    expected: dict[str, str] = {}
    others = 0
    for key, text in pairs:
        if any(unicodedata.category(c) == "Cc" and c not in "\t\n\v\f\r" for c in text):
            continue  # refused
        line = " ".join(part.strip() for part in text.splitlines() if part.strip())
        if line:
            others += expected.setdefault(key, line) != line
    if not expected:
        with pytest.raises(ValueError, match=r"jsonl holds no captions: \d+ empty"):
            CaptionTable.open(source, tmp_path / "c")
        return
    with CaptionTable.open(source, tmp_path / "c") as table:
        assert captions_of(table, "abcdé'\"%_") == expected
        assert (len(table), table.duplicates) == (len(expected), others)


# Damaged and hostile sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_short_archive_is_refused_wherever_it_is_cut(tmp_path, packed):
    plain = tar_bytes(texts())  # three members of two blocks each, and the end mark
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    for length in (0, 100, 512, 700, 1024, 1500, 2048, 3072):
        path.write_bytes(gzip.compress(plain[:length]) if packed else plain[:length])
        with pytest.raises(ValueError, match=r"a\.tar.* is (empty|cut short|damaged)"):
            CaptionTable.open(path, tmp_path / "c")
    if packed:
        whole = gzip.compress(plain)
        for data in (whole[:-1], whole[:-9], whole[: len(whole) // 2], whole[:-8] + b"\0" * 8):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"a\.tar\.gz is (cut short|damaged)"):
                CaptionTable.open(path, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.sqlite"))


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path):
    plain = bytearray(tar_bytes(texts()))
    plain[1024 + 148 : 1024 + 156] = b"9" * 8  # the second member's checksum
    (tmp_path / "a.tar").write_bytes(plain)
    with pytest.raises(ValueError, match=r"a\.tar is damaged .*invalid header"):
        CaptionTable.open(tmp_path / "a.tar", tmp_path / "c")


def test_nothing_of_an_archive_is_extracted(tmp_path):
    outside = tmp_path / "evil.txt"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in (str(outside), "../../evil.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        tar.addfile(good, io.BytesIO(b"good"))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    table = CaptionTable.open(tmp_path / "a.tar", tmp_path / "c")
    assert (len(table), table.get("good"), table.get("evil"), table.counts.refused) == (1, "good", None, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "c"}


def test_a_name_of_gigabytes_is_refused(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match="a header of 3221225472 bytes"):
        CaptionTable.open(tmp_path / "a.tar", tmp_path / "c")


def write_table(path, **columns):
    write_parquet(path, columns)


WRONG = {
    "bytes.txt": (lambda path: path.write_bytes(b"caf\xe9"), r"bytes\.txt is not UTF-8"),
    "bytes.tar": (lambda path: path.write_bytes(tar_bytes([("p/a.txt", b"caf\xe9")])), r"p/a\.txt is not UTF-8"),
    "bytes.jsonl": (lambda path: path.write_bytes(b'{"id": "a", "text": "b"}\n{"id": "caf\xe9"'), "line 2 is not JSON"),
    "half.jsonl": (lambda path: path.write_text('{"id": "a", "text": "\\ud800"}'), "caption of 'a' is not Unicode"),
    "list.jsonl": (lambda path: path.write_text("[1]\n"), "line 1 is .*expected an object"),
    "keys.jsonl": (lambda path: path.write_text('{"id": "a", "words": "b"}'), "has id, words; expected .*texts in txt"),
    "id.jsonl": (lambda path: path.write_text('{"id": null, "text": "b"}'), "line 1: id is None; expected the id"),
    "text.jsonl": (lambda path: path.write_text('{"id": "a", "text": ["b"]}'), r"line 1: text is .*expected a caption"),
    "broken.json": (lambda path: path.write_text("{"), r"broken\.json is not JSON"),
    "list.json": (lambda path: path.write_text("[]"), "holds a list; expected COCO captions or an object"),
    "deep.json": (lambda path: path.write_text('{"a": {"b": "c"}}'), "the caption of a is .*expected a caption"),
    "cols.parquet": (lambda path: write_table(path, file=["a"], txt=["b"]), "has file, txt; expected ids in __key__"),
    "real.parquet": (lambda path: write_table(path, id=[0.5], txt=["b"]), r"row 0: id is 0\.5"),
    "no.parquet": (lambda path: path.write_bytes(b"PAR1 nothing"), r"no\.parquet is damaged"),
    "empty.tar": (lambda path: path.write_bytes(tar_bytes([("a.jpg", b"x")])), "holds no captions: 0 empty"),
    "blank.txt": (lambda path: path.write_text(" \n"), r"blank\.txt holds no captions: 1 empty"),
    "other.csv": (lambda path: path.write_text("a,b"), r"holds no captions; expected files that end in \.parquet"),
    "folder": (lambda path: path.mkdir(), r"folder holds no captions"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_holds_no_captions_says_why(tmp_path, name):
    write, says = WRONG[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        CaptionTable.open(tmp_path / name, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.sqlite"))
    assert not list((tmp_path / "c").glob(".*"))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no captions .*nowhere"):
        CaptionTable.open(tmp_path / "nowhere", tmp_path / "c")


# The cache ----------------------------------------------------------------------------------------------------------


def test_a_table_is_built_once_and_again_when_its_source_changes(tmp_path):
    source, cache, told = tmp_path / "a.jsonl", tmp_path / "c", []
    write_jsonl(source, rows("id", "text") * 8000)
    assert len(CaptionTable.open(source, cache, progress=told.append)) == 3
    assert told == [10_000, 20_000, 24_000]
    built = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.sqlite")}
    assert len(CaptionTable.open(source, cache, progress=told.append)) == 3
    assert len(told) == 3
    assert built == {path.name: path.stat().st_mtime_ns for path in cache.glob("*.sqlite")}
    write_jsonl(source, [{"id": "new", "text": "b"}])
    assert CaptionTable.open(source, cache).get("new") == "b"


def test_a_kept_table_needs_no_writable_cache(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows("id", "text"))
    CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c").close()
    for lock in (tmp_path / "c").glob("*.lock"):
        lock.unlink()
    (tmp_path / "c").chmod(0o555)
    try:
        assert len(CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c")) == 3
        assert len(list((tmp_path / "c").iterdir())) == 1
    finally:
        (tmp_path / "c").chmod(0o755)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows("id", "text"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the folder .*file/c cannot be made or written"):
        CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "file" / "c")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": str(k), "text": "x" * 1000} for k in range(5000)])
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from gligen_xl.prepare.captions.table import CaptionTable\n"
        "try: CaptionTable.open(sys.argv[1], sys.argv[2])\n"
        "except OSError as error: print(type(error).__name__, error)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"OSError the table of captions cannot be written in {tmp_path / 'cache'}" in output
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_killed_and_run_again_the_table_is_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": str(k), "text": f"caption {k}"} for k in range(60_000)])
    code = (
        "import sys; from gligen_xl.prepare.captions.table import CaptionTable\n"
        "CaptionTable.open(*sys.argv[1:], progress=lambda number: print(number, flush=True))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "c")]
    for lines, delay in ((1, 0), (5, 0.0), (6, 0.02)):
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    table = CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c")
    assert (len(table), table.get("59999")) == (60_000, "caption 59999")
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".lock", ".sqlite"]  # no parts are left


def open_counting(source, cache):
    told: list[int] = []
    with CaptionTable.open(source, cache, progress=told.append) as table:
        return len(table), bool(told)


def test_of_several_processes_one_builds(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": str(k), "text": f"caption {k}"} for k in range(30_000)])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap(open_counting, [(tmp_path / "a.jsonl", tmp_path / "c")] * 4, chunksize=1)
    assert [length for length, _ in results] == [30_000] * 4
    assert sum(built for _, built in results) == 1


def test_a_damaged_table_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows("id", "text"))
    path = CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c").path
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=r"is no table of captions, or damaged .*; delete it"):
        CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "c")
    sqlite3.connect(tmp_path / "other.sqlite").close()
    with pytest.raises(ValueError, match="is no table of captions"):
        CaptionTable(tmp_path / "other.sqlite")


# Where it is read ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": str(k), "text": f"caption {k}"} for k in range(3000)])
    with CaptionTable.open(tmp_path / "a.jsonl", tmp_path / "odd ?#% name") as table:
        yield table


def test_many_ids_at_once(table):
    assert captions_of(table, map(str, range(5000))) == {str(k): f"caption {k}" for k in range(3000)}
    assert captions_of(table, []) == {}


def test_other_threads_and_processes_may_read(table):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(table.get, map(str, range(2000)))) == [f"caption {k}" for k in range(2000)]
    again = pickle.loads(pickle.dumps(table))
    assert again.get("7") == "caption 7"
    again.close()
    context = multiprocessing.get_context("fork")  # a table that was open before the fork
    with context.Pool(2) as pool:
        assert pool.map(table.get, ["1", "2", "x"]) == ["caption 1", "caption 2", None]
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(table.get("5")))
    process.start()
    assert queue.get(timeout=20) == "caption 5"
    process.join()
    assert table.get("9") == "caption 9"


def test_a_closed_table_says_so(table):
    table.close()
    table.close()
    with pytest.raises(ValueError, match="was closed"):
        table.get("1")


def test_memory_does_not_grow_with_the_captions(tmp_path):
    """Of a tar.gz as published: ten times the captions, the same memory."""
    code = (
        "import resource, sys; from gligen_xl.prepare.captions.table import CaptionTable\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "table = CaptionTable.open(*sys.argv[1:])\n"
        "print(len(table), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    growth = {}
    for count in (5_000, 50_000):
        path = tmp_path / f"{count}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            for k in range(count):
                data = f"The image shows an image of number {k}. ".encode() * 12
                info = tarfile.TarInfo(f"sa_{k * 7919 % 1_000_003}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                tar.members.clear()
        words = [sys.executable, "-c", code, str(path), str(tmp_path / "c")]
        length, kilobytes = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
        assert length == count
        growth[count] = kilobytes / 1024
    assert growth[50_000] < 48  # MiB: the page cache of SQLite is 8, the texts are 25
    assert growth[50_000] - growth[5_000] < 24
