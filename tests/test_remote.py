"""Shards from elsewhere, through a cache: never more than its size, however the storage behaves, whoever shares it."""

import json
import multiprocessing
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from helpers.flat import flat
from helpers.rows import METADATA, latents, row

from gligen_xl.data import streaming
from gligen_xl.data.cache import BoundedCache
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.loader import batches
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Shard
from gligen_xl.data.streaming import open_remote

pytestmark = pytest.mark.usefixtures("nothing_hangs")

COUNT, SIDE = 20, 8
SHARD = COUNT * 4 * SIDE * SIDE * 2  # bytes of latents


class Store(LocalFileSystem):
    """The disk as a storage far away, that fails, cuts short and is slow as it is told. What is read is noted."""

    protocol = "store"
    notes: Path  # one line for each piece that is read, by any process
    failures = 0  # of the next reads
    delay = 0.0  # seconds a read

    def open(self, path, mode="rb", **options):
        return Piece(super().open(path, mode), path)


class Piece:
    def __init__(self, file, path):
        self.file, self.path = file, path

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def seek(self, place):
        self.file.seek(place)

    def read(self, size):
        if Store.failures:
            Store.failures -= 1
            raise ConnectionResetError("connection reset by peer")
        time.sleep(Store.delay)
        data = self.file.read(min(size, 3000))
        with Store.notes.open("a") as notes:
            notes.write(json.dumps([Path(self.path).name, len(data)]) + "\n")
        return data


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Six shards far away, and a cache of its own."""
    monkeypatch.setenv("GLIGEN_XL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streaming, "PAUSES", (0.01, 0.01))
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setattr(Store, "notes", tmp_path / "notes", raising=False)
    monkeypatch.setattr(Store, "failures", 0)
    monkeypatch.setattr(Store, "delay", 0.0)
    for k in range(6):
        rows = [row(j % 3, image_id=f"{k}-{j}", caption=f"image {k}-{j}") for j in range(COUNT)]
        values = np.random.default_rng(k).normal(size=(COUNT, 4, SIDE, SIDE)).astype(np.float16)
        write_shard(tmp_path / "far" / f"s{k}", values, rows, METADATA)
    return f"store://{tmp_path}/far"


def read_bytes(tmp_path, ending=".safetensors"):
    """Bytes read by file name."""
    totals: dict[str, int] = {}
    for line in (tmp_path / "notes").read_text().splitlines():
        name, size = json.loads(line)
        totals[name] = totals.get(name, 0) + size
    return {name: size for name, size in totals.items() if name.endswith(ending)}


def cached(tmp_path):
    return list((tmp_path / "cache" / "shards").rglob("*.safetensors"))


ROOMY = 1_000_000


def test_what_comes_is_what_stands_there(store, tmp_path):
    here = ShardDataset(tmp_path / "far", Augmentation(slots=3), 1)
    there = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)
    assert not cached(tmp_path)  # latents are fetched when they are wanted
    assert there.groups == here.groups
    got = flat(batches(there, there.order(8, 2, windows=[None]), start=0, stop=120))
    assert got == flat(batches(here, here.order(8, 2), start=0, stop=120))
    assert len(cached(tmp_path)) == 6
    np.testing.assert_array_equal(there.shards[3].latents, Shard(tmp_path / "far" / "s3").latents)


def test_the_second_time_nothing_is_fetched(store, tmp_path):
    def read():
        dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)
        dataset.batch([(k, k) for k in range(0, 120, 7)])
        return (tmp_path / "notes").read_text()

    assert read() == read()
    write_shard(tmp_path / "far" / "s2", latents(COUNT, SIDE), [row(1)] * COUNT, METADATA)  # but a changed file
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)
    np.testing.assert_array_equal(dataset[40, 0].latents, latents(COUNT, SIDE)[0])


@pytest.mark.parametrize("ending", ["safetensors", "arrow", "header"])
@pytest.mark.parametrize("how", ["flipped", "shorter", "empty"])
def test_a_damaged_file_of_the_cache_is_fetched_again(store, tmp_path, ending, how):
    """Not only its own bytes are looked at: nothing of it is trained on."""

    def read():
        dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)
        return [(dataset[k, k].latents.tobytes(), dataset.row(k)) for k in range(120)]

    expected = read()
    for file in (tmp_path / "cache" / "shards").rglob(f"*.{ending}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes({"flipped": content, "shorter": content[:-9], "empty": b""}[how])
    assert read() == expected


class Nameless(Store):
    """A storage that says of its files no more than their size, as the listing of a web server does."""

    protocol = "nameless"

    def ls(self, path, detail=False, **options):
        return [self.info(entry["name"]) for entry in super().ls(path, detail=True, **options)]

    def info(self, path, **options):
        facts = super().info(path, **options)
        return {name: facts[name] for name in ("name", "size", "type")}


def test_another_file_of_the_same_size_is_fetched_though_nothing_names_it(store, tmp_path):
    fsspec.register_implementation("nameless", Nameless, clobber=True)
    url = store.replace("store://", "nameless://")

    def first():
        return np.array(ShardDataset(url, Augmentation(slots=3), 1, cache_bytes=ROOMY)[40, 0].latents)

    before = first()
    file = tmp_path / "far" / "s2.safetensors"
    status = file.stat()
    changed = np.random.default_rng(99).normal(size=(COUNT, 4, SIDE, SIDE)).astype(np.float16)
    rows = [row(j % 3, image_id=f"2-{j}", caption=f"image 2-{j}") for j in range(COUNT)]
    write_shard(file.with_suffix(""), changed, rows, METADATA)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    np.testing.assert_array_equal(first(), changed[0])
    assert not np.array_equal(before, changed[0])


def test_the_cache_is_named_by_whole_checksums_and_by_no_key(store, tmp_path):
    url = store.replace("store://", "store://KEY:HUNTER2@")
    ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)[0, 0]
    for path in (tmp_path / "cache" / "shards").rglob("*.*"):
        if path.suffix in (".arrow", ".header", ".safetensors"):
            assert re.search(r"\.[0-9a-f]{64}\.(arrow|header|safetensors)$", path.name), path
            assert re.search(r"-[0-9a-f]{64}$", path.parent.name), path
    with pytest.raises((OSError, ValueError)) as raised:
        open_remote(url, ROOMY)
    assert "HUNTER2" not in str(raised.value)
    assert not any("HUNTER2" in str(path) or "KEY" in path.name for path in (tmp_path / "cache").rglob("*"))


def test_the_cache_never_exceeds_its_size(store, tmp_path):
    limit = 5 * SHARD // 2 + 2000
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=limit)
    here = ShardDataset(tmp_path / "far", Augmentation(slots=3), 1)
    assert dataset.windows() == [1]  # half of the cache
    most, stopped = [0], threading.Event()

    def watch():
        shards = tmp_path / "cache" / "shards"
        while not stopped.is_set():
            sizes = {}
            with FileLock(shards / ".room.lock"):  # none comes and none goes while we count
                for path in (*shards.rglob(".*.partial"), *shards.rglob("*.safetensors")):
                    with suppress(FileNotFoundError):
                        sizes[path.name.removeprefix(".").removesuffix(".partial")] = path.stat().st_size
            most.append(sum(sizes.values()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    order = dataset.order(8, 2, windows=[3])  # more than fits: slower, not wrong
    got = flat(batches(dataset, order, start=0, stop=240, workers=2))
    stopped.set()
    watcher.join()
    assert got == flat(batches(here, here.order(8, 2, windows=[3]), start=0, stop=240))
    assert 2 * SHARD < max(most) <= limit


def test_the_least_recently_used_goes(store, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.data.cache.TOUCH_EVERY", 0)
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=3 * SHARD + 2000)
    for shard in (0, 1, 2, 0, 3):
        dataset.batch([(shard * COUNT, 0)])
        time.sleep(0.01)
    assert sorted(path.name[:2] for path in cached(tmp_path)) == ["s0", "s2", "s3"]


def test_a_file_that_goes_stays_readable_for_who_reads_it(store, tmp_path):
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=SHARD + 1000)
    file = dataset.shards[0].open_latents()
    dataset.batch([(COUNT, 0)])
    assert [path.name[:2] for path in cached(tmp_path)] == ["s1"]
    whole = (tmp_path / "far" / "s0.safetensors").read_bytes()
    assert os.pread(file, len(whole), 0) == whole
    os.close(file)


def test_a_shard_larger_than_the_cache_is_refused_at_the_start(store):
    with pytest.raises(ValueError, match=r"shard s0 of store:.* has 0\.00 GB.*cache_gb"):
        ShardDataset(store, Augmentation(), 1, cache_bytes=SHARD - 1)


# Networks -----------------------------------------------------------------------------------------------------------


def test_a_network_that_fails_now_and_then(store, tmp_path):
    here = Shard(tmp_path / "far" / "s0")
    Store.failures = 2
    shards = open_remote(store, ROOMY)
    Store.failures = 2
    np.testing.assert_array_equal(shards[0].latents, here.latents)
    whole = (tmp_path / "far" / "s0.safetensors").stat().st_size
    assert read_bytes(tmp_path)["s0.safetensors"] == 2 * whole  # header and file; nothing twice after a failure


def test_a_network_that_is_gone_is_told_by_the_file(store, tmp_path):
    shards = open_remote(store, ROOMY)
    Store.failures = 1000
    out = np.empty((4, SIDE, SIDE), np.float16)
    says = r"far/s1\.safetensors could not be fetched, tried 3 times: connection reset by peer; the same command"
    with pytest.raises(OSError, match=says):
        shards[1].read_latents(0, out)
    Store.failures = 0
    assert not list((tmp_path / "cache").rglob("*.partial"))
    shards[1].read_latents(0, out)


def test_an_error_in_a_worker_reaches_the_trainer(store):
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=ROOMY)
    Store.failures = 100_000
    with pytest.raises(OSError, match="could not be fetched"):
        list(batches(dataset, dataset.order(8, 2), start=0, stop=80, workers=1))


def test_a_file_that_ends_early(store, tmp_path, monkeypatch):
    shards = open_remote(store, ROOMY)
    file = tmp_path / "far" / "s4.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"s4\.safetensors could not be fetched.* it ends after"):
        shards[4].open_latents()
    assert not cached(tmp_path)


def test_half_a_pair_and_nothing_at_all(store, tmp_path):
    (tmp_path / "far" / "s3.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard s3 of store.* lacks s3\.arrow"):
        open_remote(store, ROOMY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        open_remote(f"store://{tmp_path}/empty", ROOMY)
    with pytest.raises(FileNotFoundError):
        open_remote(f"store://{tmp_path}/nowhere", ROOMY)


def test_a_damaged_header_names_the_file(store, tmp_path):
    (tmp_path / "far" / "s3.safetensors").write_bytes(b"\xff" * 500)
    with pytest.raises(ValueError, match=r"far/s3\.safetensors: .* not a safetensors file"):
        open_remote(store, ROOMY)


def test_storage_that_cannot_be_read_yet():
    with pytest.raises(ValueError, match="no storage of the kind nowhere://"):
        open_remote("nowhere://bucket/folder", ROOMY)
    with pytest.raises(ValueError, match=re.escape("s3://bucket/folder cannot be read yet: pip install s3fs")):
        open_remote("s3://bucket/folder", ROOMY)


def test_a_plain_file_url(store, tmp_path):
    shards = open_remote(f"file://{tmp_path}/far", ROOMY)
    np.testing.assert_array_equal(shards[5].latents, Shard(tmp_path / "far" / "s5").latents)


# Many at once -------------------------------------------------------------------------------------------------------


def _read_all(url, cache_bytes):
    out = np.empty((4, SIDE, SIDE), np.float16)
    for shard in open_remote(url, cache_bytes):
        shard.read_latents(0, out)


def _together(count, target, *arguments):
    processes = [multiprocessing.get_context("fork").Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_one_fetches_and_the_others_wait(store, tmp_path):
    Store.delay = 0.002
    _together(3, _read_all, store, ROOMY)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "far").iterdir()}
    assert read_bytes(tmp_path, ".arrow") == {name: size for name, size in sizes.items() if "arrow" in name}
    for name, size in read_bytes(tmp_path).items():
        assert size <= sizes[name] + min(sizes[name], streaming.HEADER)


def test_more_readers_than_room(store, tmp_path):
    Store.delay = 0.001
    _together(3, _read_all, store, SHARD + 1000)
    assert len(cached(tmp_path)) == 1


def test_what_a_killed_process_was_fetching_is_no_obstacle(store, tmp_path):
    shards = open_remote(store, SHARD + 1000)
    Store.delay = 0.2
    process = multiprocessing.get_context("fork").Process(target=shards[0].open_latents)
    process.start()
    while not (rests := list((tmp_path / "cache").rglob("*.partial"))):
        time.sleep(0.01)
    process.kill()
    process.join()
    Store.delay = 0.0
    for shard in (shards[1], shards[0]):  # its rest takes room, then stands where the file is to be
        shard.read_latents(0, np.empty((4, SIDE, SIDE), np.float16))
        rests = list((tmp_path / "cache").rglob("*.partial"))
        assert not rests


def test_what_comes_next_is_fetched_meanwhile(store, tmp_path):
    """The trainer rests after its first batch; the shards of the next ones come all the same."""
    dataset = ShardDataset(store, Augmentation(slots=3), 1, cache_bytes=3 * SHARD + 3000)
    before = threading.active_count()
    loader = iter(batches(dataset, dataset.order(4, 2, windows=[1]), start=0, stop=120))
    next(loader)
    until = time.monotonic() + 10
    while len(cached(tmp_path)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(read_bytes(tmp_path)) == 6  # headers
    fetched = {name for name, size in read_bytes(tmp_path).items() if size > SHARD + 1000}
    assert len(cached(tmp_path)) == len(fetched) == 3  # as much as there is room for, and no more
    rest = list(loader)
    assert len(rest) == 29
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_waiting_for_room_ends_when_there_is_some(tmp_path):
    """Two files of which only one fits, fetched at once."""
    cache = BoundedCache(tmp_path, 100)

    def fetch(place):
        time.sleep(0.1)
        place.write_bytes(b"x" * 80)

    threads = [
        threading.Thread(target=lambda k=k: os.close(cache.open(tmp_path / f"{k}.safetensors", 80, fetch)))
        for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
