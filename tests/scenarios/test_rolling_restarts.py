"""Planned restarts are invisible (promise 9): clients that use ready nodes see no reset, and no read that fails.

The clients do what those behind a Service do: they keep connections, send to any node that was ready when last probed,
and follow redirects. The restarts are a rolling update's: the highest ordinal first, the leader last.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import httpx
import pytest

from cluster import DEADLINE_S, Cluster, Node

REPLICAS: Final = 3
LAME_DUCK_S: Final = 2.0  # the default
RATE: Final = 200  # requests a second
UNDER_WAY_MAX: Final = 64  # more than 200 a second need, unless answers take a third of a second
WRITE_EVERY: Final = 5  # of so many requests one is a write
KEYS: Final = 200
PROBE_EVERY_S: Final = 0.2
PROBE_TIMEOUT_S: Final = 3.0  # as in deploy/app.yaml
REQUEST_TIMEOUT_S: Final = 10.0


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
    _stopping: bool = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Clients"]:
        """Have them send requests while the block runs."""
        # Probes are others' connections, each a new one, as the kubelet's are.
        limits = httpx.Limits(max_keepalive_connections=0)
        probes = httpx.AsyncClient(trust_env=False, timeout=PROBE_TIMEOUT_S, limits=limits)
        client = httpx.AsyncClient(trust_env=False, timeout=REQUEST_TIMEOUT_S, follow_redirects=True)
        async with probes, client:
            for node in self.nodes:
                await self._probe(probes, node)
            for number in range(KEYS):
                await self._write(client, self.nodes[0], f"key/{number}", b"first")
            self.outcomes.clear()
            self.written_at_s.clear()
            async with asyncio.TaskGroup() as tasks:
                for node in self.nodes:
                    tasks.create_task(self._probe_on(probes, node))
                tasks.create_task(self._send(client))
                try:
                    yield self
                finally:
                    self._stopping = True

    async def _probe(self, client: httpx.AsyncClient, node: Node) -> None:
        try:
            ready = (await client.get(f"{node.url}/readyz")).is_success
        except httpx.TransportError:
            ready = False
        if ready != (node in self.ready):
            self.ready = [*self.ready, node] if ready else [other for other in self.ready if other is not node]

    async def _probe_on(self, client: httpx.AsyncClient, node: Node) -> None:
        """Probe *node* again and again, whatever becomes of the others."""
        while not self._stopping:
            await self._probe(client, node)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _send(self, client: httpx.AsyncClient) -> None:
        """Send at RATE, whether answers come or not: a node that hangs must not lower it before many requests do."""
        chosen = random.Random(1)
        under_way: set[asyncio.Task[None]] = set()
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while not self._stopping:
                due = int((time.monotonic() - started_s) * RATE) - self.sent
                for _ in range(min(due, UNDER_WAY_MAX - len(under_way))):
                    self.sent += 1
                    node, key = chosen.choice(self.ready), f"key/{chosen.randrange(KEYS)}"
                    if self.sent % WRITE_EVERY == 0:
                        request = self._write(client, node, key, chosen.randbytes(chosen.randrange(2000)))
                    else:
                        request = self._read(client, node, key)
                    task = tasks.create_task(request)
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                await asyncio.sleep(1 / RATE)
            self.took_s = time.monotonic() - started_s

    async def _read(self, client: httpx.AsyncClient, node: Node, key: str) -> None:
        self.outcomes["reads"] += 1
        try:
            answer = await client.get(f"{node.url}/get/{key}")
        except httpx.RequestError as error:
            self._note_reset(f"GET {key} from {node.name}: {error!r}")
            return
        if answer.status_code != 200:
            self.outcomes["read errors"] += 1
            self.wrong.append(f"GET {key} from {node.name}: {answer.status_code} {answer.text}")

    async def _write(self, client: httpx.AsyncClient, node: Node, key: str, value: bytes) -> None:
        self.outcomes["writes"] += 1
        try:
            answer = await client.put(f"{node.url}/set/{key}", content=value)
        except httpx.RequestError as error:
            self._note_reset(f"PUT {key} to {node.name}: {error!r}")
            return
        if answer.status_code == 200:
            self.written_at_s.append(time.monotonic())
            revision = int(answer.headers["ETag"].strip('"'))
            self.acknowledged[key] = max(self.acknowledged.get(key, (0, b"")), (revision, value))
        elif answer.status_code == 503 and answer.headers.get("Retry-After", "").isdigit():
            self.outcomes["503"] += 1
        else:
            self.outcomes["write errors"] += 1
            self.wrong.append(f"PUT {key} to {node.name}: {answer.status_code} {answer.text}")

    def _note_reset(self, what: str) -> None:
        self.outcomes["resets"] += 1
        self.wrong.append(what)

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


async def prove(cluster: Cluster, rounds: int, rate_least: float) -> None:
    """Restart all nodes *rounds* times under load, and print the numbers. Below *rate_least*, they prove nothing."""
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
    counts, times = clients.outcomes, clients.written_at_s
    gap_s = max(later - earlier for earlier, later in pairwise(times))
    print(
        f"planned restarts: {rounds} rounds, {counts['reads']} reads, {counts['read errors']} errors, "
        f"{counts['writes']} writes, {counts['503']} answered 503, {counts['resets']} resets, {len(lost)} lost, "
        f"longest gap for writes {gap_s:.1f} s, at {clients.sent / clients.took_s:.0f} requests/s"
    )
    assert not clients.wrong, clients.wrong[:20]
    assert not lost
    assert (counts["read errors"], counts["write errors"], counts["resets"]) == (0, 0, 0)
    assert clients.sent / clients.took_s >= rate_least
    assert counts["503"] > 0, "the leader restarted"


async def test_a_rolling_restart_is_invisible_to_clients_of_ready_nodes(cluster: Cluster) -> None:
    await prove(cluster, 1, RATE / 2)  # whatever else this machine does


@pytest.mark.soak
async def test_rolling_restarts_are_invisible_to_clients_of_ready_nodes(cluster: Cluster) -> None:
    await prove(cluster, 5, 0.9 * RATE)


async def test_a_node_that_is_killed_is_noticed(cluster: Cluster) -> None:
    """The control: where nothing is finished and nobody is told, these clients see it."""
    follower = (await start(cluster))[-1]
    clients = Clients(cluster.nodes)
    async with clients.running():
        async with asyncio.timeout(DEADLINE_S):
            while not clients.outcomes["resets"]:  # the next probe may come before the next request
                await asyncio.to_thread(follower.kill)
                await asyncio.to_thread(follower.start)
    await asyncio.to_thread(cluster.converge)
    assert not await asyncio.to_thread(clients.lost)
