"""Rows of many shards: what the tables say, next to no memory, whatever writes them and wherever they are kept."""

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import METADATA, latents, row
from hypothesis import given, settings
from hypothesis import strategies as st

from gligen_xl.data import table as module
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import TABLE, Row, Shard
from gligen_xl.data.table import Table, cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SMALL", 0)  # tables of any size go through a file
    return tmp_path / "cache" / "tables"


def made(folder, *parts):
    """A shard a part; each part is the rows of a shard."""
    for name, rows in zip("abcdef", parts, strict=False):
        write_shard(folder / name, latents(len(rows)), rows, METADATA)
    return [Shard(folder / name, with_table=False) for name, _ in zip("abcdef", parts, strict=False)]


def plain(entry):
    """With boxes and scores as the float32 that they are kept in."""
    boxes = [tuple(np.float32(box).tolist()) for box in entry.boxes]
    return replace(entry, boxes=boxes, scores=np.float32(entry.scores).tolist())


def rewritten(shard, **columns):
    """The table as somebody else wrote it."""
    table = pq.read_table(shard.table_file)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, shard.table_file, row_group_size=2)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
lines = st.lists(st.tuples(texts, texts, st.lists(texts.filter(str.strip), max_size=3)), max_size=5)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(lines, min_size=1, max_size=3))
def test_every_row_is_what_was_written(parts, tmp_path_factory):
    rows = [
        [row(len(phrases), image_id=name, caption=caption, phrases=phrases) for name, caption, phrases in part]
        for part in parts
    ]
    table = Table(made(tmp_path_factory.mktemp("shards"), *rows))
    assert [table.row(k) for k in range(table.rows)] == [plain(entry) for part in rows for entry in part]


def test_the_file_is_made_once_and_again_when_a_table_changes(tmp_path, cache):
    shards = made(tmp_path, [row(2), row(0)], [], [row(1)])
    first = Table(shards)
    (file,) = cache.glob("*.rows")
    made_at = file.stat().st_ino
    assert Table(shards).row(2) == first.row(2)
    assert file.stat().st_ino == made_at
    write_shard(tmp_path / "c", latents(1), [row(3)], METADATA)
    assert len(Table([Shard(tmp_path / name) for name in "abc"]).row(2).boxes) == 3
    assert len(first.row(2).boxes) == 1  # open still
    assert len(list(cache.glob("*.rows"))) == 2
    os.utime(file, (0, 0))
    write_shard(tmp_path / "c", latents(1), [row(2)], METADATA)
    Table([Shard(tmp_path / "c")])
    assert not file.exists()  # unused for long


@pytest.mark.parametrize("place", range(0, 380, 7))
def test_a_flipped_byte_of_the_cache_is_noticed_and_the_next_time_all_is_well(tmp_path, cache, place):
    shards = made(tmp_path, [row(2), row(0)], [row(1)])
    expected = [Table(shards).row(k) for k in range(3)]
    (file,) = cache.glob("*.rows")
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 4
    file.write_bytes(content)
    if place % len(content) >= len(content) - 8:  # the end, which is looked at first: the file is made again
        assert [Table(shards).row(k) for k in range(3)] == expected
        return
    table = Table(shards)
    with pytest.raises(ValueError, match="of the cache is damaged and was removed"):
        [table.row(k) for k in range(3)]
    assert [Table(shards).row(k) for k in range(3)] == expected


def test_a_cache_that_is_cut_short_is_made_again(tmp_path, cache):
    shards = made(tmp_path, [row(2), row(0)])
    expected = Table(shards).row(0)
    (file,) = cache.glob("*.rows")
    for content in (b"", file.read_bytes()[:-5], file.read_bytes()[9:]):
        file.write_bytes(content)
        assert Table(shards).row(0) == expected


def test_a_copy_of_the_same_size_and_time_is_another_table(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    cache = tmp_path / "cache"
    captions = ("a cat", "a dog")
    for name, caption in zip(("a", "b"), captions, strict=True):
        write_shard(tmp_path / name / "s", latents(4, 8), [row(1, caption=caption)] * 4, METADATA)
    assert Table([Shard(tmp_path / "a" / "s")], cache).row(0).caption == "a cat"
    old, new = (tmp_path / name / "s.parquet" for name in ("a", "b"))
    status = old.stat()
    assert new.stat().st_size == status.st_size
    old.write_bytes(new.read_bytes())
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Table([Shard(tmp_path / "a" / "s")], cache).row(0).caption == "a dog"
    assert all(len(file.stem) == 64 for file in cache.glob("*.rows"))


def test_a_table_travels_without_its_rows(tmp_path):
    shards = made(tmp_path, [row(3, caption="long " * 1000)] * 40)
    table = Table(shards)
    sent = pickle.dumps(table)
    assert len(sent) < 1000
    assert pickle.loads(sent).row(17) == table.row(17)


def test_without_a_place_for_it_the_table_stays_in_memory(tmp_path, monkeypatch):
    shards = made(tmp_path, [row(2), row(1)])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="2 rows is kept in memory"):
        table = Table(shards)
    assert table.row(1) == plain(row(1))
    assert pickle.loads(pickle.dumps(table)).row(1) == plain(row(1))


