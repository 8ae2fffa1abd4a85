"""A unit is done again when one of its files has changed, and only then: images, texts, tables, archives, weights."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import sdxl_vae
from PIL import Image

from gligen_xl.data.shards import Shard, find_shards
from gligen_xl.prepare.file_stats import files_identity, weights_of
from gligen_xl.prepare.framing import Framing
from gligen_xl.prepare.run import prepare
from gligen_xl.prepare.runners import Machine
from gligen_xl.prepare.settings import Settings
from gligen_xl.prepare.sources import open_source

NAMES = [f"{k}.png" for k in range(6)]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    sdxl_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def how(vae):
    return Settings(framing=Framing(resolutions=(32,)), vae=str(vae))


def png(red):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (red, 0, 0)).save(stream, "PNG", compress_level=0)  # of one size, whatever is in it
    return stream.getvalue()


def images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).write_bytes(png(k))


def plain(root):
    images(root / "set")
    return {"path": root / "set"}


def rows(root):
    images(root / "set")
    (root / "set/metadata.jsonl").write_text("".join(json.dumps({"file_name": name}) + "\n" for name in NAMES))
    return {"path": root / "set"}


def parquet(root):
    images(root / "set")
    pq.write_table(pa.table({"text": ["x"] * 6, "file_name": NAMES}), root / "set/metadata.parquet", row_group_size=4)
    return {"path": root / "set"}


def layouts(root):
    images(root / "set")
    (root / "set/a.jsonl").write_text("".join(json.dumps({"image": name, "prompt": "x"}) + "\n" for name in NAMES))
    return {"path": root / "set/a.jsonl"}


def coco(root):
    images(root / "set")
    entries = [{"id": k, "file_name": name, "height": 32, "width": 32} for k, name in enumerate(NAMES)]
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    (root / "instances.json").write_text(json.dumps(content))
    return {"path": root / "set", "instances": root / "instances.json"}


KINDS = [plain, rows, parquet, layouts, coco]


def run(where, out, how, **options):
    return prepare(open_source(**where, unit_size=2), out, how, Machine(), source=str(where["path"]), **options)


def states(report):
    return [report.units[name] for name in sorted(report.units)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_was_mended_is_prepared_again_and_only_its_unit(tmp_path, how, kind):
    where, out = kind(tmp_path), tmp_path / "out"
    run(where, out, how)
    before = [shard.latents[:].copy() for shard in find_shards(out)]
    image = tmp_path / "set/3.png"
    facts = image.stat()
    image.write_bytes(png(250))
    assert image.stat().st_size == facts.st_size
    report = run(where, out, how)
    assert states(report) == ["already there", "written", "already there"]
    ((name, why),) = report.again.items()
    assert (name[-5:], why) == ("00001", "its images' files")
    assert f"done again, changed: its images' files: {name}" in str(report)
    after = [shard.latents[:] for shard in find_shards(out)]
    assert [(a == b).all() for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert states(run(where, out, how)) == ["already there"] * 3


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_image_that_comes_or_goes_is_noticed(tmp_path, how, kind):
    where, out, image = kind(tmp_path), tmp_path / "out", tmp_path / "set/4.png"
    image.rename(tmp_path / "aside")
    assert run(where, out, how).total.used == 5
    (tmp_path / "aside").rename(image)
    report = run(where, out, how)
    assert (states(report), report.total.used) == (["already there"] * 2 + ["written"], 6)
    image.unlink()
    report = run(where, out, how)
    assert (states(report), report.total.used) == (["already there"] * 2 + ["written"], 5)
    ((_, entry),) = report.total.skipped.items()
    assert str(image) in entry["example"]


def test_the_image_behind_a_link_counts(tmp_path, how):
    where, out = rows(tmp_path), tmp_path / "out"
    (tmp_path / "set/3.png").rename(tmp_path / "far.png")
    (tmp_path / "set/3.png").symlink_to(tmp_path / "far.png")
    run(where, out, how)
    os.utime(tmp_path / "far.png", ns=(1, 1))
    assert states(run(where, out, how)) == ["already there", "written", "already there"]


def test_names_that_no_file_can_have_are_absent(tmp_path):
    names = ["", "a\0b", "\ud800", "n" * 300, "../../x", "/"]
    assert files_identity(tmp_path, names) == files_identity(tmp_path, names)
    assert files_identity(tmp_path, ["a"]) != files_identity(tmp_path, ["b"])


# Archives -----------------------------------------------------------------------------------------------------------


def archive(path, reds):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for k, red in enumerate(reds):
            info = tarfile.TarInfo(f"{k}.png")
            info.size = len(png(red))
            tar.addfile(info, io.BytesIO(png(red)))
    return {"path": path.parent}


def test_an_archive_of_other_bytes_is_prepared_again(tmp_path, how):
    path = tmp_path / "set/a.tar"
    where = archive(path, [1, 2, 3])
    archive(tmp_path / "set/b.tar", [4])
    size = path.stat().st_size
    run(where, tmp_path / "out", how)
    archive(path, [1, 9, 3])
    assert path.stat().st_size == size
    report = run(where, tmp_path / "out", how)
    assert (states(report), report.again) == (["written", "already there"], {"a": "the archive"})
    assert states(run(where, tmp_path / "out", how)) == ["already there"] * 2


def test_a_copy_of_an_archive_is_the_same_and_read_once_to_know(tmp_path, how, monkeypatch):
    path = tmp_path / "set/a.tar"
    where = archive(path, [1, 2, 3])
    run(where, tmp_path / "out", how)
    os.utime(path, ns=(5, 5))
    asked = []
    sha256 = type(open_source(**where)[0]).sha256
    monkeypatch.setattr(type(open_source(**where)[0]), "sha256", lambda unit: asked.append(unit.name) or sha256(unit))
    for _ in range(2):
        report = run(where, tmp_path / "out", how)
        assert (states(report), report.again, report.older) == (["already there"], {}, [])
    assert asked == ["a"]


# Marks of before ---------------------------------------------------------------------------------------------------


def as_before(out):
    """Marks that do not speak of files, as they were."""
    for path in (out / ".prepared/units").glob("*.json"):
        mark = json.loads(path.read_text())
        for name in ("images", "mtime_ns", "sha256_of_archive"):
            mark["identity"].pop(name, None)
        path.write_text(json.dumps(mark))
    shared = out / ".prepared/settings.json"
    values = json.loads(shared.read_text())
    del values["vae_weights"]
    shared.write_text(json.dumps(values))


@pytest.mark.parametrize("file", ["settings.json", "units/*.json"])
def test_settings_that_lack_one_are_refused(tmp_path, how, file):
    where, out = plain(tmp_path), tmp_path / "out"
    run(where, out, how)
    path = next((out / ".prepared").glob(file))
    values = json.loads(path.read_text())
    del (values if file == "settings.json" else values["settings"])["latents"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="latents None, now it is 'sample'"):
        run(where, out, how)


@pytest.mark.parametrize("kind", [*KINDS, lambda root: archive(root / "set/a.tar", [1])])
def test_older_marks_hold_are_told_and_then_know_their_files(tmp_path, how, kind):
    where, out = kind(tmp_path), tmp_path / "out"
    units = len(run(where, out, how).units)
    as_before(out)
    report = run(where, out, how)
    assert (states(report), len(report.older)) == (["already there"] * units, units)
    assert "made before times of change were noted, taken to be unchanged" in str(report)
    assert json.loads((out / "prepare.json").read_text())["older"] == report.older
    file = max((tmp_path / "set").iterdir())
    if file.suffix == ".tar":
        archive(file, [200])
    elif file.suffix == ".png":
        file.write_bytes(png(77))
    else:
        (tmp_path / "set/5.png").write_bytes(png(77))
    report = run(where, out, how)
    assert (report.older, len(report.again)) == ([], 1)


# Weights -----------------------------------------------------------------------------------------------------------


def test_other_weights_under_the_name_of_the_vae_are_refused(tmp_path, how, vae):
    shutil.copytree(vae, tmp_path / "vae")
    where, mine = plain(tmp_path), replace(how, vae=str(tmp_path / "vae"))
    run(where, tmp_path / "out", mine)
    for path in (tmp_path / "vae").iterdir():
        os.utime(path, ns=(5, 5))  # a copy
    assert states(run(where, tmp_path / "out", mine)) == ["already there"] * 3
    other = sdxl_vae()
    other.encoder.conv_in.weight.data += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"holds shards prepared with vae_weights '\w+', now it is '\w+'"):
        run(where, tmp_path / "out", mine)
    as_before(tmp_path / "out")  # what was not noted is taken to be so, and is noted
    run({"path": where["path"]}, tmp_path / "out", mine)


def test_weights_of_files_and_folders_follow_their_contents(tmp_path, how):
    file = tmp_path / "vae.safetensors"
    detector = tmp_path / "detector"
    detector.mkdir()
    both = replace(how, vae=str(file), detector=str(detector))
    told = []
    for vae, network in (("1", "1"), ("2", "1"), ("2", "2"), ("2", "2")):
        file.write_text(vae)
        (detector / "model.safetensors").write_text(network)
        (detector / "README.md").write_text(str(len(told)))
        told.append(weights_of(both))
    assert [told[k]["vae"] == told[k + 1]["vae"] for k in range(3)] == [False, True, True]
    assert [told[k]["detector"] == told[k + 1]["detector"] for k in range(3)] == [True, False, True]
    assert weights_of(replace(how, vae="owner/name")) == {}


def test_other_weights_of_a_detector_do_its_units_again(tmp_path, how, monkeypatch):
    where = plain(tmp_path)
    run(where, tmp_path / "out", how)
    monkeypatch.setattr("gligen_xl.prepare.run.weights_of", lambda settings: {"detector": "other"})
    for expected in ("already there", "already there"):  # what was not noted is taken to be so, and is noted
        assert states(run(where, tmp_path / "out", how)) == [expected] * 3
    monkeypatch.setattr("gligen_xl.prepare.run.weights_of", lambda settings: {"detector": "third"})
    report = run(where, tmp_path / "out", how)
    assert states(report) == ["written"] * 3
    assert set(report.again.values()) == {"the detector's weights"}


def test_the_report_of_the_first_run_is_kept_whole(tmp_path, how):
    where = rows(tmp_path)
    (tmp_path / "set/2.png").unlink()
    first = run(where, tmp_path / "out", how)
    second = run(where, tmp_path / "out", how)
    assert second.total == first.total
    assert "there is no such file; expected the path of an image relative to" in str(second)
    assert len(Shard(Path(tmp_path / "out/set-00001"))) == 1
