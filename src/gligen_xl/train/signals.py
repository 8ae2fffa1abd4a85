"""Signals that ask a run to stop, from the start of the command to its end.

This module imports nothing heavy, as the command line begins with it. Before the first step there is nothing to save,
so a request ends the program at once; afterwards the run ends after the present step. A thread receives the signals
too, because Python handles them only when the main thread returns to it.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from types import FrameType

from .presence import announce

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130
REQUESTS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # what torchrun and accelerate launch set

_UNWIND = 5.0  # seconds for the main thread, after it was interrupted
_END = 20.0  # seconds from the exit code to the end of the program


@dataclass
class StopRequest:
    came: bool = False


# In the program -----------------------------------------------------------------------------------------------------


class _Watch:
    """A thread that receives signals and notices the end of the launcher, whatever the main thread does.

    Attributes:
        steps_began: there is something to save, so the training loop handles requests.
        farewell: a function called before the program is ended at once.
    """

    def __init__(self) -> None:
        self.steps_began = False
        self.farewell: Callable[[], object] = _nothing
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._requests, self._code, self._ends, self._closed = 0, None, float("inf"), False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former_file = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _heard) for number in _handled_signals()}
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def close(self) -> None:
        """Restore the former handlers."""
        signal.set_wakeup_fd(self._former_file)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._closed = True
        os.write(self._write, b"\0")

    def end_with(self, code: int) -> None:
        """End the program soon with this code, even if something waits for ever."""
        self._code, self._ends = code, time.monotonic() + _END

    def end_now(self) -> None:
        """End the process with its exit code; the last handler at exit."""
        if self._code is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(self._code)

    def _watch(self) -> None:
        while not self._closed:
            heard = select.select([self._read], [], [], 1.0)[0]
            for number in os.read(self._read, 64) if heard else b"":
                if number in REQUESTS and not self._closed:
                    self._answer(number)
            if self._parent not in (None, os.getppid()):
                self._parent = None
                os.write(2, b"\nthe launcher of this run is gone\n")
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > self._ends:
                os._exit(self._code or 0)
        os.close(self._read)
        os.close(self._write)

    def _answer(self, number: int) -> None:
        self._requests += 1
        if not self.steps_began:
            os.write(2, b"\nstopped before the first step; the same command begins again\n")
            for last in (self.farewell, sys.stdout.flush):
                thread = threading.Thread(target=last, daemon=True)
                thread.start()
                thread.join(2)
            os._exit(STOPPED)
        if number == signal.SIGINT and self._requests > 1 and self._code is None:
            self._code, self._ends = INTERRUPTED, time.monotonic() + _UNWIND


_watch: _Watch | None = None


def answer_signals(words: Sequence[str]) -> bool:
    """Handle signals from now on, if these are the words of `gligen-xl train`; tell whether it began to."""
    global _watch
    if next((word for word in words if word != "--traceback"), None) != "train" or _watch is not None:
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    _watch = _Watch()
    announce()
    return True


def begin_program(words: Sequence[str]) -> None:
    """Do the same for a process that runs nothing else, and ends it when its command has ended."""
    if answer_signals(words) and _watch is not None:
        atexit.register(_watch.end_now)  # the first to be registered is the last to be called


def answering_signals(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap `main(argv)` to handle signals while it trains."""

    @wraps(main)
    def answering(argv: Sequence[str] | None = None) -> int:
        global _watch
        began = answer_signals(sys.argv[1:] if argv is None else argv)
        try:
            code = main(argv)
            if _watch is not None and not began:
                _watch.end_with(code)
            return code
        finally:
            if began and _watch is not None:
                _watch.close()
                _watch = None

    return answering


def before_the_end(farewell: Callable[[], object]) -> None:
    """Set a function to be called before the program is ended at once."""
    if _watch is not None:
        _watch.farewell = farewell


# In the run ---------------------------------------------------------------------------------------------------------


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGHUP and the first Ctrl-C into a request to save and end; a second Ctrl-C ends at once."""
    request = StopRequest()

    def receive(number: int, frame: FrameType | None) -> None:
        if _watch is not None and not _watch.steps_began:
            return  # it ends the program
        request.came = True
        with suppress(OSError):  # print is not safe here
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C ends it at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        former = {number: signal.signal(number, receive) for number in _handled_signals()}
    except ValueError:  # not the main thread: whoever runs this thread has the signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def steps_begin() -> None:
    """Leave requests to the training loop from now on, which saves first."""
    if _watch is not None:
        _watch.steps_began = True


def _handled_signals() -> list[int]:
    """Return the signals to handle; under nohup SIGHUP is not one of them."""
    return [number for number in REQUESTS if number != getattr(signal, "SIGHUP", None) or not _is_ignored(number)]


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread receives the signal too."""


def _nothing() -> None:
    pass
