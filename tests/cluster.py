"""Real nodes for tests: `mehdb serve` processes on free ports of the loopback address, each with a volume of its own.

Everything that waits has a deadline. `Cluster.stop` verifies every invariant of every store that is left.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from mehdb.model import NodeStatus, decode_status
from mehdb.store import Store

T = TypeVar("T")

ADDRESS = "127.0.0.1"
DEADLINE_S = 20.0  # for what takes well under a second on an idle machine
PAUSE_S = 0.02
ASK_EVERY_S = 1.0  # after 4 s of silence a follower no longer counts as connected
# One for all: making one takes longer than a request. It keeps no connections, as the node at the other end may die.
CLIENT = httpx.Client(timeout=DEADLINE_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def eventually(look: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of *look*; fail, saying *what* was waited for, when none came in time."""
    end_s = time.monotonic() + deadline_s
    while True:
        value = look()
        if value:
            return value
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(PAUSE_S)  # between two looks, not instead of one


PORTS_OF_A_RUN = 2048
LEAST_USUAL = 32768  # the first port that clients get, on most machines


def _ports() -> Iterator[int]:
    """Yield ports below those that the kernel gives to clients, over and over. Two runs at once share none of them."""
    # Where clients get nearly all there is no better place, and they seldom get one of these.
    least = max(LEAST_USUAL, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    with socket.socket(socket.AF_UNIX) as lock:
        for begin in range(least // 2, least - PORTS_OF_A_RUN + 1, PORTS_OF_A_RUN):
            with contextlib.suppress(OSError):
                lock.bind(f"\0mehdb-tests-{begin}")  # in no directory, and gone with this process
                yield from itertools.cycle(range(begin, begin + PORTS_OF_A_RUN))
    raise RuntimeError("as many runs of these tests as there are ports for: wait for one to end")


PORTS = _ports()


def free_ports(count: int) -> int:
    """Return the first of *count* free ports in a row. A node that is away for a moment finds its own free again."""
    row: list[int] = []
    while len(row) < count:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((ADDRESS, port))
            row = [*row, port] if row and row[-1] == port - 1 else [port]
    return row[0]


def free_port() -> int:
    return free_ports(1)


def clean_environment() -> dict[str, str]:
    """Return the environment without anything that would set up a node."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MEHDB_", "KUBERNETES_"))}


@dataclass
class Node:
    """One node: its name, port and volume stay, its processes come and go."""

    name: str
    port: int
    volume: Path
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    scheme: str = "http"
    client: httpx.Client = CLIENT
    """Who asks it: shows what it must be shown."""
    run_by: tuple[str, ...] = ()  # a command that becomes the process

    @property
    def url(self) -> str:
        return f"{self.scheme}://{ADDRESS}:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def _log(self) -> Path:
        return self.volume.with_suffix(".log")

    def start(self, *arguments: str, ready: bool = True) -> "Node":
        """Start a process on the volume, and wait until it is ready, or only until it answers."""
        assert self.process is None, f"{self.name} runs already"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.run_by, sys.executable, "-m", "mehdb", "serve", *arguments],
                env=clean_environment() | self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            eventually(lambda: self.ready() if ready else self.answers(), f"{self.name} to be up")
        except AssertionError as error:
            error.add_note(f"its log:\n{self.log}")
            raise
        return self

    def kill(self) -> None:
        """End the process as power loss would, but for what the kernel holds: SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process = None

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End the process as the kubelet does. It must exit 0."""
        assert self.process is not None
        self.process.send_signal(signal_number)
        code = self.process.wait(DEADLINE_S)
        self.process = None
        assert code == 0, f"{self.name} ended with exit code {code}; its log:\n{self.log}"

    def get(self, target: str, **options: Any) -> httpx.Response:
        return self.request("GET", target, **options)

    def put(self, key: str, value: bytes, **options: Any) -> httpx.Response:
        return self.request("PUT", f"/set/{key}", content=value, **options)

    def request(self, method: str, target: str, **options: Any) -> httpx.Response:
        return self.client.request(method, self.url + target, **options)

    def status(self) -> NodeStatus:
        return decode_status(self.get("/status", headers={"Accept": "application/json"}).content)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended by itself; its log:\n{self.log}"
        try:
            return self.get("/livez").is_success
        except httpx.TransportError:
            return False

    def ready(self) -> bool:
        return self.answers() and self.get("/readyz").is_success

    def position(self) -> dict[str, Any]:
        position = self.get("/position").json()
        return {name: position[name] for name in ("history", "revision", "chain")}


@contextmanager
def lagging(node: Node, leader: Node) -> Iterator[None]:
    """Have *node* stand still, as one behind a cut network, but count as connected, however long the block takes.

    It must hold all that its *leader* holds. In its name another goes on asking for more, but never holds any.
    """
    held = leader.position()
    place = {"history": held["history"], "after": held["revision"], "chain": held["chain"]}
    over = threading.Event()

    def ask() -> None:
        while not over.wait(ASK_EVERY_S):
            with contextlib.suppress(httpx.TransportError):  # the block may stop the leader
                leader.get("/replicate", params=place | {"node": node.name, "snapshot": "no"})

    asking = threading.Thread(target=ask)
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
        node.process.send_signal(signal.SIGCONT)


async def check_volume(volume: Path) -> None:
    """Verify every invariant of the store on a volume that no process has."""
    store = await Store.open(volume)
    try:
        assert (await store.check()).problems == (), f"{volume} holds a broken store"
    finally:
        await store.close()


@dataclass
class Cluster:
    """Nodes mehdb-0, mehdb-1, …, of which mehdb-0 leads."""

    directory: Path
    nodes: list[Node] = field(default_factory=list)
    scheme: str = "http"
    client: httpx.Client = CLIENT

    def add(self, **environment: str) -> Node:
        """Return the next node, not started. *environment* is what it runs with beside the usual."""
        name = f"mehdb-{len(self.nodes)}"
        port = free_port()
        leader_url = self.nodes[0].url if self.nodes else f"{self.scheme}://{ADDRESS}:{port}"
        usual = {
            "MEHDB_HOST": name, "MEHDB_PORT": str(port), "MEHDB_LISTEN": ADDRESS, "MEHDB_PEERS": leader_url,
            "MEHDB_DATADIR": str(self.directory / name), "MEHDB_LAME_DUCK": "0",
        }  # fmt: skip
        volume = self.directory / name
        self.nodes.append(Node(name, port, volume, usual | environment, scheme=self.scheme, client=self.client))
        return self.nodes[-1]

    def introduce(self) -> None:
        """Tell the leader of all nodes that there are: from its next start on it asks them what they hold."""
        self.leader.environment["MEHDB_PEERS"] = ",".join(node.url for node in self.nodes)

    def start(self, replicas: int, **environment: str) -> "Cluster":
        """Start *replicas* nodes in order, each when the one before is ready."""
        for _ in range(replicas):
            self.add(**environment).start()
        return self

    @property
    def leader(self) -> Node:
        return self.nodes[0]

    @property
    def followers(self) -> list[Node]:
        return self.nodes[1:]

    def converge(self) -> dict[str, Any]:
        """Wait until all that run have one position, and return it."""

        def equal() -> dict[str, Any] | None:
            positions = [node.position() for node in self.nodes if node.process]
            return positions[0] if all(position == positions[0] for position in positions) else None

        return eventually(equal, "equal positions")

    def stop(self) -> None:
        """Stop all that run, the leader last."""
        for node in reversed(self.nodes):
            if node.process:
                node.stop()

    def discard(self) -> None:
        """End whatever is left of a test that failed."""
        for node in self.nodes:
            if node.process and node.process.poll() is None:
                node.process.kill()
                node.process.wait(DEADLINE_S)
        if self.client is not CLIENT:
            self.client.close()

    async def check(self) -> None:
        """Verify every invariant of every store."""
        for node in self.nodes:
            if node.volume.exists():
                await check_volume(node.volume)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """Have nodes for many tests, as the fixture `cluster` does for one."""
    nodes = Cluster(directory)
    try:
        yield nodes
        nodes.stop()
    finally:
        nodes.discard()
    asyncio.run(nodes.check())


def curl(*arguments: str, stdin: bytes = b"") -> bytes:
    """Return what curl prints. It must succeed."""
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", *arguments], input=stdin, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"curl {arguments} ended with {done.returncode}: {done.stderr.decode()}"
    return done.stdout
