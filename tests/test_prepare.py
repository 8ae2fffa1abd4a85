"""Preparation: the same shards however the work is shared out, whole or not at all, and an account of every image."""

import hashlib
import io
import json
import os
import threading
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers.tiny import sdxl_vae
from PIL import Image

import gligen_xl
from gligen_xl.cli.common import parse_part
from gligen_xl.data.check import check_shards
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Row, Shard, find_shards
from gligen_xl.detect.detection import CaptionGrounder
from gligen_xl.layout import box_iou
from gligen_xl.prepare import unit as preparation
from gligen_xl.prepare.encode import load_vae
from gligen_xl.prepare.framing import Framing
from gligen_xl.prepare.item import Item, Skipped
from gligen_xl.prepare.run import prepare
from gligen_xl.prepare.runners import Machine, run_unit
from gligen_xl.prepare.settings import Settings
from gligen_xl.prepare.unit import UnitMaker
from gligen_xl.prepare.unit_folder import UnitFolder
from gligen_xl.toyworld.detector import detect
from gligen_xl.toyworld.world import draw, sample_scene, scene_layout

HERE = Machine()


# Sources ------------------------------------------------------------------------------------------------------------


def png(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def scene_item(name, index, size=(64, 64), objects=None, **changes):
    """A scene in the middle of an image of `size` (height, width), at least 64."""
    scene = sample_scene(1, index, num_objects=objects)
    layout = scene_layout(scene, seed=1, index=index)
    (height, width), square = size, draw(scene)
    image = square.resize((1, 1)).resize((width, height))
    top, left = (height - 64) // 2, (width - 64) // 2
    image.paste(square, (left, top))
    boxes = np.asarray(layout.boxes).reshape(-1, 4) * 64 + (left, top, left, top)
    values = {
        "image_id": f"{name}-{index}", "image": png(image), "caption": layout.prompt, "phrases": layout.phrases,
        "boxes": tuple(map(tuple, boxes / (width, height, width, height))), "scores": (1.0,) * len(boxes),
        "size": size, "done": index + 1,
    }  # fmt: skip
    return Item(**(values | changes))


@dataclass(frozen=True)
class Scenes:
    """Scenes of several shapes, one after another."""

    name: str
    count: int = 5
    sizes: tuple = ((64, 80), (96, 64), (64, 64))
    objects: int | None = None
    version: int = 1

    @property
    def weight(self):
        return self.count

    def identity(self):
        return {"count": self.count, "version": self.version}

    def items(self):
        for index in range(self.count):
            yield scene_item(self.name, index, self.sizes[index % len(self.sizes)], self.objects)


@dataclass(frozen=True)
class Eventful(Scenes):
    """After its second image something happens: `event(attempt)`. Attempts are counted in a file."""

    folder: Path = Path()
    event: object = None

    @property
    def attempts(self):
        path = self.folder / self.name
        return int(path.read_text()) if path.exists() else 0

    def items(self):
        (self.folder / self.name).write_text(str(self.attempts + 1))
        for number, item in enumerate(super().items()):
            if number == 2:
                self.event(self.attempts)
            yield item


def fail(attempt):
    raise ValueError("the archive is cut short")


def fail_once(attempt):
    if attempt == 1:
        raise OSError("the network\nis gone")


def fail_oddly(attempt):
    raise KeyError("nobody expects this")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    sdxl_vae().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def how(vae):
    return Settings(framing=Framing(resolutions=(32, 64)), vae=vae, flip="both")


@pytest.fixture(scope="module")
def units():
    return [Scenes("a"), Scenes("b", 4), Scenes("c", 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, units, how):
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(units, folder, how, HERE)
    return hashes(folder)


def hashes(folder):
    """Of every shard file under a folder, which must hold nothing that is half."""
    assert not list(folder.rglob("*.partial"))
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".arrow")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder):
    return sorted({name.rpartition(".")[0] for name in hashes(folder)})


def all_rows(folder):
    return [shard.row(k) for shard in find_shards(folder) for k in range(len(shard))]


# However the work is shared out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 3), (1, 2), (2, 5)])
def test_the_same_bytes_whoever_decodes(tmp_path, units, how, undisturbed, workers, batch_size):
    report = prepare(units, tmp_path, how, Machine(workers=workers, batch_size=batch_size))
    assert hashes(tmp_path) == undisturbed
    assert (report.total.seen, report.total.written) == (10, 40)
    assert set(report.total.seconds) == {"all", "read", "wait", "decode", "encode", "write"} | (
        {"start"} if workers else set()
    )


def test_the_same_bytes_in_parts(tmp_path, units, how, undisturbed):
    for k in (2, 3, 1):
        report = prepare(units, tmp_path, how, HERE, part=(k, 3))
    assert report.units == {"a": "written", "b": "not of this part", "c": "not of this part"}
    assert hashes(tmp_path) == undisturbed
    assert (report.total.seen, report.failed) == (10, {})  # the report is of all that is done


