"""Planned restarts are invisible (promise 9): clients that use ready nodes see no reset, and no read that fails.

The clients do what those behind a Service do: they keep connections, send to any node that was ready when last probed,
and follow redirects. The restarts are a rolling update's: the highest ordinal first, the leader last.
"""

import asyncio
import itertools
import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import pytest

from cluster import DEADLINE_S, Cluster, Node
from test_kills import Answer, Connection, InDoubt, NotSent

REPLICAS: Final = 3
LAME_DUCK_S: Final = 2.0  # the default
RATE: Final = 200  # requests a second
UNDER_WAY_MAX: Final = 64  # more than 200 a second need, unless answers take a third of a second
GAP_S_MAX: Final = 20.0  # for writes: the lame duck, and the leader's start, which is long where much else runs
WRITE_EVERY: Final = 5  # of so many requests one is a write
KEYS: Final = 200
PROBE_EVERY_S: Final = 0.2
PROBE_TIMEOUT_S: Final = 3.0  # as in deploy/app.yaml


class Pool:
    """Connections to nodes, each kept for the next request."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = {node.url: node for node in nodes}
        self._idle: dict[str, list[Connection]] = {node.url: [] for node in nodes}

    async def request(self, url: str, method: str, target: str, body: bytes = b"") -> Answer:
        """Return the answer of the node at *url*, or of the one that it redirects to."""
        idle = self._idle[url]
        connection = idle.pop() if idle else Connection(self._nodes[url])
        answer = await connection.request(method, target, body)
        idle.append(connection)
        if answer.status == 307:
            return await self.request(answer.headers["Location"].removesuffix(target), method, target, body)
        return answer

    async def close(self) -> None:
        """Close those that nobody uses."""
        for connection in itertools.chain.from_iterable(self._idle.values()):
            await connection.close()


@asynccontextmanager
async def pool(nodes: list[Node]) -> AsyncIterator[Pool]:
    """Have connections to *nodes*."""
    connections = Pool(nodes)
    try:
        yield connections
    finally:
        await connections.close()


@dataclass
class Clients:
    """Clients of a Service, and what became of their requests."""

    nodes: list[Node]
    ready: list[Node] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    acknowledged: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    written_at_s: list[float] = field(default_factory=list)
    sent: int = 0
    took_s: float = 0.0
    _end_s: float = math.inf

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have them send requests while the block runs."""
        async with pool(self.nodes) as connections:
            for node in self.nodes:
                await self._probe(node)
            for number in range(KEYS):
                await self._write(connections, self.nodes[0], f"key/{number}", b"first")
            self.outcomes.clear()
            self.written_at_s.clear()
            async with asyncio.TaskGroup() as tasks:
                for node in self.nodes:
                    tasks.create_task(self._probe_on(node))
                tasks.create_task(self._send(connections))
                try:
                    yield
                finally:
                    self._end_s = monotonic()

    async def _probe(self, node: Node) -> None:
        """Look whether *node* is ready, on a connection of its own, as the kubelet does."""
        connection = Connection(node)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                ready = (await connection.request("GET", "/readyz")).status == 200
        except (NotSent, InDoubt, TimeoutError):
            ready = False
        finally:
            await connection.close()
        if ready != (node in self.ready):
            self.ready = [*self.ready, node] if ready else [other for other in self.ready if other is not node]

    async def _probe_on(self, node: Node) -> None:
        """Probe *node* again and again, whatever becomes of the others."""
        while monotonic() < self._end_s:
            await self._probe(node)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _send(self, connections: Pool) -> None:
        """Send at RATE, whether answers come or not: a node that hangs must not lower it before many requests do.

        What was missed while this process had no core is caught up with, at the end too.
        """
        chosen = random.Random(1)
        under_way: set[asyncio.Task[None]] = set()
        started_s = monotonic()
        async with asyncio.TaskGroup() as tasks:
            missed = 0
            while monotonic() < self._end_s + (DEADLINE_S if missed else 0):
                self.took_s = monotonic() - started_s
                due = int(self.took_s * RATE) - self.sent
                room = UNDER_WAY_MAX - len(under_way) if self.ready else 0
                missed = max(0, due - room)
                for _ in range(due - missed):
                    self.sent += 1
                    node, key = chosen.choice(self.ready), f"key/{chosen.randrange(KEYS)}"
                    if self.sent % WRITE_EVERY == 0:
                        request = self._write(connections, node, key, chosen.randbytes(chosen.randrange(2000)))
                    else:
                        request = self._read(connections, node, key)
                    task = tasks.create_task(request)
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                await asyncio.sleep(1 / RATE)

    async def _read(self, connections: Pool, node: Node, key: str) -> None:
        self.outcomes["reads"] += 1
        try:
            answer = await connections.request(node.url, "GET", f"/get/{key}")
        except (NotSent, InDoubt, TimeoutError) as error:
            self._note_reset(f"GET {key} from {node.name}", error)
            return
        if answer.status != 200:
            self.outcomes["read errors"] += 1
            self.wrong.append(f"GET {key} from {node.name}: {answer}")

    async def _write(self, connections: Pool, node: Node, key: str, value: bytes) -> None:
        self.outcomes["writes"] += 1
        try:
            answer = await connections.request(node.url, "PUT", f"/set/{key}", value)
        except (NotSent, InDoubt, TimeoutError) as error:
            self._note_reset(f"PUT {key} to {node.name}", error)
            return
        if answer.status == 200:
            self.written_at_s.append(monotonic())
            assert answer.revision is not None
            self.acknowledged[key] = max(self.acknowledged.get(key, (0, b"")), (answer.revision, value))
        elif answer.status == 503 and answer.headers.get("Retry-After", "").isdigit():
            self.outcomes["503"] += 1
        else:
            self.outcomes["write errors"] += 1
            self.wrong.append(f"PUT {key} to {node.name}: {answer}")

    def _note_reset(self, what: str, error: Exception) -> None:
        self.outcomes["resets"] += 1
        self.wrong.append(f"{what}: {error!r} {error.__cause__!r}")

    def lost(self) -> list[str]:
        """Return what was acknowledged and is not on every node, or is not as it was written."""
        missing = []
        for key, (revision, value) in self.acknowledged.items():
            for node in self.nodes:
                answer = node.get(f"/get/{key}")
                shown = int(answer.headers.get("ETag", '"0"').strip('"'))
                if shown < revision or (shown == revision and answer.content != value):
                    missing.append(f"{key} at {revision} from {node.name}")
        return missing