def test_a_full_disk_costs_memory_and_leaves_nothing(tmp_path, monkeypatch, cache):
    shards = made(tmp_path, [row(2), row(1)])
    real = module._write

    def full(file, shards):
        if hasattr(file, "fileno") and not hasattr(file, "getvalue"):
            raise OSError(28, "No space left on device")
        real(file, shards)

    monkeypatch.setattr(module, "_write", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert Table(shards).row(0) == plain(row(2))
    assert not [path for path in cache.iterdir() if path.name != ".lock"]


def test_where_the_cache_stands(monkeypatch, tmp_path):
    assert cache_folder("tables") == tmp_path / "cache" / "tables"
    monkeypatch.delenv("GLIGEN_XL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder("tables")) == "/x/gligen-xl/tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder("tables")) == "/home/me/.cache/gligen-xl/tables"


# Tables of other writers --------------------------------------------------------------------------------------------


def test_other_spellings_of_the_same_columns(tmp_path):
    rows = [row(k) for k in (2, 0, 3, 1, 1)]
    (shard,) = made(tmp_path, rows)
    table = pq.read_table(shard.table_file)
    rewritten(
        shard,
        image_id=table["image_id"].cast(pa.large_string()),
        caption=table["caption"].dictionary_encode(),
        phrases=table["phrases"].cast(pa.large_list(pa.large_string())),
        scores=table["scores"].cast(pa.list_(pa.float64())),
        boxes=pa.array(table["boxes"].to_pylist(), pa.list_(pa.list_(pa.float64()))),
        original_height=table["original_height"].cast(pa.int64()),
    )
    got = Table([shard])
    assert [got.row(k) for k in range(5)] == [plain(entry) for entry in rows]
    assert len(Shard(shard.stem).row(2).boxes) == 3


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("caption", pa.array(["a", None]), r"a\.parquet: column caption has no value in 1 places, first in place 1"),
        ("phrases", pa.array([["a ring", None], []]), r"column phrases \(its lists.* no value in 1 places"),
        ("scores", pa.array([None, []], pa.list_(pa.float32())), "column scores has no value"),
        ("boxes", pa.array([[[0.1, 0.1, 0.2]] * 2, []]), r"column boxes is list.*; expected"),
        ("boxes", pa.array([[[0.1, 0.1, 0.2, None]] * 2, []]), "column boxes .* no value in 2 places"),
        ("crop_top", pa.array(["top", "left"]), "column crop_top is string; expected int32"),
        ("phrases", pa.array([["a ring"], []]), "row 0 has unlike numbers of boxes, phrases and scores"),
    ],
)
def test_tables_that_cannot_be_trained_on(tmp_path, column, values, says):
    (shard,) = made(tmp_path, [row(2), row(0)])
    rewritten(shard, **{column: values})
    for read in (lambda: Shard(shard.stem), lambda: ShardDataset(tmp_path, Augmentation(), 0)):
        with pytest.raises(ValueError, match=says):
            read()


def test_rows_and_latents_that_do_not_fit(tmp_path):
    (shard,) = made(tmp_path, [row(2), row(0)])
    table = pq.read_table(shard.table_file)
    pq.write_table(table.slice(0, 1), shard.table_file)
    with pytest.raises(ValueError, match="2 latents but 1 rows"):
        ShardDataset(tmp_path, Augmentation(), 0)
    pq.write_table(table.drop_columns(["scores"]), shard.table_file)
    with pytest.raises(ValueError, match=r"lacks the columns \['scores'\]"):
        ShardDataset(tmp_path, Augmentation(), 0)
    shard.table_file.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        ShardDataset(tmp_path, Augmentation(), 0)


# Cost ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, psutil
from gligen_xl.data import table
from gligen_xl.data.dataset import Augmentation, ShardDataset
table.SMALL = 0
process = psutil.Process()
ShardDataset(sys.argv[1], Augmentation(), 0).batch([(0, 0)])
dataset = ShardDataset(sys.argv[2], Augmentation(), 0)
before = process.memory_full_info().uss
for number in range(len(dataset)):
    dataset.batch([(number, number)])
print(process.memory_full_info().uss - before)
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
    entries = [row(10, caption="grass " * 60)] * 500
    table = Table(made(tmp_path, entries))
    began = time.process_time()
    for _ in range(4):
        for number in range(500):
            record = table.record(number)
            assert len(record.boxes) + 2 == len(record.texts)
    assert (time.process_time() - began) / 2000 < 50e-6  # 4 on a free machine


def test_columns_of_the_format_are_those_of_a_row():
    assert TABLE.names == list(Row.__dataclass_fields__)