def test_buckets_make_a_shard_for_each_shape(tmp_path, vae):
    how = Settings(framing=Framing(resolutions=(64,), buckets=True), vae=vae)
    folders = [tmp_path / f"{batch_size}" for batch_size in (1, 4)]
    for folder in folders:
        prepare([Scenes("a", 7)], folder, how, Machine(batch_size=int(folder.name)))
    assert hashes(folders[0]) == hashes(folders[1])
    assert names(folders[0]) == ["a-56x72", "a-64x64", "a-76x52"]
    shapes = {shard.stem.name: (len(shard), shard.latent_shape) for shard in find_shards(folders[0])}
    assert shapes == {"a-56x72": (3, (4, 28, 36)), "a-76x52": (2, (4, 38, 26)), "a-64x64": (2, (4, 32, 32))}
    assert not check_shards(folders[0]).problems


def test_shards_say_how_they_were_made(tmp_path, units, how, vae):
    prepare(units, tmp_path, how, HERE)
    for resolution in (32, 64):
        assert not check_shards(tmp_path / f"{resolution}").problems
        for shard in find_shards(tmp_path / f"{resolution}"):
            assert shard.metadata["resolution"] == f"{resolution}"
            assert shard.latent_shape == (4, resolution // 2, resolution // 2)
            assert (shard.metadata["vae"], shard.downsampling) == (Path(vae).name, 2)  # its folder is nobody's affair
            assert (shard.metadata["latents"], shard.metadata["seed"]) == ("sample", "0")
    first, mirrored = (Shard(tmp_path / "64" / "a").row(k) for k in range(2))
    given = scene_item("a", 0, (64, 80))
    assert (first.image_id, mirrored.image_id) == ("a-0", "a-0-mirrored")
    assert (first.caption, first.phrases) == (given.caption, list(given.phrases))
    assert (first.original_height, first.original_width, first.crop_left) == (64, 80, 8)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        places = [Path(__file__).parent, Path(gligen_xl.__file__).parents[1]]  # runners meet units of this file
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, configure_logging=False)
        yield ray
        ray.shutdown()


def die_once(attempt):
    if attempt == 1:
        os._exit(1)


def test_the_same_bytes_on_a_cluster(tmp_path, units, how, undisturbed, ray, monkeypatch):
    """With a unit that fails beside them, and one that brings its runner down; both are tried twice. Paths are relative
    to a folder that runners do not begin in."""
    monkeypatch.chdir(tmp_path)
    told, out = Counter(), Path("out")
    fails = Eventful("fails", folder=Path(), event=fail)
    dies = Eventful("dies", folder=Path(), event=die_once)
    machine = Machine(batch_size=3, runner="ray", runners=2)
    report = prepare(
        [units[0], dies, *units[1:], fails], out, how, machine,
        progress=lambda weight, images: told.update(weight=weight, images=images),
    )  # fmt: skip
    made = hashes(out)
    assert {name: made[name] for name in undisturbed} == undisturbed
    assert names(out) == [f"{size}/{name}" for size in (32, 64) for name in ("a", "b", "c", "dies")]
    assert report.failed == {"fails": "the archive is cut short"}
    assert (fails.attempts, dies.attempts) == (2, 2)
    assert told["weight"] == report.total.seen == 15
    assert told["images"] >= 15


def test_what_no_runner_can_do_ends_the_work(tmp_path, units, how, ray):
    with pytest.raises(ValueError, match=r"^the VAE /nowhere could not be loaded"):
        prepare(units, tmp_path, replace(how, vae="/nowhere"), Machine(runner="ray", runners=1))
    with pytest.raises(ValueError, match="no room for a runner of 4 CPUs"):
        prepare(units, tmp_path, how, Machine(runner="ray", workers=3))
    assert ray.is_initialized()  # it is not ours


# Again --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Names of the units that are made from now on."""
    names, real = [], UnitMaker.make
    monkeypatch.setattr(
        UnitMaker, "make", lambda self, unit, progress: names.append(unit.name) or real(self, unit, progress)
    )
    return names


def test_units_that_are_done_are_kept(tmp_path, units, how, undisturbed, made):
    prepare(units[:2], tmp_path, how, HERE)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    report = prepare(units, tmp_path, how, HERE)
    assert made == ["a", "b", "c"]
    assert report.units == {"a": "already there", "b": "already there", "c": "written"}
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert hashes(tmp_path) == undisturbed
    assert report.total.seen == 10
    made.clear()
    assert prepare(units, tmp_path, replace(how, vae=how.vae), HERE).total == report.total
    assert made == []


def test_a_unit_whose_shard_is_gone_is_done_again(tmp_path, units, how, undisturbed, made):
    prepare(units, tmp_path, how, HERE)
    (tmp_path / "32" / "b.arrow").unlink()
    prepare(units, tmp_path, how, HERE)
    assert made == ["a", "b", "c", "b"]
    assert hashes(tmp_path) == undisturbed


