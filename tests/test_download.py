"""Published sets from the Hub: the files that were asked for, if there is room, checked, and not twice."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from gligen_xl.cli.main import main
from gligen_xl.contrib.sa1b.download import archive_numbers, download

CONTENTS = {f"sa_{k:06d}.npy": bytes([k]) * (1000 + k) for k in range(5)}


@pytest.fixture
def hub(monkeypatch):
    state = SimpleNamespace(fetched=[], asked={}, torn=set())

    def info(api, repository, *, revision=None, files_metadata=False):
        assert files_metadata
        state.asked = {"repository": repository, "revision": revision}
        names = {**CONTENTS, "README.md": b"words", "evil.py": b"raise SystemExit"}
        return SimpleNamespace(
            siblings=[
                SimpleNamespace(
                    rfilename=name, size=len(data), lfs=SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
                )
                for name, data in reversed(names.items())
            ]
        )

    def fetch(repository, name, *, repo_type, local_dir, **_):
        assert repo_type == "dataset"
        state.fetched.append(name)
        from pathlib import Path

        path = Path(local_dir) / name
        path.write_bytes(CONTENTS[name][:-1] + b"?" if name in state.torn else CONTENTS[name])
        return str(path)

    monkeypatch.setattr("gligen_xl.contrib.sa1b.download.HfApi.dataset_info", info)
    monkeypatch.setattr("gligen_xl.contrib.sa1b.download.hf_hub_download", fetch)
    return state


def test_archives_that_are_named_come_once(hub, tmp_path):
    paths = download("sa1b-sdxl-512", tmp_path, archives="0-2,4", revision="v1")
    assert [path.name for path in paths] == [f"sa_{k:06d}.npy" for k in (0, 1, 2, 4)]
    assert hub.asked == {"repository": "jiuntian/sa1b-sdxl-latents-512", "revision": "v1"}
    assert all(path.read_bytes() == CONTENTS[path.name] for path in paths)
    hub.fetched.clear()
    download("sa1b-sdxl-512", tmp_path)
    assert hub.fetched == ["sa_000003.npy"]  # no README, no code
    (tmp_path / "sa_000001.npy").write_bytes(b"half")
    hub.fetched.clear()
    download("sa1b-sdxl-512", tmp_path)
    assert hub.fetched == ["sa_000001.npy"]


def test_a_file_that_came_wrong_is_removed_and_the_others_stay(hub, tmp_path):
    hub.torn = {"sa_000001.npy"}
    with pytest.raises(ValueError, match=r"sa_000001\.npy did not come as the Hub has it"):
        download("boxes", tmp_path)
    assert not (tmp_path / "sa_000001.npy").exists()
    assert list(json.loads((tmp_path / "download.json").read_text())) == ["sa_000000.npy"]
    hub.torn = set()
    assert len(download("boxes", tmp_path)) == 5


def test_too_little_space_is_found_out_before(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("gligen_xl.contrib.sa1b.download.shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(ValueError, match=r"5 files need 1\.0 GiB"):
        download("boxes", tmp_path)
    assert hub.fetched == []


def test_numbers_and_ranges():
    assert archive_numbers("0-2, 7") == {0, 1, 2, 7}
    for wrong in ("", "a", "3-1", "1-", "-2", "1;2"):
        with pytest.raises(ValueError, match="archives are"):
            archive_numbers(wrong)


def test_the_command(hub, tmp_path, capsys):
    assert main(["download", "boxes", "--archives", "1", "--out", str(tmp_path)]) == 0
    assert "1 files in" in capsys.readouterr().out
    for words, says in (
        (["nothing"], "there is no set 'nothing'"),
        (["boxes", "--archives", "9"], "has no archives [9]"),
        (["boxes", "--archives", "x"], "expected numbers and ranges"),
    ):
        assert main(["download", *words, "--out", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err
