"""Preparation that is killed, stopped or begun twice: the same command goes on, and the shards are the same bytes."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.scenes import scenes_folder

from gligen_xl.cli.main import main

IMAGES, UNIT_SIZE = 40, 8
ENDINGS = (".safetensors", ".arrow")


class Run:
    """One command at work, and the decoding processes that were seen of it."""

    def __init__(self, server, words, log):
        self.server, self.log = server, log
        self.pid = server.begin(words, log)
        self.decoders = []

    def alive(self):
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch(self):
        """Note the processes below it; whether there are any."""
        if not self.decoders and self.alive():
            self.decoders = psutil.Process(self.pid).children(recursive=True)
        return bool(self.decoders)

    def end(self):
        """The exit code; afterwards nothing of it runs on."""
        code = self.server.end(self.pid)
        _, left = psutil.wait_procs(self.decoders, timeout=20)
        assert not left, f"{left} outlive the command"
        return code


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of images, five units."""

    def changed(image, index):
        return image.resize((120, 120)).crop((0, 0, 120, 120 - index % 3))

    return scenes_folder(tmp_path_factory.mktemp("source") / "scenes", IMAGES, seed=3, changed=changed)


def words(source, out):
    options = "--vae shapes --resolution 64 --resolution 32 --workers 1 --batch_size 4 --flip both --device cpu"
    return ["prepare", str(source), "--out", str(out), "--unit_size", str(UNIT_SIZE), *options.split()]


def hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def partials(folder):
    return list(folder.rglob("*.partial"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(words(source, folder)) == 0
    made = hashes(folder)
    assert len(made) == 2 * 2 * IMAGES // UNIT_SIZE
    return made


def wait_for(condition, timeout=60.0):
    """As soon as it holds, at most a millisecond later."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.0005)


def kill_when(run, out, pattern, delay):
    """SIGKILL `delay` seconds after there is another file of that name, and processes that decode."""
    before = set(out.rglob(pattern)) - set(partials(out))
    wait_for(lambda: (run.watch() and set(out.rglob(pattern)) - before) or not run.alive())
    time.sleep(delay)
    os.kill(run.pid, signal.SIGKILL)
    return run.end()


def test_killed_at_any_moment_and_run_again_the_shards_are_the_same(tmp_path, source, server, undisturbed):
    out, chance, landed = tmp_path / "out", random.Random(0), []
    # Some time after a unit is begun; or a shard's latents, its table, or the mark of a unit just took their place.
    moments = [("*.partial", chance.uniform(0, 0.15)) for _ in range(3)]
    moments[1:1] = [("64/*.safetensors", 0), ("32/*.arrow", 0), (".prepared/units/*.json", 0)]
    for pattern, delay in moments:
        run = Run(server, words(source, out), tmp_path / "log")
        if kill_when(run, out, pattern, delay) == -signal.SIGKILL:
            landed.append((pattern, len(hashes(out)), len(partials(out))))
        for shard in out.rglob("*.arrow"):
            name = str(shard.relative_to(out))
            assert hashlib.sha256(shard.read_bytes()).hexdigest() == undisturbed[name]
    assert len(landed) >= 4, landed
    assert any(rests for *_, rests in landed), landed  # a kill does leave some
    last = Run(server, words(source, out), tmp_path / "log")
    assert last.end() == 0, (tmp_path / "log").read_text()
    assert hashes(out) == undisturbed
    assert not partials(out)
    assert json.loads((out / "prepare.json").read_text())["seen"] == IMAGES


def test_stopped_it_ends_cleanly_and_goes_on(tmp_path, source, server, undisturbed):
    """By SIGTERM, as a cluster's scheduler does it."""
    out, log = tmp_path / "out", tmp_path / "log"
    run = Run(server, words(source, out), log)
    wait_for(lambda: run.watch() and list(out.glob(".prepared/units/*.json")))
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 130, log.read_text()
    assert log.read_text().rstrip().endswith("interrupted")
    assert not partials(out)
    made, done = hashes(out), len(list(out.glob(".prepared/units/*.json")))
    assert 0 < len(made) < len(undisturbed)
    assert made.items() <= undisturbed.items()
    written = json.loads((out / "prepare.json").read_text())
    assert written["seen"] == done * UNIT_SIZE
    assert set(written["units"].values()) == {"written", "not done yet"}
    again = Run(server, words(source, out), log)
    assert again.end() == 0
    assert f"5 of 5 units done ({done} already there)" in log.read_text()
    assert hashes(out) == undisturbed


def test_two_at_once_share_the_units(tmp_path, source, server, undisturbed):
    out = tmp_path / "out"
    runs = [Run(server, words(source, out), tmp_path / f"log-{k}") for k in range(2)]
    assert [run.end() for run in runs] == [0, 0]
    written = 0
    for run in runs:
        text = run.log.read_text()
        done, already = (re.search(rf"(\d) {what}", text) for what in ("of 5 units done", "already there"))
        assert done is not None, text
        written += int(done[1]) - int(already[1] if already else 0)
    assert written == 5  # each by one of them
    assert hashes(out) == undisturbed
    assert not partials(out)


def test_ctrl_c_in_a_terminal_ends_all_of_it(tmp_path, source, undisturbed):
    """The command as it is typed; the signal comes to the decoding processes too."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gligen_xl.cli", *words(source, out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list(out.glob(".prepared/units/*.json")) or process.poll() is not None)
    decoders = psutil.Process(process.pid).children(recursive=True)
    assert decoders
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.rstrip().endswith("interrupted")
    assert "SpawnProcess" not in error  # nothing is heard of the decoding processes
    assert not psutil.wait_procs(decoders, timeout=20)[1]
    assert not partials(out)
    assert hashes(out).items() <= undisturbed.items()
