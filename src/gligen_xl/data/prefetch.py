"""Shards from elsewhere, fetched by threads before the training comes to them."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from queue import Queue
from typing import Any

from .shards import Shard
from .streaming import RemoteShard

AHEAD = 1000  # batches
AT_ONCE = 4  # shards


class Prefetching:
    """Batches of a loader, while threads fetch the shards that the next ones need.

    Args:
        loader: batches.
        needed: the shards of each of its batches, one after another.
        room: bytes of the cache.
    """

    def __init__(self, loader: Any, needed: Iterator[list[Shard]], room: int):
        self._loader, self._needed, self._room = loader, needed, room

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Generator[Any]:
        # Forks its workers, which is better done before there are threads.
        with closing(iter(self._loader)) as batches:
            ahead = _Ahead(self._needed, self._room)
            try:
                for number, batch in enumerate(batches):
                    ahead.reach(number)
                    yield batch
            finally:
                ahead.stop()


class _Ahead:
    """Threads that keep what the next batches need in the cache, as far as `room` bytes and `AHEAD` batches reach."""

    def __init__(self, needed: Iterator[list[Shard]], room: int):
        self._needed, self._room = needed, room
        self._reached, self._stopped = 0, False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._wanted: Queue[Shard | None] = Queue()
        for work in (self._look, *[self._fetch] * AT_ONCE):
            threading.Thread(target=work, daemon=True).start()

    def reach(self, number: int) -> None:
        """Batch `number` is there.

        Raises:
            Exception: what kept the thread from looking further.
        """
        with self._changed:
            self._reached = number
            self._changed.notify()
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        for _ in range(AT_ONCE):
            self._wanted.put(None)

    def _look(self) -> None:
        try:
            self._go_through()
        except Exception as error:  # for whoever waits for the batches
            self._error = error

    def _go_through(self) -> None:
        """Go through the batches and ask for each shard that comes up."""
        last: dict[Shard, int] = {}  # the last batch that needs it, of those looked at
        for number, shards in enumerate(self._needed):
            for shard in shards:
                if shard not in last:
                    last[shard] = number
                    if not self._wait_for_room(number, last):
                        return
                    self._wanted.put(shard)
                last[shard] = number
            if not self._wait_for_room(number, last):
                return

    def _fetch(self) -> None:
        while not self._stopped and (shard := self._wanted.get()):
            with suppress(Exception):  # it comes again to whoever reads the shard
                os.close(shard.open_latents())

    def _wait_for_room(self, number: int, last: dict[Shard, int]) -> bool:
        """Until batch `number` is near and its shards fit beside those that are needed before; False to stop."""
        with self._changed:
            while not self._stopped:
                for shard in [shard for shard, until in last.items() if until < self._reached]:
                    del last[shard]
                taken = sum(shard.bytes for shard in last if isinstance(shard, RemoteShard))
                if number <= self._reached or (number <= self._reached + AHEAD and taken <= self._room):
                    return True
                self._changed.wait()
            return False
