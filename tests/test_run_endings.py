"""Wherever an error comes from, a run ends soon, with its code and one line that names what is at fault."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.rows import METADATA, latents, row
from helpers.tiny import sdxl_pipeline

from gligen_xl.data.shard_writer import write_shard
from gligen_xl.train.checkpoint import list_checkpoints, load_checkpoint

SOON = 30  # seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    write_shard(tmp_path / "data" / "a", latents(40, side=8), [row(1 + k % 3) for k in range(40)], METADATA)
    return tmp_path / "data"


@pytest.fixture
def recipe(base, data, tmp_path):
    """A run that does not come to its end."""
    settings = {
        "model": str(base), "data": str(data), "out": str(tmp_path / "out"), "samples": 400_000, "batch_size": 4,
        "log_every": 1, "checkpoint_every": 8, "track": [], "augmentation": {"slots": 3},
        "optimization": {"learning_rate": 1e-2, "ema_decay": 0.9},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def wait_until(condition, what):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.01)


def text(path):
    return path.read_text() if path.is_file() else ""


def wait_for_steps(tmp_path, log):
    wait_until(lambda: text(tmp_path / "out" / "metrics.jsonl").count("\n") > 1, lambda: text(log))


def error_of(log):
    """The one line that says what was wrong: the last."""
    lines = text(log).rstrip().splitlines()
    assert "Traceback" not in text(log)
    assert re.match(r"gligen-xl train: error: ", lines[-1]), text(log)
    return lines[-1]


def endings(server, pids, log):
    """Exit codes, that come soon."""
    end = time.monotonic() + SOON
    while any(running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    late = [pid for pid in pids if running(pid)]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    codes = [server.end(pid) for pid in pids]
    assert not late, f"{codes} {text(log)}"
    return codes


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Loading processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_loading_process_ends_the_run_with_the_name_of_the_file(server, recipe, data, tmp_path, workers):
    log = tmp_path / "log"
    pid = server.begin(["train", str(recipe), "--workers", str(workers)], log)
    wait_for_steps(tmp_path, log)
    os.truncate(data / "a.safetensors", 3000)
    assert endings(server, [pid], log) == [2]
    assert f"{data / 'a.safetensors'} has become shorter" in error_of(log)


def test_so_where_several_processes_train(server, recipe, data, tmp_path):
    log = tmp_path / "log.0"
    pids = server.begin_ranks(["train", str(recipe), "--workers", "1"], tmp_path / "log")
    wait_for_steps(tmp_path, log)
    (data / "a.safetensors").rename(data / "gone")
    assert endings(server, pids, log) == [2, 2]
    assert all(str(data / "a.safetensors") in error_of(tmp_path / f"log.{rank}") for rank in (0, 1))


def loading(pid, number):
    """The ids of its loading processes."""
    wait_until(lambda: len(psutil.Process(pid).children()) == number, lambda: "")
    return [child.pid for child in psutil.Process(pid).children()]


def test_a_loading_process_that_is_killed_for_its_memory(server, recipe, tmp_path):
    log = tmp_path / "log"
    pid = server.begin(["train", str(recipe), "--workers", "2"], log)
    wait_for_steps(tmp_path, log)
    killed = loading(pid, 2)[1]
    os.kill(killed, signal.SIGKILL)
    assert endings(server, [pid], log) == [2]
    assert f"loading worker 1 (process {killed}) was killed by SIGKILL: the system does so when memory" in error_of(log)


def test_a_loading_process_that_hangs_keeps_no_run_from_stopping(server, recipe, tmp_path):
    """It saves what it has."""
    log = tmp_path / "log"
    patch = "import gligen_xl.data.workers as workers\nworkers.STOP_WAIT = 0.5\n"
    pid = server.begin(["train", str(recipe), "--workers", "1", "--checkpoint_every", "40000"], log, patch)
    wait_for_steps(tmp_path, log)
    (worker,) = loading(pid, 1)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED, lambda: "")
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)  # as when a launcher and a scheduler send it
    assert endings(server, [pid], log) == [75]
    (saved,) = list_checkpoints(tmp_path / "out")
    assert load_checkpoint(saved)[1]["position"] > 0
    assert f"the same command continues from {saved}" in text(log)
    assert not psutil.pid_exists(worker)


def test_a_loading_process_that_hangs_for_long(server, recipe, tmp_path):
    log = tmp_path / "log"
    pid = server.begin(["train", str(recipe), "--workers", "1", "--process_timeout", "2"], log)
    wait_for_steps(tmp_path, log)
    (worker,) = loading(pid, 1)
    os.kill(worker, signal.SIGSTOP)
    assert endings(server, [pid], log) == [2]
    assert re.search(r"loading worker 0 \(process \d+\) gave no batch for 2 seconds", error_of(log))
    assert not psutil.pid_exists(worker)


def test_loading_processes_end_with_a_run_that_is_killed(server, recipe, tmp_path):
    log = tmp_path / "log"
    pid = server.begin(["train", str(recipe), "--workers", "2"], log)
    wait_for_steps(tmp_path, log)
    workers = loading(pid, 2)
    os.kill(workers[0], signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert endings(server, [pid], log) == [-signal.SIGKILL]
    wait_until(lambda: not any(running(worker) for worker in workers), lambda: "they go on")


# Several processes --------------------------------------------------------------------------------------------------

FAIL = """
import gligen_xl.train.{module} as module
real = module.{name}
def failing(*rest, **named):
    if {condition}:
        raise OSError(5, "Input/output error", "/data/broken")
    return real(*rest, **named)