def test_a_unit_that_has_changed_is_done_again(tmp_path, vae, made):
    how = Settings(framing=Framing(resolutions=(64,), buckets=True), vae=vae)
    prepare([Scenes("a", 3), Scenes("b")], tmp_path / "one", how, HERE)
    assert names(tmp_path / "one")[:3] == ["a-56x72", "a-64x64", "a-76x52"]
    changed = [Scenes("a", 4, sizes=((64, 64),), version=2), Scenes("b")]
    report = prepare(changed, tmp_path / "one", how, HERE)
    assert made == ["a", "b", "a"]
    prepare(changed, tmp_path / "other", how, HERE)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")  # what "a" has no more is not there
    assert report.total.seen == 9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"flip": "no"}, "flip 'both', now it is 'no'"),
        ({"latents": "mean"}, "latents 'sample', now it is 'mean'"),
        ({"framing": Framing(resolutions=(32,))}, r"resolutions \[32, 64\], now it is \[32\]"),
        ({"framing": Framing(resolutions=(32, 64), fast_jpeg=True)}, "fast_jpeg False, now it is True"),
    ],
)
def test_a_folder_has_one_kind_of_shards(tmp_path, units, how, made, change, says):
    prepare(units[:1], tmp_path, how, HERE)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=f"holds shards prepared with {says}; go on with the same settings"):
        prepare(units, tmp_path, replace(how, **change), HERE)
    assert (made, hashes(tmp_path)) == (["a"], before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"framing": Framing(resolutions=(32, 64), min_side=9)}, "min_side 0, now it is 9"),
    ],
)
@pytest.mark.parametrize("source", ["/one", "/two"])
def test_a_folder_has_one_kind_of_shards_whatever_the_part_or_source(tmp_path, units, how, made, change, says, source):
    prepare(units[:2], tmp_path, how, HERE, source="/one", part=(1, 2))
    with pytest.raises(ValueError, match=f"holds shards prepared with {says}; go on with the same settings"):
        prepare(units[:2], tmp_path, replace(how, **change), HERE, source=source, part=(2, 2))
    assert made == ["a"]


def test_settings_of_a_source_agree_in_it_and_may_be_others_in_another(tmp_path, units, how, made):
    prepare(units[:2], tmp_path, how, HERE, source="/one", part=(1, 2))
    other = replace(how, min_boxes=1)
    with pytest.raises(ValueError, match="holds a prepared with min_boxes 0, now it is 1"):
        prepare(units[:2], tmp_path, other, HERE, source="/one", part=(2, 2))
    prepare(units[2:], tmp_path, other, HERE, source="/two")
    assert made == ["a", "c"]


def test_settings_that_made_nothing_bind_nobody(tmp_path, units, how, undisturbed):
    with pytest.raises(ValueError, match="resolution is 33"):
        prepare(units, tmp_path, replace(how, framing=Framing(resolutions=(33,))), HERE)
    prepare(units, tmp_path, how, HERE)
    assert hashes(tmp_path) == undisturbed


def test_two_that_begin_at_once_agree(tmp_path, how):
    """Where one has looked before the other wrote anything, it finds out before its first unit."""
    first, second = UnitFolder(tmp_path, how), UnitFolder(tmp_path, replace(how, seed=1))
    second.check([])
    first.claim()
    first.claim()
    with pytest.raises(ValueError, match="holds shards prepared with seed 0, now it is 1"):
        second.claim()


def test_a_second_source_replaces_nothing_of_the_first(tmp_path, how, made):
    prepare([Scenes("a"), Scenes("b")], tmp_path, how, HERE, source="/day1/images")
    before = hashes(tmp_path)
    second = [Scenes("new", 1), Scenes("a", 4)]
    with pytest.raises(ValueError, match=r"holds a of /day1/images, and /day2/images has another one .*another folder"):
        prepare(second, tmp_path, how, HERE, source="/day2/images", part=(1, 2))
    assert (made, hashes(tmp_path)) == (["a", "b"], before)
    report = prepare([Scenes("new", 1)], tmp_path, how, HERE, source="/day3")  # other names have room beside them
    assert (report.removed, report.total.seen) == ([], 1)
    assert before.items() < hashes(tmp_path).items()


def test_a_source_that_was_moved_is_the_same_until_it_changes(tmp_path, how, made):
    prepare([Scenes("a"), Scenes("b")], tmp_path, how, HERE, source="/old")
    report = prepare([Scenes("a"), Scenes("b")], tmp_path, how, HERE, source="/new")
    assert (made, report.moved) == (["a", "b"], {"a": "/old", "b": "/old"})
    assert "taken for the same, made from /old: a, b" in str(report)
    changed = [Scenes("a"), Scenes("b", 6)]
    with pytest.raises(
        ValueError, match=r"moved and then changed, remove .*\.prepared/units/b\.json: the unit is then"
    ):
        prepare(changed, tmp_path, how, HERE, source="/new")
    (tmp_path / ".prepared" / "units" / "b.json").unlink()
    prepare(changed, tmp_path, how, HERE, source="/new")
    prepare(changed, tmp_path / "other", how, HERE, source="/new")
    assert (
        hashes(tmp_path / "other").items()
        <= {name.removeprefix("other/"): value for name, value in hashes(tmp_path).items()}.items()
    )


def test_another_source_that_comes_while_one_is_at_work_fails_its_unit(tmp_path, units, how):
    def meanwhile(weight, images):
        if images and not UnitFolder(tmp_path, how, "/one").is_done(units[1]):
            with UnitMaker(tmp_path, how) as maker:
                run_unit(maker, UnitFolder(tmp_path, how, "/one"), units[1])

    report = prepare([units[0], Scenes("b", 3)], tmp_path, how, HERE, source="/two", progress=meanwhile)
    assert report.units["a"] == "written"
    assert "holds b of /one, and /two has another one" in report.failed["b"]
    assert len(Shard(tmp_path / "32" / "b")) == 8


