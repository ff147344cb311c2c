"""The processes that are measured: nodes of mehdb and bare reference servers, on loopback, each with a port of its own.

Every process started here is stopped here, whatever happens; none outlives the benchmark.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

from machine import peak_memory_bytes, pin, processor_us

T = TypeVar("T")

ROOT: Final = Path(__file__).parent.parent
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0  # above the node's own MEHDB_STOP_TIMEOUT
POLL_S: Final = 0.002  # short beside the second that a restart may take, and no load
LOG_TAIL_LINES: Final = 15


class BenchError(Exception):
    """A figure could not be measured, or what was measured is no honest figure."""


def until(look: Callable[[], T | None], what: str, timeout_s: float, poll_s: float = POLL_S) -> T:
    """Return the first answer of *look* that is not None. Raises `BenchError`, saying *what* did not come."""
    deadline = time.monotonic() + timeout_s
    while (answer := look()) is None:
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)
    return answer


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A process that listens on *port*, bound to one core. Its output goes to *log*."""

    name: str
    command: list[str]
    log: Path
    core: int
    port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/"
    code: Path = ROOT
    """Where Python finds the package that is run: another version of it may be elsewhere."""
    process: subprocess.Popen[bytes] | None = None
    peak_bytes: int = 0
    """The most memory that any process of this server had resident; see `note_peak`."""

    def __post_init__(self) -> None:
        # verify: there is no TLS here, and loading the certificates takes longer than a restart may.
        self._client = httpx.Client(base_url=self.url, timeout=5, trust_env=False, verify=False)  # noqa: S501

    @property
    def url(self) -> str:
        """The server's base URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process. It does not listen yet."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.code,
                env={**os.environ, **self.environment},
            )  # fmt: skip
        self.move(self.core)

    def move(self, core: int) -> None:
        """Bind the running process to *core*."""
        self.core = core
        pin(self._alive().pid, core)

    def get(self, path: str) -> httpx.Response | None:
        """Return the answer to `GET path`, None while nothing answers. Raises `BenchError` if the process has ended."""
        self._alive()
        try:
            return self._client.get(path, headers={"Accept": "application/json"})
        except httpx.TransportError:
            return None

    def json(self, path: str) -> dict[str, Any] | None:
        """Return the JSON at *path*, None while there is none."""
        answer = self.get(path)
        return answer.json() if answer is not None and answer.is_success else None

    def wait_ready(self) -> None:
        """Wait until the server answers its ready path well. Raises `BenchError`."""

        def ready() -> bool | None:
            answer = self.get(self.ready_path)
            return True if answer is not None and answer.status_code == httpx.codes.OK else None

        until(ready, f"{self.name} answers {self.ready_path} with 200", START_TIMEOUT_S)

    def note_peak(self) -> int:
        """Take the process's memory into `peak_bytes`, and return that."""
        self.peak_bytes = max(self.peak_bytes, peak_memory_bytes(self._alive().pid))
        return self.peak_bytes

    def processor_us(self) -> int:
        """Return the microseconds of a core that the process has used so far."""
        return processor_us(self._alive().pid)

    def kill(self) -> None:
        """Kill -9, and wait until the process is gone."""
        process = self._alive()
        self.note_peak()
        process.kill()
        process.wait()

    def stop(self) -> None:
        """SIGTERM, kill -9 if that does not help in time. Does nothing if nothing runs."""
        if self.process is None or self.process.poll() is not None:
            return
        self.note_peak()
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _alive(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if self.log.exists() else []
        status = "was not started" if self.process is None else f"ended with status {self.process.returncode}"
        raise BenchError("\n".join([f"{self.name} {status}; its log ends:", *tail]))


class Cluster:
    """All servers of one run, under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.servers: list[Server] = []

    def leader(self, core: int, name: str = "mehdb-0", code: Path = ROOT) -> Server:
        """Return a leader, not started yet. Its store goes into `data_dir(leader)`; *name* is its volume's.

        *code* has the package that it runs.
        """
        return self._node(name, core, "", code)

    def follower(self, leader: Server, name: str, core: int) -> Server:
        """Return a follower of *leader* with an empty volume, not started yet. *name* is its volume's."""
        return self._node(name, core, leader.url)

    def reference(self, kind: str, core: int) -> Server:
        """Return a bare server of *kind*, `application` or `low-level`, not started yet."""
        server = Server(f"reference-{kind}", [], self.directory / f"{kind}.log", core, ready_path="/get/any")
        server.command = [sys.executable, str(ROOT / "bench" / "reference.py"), kind, str(server.port)]
        return self._keep(server)

    def data_dir(self, server: Server) -> Path:
        """Return the directory that holds the store of *server*."""
        return self.directory / server.name

    def drop(self, server: Server) -> None:
        """Stop *server* and delete its store."""
        server.stop()
        shutil.rmtree(self.data_dir(server), ignore_errors=True)

    def stop(self) -> None:
        """Stop everything, the last started first, as a StatefulSet does."""
        for server in reversed(self.servers):
            server.stop()

    def _node(self, name: str, core: int, leader_url: str, code: Path = ROOT) -> Server:
        command = [sys.executable, "-m", "mehdb", "serve"]
        node = Server(name, command, self.directory / f"{name}.log", core, ready_path="/readyz", code=code)
        inherited = [variable for variable in os.environ if variable.startswith("MEHDB_")]
        node.environment = dict.fromkeys(inherited, "") | {
            "MEHDB_HOST": "mehdb-1" if leader_url else "mehdb-0",
            "MEHDB_PORT": str(node.port),
            "MEHDB_LISTEN": "127.0.0.1",
            "MEHDB_DATADIR": str(self.data_dir(node)),
            "MEHDB_PEERS": f"{leader_url},{node.url}" if leader_url else "",
            "MEHDB_LOG_LEVEL": "warning",
        }
        return self._keep(node)

    def _keep(self, server: Server) -> Server:
        self.servers.append(server)
        return server
