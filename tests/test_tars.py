"""Archives: samples in one pass, nothing on the disk, and whatever is cut or damaged is noticed."""

import gzip
import io
import random
import tarfile
import tracemalloc

import pytest

from gligen_xl.images.decode import TOO_LARGE
from gligen_xl.prepare.sources.tars import BAD_NAME, DOTS, NO_FILE, read_samples

LIMITS = dict.fromkeys(["jpg", "png", "json", "txt"], 2**22)


def tar(path, members, format=tarfile.PAX_FORMAT, compressed=False):  # noqa: A002, tarfile's own name
    """Members are (name, contents), or a TarInfo alone."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    contents = stream.getvalue()
    path.write_bytes(gzip.compress(contents, 1) if compressed else contents)
    return path


def special(name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def keys(path):
    return [(sample.key, sample.files, sample.refused) for sample in read_samples(path, LIMITS)]


def pairs(count, seed=0):
    rng = random.Random(seed)
    for k in range(count):
        yield f"sa_{k}.jpg", rng.randbytes(rng.randrange(0, 1500))
        yield f"sa_{k}.json", b'{"k": %d}' % k


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_what_tarfile_finds(tmp_path, form, compressed):
    long = "d" * 90 + "/" + "n" * 70
    members = [*pairs(5), (f"{long}.jpg", b"long"), (f"{long}.json", b"{}"), ("./b.c.d.txt", b"?"), ("é.JPG", b"upper")]
    members += [("notes.md", b"no"), ("a.jpg", b"1"), ("a.jpg", b"2"), ("x.json", b"{}"), ("y.jpg", b"")]
    # The ending does not say what it is.
    path = tar(tmp_path / "any.name", members, form, compressed)
    expected = [(f"sa_{k}", {"jpg": jpg, "json": b'{"k": %d}' % k}) for k, jpg in enumerate(
        contents for name, contents in pairs(5) if name.endswith("jpg")
    )]  # fmt: skip
    expected += [(long, {"jpg": b"long", "json": b"{}"}), ("é", {"jpg": b"upper"}), ("a", {"jpg": b"1"})]
    expected += [("a", {"jpg": b"2"}), ("x", {"json": b"{}"}), ("y", {"jpg": b""})]
    assert keys(path) == [(key, files, {}) for key, files in expected]


def test_done_counts_bytes_of_the_file(tmp_path):
    for compressed in (False, True):
        path = tar(tmp_path / "a.tar", pairs(200), compressed=compressed)
        done = [sample.done for sample in read_samples(path, LIMITS)]
        assert done == sorted(done)
        assert 0 < done[0] < path.stat().st_size
        assert 0.8 * path.stat().st_size < done[-1] <= path.stat().st_size


def test_hostile_members_are_never_files(tmp_path):
    members = [
        ("/etc/a.jpg", b"x"),
        ("../../b.jpg", b"x"),
        ("c/../../d.jpg", b"x"),
        ("e\nf.jpg", b"x"),
        ("\x1b[31m.jpg", b"x"),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("null.jpg", tarfile.CHRTYPE),
        special("disk.jpg", tarfile.BLKTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
        ("._good.jpg", b"macOS"),
        ("d/._good.jpg", b"macOS"),
        special("linked", tarfile.SYMTYPE, "/etc"),
        ("good.jpg", b"good"),
    ]
    path = tar(tmp_path / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    found = keys(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert [(key, files) for key, files, refused in found if files] == [("good", {"jpg": b"good"})]
    reasons = {key: refused["jpg"] for key, files, refused in found if not files}
    assert set(reasons) == {"/etc/a", "../../b", "c/../../d", "e?f", "?[31m"} | {
        "link", "hard", "null", "disk", "pipe", "folder"
    }  # fmt: skip
    assert [reasons[key] for key in ("/etc/a", "../../b", "c/../../d", "e?f", "?[31m")] == [BAD_NAME] * 5
    assert {reasons[key] for key in ("link", "hard", "null", "disk", "pipe", "folder")} == {NO_FILE}


def test_names_that_are_not_utf8(tmp_path):
    path = tar(tmp_path / "a.tar", [("abcdef.jpg", b"x")], tarfile.USTAR_FORMAT)
    contents = bytearray(path.read_bytes())
    contents[:6] = b"\xff\xfedef"[:5] + b"g"
    total = sum(contents[:148]) + 8 * 32 + sum(contents[156:512])
    contents[148:156] = b"%06o\0 " % total
    path.write_bytes(contents)
    ((key, files, refused),) = keys(path)
    assert key.encode("utf-8").endswith(b"defg")
    assert (files, refused) == ({"jpg": b"x"}, {})


def test_sparse_files_are_refused(tmp_path):
    old = special("old.jpg", tarfile.GNUTYPE_SPARSE, size=0)
    new = special("new.jpg", tarfile.REGTYPE)
    new.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    path = tar(tmp_path / "a.tar", [old, new, ("good.jpg", b"good")])
    assert keys(path) == [("old", {}, {"jpg": NO_FILE}), ("new", {}, {"jpg": NO_FILE}), ("good", {"jpg": b"good"}, {})]


def test_members_above_their_limit_are_not_read(tmp_path):
    big = bytes(20 * 2**20)
    path = tar(
        tmp_path / "a.tar",
        [("a.jpg", big), ("a.json", b"{}"), ("b.jpg", b"x"), ("b.json", big), ("b.txt", b"xy"), ("c.txt", b"xyz")],
    )
    limits = {"jpg": 2**20, "json": 1000, "txt": 2}
    tracemalloc.start()
    found = [(sample.key, sample.files, sample.refused) for sample in read_samples(path, limits)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [
        ("a", {"json": b"{}"}, {"jpg": TOO_LARGE}),
        ("b", {"jpg": b"x", "txt": b"xy"}, {"json": TOO_LARGE}),
        ("c", {}, {"txt": TOO_LARGE}),
    ]
    assert peak < 4 * 2**20


def test_of_several_images_the_first_is_read(tmp_path):
    big = bytes(2**21)
    path = tar(
        tmp_path / "a.tar",
        [("a.png", big), ("a.jpg", big), ("a.txt", b"x"), ("b.jpg", bytes(2**23)), ("b.png", big), ("c.jpg", b"c")],
    )
    tracemalloc.start()
    found = [(sample.key, list(sample.files), sample.image) for sample in read_samples(path, LIMITS)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("a", ["png", "txt"], "png"), ("b", ["png"], "png"), ("c", ["jpg"], "jpg")]
    assert peak < 2.5 * 2**21  # one image of the sample that is left, and one of the next


def test_names_with_several_dots(tmp_path):
    members = [("d/a.0.png", b"0"), ("d/a.1.PNG", b"1"), ("d/a.2.txt", b"2"), ("b.png", b"b"), ("b.mask.png", b"m")]
    path = tar(tmp_path / "a.tar", [*members, ("._c.0.png", b"macOS")])
    assert keys(path) == [("d/a", {}, {"0.png": DOTS, "1.png": DOTS}), ("b", {"png": b"b"}, {"mask.png": DOTS})]
    dotted = [(sample.key, sample.files) for sample in read_samples(path, {"txt": 9}, dotted=True)]
    assert dotted == [("d/a.2", {"txt": b"2"})]


def test_headers_cannot_ask_for_memory(tmp_path):
    lie = special("x", tarfile.XHDTYPE)
    lie.size = 2**33
    path = tmp_path / "a.tar"
    path.write_bytes(lie.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    with pytest.raises(ValueError, match=r"is damaged \(a header of 8589934592 bytes\), after 0 samples"):
        keys(path)
    for size in ("-5", "many", "9" * 5000):
        info = special("a.jpg", tarfile.REGTYPE)
        info.pax_headers = {"size": size}
        tar(path, [info])
        with pytest.raises(ValueError, match=r"is (damaged|cut short)"):
            keys(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_cut_is_noticed(tmp_path, form, compressed):
    path = tar(tmp_path / "sa_000000.tar", pairs(6), form, compressed)
    whole = path.read_bytes()
    end = len(whole) if compressed else len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    cuts = {512 * k + d for k in range(end // 512) for d in (0, 1, 511)} | set(range(end - 40, end))
    cuts |= set(random.Random(0).sample(range(1, end), 60))
    complete = keys(path)
    for cut in sorted(cut for cut in cuts if 0 < cut < end):
        path.write_bytes(whole[:cut])
        found = []
        with pytest.raises(ValueError, match=r"sa_000000\.tar is cut short, after \d samples; fetch it again") as error:
            for sample in read_samples(path, LIMITS):
                found.append((sample.key, sample.files, sample.refused))
        assert f"after {len(found)} samples" in str(error.value)
        assert found == complete[: len(found)]
    path.write_bytes(whole[:end])
    assert keys(path) == complete


def test_damage_is_noticed(tmp_path):
    path = tar(tmp_path / "a.tar", pairs(6), compressed=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # the check sum
    with pytest.raises(ValueError, match=r"a\.tar is damaged \(CRC check failed.*, after 5 samples; fetch it again"):
        keys(path)
    for place in range(20, len(whole) - 8, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.tar is .*fetch it again"):
            keys(path)
    plain = bytearray(tar(path, [("a.jpg", b"x"), ("b.jpg", b"y")], tarfile.USTAR_FORMAT).read_bytes())
    plain[1024 + 20] ^= 1  # in the second header
    path.write_bytes(plain)
    with pytest.raises(ValueError, match=r"is damaged \(bad checksum\), after 0 samples"):
        keys(path)


def test_what_is_no_tar(tmp_path):
    path = tmp_path / "a.tar"
    for contents, what in (
        (b"", "is empty"),
        (b"<html>not found</html>" * 100, "is not a tar archive"),
        (b"\xff" * 2000, "is not a tar archive"),
        (gzip.compress(b"text" * 1000), "is not a tar archive"),
        (gzip.compress(b""), "is cut short"),
        (b"PK\x03\x04", "is cut short"),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"a\.tar {what}, after 0 samples"):
            keys(path)


def test_samples_come_before_the_end_is_seen(tmp_path):
    path = tar(tmp_path / "a.tar", pairs(50))
    path.write_bytes(path.read_bytes()[:20_000])
    samples = read_samples(path, LIMITS)
    assert next(samples).key == "sa_0"
    with pytest.raises(ValueError, match="is cut short"):
        list(samples)


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_is_that_of_one_sample(tmp_path, compressed):
    block = random.Random(0).randbytes(2**20)
    path = tar(tmp_path / "a.tar", ((f"{k}.jpg", block) for k in range(50)), compressed=compressed)
    tracemalloc.start()
    count = sum(len(sample.files["jpg"]) for sample in read_samples(path, LIMITS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 50 * 2**20
    assert peak < 5 * 2**20


def test_memory_does_not_grow_with_members(tmp_path):
    path = tar(tmp_path / "a.tar", ((f"{k}.jpg", b"") for k in range(5_000)), tarfile.USTAR_FORMAT)
    tracemalloc.start()
    assert sum(1 for _ in read_samples(path, LIMITS)) == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19