def test_units_that_the_source_has_no_more_go(tmp_path, how):
    """As with another unit_size: else their images are trained on twice."""
    prepare([Scenes(f"x-{k}", 2) for k in range(4)], tmp_path, how, HERE, source="/x")
    prepare([Scenes("y", 1)], tmp_path, how, HERE, source="/y")
    prepare([Scenes("z", 1)], tmp_path, how, HERE)
    larger = [Scenes("x-0", 4), Scenes("x-1", 4)]
    with UnitFolder(tmp_path, how).hold("x-3"):
        report = prepare(larger, tmp_path, how, HERE, source="/x", part=(1, 2))
    assert report.removed == ["x-2"]  # x-1 is of another part, x-3 in other hands
    assert "removed, the source has them no more: x-2" in str(report)
    assert [name for name in names(tmp_path) if name.startswith("32")] == [
        "32/x-0", "32/x-1", "32/x-3", "32/y", "32/z"
    ]  # fmt: skip
    report = prepare(larger, tmp_path, how, HERE, source="/x")
    assert json.loads((tmp_path / "prepare.json").read_text())["removed"] == report.removed == ["x-3"]
    assert [len(shard) for shard in find_shards(tmp_path / "32")] == [8, 8, 2, 2]
    assert prepare(larger, tmp_path, how, HERE, source="/x").removed == []


@dataclass(frozen=True)
class Tar(Scenes):
    def identity(self):
        return super().identity() | {"kind": "sa1b", "file": f"{self.name}.tar"}


def test_shards_of_an_archive_that_was_deleted_stay(tmp_path, how):
    """Archives are deleted to make room for the next."""
    prepare([Tar("sa_0", 1), Tar("sa_1", 1)], tmp_path, how, HERE, source="/sa1b")
    before = hashes(tmp_path)
    report = prepare([Tar("sa_1", 1), Tar("sa_2", 1)], tmp_path, how, HERE, source="/sa1b")
    assert (report.removed, report.stay) == ([], ["sa_0"])
    assert before.items() < hashes(tmp_path).items()
    assert "left, of archives that the source has no more (were they renamed, remove these): sa_0" in str(report)


@pytest.mark.parametrize("alone", [False, True])
def test_shards_of_something_else_are_not_written_over(tmp_path, units, how, alone):
    row = Row(image_id="x", caption="", boxes=[], scores=[], phrases=[], original_height=32, original_width=32)
    write_shard(tmp_path / "64" / "b", np.zeros((1, 4, 4, 4), np.float16), [row], {"vae": "mine"})
    if alone:
        (tmp_path / "64" / "b.arrow").unlink()
    before = hashes(tmp_path)
    report = prepare(units, tmp_path, how, HERE)
    assert list(report.failed) == ["b"]
    assert "64/b stands there, made otherwise; remove it" in report.failed["b"]
    after = hashes(tmp_path)
    assert {name: after[name] for name in before} == before
    assert "32/b.arrow" not in after


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_unit_that_fails_is_tried_twice_and_stops_no_other(tmp_path, units, how, undisturbed, workers):
    bad = [Eventful("bad", folder=tmp_path, event=fail), Eventful("odd", folder=tmp_path, event=fail_oddly)]
    told, out = Counter(), tmp_path / "out"
    report = prepare(
        [units[0], *bad, *units[1:]], out, how, Machine(workers=workers),
        progress=lambda weight, images: told.update(weight=weight),
    )  # fmt: skip
    assert hashes(out) == undisturbed
    assert report.failed == {"bad": "the archive is cut short", "odd": "KeyError: 'nobody expects this'"}
    assert [unit.attempts for unit in bad] == [2, 2]
    assert told["weight"] == 10  # of what is done
    written = json.loads((out / "prepare.json").read_text())
    assert (written["failed"], written["units"]["bad"], written["seen"]) == (2, "the archive is cut short", 10)
    text = (out / "prepare.txt").read_text()
    assert "3 of 5 units done" in text
    assert "failed: bad: the archive is cut short" in text


def test_a_unit_that_works_at_the_second_attempt_is_written(tmp_path, how):
    unit = Eventful("a", folder=tmp_path, event=fail_once)
    report = prepare([unit], tmp_path / "out", how, HERE)
    assert (report.units, report.failed, unit.attempts) == ({"a": "written"}, {}, 2)
    assert report.total.seen == 5


