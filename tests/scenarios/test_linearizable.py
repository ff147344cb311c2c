"""One key under concurrent writers, readers and kills of the leader: its history is linearizable.

`linearizability` says what that means and how it is decided. The order of the writes is read from the leader's log.
"""

import asyncio
import hashlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from cluster import DEADLINE_S, Cluster, Node, eventually
from linearizability import Kind, Log, Operation, check, in_doubt, read, refused, write
from mehdb.model import GENESIS, ORIGIN, Position
from mehdb.store import Store
from test_kills import Connection, InDoubt, NotSent, spawn, start_with_peers, wait_until_ready

KEY = "the/one"
WRITERS = 6
READERS = 6
OTHERS = 4  # as many as a node has threads for large values: they keep reading that of another key
PAUSE_S = 0.02  # before a client tries again what was refused, or found nobody
OTHER_KEY, OTHER_BYTES = "the/other", 1 << 20
LARGE_BYTES = 70_000  # read in a thread instead of on the event loop: later, and from another snapshot


def digest(value: bytes | None) -> bytes | None:
    """Return what is kept of a value: thousands of large ones would not fit into memory."""
    return value if value is None or len(value) < LARGE_BYTES else value[:12] + hashlib.sha256(value).digest()


class Clients:
    """Write and read one key of one node through errors, and take down what was done and when."""

    def __init__(self, node: Node, seed: int) -> None:
        self.history: list[Operation] = []
        self._node = node
        self._shuffled = random.Random(seed)
        self._numbers = itertools.count()
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have all of them at work while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            for act in [self._write] * WRITERS + [self._read] * READERS + [self._read_other] * OTHERS:
                tasks.create_task(self._repeat(act))
            try:
                yield
            finally:
                self._stopping = True

    async def more(self, count: int) -> None:
        """Wait until *count* more operations are taken down."""
        goal = len(self.history) + count
        what, deadline_s = f"{count} more operations", 6 * DEADLINE_S
        await asyncio.to_thread(eventually, lambda: len(self.history) >= goal, what, deadline_s)

    async def _repeat(self, act: Callable[[Connection], Awaitable[bool]]) -> None:
        """Do *act* again and again, after a pause where it was refused."""
        connection = Connection(self._node)
        try:
            while not self._stopping:
                if not await act(connection):
                    await asyncio.sleep(PAUSE_S)
        finally:
            await connection.close()

    async def _write(self, connection: Connection) -> bool:
        """Set the key, or delete it. Return whether that was done."""
        size = LARGE_BYTES if self._shuffled.random() < 0.25 else self._shuffled.randrange(100)
        value = None if self._shuffled.random() < 0.2 else b"%d" % next(self._numbers) + b"." * size
        method, target = ("DELETE", f"/delete/{KEY}") if value is None else ("PUT", f"/set/{KEY}")
        invoked_s = monotonic()
        try:
            answer = await connection.request(method, target, value or b"")
        except NotSent:
            return False
        except InDoubt:
            self.history.append(in_doubt(invoked_s, digest(value)))
            return False
        if answer.status == 503:
            self.history.append(refused(invoked_s, monotonic(), digest(value)))
            return False
        if answer.status == 404 and value is None:  # it found nothing: no more than a read does
            self.history.append(read(invoked_s, monotonic(), None, None))
            return True
        assert answer.status == 200, answer
        assert answer.revision is not None, answer
        self.history.append(write(invoked_s, monotonic(), answer.revision, digest(value)))
        return True

    async def _read(self, connection: Connection) -> bool:
        """Read the key. Return whether there was an answer."""
        invoked_s = monotonic()
        try:
            answer = await connection.request("GET", f"/get/{KEY}")
        except (NotSent, InDoubt):
            return False
        if answer.status == 503:
            return False
        assert answer.status in (200, 404), answer
        responded_s = monotonic()
        found = answer.status == 200
        self.history.append(read(invoked_s, responded_s, answer.revision, digest(answer.body) if found else None))
        return True

    async def _read_other(self, connection: Connection) -> bool:
        """Have the node read another key's value, without sending it: reads in threads wait behind it."""
        try:
            answer = await connection.request("HEAD", f"/get/{OTHER_KEY}")
        except (NotSent, InDoubt):
            return False
        return answer.status == 200


async def log_of(volume: Path) -> Log:
    """Return all that was written to the key, from a store that no process has."""
    store = await Store.open(volume)
    try:
        log: dict[int, bytes | None] = {}
        position = Position(store.meta.history, ORIGIN, GENESIS)
        while (page := await store.page_after(position)) is not None:
            log |= {change.revision: digest(change.value) for change in page.changes if change.key == KEY.encode()}
            position = page.end
    finally:
        await store.close()
    return log


@pytest.mark.parametrize(
    ("kills", "operations_between"),
    [(6, 800), pytest.param(20, 2000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
    ids=["short", "soak"],
)
async def test_the_history_of_a_key_on_the_leader_is_linearizable(
    cluster: Cluster, kills: int, operations_between: int
) -> None:
    start_with_peers(cluster, 2)
    leader = cluster.leader
    leader.put(OTHER_KEY, bytes(OTHER_BYTES))
    clients, shuffled = Clients(leader, seed=5), random.Random(6)
    async with clients.running():
        for number in range(kills):
            await clients.more(shuffled.randrange(operations_between // 2, operations_between * 3 // 2))
            leader.kill()
            spawn(leader)
            if number % 5 == 4:  # once more, during its start
                await asyncio.sleep(shuffled.uniform(0, 0.7))
                leader.kill()
                spawn(leader)
            await asyncio.to_thread(wait_until_ready, leader)
        await clients.more(operations_between)
    cluster.stop()
    history, log = clients.history, await log_of(leader.volume)
    violations = check(history, log)
    assert not violations, "\n".join(violations[:20])
    assert {op.kind for op in history} >= {Kind.WRITE, Kind.READ, Kind.IN_DOUBT}, "something of each"
    assert len(history) > kills * operations_between // 2
    assert check(made_stale(history), log) != [], "the control: one read that is stale by an eighth of the history"
    print(f"linearizable: {len(history)} operations, {kills + kills // 5} kills, 0 violations")


def made_stale(history: list[Operation]) -> list[Operation]:
    """Return *history* with one read of a value that shows what another read before it showed."""
    found = [n for n, op in enumerate(history) if op.kind is Kind.READ and op.revision is not None]
    earlier, later = (history[found[len(found) * part // 8]] for part in (3, 4))
    assert (earlier.revision or 0) < (later.revision or 0), "with writes between them"
    stale = replace(later, revision=earlier.revision, value=earlier.value)
    return [stale if op is later else op for op in history]
