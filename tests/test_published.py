"""The published `.npy` files: read without running their pickles, and made into shards that give the same samples."""

import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from filelock import FileLock

from gligen_xl.cli.main import main
from gligen_xl.contrib.sa1b.convert import LOCK_FOLDER, import_published
from gligen_xl.contrib.sa1b.object_array import read_object_array
from gligen_xl.contrib.sa1b.published import read_boxes, read_latents
from gligen_xl.data.check import check_shards
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Shard, find_shards

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
        row = [int(index), f"an image of {index}.", boxes, scores, [f"thing {j}" for j in range(n)]]
        if columns == 6:
            row.append((int(rng.integers(1500, 2300)), int(rng.integers(1500, 2300))))
        for j, value in enumerate(row):
            table[k, j] = value
    return table


@pytest.fixture
def published(tmp_path):
    """Two archives, whose latents and boxes each lack some images of the other."""
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


# Pickles that are put together by hand --------------------------------------------------------------------------------


def spelled(value):
    """The instructions of protocol 2 that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def spelled_dtype(kind, subarray=None, names=None, fields=None, size=-1, flags=0):
    made = named("numpy", "dtype") + b"(" + spelled(kind) + b"K\x00K\x01tR"
    state = [b"K\x03", spelled("|"), spelled(subarray), names or b"N", fields or b"N", spelled(size), spelled(1)]
    return made + b"(" + b"".join(state) + spelled(flags) + b"tb"


OBJECT = spelled_dtype("O8", flags=63)
# Eight bytes that hold a reference to an object, by a type that says it does not.
DISGUISED = spelled_dtype("V8", names=spelled(("a",)), fields=b"}" + spelled("a") + OBJECT + b"K\x00\x86s", size=8)


def spelled_array(shape, dtype, data):
    made = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    return made + b"(K\x01" + spelled(shape) + dtype + b"\x89" + data + b"tb"


def npy(body, shape=()):
    header = f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x80\x02" + body + b"."


def table_with(boxes):
    """One row, whose boxes are given by their instructions."""
    row = b"](" + b"K\x07" + spelled("a dog.") + boxes + spelled([0.5]) + spelled(["dog"]) + b"e"
    return npy(spelled_array((1, 5), OBJECT, row), (1, 5))


def tensor_of(offset, size, stride):
    """Of a storage of six numbers."""
    storage = io.BytesIO()
    torch.save(torch.arange(6.0)._typed_storage(), storage, _use_new_zipfile_serialization=False)
    made = named("torch._utils", "_rebuild_tensor_v2") + b"(" + named("torch.storage", "_load_from_bytes")
    made += pickle.dumps(storage.getvalue(), 3)[2:-1] + b"\x85R" + spelled(offset) + spelled(size) + spelled(stride)
    return made + b"\x89" + named("collections", "OrderedDict") + b")RtR"


POINTERS = b"B" + struct.pack("<I", 32) + struct.pack("<Q", 0xDEAD00) * 4
LAUGHS = b"(" * 12 + b"]q\x01" + (b"h\x01" * 99 + b"tq\x01") * 12  # 100 ** 12 lists, if each is looked at
MEGABYTE = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)

HOSTILE = {
    "disguise": table_with(spelled_array((4,), DISGUISED, POINTERS)),
    "bomb": npy(spelled_array((200_000_000,), OBJECT, b"]")),
    "short": npy(spelled_array((1000,), OBJECT, spelled([1, 2]))),
    "bytes": table_with(spelled_array((100, 4), spelled_dtype("f2"), b"C\x04abcd")),
    "negative": table_with(spelled_array((-1, -1), spelled_dtype("f2"), b"C\x02ab")),
    "overflow": table_with(spelled_array((2**32, 2**32), spelled_dtype("f2"), b"C\x00")),
    "subarray": table_with(spelled_array((1,), spelled_dtype("f2", subarray=("f2", (4,))), b"C\x02ab")),
    "nothing wide": table_with(spelled_array((10**12,), spelled_dtype("S0"), b"C\x00")),
    "scalar": table_with(named("numpy._core.multiarray", "scalar") + OBJECT + b"C\x08abcdefgh\x86R"),
    "header": npy(spelled_array((), OBJECT, spelled([{}])), (10**9,)),
    "cycle": npy(spelled_array((), OBJECT, b"](]q\x01h\x01ae")),
    "deep": npy(spelled_array((), OBJECT, b"](" + b"(" * 50_000 + b"l" * 50_000 + b"e")),
    "deep key": npy(spelled_array((), OBJECT, b"](})" + b"\x85" * 200_000 + b"K\x01se")),
    "deep shape": npy(spelled_array((), OBJECT, b"]").replace(b")", b")" + b"\x85" * 100_000, 1)),
    "laughs": table_with(LAUGHS),
    "laughing shape": npy(named("numpy", "dtype") + LAUGHS + b"\x85R"),
    "memo": npy(spelled_array((), OBJECT, b"](K\x01r\xff\xff\xff\x7fe")),
    "copies": npy(MEGABYTE + b"q\x01" + (named("_codecs", "encode") + b"h\x01X\x06\x00\x00\x00latin1\x86R") * 1000),
    "setstate of a function": npy(named("_codecs", "encode") + b"N}" + spelled("__defaults__") + b"Ns\x86b"),
    "setstate of a list": npy(b"]}" + spelled("__class__") + b"Nsb"),
    "tensor beyond": table_with(tensor_of(0, (100, 4), (4, 1))),
    "tensor before": table_with(tensor_of(-4, (1, 4), (4, 1))),
    "tensor backwards": table_with(tensor_of(4, (1, 4), (4, -1))),
    "tensor around": table_with(tensor_of(0, (5, 4), (2**62, 1))),
    "tensor repeated": table_with(tensor_of(0, (10**9, 4), (0, 1))),
}

# Reads files with both readers: each ends in a result or in a ValueError, in little memory. Apart, for it may crash.
READ = """
import resource, sys
from pathlib import Path
import numpy as np
from gligen_xl.contrib.sa1b.published import read_boxes, read_latents
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
before, good = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
for path in sorted(folder.glob("*.npy")):
    whole = path.read_bytes()
    for number in range(rounds or 1):
        content = bytearray(whole)
        if rounds and number % 4 == 0:
            del content[int(rng.integers(len(content))):]
        elif rounds:
            for place in rng.integers(len(content), size=int(rng.integers(1, 4))):
                content[place] = int(rng.integers(256))
        (folder / "tried").write_bytes(content)
        for read in (read_boxes, read_latents):
            try:
                read(folder / "tried")
                good += 1
            except ValueError as error:
                assert "tried" in str(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
assert grown < 300, f"{grown} MiB"
print(good)
"""


def read_apart(folder, rounds=0):
    """How many readings gave something."""
    words = [sys.executable, "-W", "ignore", "-c", READ, str(folder), str(rounds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, preexec_fn=_without_core_dump)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return int(done.stdout)


def _without_core_dump():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def test_no_file_makes_numpy_or_torch_follow_it_out_of_its_bytes(tmp_path):
    for name, content in HOSTILE.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    assert read_apart(tmp_path) == 0


def test_by_hand_as_numpy_and_torch_do_it(tmp_path):
    """What the hostile files are put together with makes good ones too."""
    values = np.array([[0.5, 0.5, 0.25, 0.25]], np.float16)
    for boxes in (
        spelled_array((1, 4), spelled_dtype("f2"), b"C\x08" + values.tobytes()),
        tensor_of(1, (1, 4), (4, 1)),
    ):
        (tmp_path / "b.npy").write_bytes(table_with(boxes))
        (row,) = read_boxes(tmp_path / "b.npy")
        expected = [[0.375, 0.375, 0.625, 0.625]] if b"torch" not in boxes else [[-0.5, 0.0, 2.5, 4.0]]
        assert row.boxes.tolist() == expected


@pytest.mark.parametrize("torch_tensors", [False, True])
def test_damaged_files_are_read_or_refused(tmp_path, torch_tensors):
    for number, numpy in enumerate(("numpy._core", "numpy.core")):
        latents = made_latents([1, 2])[:, :, :2, :2].copy()
        latents = torch.from_numpy(latents) if torch_tensors else latents
        write_object(tmp_path / f"l{number}.npy", {"indices": [1, 2], "latents": latents}, numpy)
        write_object(tmp_path / f"b{number}.npy", made_table([1, 2, 3], torch_tensors=torch_tensors), numpy)
    assert 0 < read_apart(tmp_path, rounds=200) < 800


def test_arrays_of_every_order_and_type_are_as_numpy_reads_them(tmp_path):
    grid = np.arange(6).reshape(2, 3)
    values = [
        np.asfortranarray(grid), grid.T, grid.astype(">i4"), grid.astype("<u2"), grid > 2, np.float32(3), np.int64(7),
        np.array(["a", "bc"]), np.array([b"a", b"bc"]), np.zeros((0, 4), np.float16), np.str_("x"), np.str_(""),
        (1, 2.5, None), np.bool_(True), np.array([1, "a", None], object), np.float16([[1, 2], [3, 4]])[:, 1],
    ]  # fmt: skip
    table = np.empty((len(values), 2), object)
    for k, value in enumerate(values):
        table[k] = [value, k]
    for array in (table, np.asfortranarray(table)):
        for numpy in ("numpy._core", "numpy.core"):
            read = read_object_array(write_object(tmp_path / "a.npy", array, numpy))
            for got, expected in zip(read[:, 0], values, strict=True):
                assert type(got) is type(expected)
                np.testing.assert_array_equal(got, expected)
                assert getattr(got, "dtype", None) == getattr(expected, "dtype", None)
            assert read[:, 1].tolist() == list(range(len(values)))


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
    assert (report.images, report.without_size) == (18, 0)
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
    assert json.loads((root / "shards" / "import.json").read_text())["pictures"] == again.images == 18


def test_killed_and_run_again_the_shards_are_the_same(published, tmp_path_factory):
    root, _ = published
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    import_published(root / "latents", root / "boxes", undisturbed)
    code = "import sys; from gligen_xl.contrib.sa1b.convert import import_published as go; print('on', flush=True); "
    code += "[go(*sys.argv[1:3], sys.argv[3]) for _ in range(1)]"
    words = [sys.executable, "-c", code, str(root / "latents"), str(root / "boxes"), str(root / "shards")]
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    for name in ("sa_000000.safetensors", "sa_000001.arrow", "import.json"):  # wherever the kills came
        (root / "shards").mkdir(exist_ok=True)
        (root / "shards" / f".{name}.12345.partial").write_bytes(b"a rest")
    import_published(root / "latents", root / "boxes", root / "shards")
    names = {path.name for path in undisturbed.iterdir()}
    assert {path.name for path in (root / "shards").iterdir()} == names
    for name in names - {"import.json", LOCK_FOLDER}:
        assert (root / "shards" / name).read_bytes() == (undisturbed / name).read_bytes()


def test_what_stands_there_is_kept_only_if_it_was_made_of_the_same_files(tmp_path):
    indices = [1, 2, 3]
    write_object(tmp_path / "latents" / "sa_0.npy", {"indices": indices, "latents": made_latents(indices)})
    write_object(tmp_path / "five" / "sa_0.npy", made_table(indices, 5))
    write_object(tmp_path / "six" / "sa_0.npy", made_table(indices[:2], 6))

    def go(latents="latents", boxes="five", sizes=None):
        sizes = tmp_path / sizes if sizes else None
        report = import_published(tmp_path / latents, tmp_path / boxes, tmp_path / "out", sizes=sizes)
        return report.archives["sa_0"], report.without_size

    assert go() == ("written", 3)
    before = (tmp_path / "out" / "sa_0.safetensors").read_bytes()
    os.utime(tmp_path / "latents" / "sa_0.npy", (0, 0))
    assert go() == ("already there", 3)
    assert go(sizes="six") == ("written", 1)
    assert go(sizes="six") == ("already there", 1)
    assert Shard(tmp_path / "out" / "sa_0").row(0).original_height == made_table(indices[:2], 6)[0, 5][0]
    assert go() == ("written", 3)
    assert (tmp_path / "out" / "sa_0.safetensors").read_bytes() == before
    write_object(tmp_path / "others" / "sa_0.npy", {"indices": indices, "latents": made_latents(indices, seed=1)})
    assert go("others") == ("written", 3)  # a file of as many bytes
    np.testing.assert_array_equal(Shard(tmp_path / "out" / "sa_0").latents, made_latents(indices, seed=1))
    (tmp_path / "out" / "sa_0.arrow").unlink()  # killed between the two
    assert go("others") == ("written", 3)
    wide = np.zeros((3, 4, 2 * SIDE, 2 * SIDE), np.float16)
    write_object(tmp_path / "wide" / "sa_0.npy", {"indices": indices, "latents": wide})
    what, _ = go("wide")
    assert "has latents of 64 pixels" in what
    assert "those of 128; choose another folder" in what


def test_a_shard_that_was_not_imported_is_not_written_over(published):
    root, _ = published
    import_published(root / "latents", root / "boxes", root / "shards")
    shard = Shard(root / "shards" / "sa_000000")
    row, prepared = shard.row(0), {"resolution": "64", "vae": "x", "scaling_factor": "1", "prepared": "abc"}
    write_shard(shard.stem, np.array(shard.latents[:1]), [row], prepared)
    (root / "shards" / "sa_000001.safetensors").unlink()
    report = import_published(root / "latents", root / "boxes", root / "shards")
    for name in ("sa_000000", "sa_000001"):
        assert f"{name} stands there, not imported; remove it" in report.archives[name]
    assert len(Shard(shard.stem)) == 1


def test_two_imports_at_once_share_the_archives(published):
    root, _ = published
    folders = [str(root / name) for name in ("latents", "boxes", "shards")]
    (root / "shards" / LOCK_FOLDER).mkdir(parents=True)
    with ThreadPoolExecutor() as pool, FileLock(root / "shards" / LOCK_FOLDER / "sa_000000.lock"):
        other = pool.submit(import_published, *folders)
        while not (other.done() or (root / "shards" / "sa_000001.arrow").exists()):
            time.sleep(0.01)
        assert not other.done()
        assert not (root / "shards" / "sa_000000.arrow").exists()
        _archive_by_somebody_else(root)
    assert other.result().archives == {"sa_000000": "already there", "sa_000001": "written"}
    assert other.result().images == 18


def _archive_by_somebody_else(root):
    import_published(root / "latents", root / "boxes", root / "elsewhere")
    for ending in (".safetensors", ".arrow"):
        (root / "elsewhere" / f"sa_000000{ending}").rename(root / "shards" / f"sa_000000{ending}")


def test_the_import_command_says_what_it_did_and_fails_where_it_failed(published, capsys):
    root, _ = published
    words = ["import", str(root / "latents"), str(root / "boxes"), "--out", str(root / "shards")]
    assert main(words) == 0
    assert "18 images" in capsys.readouterr().out
    (root / "latents" / "sa_000003.npy").write_bytes(b"nothing")
    assert main(words) == 2
    output = capsys.readouterr()
    assert "failed: sa_000003" in output.out
    assert "not every archive" in output.err
    assert main(["import", str(root / "nowhere"), str(root / "boxes"), "--out", str(root / "x")]) == 2
    assert "is not a folder of .npy files" in capsys.readouterr().err
