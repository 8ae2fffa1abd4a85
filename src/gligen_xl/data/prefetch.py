"""Threads that fetch remote shards before the training needs them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import Queue
from typing import Any, Self

from .shards import Shard
from .streaming import RemoteShard

MOST_BATCHES = 1000  # that are looked through before they are needed
THREADS = 4  # each fetches one shard at a time


class Prefetcher:
    """Keeps the shards of the next batches in the cache, as far as there is room.

    Args:
        needed: the shards of each batch, one batch after another.
        room: bytes of the cache.
    """

    def __init__(self, needed: Iterator[list[Shard]], room: int):
        self._needed, self._room = needed, room
        self._number, self._stopped = 0, False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._queue: Queue[Shard | None] = Queue()

    def __enter__(self) -> Self:
        for work in (self._plan, *[self._fetch] * THREADS):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        for _ in range(THREADS):
            self._queue.put(None)

    def reach(self, number: int) -> None:
        """Note that batch `number` is there.

        Raises:
            Exception: the error that ended the planning.
        """
        with self._changed:
            self._number = number
            self._changed.notify()
            if self._error is not None:
                raise self._error

    def _plan(self) -> None:
        try:
            self._queue_shards()
        except Exception as error:  # is raised where batches are waited for
            self._error = error

    def _queue_shards(self) -> None:
        """Go through the batches, and queues each shard that is not in the cache for an earlier one."""
        last: dict[Shard, int] = {}  # the last batch, of those gone through, that needs the shard
        for number, shards in enumerate(self._needed):
            for shard in shards:
                new = shard not in last
                last[shard] = number
                if new:
                    if not self._wait_for_room(number, last):
                        return
                    self._queue.put(shard)
            if not self._wait_for_room(number, last):
                return

    def _fetch(self) -> None:
        while not self._stopped and (shard := self._queue.get()):
            with suppress(Exception):  # whoever reads the shard meets the error again
                os.close(shard.open_latents())

    def _wait_for_room(self, number: int, last: dict[Shard, int]) -> bool:
        """Wait until batch `number` is near, and its shards fit beside those of earlier batches; False means stop."""
        with self._changed:
            while not self._stopped:
                for shard in [shard for shard, until in last.items() if until < self._number]:
                    del last[shard]
                used = sum(shard.bytes for shard in last if isinstance(shard, RemoteShard))
                if number <= self._number or (number <= self._number + MOST_BATCHES and used <= self._room):
                    return True
                self._changed.wait()
            return False
