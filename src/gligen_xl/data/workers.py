"""Loading workers: processes that each do every n-th task, a few before they are needed, and send results through a
pipe of their own.

Whoever waits for a result learns at once that its process has died, gets the very error that was raised there, and can
end all processes, whatever they are doing.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.multiprocessing

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
POLL_EVERY = 1.0  # seconds between checks that the other side still lives
STOP_WAIT = 10.0  # seconds to wait for a result when the run is asked to stop


class Stuck(RuntimeError):
    """The run is asked to stop, and no result comes."""


class Workers(Iterator[Any]):
    """The results of `work(task)`, in the order of the tasks.

    Args:
        tasks: these are drawn in this process, one by one.
        count: number of processes.
        prefetch: number of tasks that each process has in hand.
        timeout: seconds to wait for a result.
        stop_requested: tells whether the run is asked to stop; then it does not wait long for a result.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        tasks: Iterator[Any],
        count: int,
        prefetch: int,
        timeout: float | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self._tasks, self._timeout, self._stop_requested, self._turn = tasks, timeout, stop_requested, 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._in_hand = [0] * count
        # It is also called at the end of the program, before that waits for its processes.
        self.close = Finalize(self, _end, (self._processes, self._pipes), exitpriority=100)
        context = torch.multiprocessing.get_context()
        try:
            with _signals_delayed():  # a process that has not begun cannot handle them
                for number in range(count):
                    ours, theirs = context.Pipe()
                    self._pipes.append(ours)
                    process = context.Process(
                        target=_run, args=(work, theirs, os.getpid()), name=f"loading process {number}", daemon=True
                    )
                    process.start()
                    self._processes.append(process)
                    theirs.close()
            for _ in range(prefetch):
                for number in range(count):
                    self._give(number)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        """Return the next result.

        Raises:
            Stuck: the run is asked to stop, and no result came.
            RuntimeError: the process died, or no result came in time.
            Exception: whatever `work` raised.
        """
        if not self._in_hand[self._turn]:
            self.close()
            raise StopIteration
        try:
            error, value = self._receive(self._turn)
        except BaseException:
            self.close()
            raise
        if error:
            self.close()
            raise value
        self._in_hand[self._turn] -= 1
        self._give(self._turn)
        self._turn = (self._turn + 1) % len(self._pipes)
        return value

    def _give(self, number: int) -> None:
        """Send the next task, if there is one, to a process."""
        for task in self._tasks:
            self._in_hand[number] += 1
            with suppress(BrokenPipeError, ConnectionResetError):  # waiting for the result will tell
                self._pipes[number].send(task)
            return

    def _receive(self, number: int) -> tuple[bool, Any]:
        pipe, process, began, requested = self._pipes[number], self._processes[number], time.monotonic(), 0.0
        name = f"loading worker {number} (process {process.pid})"
        try:
            while not pipe.poll(POLL_EVERY):
                now = time.monotonic()
                if self._timeout is not None and now - began > self._timeout:
                    raise RuntimeError(
                        f"{name} gave no batch for {self._timeout:.0f} seconds (process_timeout); the disk or the "
                        "network that it reads may hang"
                    )
                requested = (requested or now) if self._stop_requested() else 0.0
                if requested and now - requested > STOP_WAIT:
                    raise Stuck(f"{name} gives no batch, and the run is asked to stop; the last checkpoint stands")
            return pipe.recv()
        except (EOFError, OSError) as error:
            process.join(5)
            raise RuntimeError(f"{name} {_ending(process.exitcode)}") from error


def _ending(code: int | None) -> str:
    """Say how a process ended."""
    if code is None or code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        "SIGKILL": ": the system does so when memory runs out; fewer workers take less",
        "SIGBUS": ": a file that it read became shorter, or shared memory (/dev/shm) ran out",
    }
    return f"was killed by {name}{hints.get(name, '')}"


def _end(processes: list[BaseProcess], pipes: list[Connection]) -> None:
    """End the processes, whatever they are doing."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)  # a process in a system call that cannot be interrupted ends later
    for pipe in pipes:
        pipe.close()


@contextmanager
def _signals_delayed() -> Iterator[None]:
    """Delays requests to stop until the end of the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


# In the process -----------------------------------------------------------------------------------------------------


def _run(work: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    """Do the tasks that come, until the parent is gone.

    A request to stop often goes to all processes of a job. The run has to end its step and save, for which it needs its
    workers: they ignore the request, and their parent ends them.
    """
    _end_with_parent()
    signal.set_wakeup_fd(-1)  # it belongs to the parent
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    gc.freeze()  # the collector would mark the parent's objects, which copies their memory
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            while not pipe.poll(POLL_EVERY):
                if os.getppid() != parent:
                    return
            task = pipe.recv()
            try:
                result = False, work(task)
            except Exception as error:
                result = True, _portable(error)
            pipe.send(result)


def _portable(error: Exception) -> Exception:
    """Return the error in a form that can be sent, with its traceback as a note."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, StopIteration):  # it would end the batches silently
        error = RuntimeError(f"StopIteration: {text}")
    if isinstance(error, MemoryError):
        error = RuntimeError(f"a loading worker has too little memory: {text}; fewer workers take less")
    error.add_note("in a loading process:\n" + "".join(traceback.format_exception(error)))
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # some exceptions cannot be made again from their arguments
        pass
    return RuntimeError(text if type(error).__name__ in text else f"{type(error).__name__}: {text}")


def _end_with_parent() -> None:
    """Ask the system to kill this process when the thread that started it ends, in whatever way."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
