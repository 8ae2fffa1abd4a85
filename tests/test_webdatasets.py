"""Archives as `webdataset` and `tar` write them: every file of a sample is used, or told, or the unit fails."""

import gzip
import io
import json
import subprocess
import tarfile

import pytest
import webdataset
from PIL import Image

from gligen_xl.prepare.item import BAD_TEXT, Item, Skipped
from gligen_xl.prepare.report import UnitReport
from gligen_xl.prepare.sources import open_source
from gligen_xl.prepare.sources.rows import CAPTION_NOT_UTF8, NOT_UTF8
from gligen_xl.prepare.sources.tars import DOTS, read_samples

BOX = {"boxes": [[0.1, 0.2, 0.5, 0.6]], "phrases": ["a dog"], "box_format": "xyxy"}


def jpeg(value=0):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 120, 30)).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path, samples, **options):
    with webdataset.TarWriter(str(path), encoder=False, **options) as writer:
        for sample in samples:
            writer.write({k: v if isinstance(v, str | bytes) else json.dumps(v).encode() for k, v in sample.items()})
    return path


def files(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        folder.joinpath(name.replace("_", ".", 1)).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return folder


def run_tar(*words, cwd):
    subprocess.run(["tar", *map(str, words)], cwd=cwd, check=True, capture_output=True)


def results(path, **options):
    (unit,) = open_source(path, **options)
    return list(unit.items())


def used(found):
    return {item.image_id: item for item in found if isinstance(item, Item)}


def skipped(found):
    return {item.image_id: (item.reason, item.detail) for item in found if isinstance(item, Skipped)}


def unread(found):
    total = UnitReport()
    for item in found:
        total.unread.update(item.unread)
    return dict(total.unread)


def test_what_webdataset_writes(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=3, verbose=0, encoder=True) as writer:
        for k in range(6):
            image = Image.new("RGB", (8, 8), (40 * k, 0, 0))
            writer.write({"__key__": f"d/{k:03d}", "jpg": image, "json": BOX, "txt": f"caption {k}", "cls": k})
    found = [item for unit in open_source(tmp_path) for item in unit.items()]
    assert [item.image_id for item in found] == [f"d/{k:03d}" for k in range(6)]
    assert [item.caption for item in found] == [f"caption {k}" for k in range(6)]
    assert {item.boxes for item in found} == {((0.1, 0.2, 0.5, 0.6),)}
    assert found[4].where == f"{tmp_path / 'set-001.tar'}, sample d/004"
    assert unread(found) == {".cls": 6}


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_what_tar_writes(tmp_path, form):
    for k in range(3):
        files(tmp_path / "set/d", **{f"{k}_jpg": jpeg(k), f"{k}_json": json.dumps(BOX), f"{k}_txt": f"caption {k}"})
    run_tar("--sort=name", f"--format={form}", "-cf", "../a.tar", ".", cwd=tmp_path / "set")
    found = results(tmp_path / "a.tar")
    assert [(item.image_id, item.caption, item.phrases) for item in found] == [
        (f"d/{k}", f"caption {k}", ("a dog",)) for k in range(3)
    ]
    assert unread(found) == {}


@pytest.mark.parametrize("order", ["jpg json", "json jpg"])
@pytest.mark.parametrize("mode", ["-cf", "-czf"])
def test_members_that_are_not_adjacent_fail_the_unit_and_say_how_to_sort(tmp_path, order, mode):
    for k in range(3):
        files(tmp_path / "set", **{f"{k}_jpg": jpeg(k), f"{k}_json": json.dumps(BOX)})
    names = [f"{k}.{ending}" for ending in order.split() for k in range(3)]
    run_tar(mode, "../a.tar", *names, cwd=tmp_path / "set")
    again = order.split()[1]
    with pytest.raises(ValueError, match=rf"a\.tar: sample 0 comes back with \.{again}; .*tar --sort=name"):
        results(tmp_path / "a.tar")
    if mode == "-cf":  # of the first archive it is told before anything is begun
        with pytest.raises(ValueError, match=r"sample 0 comes back"):
            open_source(tmp_path / "a.tar")
    run_tar("--sort=name", mode, "../b.tar", ".", cwd=tmp_path / "set")
    assert [len(item.boxes) for item in results(tmp_path / "b.tar")] == [1, 1, 1]


def test_a_later_archive_that_is_not_adjacent_fails_alone(tmp_path):
    files(tmp_path / "in", **{f"{k}_jpg": jpeg() for k in range(2)}, **{f"{k}_json": json.dumps(BOX) for k in range(2)})
    run_tar("--sort=name", "-cf", "../set/a.tar", ".", cwd=files(tmp_path / "set") and tmp_path / "in")
    run_tar("-cf", "../set/b.tar", "0.jpg", "1.jpg", "0.json", "1.json", cwd=tmp_path / "in")
    good, bad = open_source(tmp_path / "set")
    assert [len(item.boxes) for item in good.items()] == [1, 1]
    with pytest.raises(ValueError, match=r"b\.tar: sample 0 comes back with \.json"):
        list(bad.items())


def test_an_archive_that_was_appended_to_is_not_read_twice(tmp_path):
    files(tmp_path / "set", a_jpg=jpeg(), a_json=json.dumps(BOX), b_jpg=jpeg())
    run_tar("--sort=name", "-cf", "../a.tar", ".", cwd=tmp_path / "set")
    run_tar("-rf", "../a.tar", "./a.jpg", cwd=tmp_path / "set")
    with pytest.raises(ValueError, match=r"sample a comes back with \.jpg"):
        results(tmp_path / "a.tar")


def test_the_same_key_in_two_folders_is_two_samples(tmp_path):
    samples = [{"__key__": f"{folder}/a", "jpg": jpeg(), "txt": folder.encode()} for folder in ("x", "y", "x/y")]
    found = results(write_shard(tmp_path / "a.tar", samples))
    assert {key: item.caption for key, item in used(found).items()} == {"x/a": "x", "y/a": "y", "x/y/a": "x/y"}


# Two archives in one file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_archives_that_were_put_together_are_all_read(tmp_path, packed):
    ending = "tar.gz" if packed else "tar"
    parts = [write_shard(tmp_path / f"{k}.{ending}", [{"__key__": f"{k}", "jpg": jpeg(), "json": BOX}]) for k in "abc"]
    whole = tmp_path / f"set/all.{ending}"
    whole.parent.mkdir()
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = results(whole)
    assert list(used(found)) == ["a", "b", "c"]
    assert found[-1].done <= whole.stat().st_size
    with tarfile.open(whole) as archive:
        assert len(archive.getnames()) == 2  # it stops where the first one ends
    whole.write_bytes(parts[0].read_bytes() + parts[1].read_bytes()[:700])
    with pytest.raises(ValueError, match=r"all\.tar.* (is cut short|is damaged).*fetch it again"):
        results(whole)


@pytest.mark.parametrize("rest", [b"x", b"\0" * 511 + b"x", b"text" * 400, b"\0" * 10_240 + b"\1" * 512])
def test_data_behind_the_end_is_noticed(tmp_path, rest):
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", "jpg": jpeg()}])
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    with pytest.raises(
        ValueError, match=r"a\.tar holds data behind its end that is no further archive, after 0 samples"
    ):
        results(path)
    path.write_bytes(whole + bytes(10_240 + 7))
    assert list(used(results(path))) == ["a"]


# Endings -----------------------------------------------------------------------------------------------------------


def test_endings_that_are_of_no_use_are_counted(tmp_path):
    sample = {"jpg": jpeg(), "json": BOX, "npy": b"1", "cls": b"1", "cls.txt": b"1", "seg.png": b"1", "jsonl": b"1"}
    path = write_shard(tmp_path / "a.tar", [{"__key__": f"{k}"} | sample for k in range(3)])
    found = results(path)
    assert len(used(found)) == 3
    assert unread(found) == {".npy": 3, ".cls": 3, ".cls.txt": 3, ".seg.png": 3, ".jsonl": 3}


@pytest.mark.parametrize("ending", ["txt", "TXT", "caption.txt", "text.txt", "prompt.txt", "text", "caption"])
def test_texts_that_are_captions(tmp_path, ending):
    path = tmp_path / "a.tar"
    files(tmp_path / "set", **{f"a_{ending}": "a dog", "a_JPG": jpeg(), "a_Json": json.dumps(BOX | {"text": "no"})})
    run_tar("--sort=name", "-cf", path, ".", cwd=tmp_path / "set")
    ((key, item),) = used(results(path)).items()
    assert (key, item.caption, item.phrases) == ("a", "a dog", ("a dog",))


def test_the_first_of_two_captions_is_used(tmp_path):
    sample = {"__key__": "a", "jpg": jpeg(), "caption.txt": b"long", "txt": b"short"}
    assert used(results(write_shard(tmp_path / "a.tar", [sample])))["a"].caption == "short"


def test_hidden_files_and_second_images_are_counted(tmp_path):
    files(tmp_path / "set", a_jpg=jpeg(), a_txt="a", a_webp=b"x", README="x", b_md="x")
    (tmp_path / "set/._a.jpg").write_bytes(b"\0\5\x16\7AppleDouble")
    run_tar("--sort=name", "-cf", "../a.tar", ".", cwd=tmp_path / "set")
    found = results(tmp_path / "a.tar")
    assert list(used(found)) == ["a"]
    assert unread(found) == {"hidden, or without an ending": 2, ".webp beside another image": 1, ".md": 1}


def test_images_whose_key_has_a_dot_are_told(tmp_path):
    found = results(write_shard(tmp_path / "a.tar", [{"__key__": "img.2020", "jpg": jpeg(), "txt": b"a"}]))
    assert skipped(found)["img.2020.jpg"] == (DOTS, "it is img.2020.jpg")


def test_endings_of_a_hostile_archive_are_told_together(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", "jpg": jpeg()} | {f"x{k}": b"" for k in range(500)}])
    counts = unread(results(path))
    assert (len(counts), sum(counts.values()), counts["others"]) == (31, 500, 470)


# Texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "reason", "told"),
    [
        ("un café".encode("latin-1"), CAPTION_NOT_UTF8, "a.txt: byte 6 is 0xe9, of another encoding"),
        ("a dog".encode("utf-16"), CAPTION_NOT_UTF8, "a.txt: it begins with the byte order mark of UTF-16"),
        ("a dog".encode("utf-32"), CAPTION_NOT_UTF8, "a.txt: it begins with the byte order mark of UTF-32"),
        ("a dog".encode("utf-16-le"), CAPTION_NOT_UTF8, "a.txt: byte 1 is NUL"),
        (b"a\0dog", CAPTION_NOT_UTF8, "a.txt: byte 1 is NUL"),
        (b"a \x1b[31mdog", BAD_TEXT, "a.txt: 'a \\x1b[31mdog' has U+001B at character 2"),
    ],
)
def test_captions_that_are_no_text_are_left_out(tmp_path, contents, reason, told):
    samples = [{"__key__": "a", "jpg": jpeg(), "txt": contents}, {"__key__": "b", "jpg": jpeg(), "txt": b"good"}]
    found = results(write_shard(tmp_path / "a.tar", samples))
    assert list(used(found)) == ["b"]
    ((why, detail),) = skipped(found).values()
    assert why == reason
    assert detail.startswith(told)


def test_rows_that_are_not_utf8_are_left_out(tmp_path):
    rows = [json.dumps(BOX | {"caption": "café"}, ensure_ascii=False).encode(form) for form in ("latin-1", "utf-16")]
    rows += [json.dumps(BOX | {"caption": "café"}, ensure_ascii=False).encode("utf-8-sig")]
    samples = [{"__key__": f"{k}", "jpg": jpeg(), "json": row} for k, row in enumerate(rows)]
    found = results(write_shard(tmp_path / "a.tar", samples))
    assert {key: why for key, (why, _) in skipped(found).items()} == {"0": NOT_UTF8, "1": NOT_UTF8}
    assert used(found)["2"].caption == "café"


def test_the_digest_is_that_of_the_file(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"__key__": f"{k}", "jpg": jpeg(k), "npy": bytes(10**5)} for k in range(9)])
    packed = tmp_path / "b/b.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        (unit,) = open_source(file)
        list(unit.items())
        assert unit.reading.sha256 == unit.sha256()
    assert sum(1 for _ in read_samples(packed, {"jpg": 10**6})) == 9
