"""Where units are done: one after another in this process, or on a Ray cluster, whose runners load the models once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .item import Unit
from .report import ALREADY, HELD, WRITTEN
from .unit import Progress, UnitMaker, no_progress
from .unit_folder import UnitFolder

SUCCESSES = (WRITTEN, ALREADY, HELD)  # what becomes of a unit that does not fail

Execute = Callable[[Sequence[Unit]], Iterator[tuple[Unit, str]]]  # does units; gives what became of each


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the work is done; what is written does not depend on it.

    Args:
        workers: decoding processes of each runner; 0 decodes in the runner itself.
        device: of the VAE and the detector.
        batch_size: images that are detected and encoded together.
        runner: "local" does units one after another here; "ray" on a Ray cluster (that of RAY_ADDRESS, or one of this
            machine), which has to see the same files.
        runners: on Ray, units at a time; by default one for each GPU, or for each `workers` + 1 CPUs.
    """

    workers: int = 0
    device: str = "cpu"
    batch_size: int = 8
    runner: Literal["local", "ray"] = "local"
    runners: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.runners is not None and (self.runners < 1 or self.runner != "ray"):
            raise ValueError(f"runners is {self.runners} with runner {self.runner!r}; expected at least 1, and ray")


class LocalRunner:
    """Does units one after another, in this process. As a context it gives the function that does them."""

    def __init__(self, folder: UnitFolder, machine: Machine, progress: Progress):
        self.folder, self.machine, self.progress = folder, machine, progress

    def __enter__(self) -> Execute:
        self.maker = UnitMaker(
            self.folder.out,
            self.folder.settings,
            workers=self.machine.workers,
            device=self.machine.device,
            batch_size=self.machine.batch_size,
        )
        return self.execute

    def __exit__(self, *_: object) -> None:
        self.maker.close()

    def execute(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        for unit in units:
            yield unit, run_unit(self.maker, self.folder, unit, self.progress)


def run_unit(maker: UnitMaker, folder: UnitFolder, unit: Unit, progress: Progress = no_progress) -> str:
    """Do one unit, unless it is done or another process works on it; return what became of it.

    Raises:
        OSError: the disk is full.
    """
    done_weight = 0

    def count(weight: int, images: int) -> None:
        nonlocal done_weight
        done_weight += weight
        progress(weight, images)

    with folder.hold(unit.name) as free:
        if not free or folder.is_done(unit):  # by another process, since this one looked
            count(unit.weight, 0)
            return ALREADY if free else HELD
        try:
            folder.claim()
            folder.check_unit(unit)
            identity = folder.identity(unit)
            report, shards = maker.make(unit, count)
            folder.mark(unit, identity, report, shards)
            return WRITTEN
        except Exception as error:  # whatever it is, other units may still be done
            count(-done_weight, 0)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno, f"the disk of {maker.out} is full; make room, and the same command goes on"
                ) from error
            text = " ".join(str(error).split())
            return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


class RayRunner(LocalRunner):
    """Does units on many machines that see the same files."""

    def __enter__(self) -> Execute:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--runner ray needs Ray; pip install 'gligen-xl[ray]'") from error
        self.ray = ray
        self.idle: list[Any] = []
        self.began = not ray.is_initialized()
        if self.began:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            self._plan()
        except BaseException:
            self.__exit__()
            raise
        return self.execute

    def _plan(self) -> None:
        """Decide how many actors there are, and what each of them needs."""
        resources, gpus = self.ray.cluster_resources(), int(self.machine.device.startswith("cuda"))
        cpus = self.machine.workers + 1
        room = int(resources.get("GPU", 0)) if gpus else int(resources.get("CPU", 1)) // cpus
        if room < 1:
            raise ValueError(f"the Ray cluster has no room for a runner of {cpus} CPUs and {gpus} GPUs: {resources}")
        self.count = self.machine.runners or room
        self.actor: Any = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)

    def __exit__(self, *_: object) -> None:
        self.idle.clear()
        if self.began:
            self.ray.shutdown()

    def execute(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        """Do the units; whichever ends first comes first. An actor that dies fails its unit, and is replaced."""
        from ray.exceptions import RayError, RayTaskError

        waiting, running = list(units), {}
        while waiting or running:
            while waiting and len(running) < self.count:
                actor, unit = self.idle.pop() if self.idle else self._new_actor(), waiting.pop(0)
                running[actor.run.remote(unit)] = (actor, unit)
            (ready,), _ = self.ray.wait(list(running), num_returns=1)
            actor, unit = running.pop(ready)
            try:
                what, images = self.ray.get(ready)
                self.idle.append(actor)
            except RayTaskError as error:
                raise error.cause from None  # of the settings or the disk: no other actor would do better
            except RayError as error:
                what, images = f"the runner was lost ({type(error).__name__})", 0
            self.progress(unit.weight if what in SUCCESSES else 0, images)
            yield unit, what

    def _new_actor(self) -> Any:
        return self.actor.remote(self.folder, self.machine, Path.cwd())


class _Actor:
    """A local runner in a process of Ray. `working` is the folder that relative paths begin at."""

    def __init__(self, folder: UnitFolder, machine: Machine, working: Path):
        self.local, self.working = LocalRunner(folder, machine, self._count), working
        self.begun, self.images = False, 0

    def run(self, unit: Unit) -> tuple[str, int]:
        """Do a unit; return what became of it, and how many of its images were read."""
        if not self.begun:  # here, since an error of an actor's constructor does not reach the driver
            self._begin()
        self.begun = True
        self.images = 0
        ((_, what),) = self.local.execute([unit])
        return what, self.images

    def _begin(self) -> None:
        try:
            os.chdir(self.working)
        except OSError as error:
            raise OSError(
                f"a machine of the Ray cluster does not see the folder {self.working}: {error}; "
                "start from one that all of them see"
            ) from error
        self.local.__enter__()

    def _count(self, weight: int, images: int) -> None:
        self.images += images


def runner_for(folder: UnitFolder, machine: Machine, progress: Progress) -> LocalRunner:
    return (RayRunner if machine.runner == "ray" else LocalRunner)(folder, machine, progress)
