"""How the processes of a run tell each other that one of them has ended.

Collective operations notice a missing process late (NCCL after `process_timeout`), or never (before the first
rendezvous). So every process keeps a connection to the first one: a failing process sends its reason, and a dying one
closes the connection. Before the rendezvous, at a torch store on MASTER_ADDR and MASTER_PORT, a failing process leaves
its reason in the store.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from ..escape import printable
from ..redact import redacted
from . import presence
from .signals import STOPPED, before_the_end

MEETING = 300  # seconds for all processes to come: they begin together, but some machines import slowly

_GRACE = 10.0  # seconds for the main thread to notice by itself, and say it in its own words
_TELLING = 20.0  # seconds to leave word for those that are not there yet
_POLL = 0.1
_CONNECT = 30.0

_LOGGER = logging.getLogger(__name__)


class Peers:
    """Connects all processes with the first one.

    Args:
        tell_all: sends a text of the first process to all.
    """

    def __init__(self, rank: int, count: int, tell_all: Callable[[str], str]):
        self._rank, self._left, self._lock = rank, False, threading.Lock()
        self._verdict: tuple[int, str] | None = None
        self._judged = threading.Event()
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._connect(rank, count, tell_all)
        before_the_end(lambda: self.leave("it was asked to stop before the first step", STOPPED))
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def leave(self, reason: str = "", code: int = 0) -> None:
        """Tell the others that this process ends.

        Args:
            reason: why the run cannot go on; empty if it is finished or stopped as a whole.
        """
        with self._lock:
            if self._left:
                return
            self._left = True
        if self._verdict is None:
            reason = reason and f"process {self._rank}: {reason}"
            for connection in self._connections.values():
                _send(connection, {"code": code, "reason": reason})

    def reason(self, seconds: float) -> str | None:
        """Wait for the reason why another process has ended the run; return None if none has."""
        self._judged.wait(seconds)
        return self._verdict[1] if self._verdict else None

    def _connect(self, rank: int, count: int, tell_all: Callable[[str], str]) -> None:
        if rank:
            port, token = tell_all("").split()
            with suppress(OSError):
                host = os.environ.get("MASTER_ADDR", "localhost")
                connection = socket.create_connection((host, int(port)), timeout=_CONNECT)
                _send(connection, {"rank": rank, "token": token})
                self._keep(0, connection)
        else:
            token = secrets.token_hex(8)
            with socket.create_server(("", 0), backlog=count) as server:
                tell_all(f"{server.getsockname()[1]} {token}")
                self._welcome(server, token, count)
        if len(self._connections) < (1 if rank else count - 1):
            _LOGGER.warning("process %d cannot be reached by all others at MASTER_ADDR; deaths are noticed late", rank)

    def _welcome(self, server: socket.socket, token: str, count: int) -> None:
        end = time.monotonic() + _CONNECT
        while len(self._connections) < count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError, KeyError, TypeError):
                connection, _ = server.accept()
                connection.settimeout(5)
                with connection.makefile("rb") as lines:
                    hello = json.loads(lines.readline(200))
                if hello["token"] == token:
                    self._keep(int(hello["rank"]), connection)

    def _keep(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is gone closes nothing
        for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self._connections[rank] = connection

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, (rank, bytearray()))
            while selector.get_map():
                for key, _ in selector.select():
                    rank, received = key.data
                    if (message := _receive(key.fileobj, received)) is None:
                        continue
                    selector.unregister(key.fileobj)
                    if message["reason"] and not self._left:
                        self._end(message["code"], message["reason"] if message["code"] else f"process {rank} is gone")

    def _end(self, code: int, reason: str) -> None:
        """End this process, as another one has ended."""
        self._verdict = code, reason
        self._judged.set()
        for connection in self._connections.values():
            _send(connection, {"code": code, "reason": reason})
        if code == STOPPED:
            _end_stopped(reason)
        time.sleep(_GRACE)
        if not self._left:
            _write(f"error: {ended(reason)}")
            os._exit(code)


def ended(reason: str) -> str:
    """Return the message of a process when another one has ended the run."""
    return f"another process of this run is gone, {reason}. The last checkpoint stands; the same command continues"


def _end_stopped(reason: str) -> NoReturn:
    """End this process, as another one was asked to stop before the first step."""
    _write(f"stopped: {reason}; the same command begins again")
    os._exit(STOPPED)


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"\n{printable(redacted(text))}\n".encode(errors="replace"))


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: Any, received: bytearray) -> dict[str, Any] | None:
    """Return the message of a connection, if it is complete; a closed connection counts as a message."""
    try:
        part = connection.recv(65536)
    except OSError:
        part = b""
    received += part
    if part and b"\n" not in received:
        return None
    try:
        return json.loads(received.partition(b"\n")[0])
    except ValueError:
        return {"code": 0, "reason": "gone"}


# Before the rendezvous -----------------------------------------------------------------------------------------------


_store: Any = None  # of this process; the first one's is the others' too, and has to stay
_waited = _met = False  # for the others; they are there


def meet(timeout: float) -> None:
    """Wait for all processes of the run.

    Raises:
        RuntimeError: one does not come, or cannot begin.
    """
    global _waited, _met
    if (ours := _rank_and_count()) is None or _met or dist.is_initialized():
        return
    _waited = True
    rank, count = ours
    end = time.monotonic() + min(timeout, MEETING)
    store = _open_store(end)
    missing = list(range(count))
    if store is not None:
        store.set(f"here/{rank}", "")
        while missing and time.monotonic() < end:
            if store.check(["failed"]):
                reason = store.get("failed").decode(errors="replace")
                store.set(f"heard/{rank}", "")
                code, _, text = reason.partition(" ")
                if int(code) == STOPPED:
                    _end_stopped(text)
                raise RuntimeError(f"another process of this run could not begin, {text}")
            missing = [other for other in missing if not store.check([f"here/{other}"])]
            if missing:
                _check_presence(missing)
                time.sleep(_POLL)
    if missing:
        others = ", ".join(str(other) for other in missing if other != rank)
        raise RuntimeError(
            f"process {rank} of this run waited {min(timeout, MEETING):.0f} seconds in vain for the others ({others} "
            f"of {count}) at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        )
    _met = True
    presence.withdraw()


def _check_presence(ranks: Iterable[int]) -> None:
    if (rank := presence.gone(ranks)) is not None:
        raise RuntimeError(f"process {rank} of this run ended before it met the others; its own log says more")


def tell_failure(reason: str, code: int) -> None:
    """Tell the others, before the rendezvous, that this process cannot begin."""
    global _met
    if (ours := _rank_and_count()) is None or _met or dist.is_initialized():
        return
    _met = True  # it is said once
    rank, count = ours
    end = time.monotonic() + _TELLING
    with suppress(RuntimeError, ValueError, OSError):
        store = _open_store(end)
        if store is None:
            return
        if not store.check(["failed"]):
            store.set("failed", f"{code} process {rank}: {reason}")
        store.set(f"heard/{rank}", "")
        if rank == 0:  # the word goes with this process
            others = [other for other in range(count) if not _waited or store.check([f"here/{other}"])]
            while time.monotonic() < end and presence.gone(others) is None:
                others = [other for other in others if not store.check([f"heard/{other}"])]
                if not others:
                    return
                time.sleep(_POLL)


def _rank_and_count() -> tuple[int, int] | None:
    """Return rank and number of processes; None if there is only one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names) or int(os.environ["WORLD_SIZE"]) < 2:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _open_store(end: float) -> Any:
    """Return the store of the rendezvous; None if nobody serves it until `end`, of the monotonic clock."""
    global _store
    if _store is None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosts = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not hosts and not _answers(host, port):
            if time.monotonic() > end:
                return None
            _check_presence([0])
            time.sleep(_POLL)
        # Later ones of this process at the same port share the server.
        store = dist.TCPStore(
            host, port, is_master=hosts, wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=_CONNECT)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = dist.PrefixStore(f"gligen-xl/{attempt}", store)
    return _store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
        return True
    except OSError:
        return False