module.{name} = failing
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["before they meet", "in a step"])
def test_a_process_that_fails_ends_the_others_with_its_reason(server, recipe, tmp_path, place, rank):
    """No launcher ends them here, and they would wait for half an hour."""
    here = f"os.environ['RANK'] == '{rank}'"
    if place == "in a step":
        patch = FAIL.format(module="step", name="denoising_loss", condition=f"{here} and rest[2].position >= 16")
    else:
        patch = FAIL.format(module="precheck", name="check_before", condition=here)
    pids = server.begin_ranks(["train", str(recipe)], tmp_path / "log", patch=patch)
    assert endings(server, pids, tmp_path / "log.0") == [2, 2]
    assert error_of(tmp_path / f"log.{rank}").endswith("/data/broken: Input/output error")
    other = error_of(tmp_path / f"log.{1 - rank}")
    assert f"process {rank}: [Errno 5] Input/output error: '/data/broken'" in other


def test_an_error_of_the_main_process_alone_ends_the_others(server, recipe, data, tmp_path):
    """In the validation, while the others wait."""
    patch = FAIL.format(module="validate", name="Validator.__call__", condition="True")
    looks = ["--validation.data", str(data), "--validation.every", "8", "--validation.pictures", "0"]
    pids = server.begin_ranks(["train", str(recipe), *looks], tmp_path / "log", patch=patch)
    assert endings(server, pids, tmp_path / "log.0") == [2, 2]
    assert error_of(tmp_path / "log.0").endswith("/data/broken: Input/output error")
    assert "process 0: [Errno 5] Input/output error: '/data/broken'" in error_of(tmp_path / "log.1")


