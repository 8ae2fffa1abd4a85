"""Shards: what is written is what is read; whole or not at all; damage is named."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from helpers.rows import METADATA, latents, read_arrow, row, to_version_1, write_arrow
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gligen_xl.data.shard_writer import ShardWriter, write_shard
from gligen_xl.data.shards import Shard, find_shards
from gligen_xl.data.table import BATCH_ROWS, TABLE
from gligen_xl.io import read_json, write_json


@pytest.fixture
def stem(tmp_path):
    write_shard(tmp_path / "a.0", latents(3), [row(k) for k in range(3)], METADATA)
    return tmp_path / "a.0"


def test_what_is_written_is_what_is_read(stem):
    shard = Shard(stem)
    assert len(shard) == 3
    assert shard.latent_shape == (4, 4, 4)
    np.testing.assert_array_equal(shard.latents, latents(3))
    assert isinstance(shard.latents, np.memmap)
    assert shard.metadata["vae"] == "tiny"
    for k in range(3):
        got = shard.row(k)
        np.testing.assert_allclose(np.reshape(got.boxes, (-1, 4)), np.reshape(row(k).boxes, (-1, 4)), rtol=1e-6)
        assert (got.caption, got.phrases, got.crop_left) == (row(k).caption, row(k).phrases, k)
    assert shard.rows("caption") == [{"caption": f"grass with {k} rings"} for k in range(3)]


def test_a_failed_write_leaves_nothing(stem, monkeypatch):
    monkeypatch.setattr(
        ShardWriter, "_write_rows", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_shard(stem.parent / "b", latents(1), [row(0)], METADATA)
    assert not [path for path in stem.parent.iterdir() if "partial" in path.name]
    assert not (stem.parent / "b.arrow").exists()


@pytest.mark.parametrize(
    ("values", "rows", "says"),
    [
        (latents(2), [row(0)], "2 latents but 1 rows"),
        (latents(1).astype(np.float32), [row(0)], "expected float16"),
        (np.full((1, 4, 4, 4), np.nan, np.float16), [row(0)], "row 0 hold NaN"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, values, rows, says):
    with pytest.raises(ValueError, match=says):
        write_shard(tmp_path / "x", values, rows, METADATA)
    assert not list(tmp_path.iterdir())


def test_damage_is_named(stem):
    file = stem.with_name("a.0.safetensors")
    whole = file.read_bytes()
    for broken, says in (
        (whole[:-10], "cut short"),
        (whole[:6], "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (whole.replace(b"gligen-xl-shard", b"other-xl-shard!"), "this program reads"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=says) as error:
            Shard(stem)
        assert str(file) in str(error.value)
    file.write_bytes(whole)
    table = stem.with_name("a.0.arrow")
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.0\.arrow is not a readable"):
        Shard(stem)


LATENTS = {"dtype": "F16", "shape": [3, 4, 4, 4], "data_offsets": [0, 384]}
INFORMATION = {"format": "gligen-xl-shard", "version": "2", **METADATA}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "has no latents with metadata"),
        ({"latents": LATENTS}, "has no latents with metadata"),
        ({"latents": [], "__metadata__": INFORMATION}, "has no latents with metadata"),
        ({"latents": LATENTS, "__metadata__": ["format"]}, "expected texts by name"),
        ({"latents": LATENTS, "__metadata__": INFORMATION | {"seed": 3}}, "expected texts by name"),
        ({"latents": LATENTS, "__metadata__": INFORMATION, "more": LATENTS}, "holds more beside its latents"),
        *(
            ({"latents": LATENTS, "__metadata__": INFORMATION | {name: value}}, f"says that {name} is")
            for name, value in [
                ("downsampling", "eight"), ("downsampling", "8.5"), ("downsampling", "0"), ("scaling_factor", "nan"),
                ("scaling_factor", "-1"), ("scaling_factor", ""), ("resolution", "512px"), ("shift_factor", "inf"),
            ]
        ),
        *(
            ({"latents": LATENTS | {"shape": shape}, "__metadata__": INFORMATION}, r"holds latents F16 .*; expected")
            for shape in [
                ["a", 4, 4, 4], [2**32, 2**32, 1, 1], [-1, -4, 8, 8], [3.0, 4, 4, 4], [True, 12, 4, 4], [3, 4, 16], 7,
                None, [3, 4, 4, 5], [0, 4, 0, 4], [2**70, 4, 4, 4], "3444", {"3": 4},
            ]
        ),
        *(
            ({"latents": LATENTS | {"data_offsets": offsets}, "__metadata__": INFORMATION}, "holds latents F16")
            for offsets in [[-512, 0], [384, 0], [0, 383], [0], ["0", "384"], [0.0, 384.0], None]
        ),
        ({"latents": LATENTS | {"data_offsets": [100, 484]}, "__metadata__": INFORMATION}, "cut short"),
        ({"latents": LATENTS | {"dtype": ["F16"]}, "__metadata__": INFORMATION}, "holds latents"),
    ],
)  # fmt: skip
def test_a_header_that_is_not_a_shards_is_refused_by_name(stem, header, says):
    file = stem.with_name("a.0.safetensors")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(384))
    with pytest.raises(ValueError, match=says) as error:
        Shard(stem)
    assert str(file) in str(error.value)


def test_a_header_of_brackets_is_refused(stem):
    file = stem.with_name("a.0.safetensors")
    file.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match=r"a\.0\.safetensors has no latents"):
        Shard(stem)


def test_json_is_read_as_it_was_written_whatever_the_locale(tmp_path):
    names = {"file": os.fsdecode(b"caf\xe9.jpg"), "text": "кошка \u2028 \\udce9 \U0001f408", "\udcff": ["\\\udc80"]}
    write_json(tmp_path / "a.json", names)
    assert read_json(tmp_path / "a.json") == names
    assert "кошка" in (tmp_path / "a.json").read_bytes().decode("utf-8")
    code = "import sys, locale; from gligen_xl.io import *; assert locale.getencoding() != 'utf-8'; "
    code += "write_json(sys.argv[2], read_json(sys.argv[1]))"
    words = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    subprocess.run(words, env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, check=True)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_versions_of_the_format_give_the_same_rows(stem, tmp_path):
    new = Shard(stem)
    before = [new.row(k) for k in range(3)], new.rows("image_id"), new.read_column("scores").to_pylist()
    to_version_1(stem)
    old = Shard(stem)
    assert old.table_file.name == "a.0.parquet"
    assert ([old.row(k) for k in range(3)], old.rows("image_id"), old.read_column("scores").to_pylist()) == before
    np.testing.assert_array_equal(old.latents, new.latents)
    write_shard(stem, latents(1), [row(3)], METADATA)  # takes the place of both files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.0.arrow", "a.0.safetensors"]
    file = stem.with_name("a.0.safetensors")
    file.write_bytes(file.read_bytes().replace(b'"version": "2"', b'"version": "3"'))
    with pytest.raises(ValueError, match=r"version 3; .* versions 1 and 2"):
        Shard(stem)


def test_a_table_is_read_by_pyarrow_itself(stem):
    table = read_arrow(stem.with_name("a.0.arrow"))
    assert table.schema.equals(TABLE)
    assert table["image_id"].to_pylist() == [f"picture-{k}" for k in range(3)]


def test_folders(stem, tmp_path):
    assert [shard.stem for shard in find_shards(tmp_path)] == [stem]
    stem.with_name("a.0.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks a\.0\.arrow"):
        find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_shards(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        find_shards(tmp_path / "empty")


def test_shards_cost_no_open_files_and_travel_light(stem):
    shards = [Shard(stem) for _ in range(200)]
    before = psutil.Process().num_fds()
    for shard in shards:
        shard.latents[0].sum()
    assert psutil.Process().num_fds() <= before + 2
    assert len(pickle.dumps(shards[0])) < 20_000 + shards[0]._table.nbytes


def test_a_row_that_cannot_be_trained_on_is_named(tmp_path):
    good, pixels = row(2), replace(row(2), boxes=[(0.1, 0.1, 0.5, 0.5), (10.0, 20.0, 30.0, 40.0)])
    with pytest.raises(
        ValueError, match=r"row 1 .*boxes\[1\] is \[10\.0, 20\.0, 30\.0, 40\.0\], which look like percent"
    ):
        write_shard(tmp_path / "a", latents(2), [good, pixels], METADATA)
    with pytest.raises(ValueError, match=r"row 0 .*1 scores but 2 boxes"):
        write_shard(tmp_path / "a", latents(2), [replace(good, scores=[0.5]), good], METADATA)
    assert not list(tmp_path.iterdir())
    write_shard(tmp_path / "a", latents(2), [good, good], METADATA)
    table = read_arrow(tmp_path / "a.arrow").to_pydict()
    table["phrases"][1] = ["a dog"]  # somebody else's writer
    write_arrow(tmp_path / "a.arrow", pa.table(table, schema=TABLE))
    with pytest.raises(ValueError, match=r"a\.arrow: row 1 has unlike numbers"):
        Shard(tmp_path / "a")


# Written batch by batch ---------------------------------------------------------------------------------------------

ENDINGS = (".safetensors", ".arrow")


def contents(stem):
    return [stem.with_name(stem.name + ending).read_bytes() for ending in ENDINGS]


MANY = BATCH_ROWS + 300
MANY_LATENTS, MANY_ROWS = latents(MANY, side=1), [row(k % 3, image_id=f"{k}") for k in range(MANY)]


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    stem = tmp_path_factory.mktemp("undivided") / "a"
    write_shard(stem, MANY_LATENTS, MANY_ROWS, METADATA)
    return contents(stem)


@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, MANY - 1), max_size=6))
def test_batches_make_the_files_of_the_whole(tmp_path_factory, undivided, cuts):
    stem = tmp_path_factory.mktemp("batches") / "a"
    metadata = dict(reversed(METADATA.items()))
    edges = [0, *sorted(cuts), MANY]
    with ShardWriter(stem, (4, 1, 1), metadata) as writer:
        for begin, end in pairwise(edges):
            writer.add(MANY_LATENTS[begin:end], MANY_ROWS[begin:end])
    assert writer.count == MANY
    assert contents(stem) == undivided
    assert contents(stem)[1].count(b"ARROW1") == 2  # at the begin and at the end


def test_a_grown_shard_is_read_by_safetensors_itself(tmp_path):
    values = latents(5)
    with ShardWriter(tmp_path / "a", (4, 4, 4), METADATA) as writer:
        for k in range(5):
            writer.add(values[k : k + 1], [row(k)])
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert list(file.keys()) == ["latents"]
        assert np.array_equal(file.get_tensor("latents"), values)
        assert file.metadata() == {"format": "gligen-xl-shard", "version": "2", **METADATA}
    assert (8 + int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")) % 64 == 0
    assert Shard(tmp_path / "a").row(3).image_id == "picture-3"


def test_a_shard_of_no_images_can_be_read(tmp_path):
    with ShardWriter(tmp_path / "a", (4, 4, 4), METADATA):
        pass
    shard = Shard(tmp_path / "a")
    assert (len(shard), shard.latent_shape, shard.rows("caption")) == (0, (4, 4, 4), [])


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, Interrupted])
def test_until_it_is_whole_the_former_shard_stays(stem, kind):
    before = contents(stem)
    with pytest.raises(kind), ShardWriter(stem, (4, 4, 4), METADATA) as writer:
        writer.add(latents(1), [row(1)])
        assert contents(stem) == before
        raise kind
    assert contents(stem) == before
    assert len(list(stem.parent.iterdir())) == 2
    with ShardWriter(stem, (4, 4, 4), METADATA) as writer:
        writer.add(latents(1), [row(1)])
    assert len(Shard(stem)) == 1


def test_a_row_of_a_later_batch_is_named_by_its_place_in_the_shard(tmp_path):
    bad = latents(2)
    bad[1, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="row 4 hold NaN"), ShardWriter(tmp_path / "a", (4, 4, 4), METADATA) as writer:
        writer.add(latents(3), [row(1)] * 3)
        writer.add(bad, [row(1)] * 2)
    wide = replace(row(1), boxes=[(10.0, 20.0, 30.0, 40.0)])
    with pytest.raises(ValueError, match=r"row 3 .*pixels"), ShardWriter(tmp_path / "a", (4, 4, 4), METADATA) as writer:
        writer.add(latents(3), [row(1)] * 3)
        writer.add(latents(1), [wide])
    expected = r"expected float16 \(N, 4, 4, 4\)"
    with pytest.raises(ValueError, match=expected), ShardWriter(tmp_path / "a", (4, 4, 4), METADATA) as writer:
        writer.add(latents(1, side=8), [row(1)])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_nothing(tmp_path, ending):
    (tmp_path / f".a{ending}.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path / "a", (4, 4, 4), METADATA) as writer:
        writer.add(latents(1), [row(1)])
    assert not list(tmp_path.iterdir())


def test_a_writer_needs_no_more_memory_for_more_images(tmp_path):
    batch, batch_rows = latents(64, side=16), [row(k % 4) for k in range(64)]
    peaks = []
    for count in (40, 160):  # batches: 5 and 20 MB
        tracemalloc.start()
        with ShardWriter(tmp_path / f"{count}", (4, 16, 16), METADATA) as writer:
            arrow = pa.total_allocated_bytes()
            for _ in range(count):
                writer.add(batch, batch_rows)
            assert pa.total_allocated_bytes() - arrow < 1e6
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000
