"""Units on a Ray cluster: each runner loads the models once and does unit after unit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .item import Unit
from .run import ENDS, Execute, Local, Machine
from .unit_folder import Done


class Cluster(Local):
    """As `Local`, on many machines that see the same files."""

    def __enter__(self) -> Execute:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--runner ray wants Ray; pip install 'gligen-xl[ray]'") from error
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
        """How many runners there are, and of what kind."""
        ray = self.ray
        resources, gpus = ray.cluster_resources(), int(self.machine.device.startswith("cuda"))
        cpus = self.machine.workers + 1
        room = int(resources.get("GPU", 0)) if gpus else int(resources.get("CPU", 1)) // cpus
        if room < 1:
            raise ValueError(f"the Ray cluster has no room for a runner of {cpus} CPUs and {gpus} GPUs: {resources}")
        self.count = self.machine.runners or room
        self.kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Runner)

    def __exit__(self, *_: object) -> None:
        self.idle.clear()
        if self.began:
            self.ray.shutdown()

    def execute(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        """Whichever comes first; a runner that dies fails its unit, and another takes its place."""
        from ray.exceptions import RayError, RayTaskError

        waiting, running = list(units), {}
        while waiting or running:
            while waiting and len(running) < self.count:
                runner, unit = self.idle.pop() if self.idle else self._new_runner(), waiting.pop(0)
                running[runner.run.remote(unit)] = (runner, unit)
            (ready,), _ = self.ray.wait(list(running), num_returns=1)
            runner, unit = running.pop(ready)
            try:
                what, images = self.ray.get(ready)
                self.idle.append(runner)
            except RayTaskError as error:
                raise error.cause from None  # of the settings or the disk: nobody else would do better
            except RayError as error:
                what, images = f"the runner was lost ({type(error).__name__})", 0
            self.progress(unit.weight if what in ENDS else 0, images)
            yield unit, what

    def _new_runner(self) -> Any:
        return self.kind.remote(self.done, self.machine, Path.cwd())


class _Runner:
    """Args as `Local`'s, and the folder that relative paths begin at."""

    def __init__(self, done: Done, machine: Machine, folder: Path):
        self.local, self.folder = Local(done, machine, self._count), folder
        self.begun, self.images = False, 0

    def run(self, unit: Unit) -> tuple[str, int]:
        """What became of a unit, and how many of its images were seen."""
        if not self.begun:  # here, since an error of an actor's beginning does not reach the one who began it
            self._begin()
        self.begun = True
        self.images = 0
        ((_, what),) = self.local.execute([unit])
        return what, self.images

    def _begin(self) -> None:
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise OSError(
                f"a machine of the Ray cluster does not see the folder {self.folder}: {error}; "
                "start from one that all of them see"
            ) from error
        self.local.__enter__()

    def _count(self, weight: int, images: int) -> None:
        self.images += images
