"""The published `.npy` files: read without running their pickles, and made into shards that give the same samples."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gligen_xl.cli import main
from gligen_xl.data.batch import Augmentation, ShardDataset
from gligen_xl.data.check import check_shards
from gligen_xl.data.published import read_boxes, read_latents
from gligen_xl.data.shards import Shard, find_shards
from gligen_xl.prepare.imports import import_published

SIDE = 8  # latents


def write_object(path, value, numpy="numpy._core"):
    """As `np.save` does it; with the module names of numpy 1 where asked."""
    array = value if isinstance(value, np.ndarray) else np.empty((), object)
    if not isinstance(value, np.ndarray):
        array[()] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)
    if numpy == "numpy.core":
        header, _, body = path.read_bytes().partition(b"\n")
        import io

        stream = io.BytesIO()
        pickle.dump(array, stream, protocol=2)
        body = stream.getvalue().replace(b"numpy._core", b"numpy.core")
        path.write_bytes(header + b"\n" + body)
    return path


def made_latents(indices, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(indices), 4, SIDE, SIDE)).astype(np.float16)


def made_table(indices, columns=6, seed=0, torch_tensors=False):
    rng = np.random.default_rng(seed)
    table = np.empty((len(indices), columns), object)
    for k, index in enumerate(indices):
        n = int(rng.integers(0, 5))
        boxes = np.concatenate([rng.uniform(0.3, 0.7, (n, 2)), rng.uniform(0.1, 0.5, (n, 2))], -1).astype(np.float16)
        scores = rng.uniform(0.2, 0.9, n).astype(np.float16)
        if torch_tensors:
            boxes, scores = torch.from_numpy(boxes), torch.from_numpy(scores)
        row = [int(index), f"a picture of {index}.", boxes, scores, [f"thing {j}" for j in range(n)]]
        if columns == 6:
            row.append((int(rng.integers(1500, 2300)), int(rng.integers(1500, 2300))))
        for j, value in enumerate(row):
            table[k, j] = value
    return table


@pytest.fixture
def published(tmp_path):
    """Two archives, whose latents and boxes each lack some pictures of the other."""
    known = {}
    for number, name in enumerate(("sa_000000", "sa_000001")):
        indices = list(range(100 * number, 100 * number + 12))
        latents, table = made_latents(indices[:-1], number), made_table(indices[2:], 6, number)
        write_object(tmp_path / "latents" / f"{name}.npy", {"indices": indices[:-1], "latents": latents})
        write_object(tmp_path / "boxes" / f"{name}.npy", table)
        known[name] = (indices[:-1], latents, table)
    return tmp_path, known


@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("torch_tensors", [False, True])
@pytest.mark.parametrize("columns", [5, 6])
def test_every_spelling_gives_the_same_arrays(tmp_path, numpy, torch_tensors, columns):
    indices = [3, 5, 8]
    latents, table = made_latents(indices), made_table(indices, columns, torch_tensors=torch_tensors)
    stored = torch.from_numpy(latents) if torch_tensors else latents
    content = read_latents(write_object(tmp_path / "l.npy", {"indices": indices, "latents": stored}, numpy))
    assert content.indices.tolist() == indices
    assert content.latents.dtype == np.float16
    assert np.array_equal(content.latents, latents)
    rows = read_boxes(write_object(tmp_path / "b.npy", table, numpy))
    for row, given in zip(rows, table.tolist(), strict=True):
        assert (row.index, row.caption, row.phrases) == (given[0], given[1], given[4])
        centres, sizes = (np.asarray(given[2], np.float32)[:, part] for part in (slice(0, 2), slice(2, 4)))
        np.testing.assert_allclose(row.boxes, np.concatenate([centres - sizes / 2, centres + sizes / 2], -1), atol=1e-6)
        assert row.original_size == (given[5] if columns == 6 else None)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_that_a_file_asks_for_is_run(tmp_path):
    table = made_table([1])
    table[0, 1] = Runs(tmp_path / "ran")
    with pytest.raises(ValueError, match=r"b\.npy asks for (io|_io)\.open, .*; nothing of it was run"):
        read_boxes(write_object(tmp_path / "b.npy", table))
    with pytest.raises(ValueError, match=r"l\.npy asks for .*open"):
        read_latents(write_object(tmp_path / "l.npy", {"indices": [1], "latents": Runs(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()


def test_hostile_pickles_are_refused(tmp_path):
    """Each uses a name that is allowed, in a way that is not."""
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    hostile = {
        "class": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntC\x01btR.",
        "memory": b"cnumpy\nndarray\n((I99999999999\nttR.",
        "codec": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        "storage": b"ctorch.storage\n_load_from_bytes\n(C\x10cos\nsystem\n(Vls\ntR.",
        "global": b"cos\nsystem\n(Vls\ntR.",
        "short": b"cnumpy._core.mult",
        "nothing": b"",
        "number": b"I3\n.",
    }
    for name, body in hostile.items():
        (tmp_path / f"{name}.npy").write_bytes(header + body)
        with pytest.raises(ValueError, match=f"{name}.npy"):
            read_latents(tmp_path / f"{name}.npy")


def test_what_is_no_such_file_says_what_it_is(tmp_path):
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "text.npy").write_text("no array")
    indices = [1, 2]
    wrong = {
        "shape": {"indices": indices, "latents": np.zeros((2, 3, 8, 8), np.float16)},
        "count": {"indices": [1], "latents": made_latents(indices)},
        "twice": {"indices": [1, 1], "latents": made_latents(indices)},
        "names": {"latents": made_latents(indices)},
    }
    for name, value in wrong.items():
        write_object(tmp_path / f"{name}.npy", value)
    for name, says in {
        "plain": "expected objects", "text": "is not a .npy file", "shape": "expected float16", "count": "indices",
        "twice": "stands in it twice", "names": "lacks \\['indices'\\]",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=says):
            read_latents(tmp_path / f"{name}.npy")
    table = made_table([1, 2], seed=3)
    table[1, 3] = np.zeros(40, np.float16)
    with pytest.raises(ValueError, match=r"row 1: .* 40 scores"):
        read_boxes(write_object(tmp_path / "rows.npy", table))
    with pytest.raises(ValueError, match="five or six columns"):
        read_boxes(write_object(tmp_path / "four.npy", table[:, :4]))


def test_imported_shards_give_the_samples_of_the_published_loader(published):
    root, known = published
    report = import_published(root / "latents", root / "boxes", root / "shards")
    assert report.archives == {"sa_000000": "written", "sa_000001": "written"}
    assert (report.pictures, report.without_size) == (18, 0)
    assert report.skipped == {"no row in the table of boxes": 4, "no latents for a row of boxes": 2}
    assert not check_shards(root / "shards").problems
    dataset = ShardDataset(root / "shards", Augmentation(drop_grounding=0, drop_caption=0, min_score=0.25), seed=0)
    for number in range(len(dataset)):
        sample = dataset[number, 0]
        shard, place = dataset.find(number)
        indices, latents, table = known[shard.stem.name]
        index = int(shard.row(place).image_id.removeprefix("sa_"))
        (given,) = [row for row in table.tolist() if row[0] == index]
        assert np.array_equal(sample.latents, latents[indices.index(index)].astype(np.float32))
        assert sample.caption == given[1]
        scores = given[3].astype(np.float32)  # the loader's way: above the confidence, best first, corners
        best = [k for k in np.argsort(-scores, kind="stable") if scores[k] > 0.25]
        boxes = given[2].astype(np.float32)
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
        np.testing.assert_allclose(sample.boxes, corners[best].clip(0, 1), atol=1e-6)
        assert sample.phrases == [given[4][k] for k in best]
        height, width = given[5]
        assert sample.size[:2] == (height, width)
        long = int(64 * max(height, width) / min(height, width))
        crop = (round((long - 64) / 2), 0) if height > width else (0, round((long - 64) / 2))
        assert sample.size[2:] == (*crop, 64, 64)


def test_sizes_come_from_another_table_or_are_those_of_the_latents(tmp_path):
    indices = [1, 2, 3]
    write_object(tmp_path / "latents" / "sa_0.npy", {"indices": indices, "latents": made_latents(indices)})
    write_object(tmp_path / "five" / "sa_0.npy", made_table(indices, 5))
    write_object(tmp_path / "six" / "sa_0.npy", made_table(indices[:2], 6))
    report = import_published(tmp_path / "latents", tmp_path / "five", tmp_path / "a", sizes=tmp_path / "six")
    assert report.without_size == 1
    rows = [Shard(tmp_path / "a" / "sa_0").row(k) for k in range(3)]
    assert [(row.original_height > 64, row.original_height == 64) for row in rows][2] == (False, True)
    assert rows[0].original_height == made_table(indices[:2], 6)[0, 5][0]
    assert import_published(tmp_path / "latents", tmp_path / "five", tmp_path / "b").without_size == 3


def test_a_failed_archive_is_reported_and_tried_again(published):
    root, _ = published
    whole = (root / "boxes" / "sa_000001.npy").read_bytes()
    (root / "boxes" / "sa_000001.npy").write_bytes(whole[: len(whole) // 2])
    write_object(root / "latents" / "sa_000002.npy", {"indices": [1], "latents": made_latents([1])})
    report = import_published(root / "latents", root / "boxes", root / "shards")
    assert report.archives["sa_000000"] == "written"
    assert "damaged" in report.archives["sa_000001"]
    assert "there is no table of boxes" in report.archives["sa_000002"]
    assert [shard.stem.name for shard in find_shards(root / "shards")] == ["sa_000000"]
    (root / "boxes" / "sa_000001.npy").write_bytes(whole)
    again = import_published(root / "latents", root / "boxes", root / "shards")
    assert (again.archives["sa_000000"], again.archives["sa_000001"]) == ("already there", "written")
    assert json.loads((root / "shards" / "import.json").read_text())["pictures"] == again.pictures == 18


def test_killed_and_run_again_the_shards_are_the_same(published, tmp_path_factory):
    root, _ = published
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    import_published(root / "latents", root / "boxes", undisturbed)
    code = "import sys; from gligen_xl.prepare.imports import import_published as go; print('on', flush=True); "
    code += "[go(*sys.argv[1:3], sys.argv[3]) for _ in range(1)]"
    words = [sys.executable, "-c", code, str(root / "latents"), str(root / "boxes"), str(root / "shards")]
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    import_published(root / "latents", root / "boxes", root / "shards")
    for file in sorted(undisturbed.iterdir()):
        if file.suffix in (".safetensors", ".parquet"):
            assert (root / "shards" / file.name).read_bytes() == file.read_bytes()


def test_the_import_command_says_what_it_did_and_fails_where_it_failed(published, capsys):
    root, _ = published
    words = ["import", str(root / "latents"), str(root / "boxes"), "--out", str(root / "shards")]
    assert main(words) == 0
    assert "18 pictures" in capsys.readouterr().out
    (root / "latents" / "sa_000003.npy").write_bytes(b"nothing")
    assert main(words) == 2
    output = capsys.readouterr()
    assert "failed: sa_000003" in output.out
    assert "not every archive" in output.err
    assert main(["import", str(root / "nowhere"), str(root / "boxes"), "--out", str(root / "x")]) == 2
    assert "is not a folder of .npy files" in capsys.readouterr().err
