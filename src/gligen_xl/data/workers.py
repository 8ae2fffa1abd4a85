"""Loading processes: each does every n-th task, a few ahead, and hands the results over through a pipe of its own.

Whoever waits for a result learns at once that its process is gone, gets the very error that was raised there, and can
end all of them whatever they are at.
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
_LOOK = 1.0  # seconds between looks whether the other side is still there
_ASKED = 10.0  # seconds to wait for a result when asked to stop


class Stuck(RuntimeError):
    """Asked to stop, and no result comes."""


class Workers(Iterator[Any]):
    """The results of `make(task)`, in the order of the tasks.

    Args:
        tasks: drawn here, one by one.
        count: processes.
        ahead: tasks that each of them has in hand.
        timeout: seconds to wait for a result.
        asked: whether one is asked to stop, so that a result is not worth a long wait.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        tasks: Iterator[Any],
        count: int,
        ahead: int,
        timeout: float | None = None,
        asked: Callable[[], bool] = lambda: False,
    ):
        self._tasks, self._timeout, self._asked, self._turn = tasks, timeout, asked, 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._in_hand = [0] * count
        # Also where nobody calls it: before the end of the program waits for its processes.
        self.close = Finalize(self, _end, (self._processes, self._pipes), exitpriority=100)
        context = torch.multiprocessing.get_context()
        try:
            with _signals_wait():  # they are not for a process that has not begun
                for number in range(count):
                    ours, theirs = context.Pipe()
                    self._pipes.append(ours)
                    process = context.Process(
                        target=_work, args=(make, theirs, os.getpid()), name=f"loading process {number}", daemon=True
                    )
                    process.start()
                    self._processes.append(process)
                    theirs.close()
            for _ in range(ahead):
                for number in range(count):
                    self._give(number)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        """The next result.

        Raises:
            Stuck: one is asked to stop, and none came.
            RuntimeError: the process died, or none came in time. Whatever `make` raised.
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
        """The next task, if there is one, to a process."""
        for task in self._tasks:
            self._in_hand[number] += 1
            with suppress(BrokenPipeError, ConnectionResetError):  # it is missed when its result is
                self._pipes[number].send(task)
            return

    def _receive(self, number: int) -> tuple[bool, Any]:
        pipe, process, began, asked = self._pipes[number], self._processes[number], time.monotonic(), 0.0
        name = f"loading worker {number} (process {process.pid})"
        try:
            while not pipe.poll(_LOOK):
                now = time.monotonic()
                if self._timeout is not None and now - began > self._timeout:
                    raise RuntimeError(
                        f"{name} gave no batch for {self._timeout:.0f} seconds (process_timeout); the disk or the "
                        "network that it reads may hang"
                    )
                asked = (asked or now) if self._asked() else 0.0
                if asked and now - asked > _ASKED:
                    raise Stuck(f"{name} gives no batch, and the run is asked to stop; the last checkpoint stands")
            return pipe.recv()
        except (EOFError, OSError) as error:
            process.join(5)
            raise RuntimeError(f"{name} {_how(process.exitcode)}") from error


def _how(code: int | None) -> str:
    """How a process ended."""
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
    """End the processes, whatever they are at."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)  # one in a system call that cannot be interrupted goes later, by itself
    for pipe in pipes:
        pipe.close()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Requests to stop that come meanwhile are heard afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


# In the process -----------------------------------------------------------------------------------------------------


def _work(make: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    """Do what comes, until nobody is there to take it.

    A request to stop often goes to all processes of a job. The run is to end its step and save, for which it needs
    these: they pass over it, and are ended by the one that began them.
    """
    _end_with_parent()
    signal.set_wakeup_fd(-1)  # that of the parent
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    gc.freeze()  # what comes from the parent is left alone by the collector, whose marks would copy it
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            while not pipe.poll(_LOOK):
                if os.getppid() != parent:
                    return
            task = pipe.recv()
            try:
                result = False, make(task)
            except Exception as error:
                result = True, _portable(error)
            pipe.send(result)


def _portable(error: Exception) -> Exception:
    """The error as it may be sent, with the place where it arose as a note."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, StopIteration):  # which would end the batches without a word
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
    """The system kills this process when the thread that began it ends, however that ends."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
