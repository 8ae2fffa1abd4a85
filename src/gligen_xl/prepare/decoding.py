"""Reads and decodes images ahead of the device: a thread reads, processes decode, and their order stays."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from .framing import Framed, Framing, Reason, begin_process, frame_image
from .item import Item, Skipped
from .report import UnitReport

Decoded = tuple[Item | Skipped, Framed | Reason | None]  # an image, and its frames, or why it has none

LONGEST = 600.0  # seconds for an image, after which its process is taken to be stuck
LONGEST_READ = 10.0  # seconds that an end waits for the reading thread


class Decoders:
    """Decoding processes, which are started once; with none of them (0) this process decodes.

    Args:
        ahead: images that may be decoded before they are asked for.
    """

    def __init__(self, workers: int, framing: Framing, ahead: int):
        self.workers, self.framing, self.ahead = workers, framing, ahead
        self._pool: ProcessPoolExecutor | None = None

    def decode(self, items: Iterator[Item | Skipped], report: UnitReport) -> Iterator[Decoded]:
        """Give images and their frames, in order.

        Args:
            report: its seconds of `wait` grow while nothing is ready.

        Raises:
            RuntimeError: a process died. Whatever `items` raises.
        """
        return self._decode_ahead(items, report) if self.workers else self._decode_here(items, report)

    def close(self) -> None:
        """End the processes, also one that is stuck in an image: the program would wait for it when it ends."""
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            self._pool = None

    def _decode_here(self, items: Iterator[Item | Skipped], report: UnitReport) -> Iterator[Decoded]:
        for item in items:
            if isinstance(item, Skipped):
                yield item, None
            else:
                with report.timed("wait"):
                    framed = frame_image(item.image, item.size, self.framing)
                yield item, framed

    def _decode_ahead(self, items: Iterator[Item | Skipped], report: UnitReport) -> Iterator[Decoded]:
        stop = threading.Event()
        entries: queue.Queue[Any] = queue.Queue(self.ahead + 2 * self.workers)

        def put(entry: Any) -> None:
            while not stop.is_set():
                try:
                    entries.put(entry, timeout=0.1)
                    break
                except queue.Full:
                    pass

        def feed() -> None:
            try:
                for item in items:
                    if stop.is_set():
                        return
                    if isinstance(item, Skipped):
                        put((item, None))
                    else:
                        future = pool.submit(frame_image, item.image, item.size, self.framing)
                        put((replace(item, image=b""), future))
                put(None)
            except BaseException as error:  # the other thread can do something about it
                put(error)

        thread = threading.Thread(target=feed, name="read", daemon=True)
        try:
            with report.timed("start"):
                pool = self._processes()
            thread.start()
            while True:
                with report.timed("wait"):
                    entry = entries.get()
                    framed = self._result(*entry) if isinstance(entry, tuple) and isinstance(entry[1], Future) else None
                if entry is None:
                    return
                if isinstance(entry, BaseException):
                    raise entry
                yield entry[0], framed
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError("a decoding process died: too little memory, or an image that breaks it") from error
        finally:
            stop.set()
            if thread.is_alive():
                thread.join(LONGEST_READ)  # from a disk that hangs it may never come

    def _result(self, item: Item, future: Future[Framed | Reason]) -> Framed | Reason:
        """Return the frames of an image, or why there are none.

        Raises:
            RuntimeError: a process is stuck in it.
        """
        try:
            return future.result(LONGEST)
        except TimeoutError as error:
            if future.done():  # it is of the image's file
                raise
            self.close()
            raise RuntimeError(f"a decoding process was stuck in {item.image_id} for {LONGEST:.0f} seconds") from error

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: a copy of a process with threads of torch may hang.
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=begin_process)
            wait([self._pool.submit(os.getpid) for _ in range(self.workers)])
        return self._pool
