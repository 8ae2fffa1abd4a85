"""Rows of many shards: what the tables say, next to no memory, whatever version they have and whoever wrote them."""

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, latents, read_arrow, row, to_version_1, write_arrow
from hypothesis import given, settings
from hypothesis import strategies as st

from gligen_xl.data import rows as module
from gligen_xl.data.cache import cache_folder
from gligen_xl.data.check import check_shards
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.rows import open_tables
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Row, Shard
from gligen_xl.data.table import TABLE


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


def made(folder, *parts, version=2):
    """A shard a part; each part is the rows of a shard."""
    stems = [folder / name for name, _ in zip("abcdef", parts, strict=False)]
    for stem, rows in zip(stems, parts, strict=True):
        write_shard(stem, latents(len(rows)), rows, METADATA)
        if version == 1:
            to_version_1(stem)
    return [Shard(stem, with_table=False) for stem in stems]


def read(shards, *where):
    return [
        table.row(k)
        for shard, table in zip(shards, open_tables(shards, *where), strict=True)
        for k in range(len(shard))
    ]


def plain(entry):
    """With boxes and scores as the float32 that they are kept in."""
    boxes = [tuple(np.float32(box).tolist()) for box in entry.boxes]
    return replace(entry, boxes=boxes, scores=np.float32(entry.scores).tolist())


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
lines = st.lists(st.tuples(texts, texts, st.lists(texts.filter(str.strip), max_size=3)), max_size=5)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(lines, min_size=1, max_size=3), version=st.sampled_from([1, 2]))
def test_every_row_is_what_was_written(parts, version, tmp_path_factory):
    rows = [
        [row(len(phrases), image_id=name, caption=caption, phrases=phrases) for name, caption, phrases in part]
        for part in parts
    ]
    shards = made(tmp_path_factory.mktemp("shards"), *rows, version=version)
    assert read(shards) == [plain(entry) for part in rows for entry in part]


def test_rows_of_many_batches(tmp_path):
    rows = [row(k % 5, image_id=str(k), caption="x" * (k % 7)) for k in range(2500)]
    (shard,) = made(tmp_path, rows)
    assert read([shard]) == [plain(entry) for entry in rows]
    assert [list(batch) for batch in shard.row(2400).boxes] == [list(box) for box in plain(rows[2400]).boxes]
    assert shard.rows("image_id")[2499] == {"image_id": "2499"}


def test_rows_travel_without_their_contents(tmp_path):
    (table,) = open_tables(made(tmp_path, [row(3, caption="long " * 1000)] * 40))
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    assert pickle.loads(sent).row(17) == table.row(17)


def test_open_tables_hold_no_files_open(tmp_path):
    shards = made(tmp_path, [row(1)], [row(2)], [row(3)])
    open_tables(shards)  # imports what it needs
    before = psutil.Process().num_fds()
    tables = open_tables(shards * 20)
    assert psutil.Process().num_fds() == before
    assert len(tables[-1].row(0).boxes) == 3


def test_columns_of_the_format_are_those_of_a_row():
    assert TABLE.names == list(Row.__dataclass_fields__)


# Files that are damaged, or no tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("caption", pa.array(["a", None]), "column caption has no value in 1 places, first in place 1"),
        ("phrases", pa.array([["a ring", None], []]), r"column phrases \(its lists.* no value in 1 places"),
        ("scores", pa.array([None, []], pa.list_(pa.float32())), "column scores has no value"),
        ("boxes", pa.array([[[0.1, 0.1, 0.2, None]] * 2, []], TABLE.field("boxes").type), "boxes .* no value in 2"),
        ("phrases", pa.array([["a ring"], []]), "row 0 has unlike numbers of boxes, phrases and scores"),
        ("boxes", pa.array([[[0.1, 0.1, 0.2]] * 2, []]), "boxes.*; expected"),
        ("crop_top", pa.array(["top", "left"]), "crop_top.* string.*; expected"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_tables_that_cannot_be_trained_on(tmp_path, column, values, says, version):
    (shard,) = made(tmp_path, [row(2), row(0)], version=version)
    table = pq.read_table(shard.table_file) if version == 1 else read_arrow(shard.table_file)
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, shard.table_file) if version == 1 else write_arrow(shard.table_file, table)
    for read in (lambda: Shard(shard.stem), lambda: ShardDataset(tmp_path, Augmentation(), 0)):
        with pytest.raises(ValueError, match=says) as error:
            read()
        assert shard.table_file.name in str(error.value)


