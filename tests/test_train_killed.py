"""A run that is killed, stopped or interrupted at any moment: the same command goes on and ends with the same bits."""

import hashlib
import json
import os
import random
import shutil
import signal
import time

import psutil
import pytest
import yaml
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline

from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint
from gligen_xl.train.log import CLOCKED

SAMPLES, MOMENTS = 96, 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """24 steps, a line every 5, a checkpoint every 3, a look at the grounding gain every 7."""
    folder = tmp_path_factory.mktemp("recipe")
    sdxl_pipeline().save_pretrained(folder / "base")
    write_shard(folder / "data" / "a", latents(40, side=8), [row(1 + k % 3) for k in range(40)], METADATA)
    settings = {
        "model": str(folder / "base"), "data": str(folder / "data"), "samples": SAMPLES, "batch_size": 4,
        "log_every": 5, "checkpoint_every": 12, "track": [], "augmentation": {"slots": 3},
        "optimization": {"learning_rate": 1e-2, "warmup_samples": 8, "ema_decay": 0.9},
        "validation": {"data": str(folder / "data"), "every": 28, "loss_samples": 4, "pictures": 0},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


# One step is not finite, and takes its time as one of a large model does.
PATCH = """
import time
import gligen_xl.train.step as step
real = step.denoising_loss
def slow(unet, scheduler, batch, *rest):
    time.sleep(0.01)
    losses = real(unet, scheduler, batch, *rest)
    return losses * float("nan") if batch.position == 44 else losses
step.denoising_loss = slow
"""


def begin(server, recipe, out, log):
    return server.begin(["train", str(recipe), "--out", str(out)], log, PATCH)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def send(number, pid, settings, delay, *, while_loading):
    """A signal to a run, some time after it has begun or, as it writes its settings, the steps have."""
    before = written(settings)
    if not while_loading:
        wait_until(lambda: not alive(pid) or written(settings) != before, 60)
    wait_until(lambda: not alive(pid), delay)
    if alive(pid):
        os.kill(pid, number)


def written(path):
    return path.stat().st_mtime_ns if path.is_file() else None


def ended_with(out):
    """All that a run leaves: bytes of its tensors by file, and its lines without what the clock says."""
    tensors, state = load_checkpoint(list_checkpoints(out)[-1])
    assert state["position"] == SAMPLES
    files = [*list_checkpoints(out)[-1].glob("*.safetensors"), *(out / "adapter").glob("*.safetensors")]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in entry.items() if name not in CLOCKED} for entry in rows]
    assert set(tensors) == {"gligen_adapter", "weights", "optimizer", "log"}
    kept = {name: state[name] for name in ("ema_steps", "log")}
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}, lines, kept


def test_killed_stopped_or_interrupted_at_any_moment_it_ends_with_the_same_bits(server, recipe, tmp_path):
    out, log, chance, codes = tmp_path / "out", tmp_path / "log", random.Random(0), []
    assert server.end(begin(server, recipe, tmp_path / "whole", log)) == 0, log.read_text()
    expected = ended_with(tmp_path / "whole")
    assert {entry["kind"] for entry in expected[1]} == {"train", "validation", "skipped"}
    finished = 0
    while len(codes) < MOMENTS:
        pid = begin(server, recipe, out, log)
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        send(number, pid, out / "config.json", chance.uniform(0, 0.5), while_loading=len(codes) % 5 == 0)
        code = server.end(pid)
        if code == 0:
            assert ended_with(out) == expected
            finished += 1
            shutil.rmtree(out)
        else:
            codes.append(code)
            # An interrupt before the command has begun, or after it, is Python's own: a shell calls it 130 as well.
            assert code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 75, 130), (
                f"code {code} after signal {number}: {log.read_text()}"
            )
            for path in list_checkpoints(out):
                load_checkpoint(path)
    assert server.end(begin(server, recipe, out, log)) == 0, log.read_text()
    assert ended_with(out) == expected
    assert not list(out.rglob("*.partial"))
    assert codes.count(75) >= 3, codes  # each kind of end did come
    assert codes.count(-signal.SIGKILL) >= 5, codes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(server, recipe, tmp_path, number, code):
    out, log = tmp_path / "out", tmp_path / "log"
    pid = begin(server, recipe, out, log)
    wait_until(lambda: list_checkpoints(out), 60)
    os.kill(pid, number)
    assert server.end(pid) == code, log.read_text()
    last = list_checkpoints(out)[-1]
    assert f"the same command continues from {last}" in log.read_text()
    assert log.read_text().rstrip().endswith(str(last))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_that_reaches_the_loading_processes_too(server, recipe, tmp_path, number):
    """As schedulers send it."""
    out, log = tmp_path / "out", tmp_path / "log"
    pid = server.begin(["train", str(recipe), "--out", str(out), "--workers", "2"], log, PATCH)
    wait_until(lambda: list_checkpoints(out), 60)
    os.killpg(pid, number)
    assert server.end(pid) == 75, log.read_text()
    position = int(list_checkpoints(out)[-1].name.split("-")[1])
    assert load_checkpoint(list_checkpoints(out)[-1])[1]["position"] == position < SAMPLES


def test_asked_to_stop_before_the_first_step(server, recipe, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    asked = "def asked(*rest, **named):\n    os.kill(os.getpid(), 15)\n    return reads(*rest, **named)\n"
    patch = PATCH + "import gligen_xl.train.setup as setup\nreads = setup.load_base\n" + asked
    pid = server.begin(["train", str(recipe), "--out", str(out)], log, patch + "setup.load_base = asked\n")
    assert server.end(pid) == 75, log.read_text()
    assert not list_checkpoints(out)
    assert "stopped before the first step" in log.read_text()


def test_a_second_interrupt_ends_it_at_once(server, recipe, tmp_path):
    """While the step goes on, after which the first would be heard."""
    out, log = tmp_path / "out", tmp_path / "log"
    patch = PATCH.replace("time.sleep(0.01)", "time.sleep(60 if batch.position == 24 else 0)")
    pid = server.begin(["train", str(recipe), "--out", str(out)], log, patch)
    wait_until(lambda: len(list_checkpoints(out)) == 2, 60)
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert alive(pid)
    os.kill(pid, signal.SIGINT)
    assert server.end(pid) == 130, log.read_text()
    assert log.read_text().rstrip().endswith("interrupted")
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-00000012", "checkpoint-00000024"]