async def restart_all(nodes: list[Node]) -> None:
    """Restart one node after the other, the leader last, each when the one before is ready again."""
    for node in reversed(nodes):
        await asyncio.to_thread(node.stop)
        await asyncio.to_thread(node.start)


async def start(cluster: Cluster) -> list[Node]:
    """Start a cluster whose leader knows its followers, and return its nodes."""
    for _ in range(REPLICAS):
        cluster.add(MEHDB_LAME_DUCK=str(LAME_DUCK_S))
    cluster.introduce()
    for node in cluster.nodes:
        await asyncio.to_thread(node.start)
    return cluster.nodes


async def prove(cluster: Cluster, rounds: int) -> None:
    """Restart all nodes *rounds* times under load, and print the numbers."""
    clients = Clients(await start(cluster))
    async with clients.running():
        for _ in range(rounds):
            await restart_all(cluster.nodes)
            written = len(clients.written_at_s)
            async with asyncio.timeout(DEADLINE_S):  # the last gap ends with a write
                while len(clients.written_at_s) <= written:  # noqa: ASYNC110  written in this same loop
                    await asyncio.sleep(PROBE_EVERY_S)
    await asyncio.to_thread(cluster.converge)
    lost = await asyncio.to_thread(clients.lost)
    counts, rate = clients.outcomes, clients.sent / clients.took_s
    gap_s = max(later - earlier for earlier, later in itertools.pairwise(clients.written_at_s))
    print(
        f"planned restarts: {rounds} rounds, {counts['reads']} reads, {counts['read errors']} errors, "
        f"{counts['writes']} writes, {counts['503']} answered 503, {counts['resets']} resets, {len(lost)} lost, "
        f"longest gap for writes {gap_s:.1f} s, at {rate:.0f} requests/s"
    )
    assert not clients.wrong, clients.wrong[:20]
    assert not lost
    assert (counts["read errors"], counts["write errors"], counts["resets"]) == (0, 0, 0)
    assert math.ceil(rate) >= RATE, "fewer prove less"
    assert counts["reads"] > clients.sent / 2
    assert counts["503"] > 0, "the leader restarted"
    assert gap_s < GAP_S_MAX


async def test_a_rolling_restart_is_invisible_to_clients_of_ready_nodes(cluster: Cluster) -> None:
    await prove(cluster, 1)


@pytest.mark.soak
async def test_rolling_restarts_are_invisible_to_clients_of_ready_nodes(cluster: Cluster) -> None:
    await prove(cluster, 5)


async def test_a_node_that_is_killed_is_noticed(cluster: Cluster) -> None:
    """The control: where nothing is finished and nobody is told, these clients see it."""
    follower = (await start(cluster))[-1]
    clients = Clients(cluster.nodes)
    async with clients.running():
        for _ in range(10):  # the next probe may come before the next request
            if not clients.outcomes["resets"]:
                async with asyncio.timeout(DEADLINE_S):  # before that, nobody sends it anything
                    while follower not in clients.ready:  # noqa: ASYNC110  probed in this same loop
                        await asyncio.sleep(1 / RATE)
                await asyncio.to_thread(follower.kill)
                await asyncio.to_thread(follower.start)
    assert clients.outcomes["resets"] > 0
    await asyncio.to_thread(cluster.converge)
    assert not await asyncio.to_thread(clients.lost)
