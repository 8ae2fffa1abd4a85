"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    came: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGTERM and the first Ctrl-C ask for a checkpoint and an end; a second Ctrl-C ends at once."""
    request = StopRequest()

    def receive(number: int, frame: FrameType | None) -> None:
        request.came = True
        os.write(
            2, b"\nstopping after this step, with a checkpoint; Ctrl-C ends it at once\n"
        )  # print is not safe here
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        former = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs this thread has the signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