def test_rows_and_latents_that_do_not_fit(tmp_path):
    (shard,) = made(tmp_path, [row(2), row(0)])
    table = read_arrow(shard.table_file)
    whole = shard.table_file.read_bytes()
    write_arrow(shard.table_file, table.slice(0, 1))
    with pytest.raises(ValueError, match="2 latents but 1 rows"):
        ShardDataset(tmp_path, Augmentation(), 0)
    write_arrow(shard.table_file, table.drop_columns(["scores"]))
    with pytest.raises(ValueError, match=r"a\.arrow has the columns .*; expected .*scores"):
        ShardDataset(tmp_path, Augmentation(), 0)
    for content in (b"", b"ARROW1", whole[:-4], whole[: len(whole) // 2], whole[:200] + whole[300:], b"x" * 500):
        shard.table_file.write_bytes(content)
        for read in (ShardDataset, lambda folder, *_: Shard(folder / "a")):
            with pytest.raises(ValueError, match=r"a\.arrow is not a readable"):
                read(tmp_path, Augmentation(), 0)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_table_is_refused_before_it_is_unpacked(tmp_path, compression):
    (shard,) = made(tmp_path, [row(1)] * 4)
    table = read_arrow(shard.table_file)
    long = pa.array(["x" * 50_000_000] * 4)
    write_arrow(shard.table_file, table.set_column(1, "caption", long), compression=compression)
    assert shard.table_file.stat().st_size < 10_000_000
    del long, table
    before, peak = pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()
    for read in (lambda: Shard(shard.stem), lambda: ShardDataset(tmp_path, Augmentation(), 0)):
        with pytest.raises(ValueError, match=r"a\.arrow is compressed"):
            read()
    assert pa.total_allocated_bytes() <= before
    assert pa.default_memory_pool().max_memory() == peak


def test_flipped_bytes_end_no_process(tmp_path):
    """Whatever stands in a table: rows come, or an error that names it."""
    (shard,) = made(tmp_path, [row(2), row(0), row(3)])
    whole = shard.table_file.read_bytes()
    errors = []
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 0x85
        shard.table_file.write_bytes(content)
        try:
            read([shard])
        except ValueError as error:
            errors.append(str(error))
        check_shards(tmp_path)
    assert len(errors) > 20
    assert all("a.arrow" in error or "latents but" in error for error in errors), errors


# Tables of version 1 ------------------------------------------------------------------------------------------------


def test_a_table_is_converted_once_and_again_when_it_changes(tmp_path, cache):
    shards = made(tmp_path, [row(2), row(0)], [], [row(1)], version=1)
    (last,) = open_tables(shards)[2:]
    files = {file: file.stat().st_ino for file in cache.glob("*.arrow")}
    assert len(files) == 3
    assert read(shards)[2] == last.row(0)
    assert {file: file.stat().st_ino for file in cache.glob("*.arrow")} == files
    shards = shards[:2] + made(tmp_path / "new", [row(3)], version=1)
    shards[2].table_file.replace(tmp_path / "c.parquet")
    shards[2] = Shard(tmp_path / "c")
    assert len(read(shards)[2].boxes) == 3
    assert len(last.row(0).boxes) == 1  # open still
    (new,) = set(cache.glob("*.arrow")) - files.keys()
    for file in files:
        os.utime(file, (0, 0))
    made(tmp_path / "other", [row(1)], version=1)
    open_tables([Shard(tmp_path / "other" / "a")])
    assert not any(file.exists() for file in files)  # unused for long
    assert new.exists()


@pytest.mark.parametrize("place", range(0, 3200, 71))
def test_a_flipped_byte_of_the_cache_changes_nothing(tmp_path, cache, place):
    shards = made(tmp_path, [row(2), row(0), row(1)], version=1)
    expected = read(shards)
    (file,) = cache.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 4
    file.write_bytes(content)
    assert read(shards) == expected


def test_a_cache_that_is_cut_short_is_made_again(tmp_path, cache):
    shards = made(tmp_path, [row(2), row(0)], version=1)
    expected = read(shards)
    (file,) = cache.glob("*.arrow")
    for content in (b"", file.read_bytes()[:-5], file.read_bytes()[9:]):
        file.write_bytes(content)
        assert read(shards) == expected


def test_a_copy_of_the_same_size_and_time_is_another_table(tmp_path):
    for name, caption in (("x", "a cat"), ("y", "a dog")):
        (shard,) = made(tmp_path / name, [row(1, caption=caption)] * 4, version=1)
    (old,) = made(tmp_path / "x", [row(1, caption="a cat")] * 4, version=1)
    assert read([old], tmp_path / "cache")[0].caption == "a cat"
    status = old.table_file.stat()
    assert shard.table_file.stat().st_size == status.st_size
    old.table_file.write_bytes(shard.table_file.read_bytes())
    os.utime(old.table_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read([old], tmp_path / "cache")[0].caption == "a dog"
    assert all(len(file.stem) == 64 for file in (tmp_path / "cache").glob("*.arrow"))


def test_without_a_place_for_it_the_table_stays_in_memory(tmp_path, monkeypatch):
    shards = made(tmp_path, [row(2), row(1)], version=1)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="1 parquet tables are kept in memory"):
        (table,) = open_tables(shards)
    assert table.row(1) == plain(row(1))
    assert pickle.loads(pickle.dumps(table)).row(1) == plain(row(1))


def test_a_full_disk_costs_memory_and_leaves_nothing(tmp_path, monkeypatch, cache):
    shards = made(tmp_path, [row(2), row(1)], version=1)

    def full(shard, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_convert_to_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert read(shards) == [plain(row(2)), plain(row(1))]
    assert not [path for path in cache.iterdir() if path.name != ".lock"]


def test_other_spellings_of_the_same_columns(tmp_path):
    rows = [row(k) for k in (2, 0, 3, 1, 1)]
    (shard,) = made(tmp_path, rows, version=1)
    table = pq.read_table(shard.table_file)
    columns = {
        "image_id": table["image_id"].cast(pa.large_string()),
        "caption": table["caption"].dictionary_encode(),
        "phrases": table["phrases"].cast(pa.large_list(pa.large_string())),
        "scores": table["scores"].cast(pa.list_(pa.float64())),
        "boxes": pa.array(table["boxes"].to_pylist(), pa.list_(pa.list_(pa.float64()))),
        "original_height": table["original_height"].cast(pa.int64()),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, shard.table_file, row_group_size=2)
    assert read([shard]) == [plain(entry) for entry in rows]
    assert len(Shard(shard.stem).row(2).boxes) == 3


def test_a_damaged_parquet_file_is_named(tmp_path):
    (shard,) = made(tmp_path, [row(2), row(0)], version=1)
    pq.write_table(pq.read_table(shard.table_file).drop_columns(["scores"]), shard.table_file)
    with pytest.raises(ValueError, match=r"a\.parquet lacks the columns \['scores'\]"):
        ShardDataset(tmp_path, Augmentation(), 0)
    shard.table_file.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable"):
        ShardDataset(tmp_path, Augmentation(), 0)


def test_where_the_cache_stands(monkeypatch, tmp_path):
    assert cache_folder("tables") == tmp_path / "cache" / "tables"
    monkeypatch.delenv("GLIGEN_XL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder("tables")) == "/x/gligen-xl/tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder("tables")) == "/home/me/.cache/gligen-xl/tables"


# Cost ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, psutil
from gligen_xl.data.dataset import Augmentation, ShardDataset
def own():  # pages of mapped files are the system's: it takes them back when it needs room
    return sum(part.anonymous for part in psutil.Process().memory_maps())
ShardDataset(sys.argv[1], Augmentation(), 0).batch([(0, 0)])
dataset = ShardDataset(sys.argv[2], Augmentation(), 0)
_, before = own(), own()  # the first time it takes memory itself
for number in range(len(dataset)):
    dataset.batch([(number, number)])
print(own() - before)
"""


def test_private_memory_does_not_grow_with_the_shard(tmp_path):
    """Every row of a shard of 32 MB is read, by a process that knows the code already from a small one."""
    count, caption = 500, "a long caption " * 200
    entries = [row(8, caption=caption)] * count
    write_shard(tmp_path / "small" / "a", latents(1, side=90), entries[:1], METADATA)
    large = np.random.default_rng(0).normal(size=(count, 4, 90, 90)).astype(np.float16)
    write_shard(tmp_path / "large" / "a", large, entries, METADATA)
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    growth = int(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    assert growth < 0.05 * large.nbytes


def test_a_row_is_read_in_microseconds(tmp_path):
    (table,) = open_tables(made(tmp_path, [row(10, caption="grass " * 60)] * 500))
    began = time.process_time()
    for _ in range(4):
        for number in range(500):
            table.row(number)
    assert (time.process_time() - began) / 2000 < 50e-6  # 10 on a free machine