def decoders():
    """Processes that were spawned by this one, and live."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_decoders(attempt):
    for child in decoders():
        with suppress(psutil.NoSuchProcess):
            child.kill()


def kill_decoders_once(attempt):
    if attempt == 1:
        kill_decoders(attempt)


def test_a_decoding_process_that_dies_fails_its_unit_alone(tmp_path, units, how, undisturbed):
    once = Eventful("once", 12, folder=tmp_path, event=kill_decoders_once)
    always = Eventful("always", 12, folder=tmp_path, event=kill_decoders)
    out = tmp_path / "out"
    report = prepare([once, always, *units], out, how, Machine(workers=2, batch_size=2))
    assert list(report.failed) == ["always"]
    assert "a decoding process died" in report.failed["always"]
    assert (once.attempts, always.attempts) == (2, 2)
    mine = hashes(out)
    assert {name: mine[name] for name in undisturbed} == undisturbed
    assert len(Shard(out / "32" / "once")) == 24


full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")


@full_disk
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("file", ["32/.b.safetensors", "64/.b.safetensors", "64/.b.arrow"])
def test_a_full_disk_ends_the_work_and_leaves_no_rests(tmp_path, units, how, undisturbed, workers, file):
    """What is written to a file of unit b meets a device that is full: at once, or when the shard is closed."""

    def fill(attempt):
        place = out / f"{file}.{os.getpid()}.partial"
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to("/dev/full")

    out = tmp_path / "out"
    full = Eventful("b", 4, folder=tmp_path, event=None)
    object.__setattr__(full, "event", fill)
    late = [units[0], full, units[2]]
    with pytest.raises(OSError, match=f"the disk of {out} is full; make room, and the same command goes on"):
        prepare(late, out, how, Machine(workers=workers, batch_size=3))
    assert names(out) == ["32/a", "64/a"]
    written = json.loads((out / "prepare.json").read_text())
    assert written["units"] == {"a": "written", "b": "not done yet", "c": "not done yet"}
    assert (written["seen"], written["failed"]) == (5, 0)
    prepare(units, out, how, HERE)
    assert hashes(out) == undisturbed


def test_a_report_that_does_not_fit_hides_no_error(tmp_path, units, how, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gligen_xl.prepare.run.write_json", no_room)
    monkeypatch.setattr(UnitMaker, "make", no_room)
    with pytest.raises(OSError, match="make room, and the same command goes on"):
        prepare(units, tmp_path, how, HERE)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_leaves_whole_shards_and_a_report(tmp_path, units, how, undisturbed, workers):
    seen = Counter()

    def interrupt(weight, images):
        seen.update(images=images)
        if seen["images"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(units, tmp_path, how, Machine(workers=workers, batch_size=1), progress=interrupt)
    assert names(tmp_path) == ["32/a", "64/a"]
    written = json.loads((tmp_path / "prepare.json").read_text())
    assert written["units"] == {"a": "written", "b": "not done yet", "c": "not done yet"}
    text = (tmp_path / "prepare.txt").read_text()
    assert "1 of 3 units done (2 not done yet)" in text
    assert "failed" not in text
    for child in decoders():
        child.wait(timeout=20)
    prepare(units, tmp_path, how, HERE)
    assert hashes(tmp_path) == undisturbed


def test_units_that_another_process_is_at_are_left_to_it(tmp_path, units, how, undisturbed):
    told = Counter()
    with UnitFolder(tmp_path, how).hold("b") as free:
        assert free
        report = prepare(units, tmp_path, how, HERE, progress=lambda weight, _: told.update(weight=weight))
    assert report.units == {"a": "written", "b": "held by another process", "c": "written"}
    assert (report.failed, report.in_work, told["weight"]) == ({}, True, 10)
    assert "2 of 3 units done (1 held by another process)" in str(report)
    assert prepare(units, tmp_path, how, HERE).in_work is False
    assert hashes(tmp_path) == undisturbed


def test_rests_of_a_killed_process_are_removed_and_others_left(tmp_path, units, how):
    work = tmp_path / ".prepared" / "units"
    for folder in (tmp_path / "32", tmp_path / "64", work):
        folder.mkdir(parents=True, exist_ok=True)
    rests = [tmp_path / "32" / ".a.arrow.1.partial", tmp_path / "64" / ".a-64x48.safetensors.77.partial"]
    rests.append(work / ".a.json.5.partial")
    others = [tmp_path / "32" / ".a-2.arrow.1.partial", tmp_path / "64" / ".a.b.safetensors.7.partial"]
    others.append(tmp_path / "32" / ".b-a.arrow.1.partial")
    for path in (*rests, *others):
        path.write_text("rest")
    prepare(units[:1], tmp_path, how, HERE)
    assert not any(path.exists() for path in rests)
    assert all(path.exists() for path in others)  # of units whose names are alike


@pytest.mark.parametrize(("content", "says"), [("{", "is not valid JSON"), ("[]", "is no mark of a unit; remove it")])
def test_a_damaged_mark_is_named(tmp_path, units, how, content, says):
    prepare(units[:1], tmp_path, how, HERE)
    (tmp_path / ".prepared" / "units" / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"\.prepared/units/a\.json {says}"):
        prepare(units, tmp_path, how, HERE)


# The account --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed(Scenes):
    """Every fourth image is fine, the others are each wrong in a way of their own."""

    def items(self):
        for index in range(self.count):
            done = index + 1
            if index % 4 == 0:
                yield scene_item(self.name, index, (64, 80), dropped={"crowd": 2})
            elif index % 4 == 1:
                yield Skipped(image_id=f"{self.name}-{index}", reason="its row is broken", done=done)
            elif index % 4 == 2:
                yield scene_item(self.name, index, image=b"nothing")
            else:
                yield scene_item(self.name, index, boxes=(), phrases=(), scores=())


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_is_accounted_for(tmp_path, how, workers):
    told = Counter()
    report = prepare(
        [Mixed("a", 30), Mixed("b", 2)], tmp_path, replace(how, min_boxes=1), Machine(workers=workers, batch_size=3),
        progress=lambda weight, images: told.update(weight=weight, images=images),
    )  # fmt: skip
    total = report.total
    counts = {reason: entry["count"] for reason, entry in total.skipped.items()}
    assert counts == {"its row is broken": 9, "not an image": 7, "too few boxes": 7}
    assert (total.seen, total.used, total.written) == (32, 9, 36)
    assert total.seen == total.used + sum(counts.values())
    assert total.skipped["its row is broken"]["examples"] == ["a-1", "a-5", "a-9", "a-13", "a-17"]
    assert total.skipped["too few boxes"]["examples"] == ["a-3", "a-7", "a-11", "a-15", "a-19"]
    assert total.dropped_boxes["crowd"] == 18
    rows = [*all_rows(tmp_path / "32"), *all_rows(tmp_path / "64")]
    assert total.boxes == sum(len(row.boxes) for row in rows)
    assert total.bytes == sum(shard.latents.nbytes for size in ("32", "64") for shard in find_shards(tmp_path / size))
    assert told == {"weight": 32, "images": 32}
    written = json.loads((tmp_path / "prepare.json").read_text())
    assert written["boxes_per_row"] == round(total.boxes / 36, 2)
    assert written["skipped"]["not an image"]["count"] == 7
    assert 0 < written["share_of_time_device_was_busy"] <= 1
    stages = total.seconds["encode"] + total.seconds["wait"] + total.seconds["write"] + total.seconds.get("start", 0)
    assert stages <= total.seconds["all"] * 1.01  # one after another, in this thread
    text = (tmp_path / "prepare.txt").read_text()
    assert "images: 32 seen, 9 used, 36 rows of " in text
    assert "skipped, too few boxes: 7 (as a-3, a-7, a-11, a-15, a-19)" in text
    assert "boxes dropped, crowd: 18" in text


def test_a_unit_without_an_image_that_can_be_used_is_done(tmp_path, how, made):
    for _ in range(2):
        report = prepare([Mixed("b", 4)], tmp_path, replace(how, min_boxes=9), HERE)
        assert (report.total.seen, report.total.used, report.failed) == (4, 0, {})
    assert (made, names(tmp_path)) == (["b"], [])


@dataclass(frozen=True)
class Bright(Scenes):
    """Grey images, and the second one has white in it."""

    def items(self):
        for index in range(self.count):
            image = Image.new("RGB", (64, 64), (128, 127, 128))
            if index == 1:
                image.paste((255, 255, 255), (0, 0, 30, 64))
            yield scene_item(self.name, index, image=png(image))


def test_latents_that_are_not_finite_are_left_out_and_told(tmp_path, how):
    vae = sdxl_vae()
    torch.nn.init.constant_(vae.encoder.conv_in.weight, 1e19)
    vae.save_pretrained(tmp_path / "vae")
    report = prepare([Bright("a", 4)], tmp_path / "out", replace(how, vae=str(tmp_path / "vae")), HERE)
    example = "a-1: the VAE gave infinities or NaN, in float32 too"
    assert report.total.skipped == {"its latents are not finite": {"count": 1, "examples": ["a-1"], "example": example}}
    assert (report.total.seen, report.total.used, report.total.written) == (4, 3, 12)
    kept = [row.image_id for row in all_rows(tmp_path / "out" / "64")]
    assert kept == [f"a-{k}{side}" for k in (0, 2, 3) for side in ("", "-mirrored")]


def test_what_overflows_in_half_precision_is_counted(tmp_path, how):
    vae = sdxl_vae()
    torch.nn.init.constant_(vae.encoder.conv_in.weight, 10_000.0)
    vae.save_pretrained(tmp_path / "vae")
    half = replace(how, vae=str(tmp_path / "vae"), dtype="float16")
    report = prepare([Bright("a", 3)], tmp_path / "out", half, HERE)
    assert (report.total.repeated_in_float32, report.total.written) == (4, 12)
    assert "encoded again in float32: 4" in str(report)
    latents = Shard(tmp_path / "out" / "64" / "a").latents
    prepare([Bright("a", 3)], tmp_path / "full", replace(half, dtype="float32"), HERE)
    full = Shard(tmp_path / "full" / "64" / "a").latents
    same = [np.array_equal(latents[k], full[k]) for k in range(6)]
    assert same == [False, False, True, True, False, False]


@dataclass(frozen=True)
class Edge(Scenes):
    """A box so thin that only the larger image resolves it."""

    def items(self):
        for index in range(self.count):
            thin = ((0.5, 0.2, 0.5 + 1.5 / 64, 0.8),)
            yield scene_item(self.name, index, boxes=thin, phrases=("a pole",), scores=(1.0,))


def test_an_image_that_lacks_a_resolution_is_used_and_told(tmp_path, how):
    report = prepare([Edge("a", 3)], tmp_path, replace(how, min_boxes=1), HERE)
    total = report.total
    assert (total.seen, total.used, total.written, total.skipped) == (3, 3, 6, {})
    assert total.incomplete == {"too few boxes": 3}
    assert total.dropped_boxes == {"smaller than a pixel of the frame": 3}
    told = total.dropped_examples["smaller than a pixel of the frame"]
    assert told.startswith(
        "a-0: 'a pole' at [0.5, 0.2, 0.523, 0.8] (xyxy; in pixels [32.0, 12.8, 33.5, 51.2] of 64 x 64)"
    )
    assert names(tmp_path) == ["64/a"]
    assert "used, but lack a row, too few boxes: 3" in str(report)
    assert prepare([Edge("a", 3)], tmp_path, replace(how, min_boxes=1), HERE).total == total


def test_boxes_that_are_all_dropped_are_warned_of(tmp_path, how):
    far = {"boxes": ((30.0, 40.0, 50.0, 60.0),), "phrases": ("a pole",), "scores": (1.0,)}

    @dataclass(frozen=True)
    class Far(Scenes):
        def items(self):
            yield scene_item(self.name, 0, **far)

    report = prepare([Far("a", 1)], tmp_path / "far", how, HERE)
    assert report.total.dropped_boxes == {"outside the image": 2}
    (warning,) = json.loads((tmp_path / "far" / "prepare.json").read_text())["warnings"]
    assert "whether box_format is that of the source" in warning
    assert f"warning: {warning}" in str(report)
    assert prepare([Mixed("b", 9), Far("a", 1)], tmp_path / "some", how, HERE).warnings == []


# Memory and overlap -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Many(Scenes):
    """The same image under many names."""

    def items(self):
        item = scene_item(self.name, 0, (128, 128))
        for index in range(self.count):
            yield replace(item, image_id=f"{self.name}-{index}", image=bytes(bytearray(item.image)), done=index + 1)


def test_a_larger_unit_needs_no_more_memory(tmp_path, vae):
    how = Settings(framing=Framing(resolutions=(32,)), vae=vae)
    peaks = []
    for count in (60, 360):
        with UnitMaker(tmp_path, how) as maker:
            maker.make(Many("warm", 8))
            tracemalloc.start()
            maker.make(Many(f"a{count}", count))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # Rows wait for a group of 1024: about a kilobyte each. 300 decoded images would be 15 MB.
    assert peaks[1] - peaks[0] < 300 * 3_000


def test_reading_is_only_so_far_ahead(tmp_path, vae):
    read, ahead = Counter(), []

    class Watched(Many):
        def items(self):
            for item in super().items():
                read["pictures"] += 1
                ahead.append(read["pictures"] - read["seen"])
                yield item

    how = Settings(framing=Framing(resolutions=(32,)), vae=vae)
    with UnitMaker(tmp_path, how, workers=1, batch_size=4) as maker:
        report, _ = maker.make(Watched("a", 60), lambda weight, images: read.update(seen=images))
    assert report.seen == 60
    assert 4 <= max(ahead) <= 4 + 2 + 2  # a batch, two for each process, one in hand at either end
    assert threading.active_count() < 20


# What the rows say is what the latents show -------------------------------------------------------------------------


def decoded(vae, latents):
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(latents.astype(np.float32)) / vae.config.scaling_factor).sample
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def overlaps(shard, vae):
    """Of every box of a shard, its IoU with the object of its colour that is seen in the decoded latents."""
    found = []
    images = decoded(vae, np.array(shard.latents))
    for k, image in enumerate(images):
        row = shard.row(k)
        seen = {item.attributes["colour"]: item.box for item in reversed(detect(image))}
        for box, phrase in zip(row.boxes, row.phrases, strict=True):
            colour = phrase.split()[1]
            found.append(float(box_iou(np.array([box]), np.array([seen[colour]]))[0, 0]) if colour in seen else 0.0)
    return np.array(found)


@pytest.mark.parametrize("buckets", [False, True])
def test_boxes_enclose_their_objects_in_the_decoded_latents(tmp_path, buckets):
    """Objects stand alone, so that none hides another. The VAE itself loses the tips of some stars."""
    framing = Framing(resolutions=(64,), buckets=buckets)
    how = Settings(framing=framing, vae="shapes", latents="mean", flip="both", min_share=0.99)
    sizes = ((64, 64), (70, 64)) if buckets else ((64, 80), (90, 64), (64, 64))
    report = prepare([Scenes("a", 30, sizes, objects=1)], tmp_path, how, HERE)
    vae = load_vae("shapes")
    found = np.concatenate([overlaps(shard, vae) for shard in find_shards(tmp_path)])
    assert len(found) == report.total.boxes >= 48
    assert np.mean(found > 0.7) > 0.9
    assert np.median(found) > 0.9


def test_found_boxes_are_moved_into_every_frame(tmp_path):
    framing = Framing(resolutions=(64, 128))
    how = Settings(framing=framing, vae="shapes", latents="mean", detector="shapes", flip="both")
    prepare([Scenes("a", 6, ((64, 100), (96, 64)))], tmp_path, how, HERE)
    for shard in find_shards(tmp_path / "64"):
        assert np.mean(overlaps(shard, load_vae("shapes")) > 0.7) > 0.95
    small, large = (Shard(tmp_path / size / "a") for size in ("64", "128"))
    for k in range(12):
        np.testing.assert_allclose(small.row(k).boxes, large.row(k).boxes, atol=0.01)
        assert small.row(k).phrases == large.row(k).phrases


# Captions -----------------------------------------------------------------------------------------------------------


def test_captions_are_joined_by_image_id(tmp_path, how, units):
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image_id": f"a-{k}", "caption": f"it is {k}"}) + "\n" for k in range(4)))
    for workers in (0, 1):
        out = tmp_path / f"{workers}"
        report = prepare(units[:1], out, replace(how, captions=str(captions)), Machine(workers=workers))
        example = "a-4: no id of the captions ends as 'a-4'"
        assert report.total.skipped == {"no caption": {"count": 1, "examples": ["a-4"], "example": example}}
        assert {row.image_id: row.caption for row in all_rows(out / "32")} == {
            f"a-{k}{side}": f"it is {k}" for k in range(4) for side in ("", "-mirrored")
        }
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1")


def test_captions_that_are_corrected_are_joined_anew(tmp_path, how, units, made):
    captions, out = tmp_path / "captions.jsonl", tmp_path / "out"
    joined = replace(how, captions=str(captions))
    for text in ("a dgo", "a dog"):
        captions.write_text(json.dumps({"image_id": "c-0", "caption": text}))
        for _ in range(2):
            prepare(units[2:], out, joined, HERE, source="/c")
        assert [row.caption for row in all_rows(out / "32")] == [text] * 2
    assert made == ["c", "c"]


def test_captions_that_are_left_out_are_told(tmp_path, how, units):
    captions = tmp_path / "captions.jsonl"
    lines = [("c-0", "first"), ("c-0", "second"), ("c-1", " "), ("d-0", "third")]
    captions.write_text("".join(json.dumps({"id": k, "caption": text}) + "\n" for k, text in lines))
    report = prepare([units[2], Scenes("d", 1)], tmp_path / "out", replace(how, captions=str(captions)), HERE)
    written = json.loads((tmp_path / "out" / "prepare.json").read_text())["captions"]  # once, not for every unit
    assert (written["captions"], written["duplicates"], written["empty"]) == (2, 1, 1)
    assert "captions left out, of an image that had one already: 1" in str(report)
    assert "captions left out, empty: 1" in str(report)


# Detectors ----------------------------------------------------------------------------------------------------------


class Cutting(CaptionGrounder):
    """Finds nothing, and every text is too long for it."""

    reads_captions = True

    def ground(self, images, captions):
        self.cut_texts += len(captions)
        return [[] for _ in images]


@dataclass(frozen=True)
class Silent(Scenes):
    """Every second image has no caption."""

    def items(self):
        for index in range(self.count):
            yield scene_item(self.name, index, **({"caption": ""} if index % 2 else {}))


def test_texts_that_were_cut_are_told(tmp_path, how, monkeypatch):
    monkeypatch.setattr(preparation, "find_grounder", lambda *_, **__: Cutting())
    report = prepare([Silent("a", 5), Silent("b", 4)], tmp_path, replace(how, detector="d"), HERE)
    assert report.total.cut_texts == 5
    assert report.total.skipped["no caption"]["count"] == 4
    assert "texts cut, too long for the detector: 5" in str(report)
    assert prepare([Silent("a", 5)], tmp_path, replace(how, detector="d"), HERE).total.cut_texts == 3


def test_a_detector_that_reads_no_captions_leaves_out_no_image_without_one(tmp_path, how):
    report = prepare([Silent("a", 4)], tmp_path, replace(how, detector="shapes"), HERE)
    assert (report.total.used, report.total.skipped) == (4, {})
    assert report.total.boxes > 8


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"framing": Framing(resolutions=())}, "expected different numbers of pixels"),
        ({"framing": Framing(resolutions=(64, 64))}, "expected different numbers of pixels"),
        ({"framing": Framing(resolutions=(0,))}, "expected different numbers of pixels"),
        ({"min_share": 1.5}, "min_share is 1.5; expected a share"),
        ({"box_threshold": float("nan")}, "box_threshold is nan"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"at_once": 0}, "at_once is 0; expected at least 1"),
        ({"min_boxes": -1}, "min_boxes is -1"),
        ({"detect_text": "a dog."}, "detect_text is 'a dog.' but there is no detector; name one"),
        ({"box_threshold": 0.2}, "box_threshold is 0.2 but there is no detector; name one"),
        ({"text_threshold": 0.0}, "text_threshold is 0.0 but there is no detector; name one"),
        ({"detector": "shapes", "text_threshold": 0.3}, "text_threshold is 0.3, but the detector of shapes has no"),
        ({"detector": "shapes", "detect_text": "x"}, "detect_text is 'x', but the detector of shapes has no"),
    ],
)
def test_settings_that_cannot_be_are_refused(how, change, says):
    with pytest.raises(ValueError, match=says):
        replace(how, **change)


def test_a_resolution_fits_the_vae(tmp_path, units, how):
    for framing, says in (
        (Framing(resolutions=(32, 33)), "resolution is 33; this VAE needs a multiple of 2"),
        (Framing(resolutions=(34,), buckets=True), "resolution is 34; with buckets this VAE needs a multiple of 32"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare(units, tmp_path / "out", replace(how, framing=framing), HERE)
    assert not (tmp_path / "out").exists()


def test_thresholds_that_are_not_given_are_those_that_are_given_so(how):
    assert replace(how, detector="d") == replace(how, detector="d", box_threshold=0.2, text_threshold=0.2)
    assert replace(how, detector="shapes").box_threshold is how.box_threshold is None


def test_the_fingerprint_is_of_every_setting(how):
    changes = [
        {"seed": 1},
        {"flip": "no"},
        {"vae": "x"},
        {"min_share": 0.4},
        {"framing": Framing(resolutions=(64, 32))},
    ]
    prints = {replace(how, **change).fingerprint for change in changes} | {how.fingerprint}
    assert len(prints) == len(changes) + 1
    assert replace(how, seed=0).fingerprint == how.fingerprint


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"runners": 2}, "runners is 2 with runner 'local'"),
        ({"runner": "ray", "runners": 0}, "runners is 0"),
    ],
)
def test_machines_that_cannot_be_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Machine(**values)


def test_parts():
    assert (parse_part("3/16"), parse_part(" 1/1 ")) == ((3, 16), (1, 1))
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", ""):
        with pytest.raises(ValueError, match="expected k/n with k from 1 to n"):
            parse_part(text)
