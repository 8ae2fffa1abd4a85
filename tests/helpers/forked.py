"""A process that has the libraries imported and forks a process of its own for every command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODULES = (
    "gligen_xl.train.loop, torch.distributed, "
    "gligen_xl.prepare.run, gligen_xl.prepare.sources, gligen_xl.toyworld.model"
)

_SERVER = """
import json, os, sys
from gligen_xl.cli.main import main
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(request["environment"])
        exec(request["patch"])
        sys.exit(main(request["words"]))
    print(pid, flush=True)
"""


class Server:
    """Starts processes that run commands, without the seconds that imports take: its own has what they need."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLIGEN_XL_TRACEBACK": ""}
        program = [sys.executable, "-c", f"import {MODULES}\n{_SERVER}"]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._line() == "ready"

    def begin(self, words: list[str], log: Path, patch: str = "", environment: dict[str, str] | None = None) -> int:
        """The id of a new process that runs `gligen-xl WORDS`.

        Args:
            patch: Python to run there first.
        """
        request = {"words": words, "log": str(log), "patch": patch, "environment": environment or {}}
        return int(self._ask(request))

    def begin_ranks(self, words: list[str], log: Path, ranks: int = 2, patch: str = "") -> list[int]:
        """As `begin`, several processes of one run; their logs are LOG.0, LOG.1, ..."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.begin(words, Path(f"{log}.{rank}"), patch, {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]

    def end(self, pid: int) -> int:
        """Waits for a process; its exit code."""
        return int(self._ask({"wait": pid}))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)

    def _ask(self, request: Any) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
