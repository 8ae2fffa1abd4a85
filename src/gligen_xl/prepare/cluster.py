"""Units on a Ray cluster: each runner loads the models once and does unit after unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .item import Unit
from .run import Execute, Local, Machine
from .settings import Settings
from .unit import Progress, UnitMaker


class Cluster(Local):
    """As `Local`, on many machines that see the same files."""

    def __init__(self, out: str | Path, settings: Settings, machine: Machine, progress: Progress):
        super().__init__(Path(out).resolve(), settings, machine, progress)

    def __enter__(self) -> Execute:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--runner ray wants Ray; pip install 'gligen-xl[ray]'") from error
        self.ray = ray
        self.began = not ray.is_initialized()
        if self.began:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        resources, gpus = ray.cluster_resources(), int(self.machine.device.startswith("cuda"))
        cpus = self.machine.workers + 1
        room = int(resources.get("GPU", 0)) if gpus else int(resources.get("CPU", 1)) // cpus
        if room < 1:
            raise ValueError(f"the Ray cluster has no room for a runner of {cpus} CPUs and {gpus} GPUs: {resources}")
        self.count = self.machine.runners or room
        self.kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Runner)
        return self.execute

    def __exit__(self, *_: object) -> None:
        if self.began:
            self.ray.shutdown()

    def execute(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        """Whichever comes first; a runner that dies fails its unit, and another takes its place."""
        waiting, running = list(units), {}
        while waiting or running:
            while waiting and len(running) < self.count:
                self._begin(self._new_runner(), waiting.pop(0), running)
            (ready,), _ = self.ray.wait(list(running), num_returns=1)
            runner, unit = running.pop(ready)
            try:
                what = self.ray.get(ready)
                if waiting:
                    self._begin(runner, waiting.pop(0), running)
            except self.ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None  # of the settings or the disk: nobody else would do better
            except self.ray.exceptions.RayError as error:
                what = f"the runner was lost ({type(error).__name__})"
            self.progress(unit.weight, 0)
            yield unit, what

    def _new_runner(self) -> Any:
        return self.kind.remote(self.out, self.settings, self.machine)

    def _begin(self, runner: Any, unit: Unit, running: dict[Any, tuple[Any, Unit]]) -> None:
        running[runner.run.remote(unit)] = (runner, unit)


class _Runner:
    def __init__(self, out: Path, settings: Settings, machine: Machine):
        options = {"workers": machine.workers, "device": machine.device, "batch_size": machine.batch_size}
        self.maker = UnitMaker(out, settings, **options)  # type: ignore[arg-type]

    def run(self, unit: Unit) -> str:
        from .run import run_unit

        return run_unit(self.maker, unit)