def test_one_that_fails_as_all_do_waits_for_nobody(server, recipe, data, tmp_path):
    (data / "a.arrow").unlink()
    pids = server.begin_ranks(["train", str(recipe)], tmp_path / "log")
    began = time.monotonic()
    assert endings(server, pids, tmp_path / "log.0") == [2, 2]
    assert time.monotonic() - began < SOON
    assert all("a.arrow" in text(tmp_path / f"log.{rank}") for rank in (0, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_before_they_meet(server, recipe, tmp_path, rank):
    """And so can say nothing. They are on one machine here."""
    patch = "import gligen_xl.recipes as recipes\nreal = recipes.find_recipe\nrecipes.find_recipe = lambda *a, **k: "
    patch += f"os.kill(os.getpid(), 9) if os.environ['RANK'] == '{rank}' else real(*a, **k)\n"
    pids = server.begin_ranks(["train", str(recipe)], tmp_path / "log", patch=patch)
    codes = endings(server, pids, tmp_path / f"log.{1 - rank}")
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 2)
    assert f"process {rank} of this run ended before it met the others" in error_of(tmp_path / f"log.{1 - rank}")


def test_a_process_that_never_comes(server, recipe, tmp_path):
    log = tmp_path / "log"
    alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713"}
    patch = "import gligen_xl.train.peers as peers\npeers.MEETING = 2\n"
    pid = server.begin(["train", str(recipe)], log, patch, alone)
    assert endings(server, [pid], log) == [2]
    assert "process 0 of this run waited 2 seconds in vain for the others (1 of 2) at 127.0.0.1:29713" in error_of(log)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_asked_to_stop_before_the_first_step_stops_all(server, recipe, tmp_path, rank):
    asked = f"os.kill(os.getpid(), 15) if os.environ['RANK'] == '{rank}' else None"
    patch = (
        f"import gligen_xl.train.setup as setup\nreal = setup.load_base\nsetup.load_base = lambda *a, **k: ({asked}, "
    )
    pids = server.begin_ranks(["train", str(recipe)], tmp_path / "log", patch=patch + "real(*a, **k))[1]\n")
    assert endings(server, pids, tmp_path / "log.0") == [75, 75]
    assert "stopped before the first step" in text(tmp_path / f"log.{rank}")


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29714", "-m"],
        pytest.param(
            ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "-m"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_that_is_killed_alone_ends_its_processes_with_a_checkpoint(recipe, tmp_path, launcher):
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *launcher, "gligen_xl.cli", "train", str(recipe), "--workers", "1"]
        launched = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        wait_for_steps(tmp_path, log)
        ranks = psutil.Process(launched.pid).children()
        assert len(ranks) == (2 if "torch.distributed.run" in launcher else 1)
        launched.kill()
        launched.wait()
        _, alive = psutil.wait_procs(ranks, timeout=SOON)
        assert not alive, text(log)
    finally:
        for process in psutil.process_iter():
            if process.pid != os.getpid() and os.getpgid(process.pid) == launched.pid:
                process.kill()
    last = list_checkpoints(tmp_path / "out")[-1]
    assert "the launcher of this run is gone" in text(log)
    assert f"the same command continues from {last}" in text(log)
    load_checkpoint(last)


# Signals ------------------------------------------------------------------------------------------------------------


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = text(Path(f"/proc/{pid}/status"))
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_the_first_moment_a_request_to_stop_gives_its_code(recipe, number):
    command = [sys.executable, "-X", "importtime", "-m", "gligen_xl.cli", "train", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: catches(process.pid, signal.SIGTERM), lambda: "no handler")
        process.send_signal(number)
        _, said = process.communicate(timeout=SOON)
    assert process.returncode == 75
    assert "stopped before the first step; the same command begins again" in said
    imported = [line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")]
    before = imported[: imported.index("gligen_xl.train.signals")]
    assert not {"torch", "jsonargparse", "yaml", "numpy"} & set(before)


ASK = """
import signal
import gligen_xl.{module} as module
real = module.{name}
def asked(*rest, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*rest, **named)
module.{name} = asked
"""


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [
        ("recipes", "find_recipe", 75),
        ("train.precheck", "check_before", 75),
        ("train.loop", "make_accelerator", 75),
        ("train.setup", "load_base", 75),
        ("train.setup", "open_data", 75),
        ("train.loop", "RunLog.__enter__", 75),
        ("train.validate", "Validator.__call__", 75),
        ("train.checkpoint", "save_checkpoint", 75),
        ("train.loop", "save_adapter", 0),  # the run is finished
        ("train.estimate", "estimate", 75),
    ],
)
def test_a_request_to_stop_wherever_the_run_is(server, recipe, data, tmp_path, module, name, code):
    log = tmp_path / "log"
    words = ["train", str(recipe), "--samples", "8" if name == "save_adapter" else "40"]
    words += ["--validation.data", str(data), "--validation.every", "8", "--validation.pictures", "0"]
    words += ["--validation.loss_samples", "4"]
    words += ["--dry_run"] if name == "estimate" else []
    pid = server.begin(words, log, ASK.format(module=module, name=name))
    assert endings(server, [pid], log) == [code], text(log)
    assert ("stopped" in text(log)) == (code == 75)


def test_a_second_interrupt_ends_a_run_that_hears_nothing(server, recipe, tmp_path):
    """As in a call of C that does not come back: the thread that hears signals too ends it."""
    log = tmp_path / "log"
    patch = """
import ctypes
import gligen_xl.train.step as step
import gligen_xl.train.signals as signals
signals._UNWIND = 0.5
def hang(unet, scheduler, batch, *rest):
    print("hangs", flush=True)
    wait = ctypes.CDLL(None).pthread_mutex_lock  # which signals do not interrupt
    mutex = ctypes.create_string_buffer(64)
    wait(mutex), wait(mutex)
step.denoising_loss = hang
"""
    pid = server.begin(["train", str(recipe)], log, patch)
    wait_until(lambda: "hangs" in text(log), lambda: text(log))
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)  # else the two are one
    os.kill(pid, signal.SIGINT)
    assert endings(server, [pid], log) == [130]


# The disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_is_named(server, recipe, tmp_path):
    log, lines = tmp_path / "log", tmp_path / "out" / "metrics.jsonl"
    lines.parent.mkdir()
    lines.symlink_to("/dev/full")
    pid = server.begin(["train", str(recipe), "--workers", "1"], log)
    assert endings(server, [pid], log) == [2]
    assert error_of(log).endswith(f"{lines}: No space left on device")


@pytest.mark.parametrize("name", ["config.json", "validation/00000008.png"])
def test_a_full_disk_under_what_is_written_once_is_named(server, recipe, data, tmp_path, name):
    log = tmp_path / "log"
    patch = f"""
import gligen_xl.io as files
real = files.settle
def full(partial, path):
    if path.name == {Path(name).name!r}:
        raise OSError(28, "No space left on device")
    real(partial, path)
files.settle = full
"""
    looks = ["--validation.data", str(data), "--validation.every", "8", "--validation.pictures", "1"]
    looks += ["--validation.steps", "1", "--validation.loss_samples", "4"]
    pid = server.begin(["train", str(recipe), *looks], log, patch)
    assert endings(server, [pid], log) == [2]
    assert error_of(log).endswith(f"{tmp_path / 'out' / name}: No space left on device")
