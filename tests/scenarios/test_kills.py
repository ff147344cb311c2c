"""kill -9 of leader and followers at random moments under 16 writers: nothing acknowledged is lost.

Each round ends with all nodes at one position, compared with all that was acknowledged up to then. In some rounds the
leader keeps few changes: kills meet compaction, and followers that were away for a moment take snapshots.

The comparison is itself under test: it notices a store that was replaced by an older copy behind its back.
"""

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, clean_environment, eventually
from wire import NO_HEADERS

WRITERS = 16
KEYS_EACH = 20  # few enough that most writes overwrite or delete something
LARGE_BYTES = 100_000  # beyond what a point read answers on the event loop
SAMPLE = 100  # keys compared after each round, beside those that were written since the last one
PACE_S = 0.04  # at most, between a writer's writes: nodes that start need the core too
KEPT = {"MEHDB_RETAIN_CHANGES": "100000", "MEHDB_SNAPSHOT_LAG": "100000"}  # the default
COMPACTED = {"MEHDB_RETAIN_CHANGES": "1000", "MEHDB_SNAPSHOT_LAG": "200"}  # more are missed while a node starts
PAUSE_S = 0.05  # before a writer tries again what was refused, or found nobody


class NotSent(Exception):
    """Nobody listened: nothing can have happened."""


class InDoubt(Exception):
    """The connection broke before the answer was here: what was asked may have been done, or not."""


class Answer(NamedTuple):
    """*revision* is from the `ETag`."""

    status: int
    revision: int | None
    body: bytes
    headers: Mapping[str, str] = NO_HEADERS


class Connection:
    """One keep-alive connection to a node, opened anew after it broke.

    Nothing is sent twice: what is in doubt is one write. And it takes less of the cores than an HTTP client would.
    """

    def __init__(self, node: Node) -> None:
        self._port = node.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, target: str, body: bytes = b"") -> Answer:
        """Return the answer. Raises `NotSent` and `InDoubt`."""
        async with asyncio.timeout(DEADLINE_S):
            if self._streams and self._streams[0].at_eof():  # closed by the node, in peace
                await self.close()
            if self._streams is None:
                try:
                    self._streams = await asyncio.open_connection(ADDRESS, self._port)
                except ConnectionError as error:
                    raise NotSent from error
            try:
                return await self._exchange(*self._streams, method, target, body)
            except (ConnectionError, EOFError) as error:
                await self.close()
                raise InDoubt from error
            except asyncio.CancelledError:  # what may still come is no answer to the next request
                await self.close()
                raise

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, target: str, body: bytes
    ) -> Answer:
        writer.write(
            f"{method} {target} HTTP/1.1\r\nHost: mehdb\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        await writer.drain()
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        content = b"" if method == "HEAD" else await reader.readexactly(int(headers["Content-Length"]))
        if headers.get("Connection") == "close":
            await self.close()
        revision = int(headers["ETag"].strip('"')) if "ETag" in headers else None
        return Answer(int(status_line.split()[1]), revision, content, headers)

    async def close(self) -> None:
        if self._streams is not None:
            (_, writer), self._streams = self._streams, None
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@dataclass
class Known:
    """What is known of one key: the last acknowledged write, and those after it whose answer never came.

    A *value* of None is a deletion; at revision 0 nothing was written yet.
    """

    revision: int = 0
    value: bytes | None = None
    doubts: list[bytes | None] = field(default_factory=list)

    def contradiction(self, answer: Answer) -> str | None:
        """Return what is wrong with *answer*, to a read or to a deletion of nothing; None if nothing is."""
        assert answer.status in (200, 404), f"neither a value nor none: {answer}"
        if answer.status == 404:
            return None if self.value is None or None in self.doubts else f"gone, acknowledged at {self.revision}"
        assert answer.revision is not None, "a value has an ETag"
        if answer.revision < self.revision:
            return f"back at {answer.revision}, acknowledged at {self.revision}"
        expected = [self.value] if answer.revision == self.revision else self.doubts
        return None if answer.body in expected else f"at {answer.revision} not what was written"

    def settle(self, answer: Answer) -> str | None:
        """Return what is wrong with *answer*; if nothing is, it ends all doubts: what was seen must stay.

        To be asked while no write is under way: what was in doubt was done by a process that is dead.
        """
        if problem := self.contradiction(answer):
            return problem
        self.revision = answer.revision or self.revision  # a deletion does not tell its own
        self.value, self.doubts = answer.body if answer.status == 200 else None, []
        return None


class Writers:
    """Write to a leader through errors, each to keys of its own, and know what was acknowledged."""

    def __init__(self, leader: Node, seed: int = 0) -> None:
        self.known: dict[str, Known] = {}
        self.acknowledged = 0
        self.in_doubt = 0
        self.written: set[str] = set()  # since they were last compared
        self.contradictions: list[str] = []
        self._leader = leader
        self._shuffled = [random.Random(seed * WRITERS + number) for number in range(WRITERS)]
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write while the block runs. Behind it, no write is under way."""
        self._stopping = False
        async with asyncio.TaskGroup() as tasks:
            for number in range(WRITERS):
                tasks.create_task(self._write_on(number))
            try:
                yield
            finally:
                self._stopping = True

    async def _write_on(self, number: int) -> None:
        connection = Connection(self._leader)
        try:
            while not self._stopping:
                await self._write(connection, number)
        finally:
            await connection.close()

    async def _write(self, connection: Connection, number: int) -> None:
        shuffled = self._shuffled[number]
        key = f"{number}/{shuffled.randrange(KEYS_EACH)}"
        size = LARGE_BYTES if shuffled.random() < 0.005 else shuffled.randrange(500)
        value = None if shuffled.random() < 0.2 else f"{key} {shuffled.random()} ".encode() + b"." * size
        known = self.known.setdefault(key, Known())
        self.written.add(key)
        try:
            if value is None:
                answer = await connection.request("DELETE", f"/delete/{key}")
            else:
                answer = await connection.request("PUT", f"/set/{key}", value)
        except NotSent:
            await asyncio.sleep(PAUSE_S)
        except InDoubt:
            known.doubts.append(value)
            self.in_doubt += 1
        else:
            self._note(key, known, value, answer)
            await asyncio.sleep(PAUSE_S if answer.status == 503 else shuffled.uniform(0, PACE_S))

    def _note(self, key: str, known: Known, value: bytes | None, answer: Answer) -> None:
        if answer.status == 503:
            return  # nothing was written, by the contract
        if answer.status == 404 and value is None:
            if problem := known.settle(answer):
                self.contradictions.append(f"{key} to its writer: {problem}")
        else:
            assert answer.status == 200, answer
            assert answer.revision is not None, answer
            if answer.revision <= known.revision:
                self.contradictions.append(f"{key} acknowledged at {answer.revision} after {known.revision}")
            known.revision, known.value, known.doubts = answer.revision, value, []
            self.acknowledged += 1

    async def compare(self, nodes: Iterable[Node], keys: Iterable[str]) -> None:
        """Add to `contradictions` where *nodes* do not show what was acknowledged of *keys*, or a later write."""
        keys = list(keys)
        await asyncio.gather(*(self._compare(node, keys) for node in nodes))

    async def _compare(self, node: Node, keys: list[str]) -> None:
        connection = Connection(node)
        try:
            for key in keys:
                if problem := self.known[key].settle(await connection.request("GET", f"/get/{key}")):
                    self.contradictions.append(f"{key} on {node.name}: {problem}")
        finally:
            await connection.close()


def start_with_peers(cluster: Cluster, replicas: int, **environment: str) -> None:
    """Start *replicas* nodes that know each other, as pods do: the leader asks its peers at each start."""
    for _ in range(replicas):
        cluster.add(**environment)
    for node in cluster.nodes:
        node.environment["MEHDB_PEERS"] = ",".join(peer.url for peer in cluster.nodes)
        node.start()


def spawn(node: Node) -> None:
    """Start a process on the node's volume, without waiting for anything."""
    assert node.process is None
    with node.volume.with_suffix(".log").open("ab") as log:
        node.process = subprocess.Popen(
            [sys.executable, "-m", "mehdb", "serve"],
            env=clean_environment() | node.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def wait_until_ready(node: Node) -> None:
    try:
        eventually(node.ready, f"{node.name} to be ready")
    except AssertionError as error:
        error.add_note(f"its log:\n{node.log}")
        raise


class Killer:
    """Kills nodes that run, and counts."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.kills = dict.fromkeys((node.name for node in cluster.nodes), 0)
        self.during_snapshots = 0
        self._cluster = cluster
        self._shuffled = random.Random(seed)

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def kill(self, node: Node) -> None:
        process = node.process
        assert process is not None
        assert process.poll() is None, f"{node.name} ended by itself with {process.returncode}; its log:\n{node.log}"
        node.kill()
        assert process.returncode == -signal.SIGKILL, f"{node.name} ended by itself; its log:\n{node.log}"
        self.kills[node.name] += 1
        self.during_snapshots += arriving(node).exists()

    async def strike(self) -> None:
        """Kill one node or two at random moments, sometimes one again during its start. Return when all are ready."""
        shuffled, leader, followers = self._shuffled, self._cluster.leader, self._cluster.followers
        follower = shuffled.choice(followers)
        (victims,) = shuffled.choices([[leader], [follower], [leader, follower], followers], [10, 7, 2, 1])
        await asyncio.sleep(shuffled.uniform(0, 0.25))  # the moment
        for node in victims:
            self.kill(node)
        for node in victims:
            node.environment |= shuffled.choice([KEPT, COMPACTED])
            spawn(node)
        if shuffled.random() < (0.1 if victims[-1] is leader else 0.3):  # a follower may be taking a snapshot then
            start_s = shuffled.choice([shuffled.uniform(0, 2.5), DEADLINE_S])
            more_s = shuffled.uniform(0, 0.05)
            await asyncio.to_thread(self._kill_again, victims[-1], start_s, more_s)
        for node in self._cluster.nodes:
            await asyncio.to_thread(wait_until_ready, node)

    def _kill_again(self, node: Node, start_s: float, more_s: float) -> None:
        """Kill *node* up to *start_s* after its start, or *more_s* after it is ready or a snapshot begins to arrive."""
        end_s = monotonic() + start_s
        while monotonic() < end_s and not arriving(node).exists() and not node.ready():
            sleep(0.001)
        sleep(more_s)
        self.kill(node)
        spawn(node)


def position(node: Node) -> tuple[str | None, int, str]:
    """Return where *node* is, also while its store is being replaced by a snapshot."""
    status = node.status()
    return status.history, status.revision, status.chain


def arriving(node: Node) -> Path:
    """Return the file that is on the volume of *node* while it takes a snapshot."""
    return node.volume / "store.db.incoming"


@pytest.mark.parametrize(
    "least", [8, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])], ids=["short", "soak"]
)
async def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(cluster: Cluster, least: int) -> None:
    """Each round ends with all nodes at one position, compared with all that was acknowledged so far."""
    start_with_peers(cluster, 3, **COMPACTED)
    leader = cluster.leader
    writers, killer, shuffled = Writers(leader), Killer(cluster, seed=3), random.Random(4)
    rounds = 0
    while killer.total < least:
        async with writers.running():
            await killer.strike()
        await asyncio.to_thread(eventually, lambda: len(set(map(position, cluster.nodes))) == 1, "equal positions")
        sample = shuffled.sample(sorted(writers.known), min(SAMPLE, len(writers.known)))
        await writers.compare(cluster.nodes, writers.written.union(sample))
        writers.written.clear()
        assert writers.contradictions == [], f"seen after {killer.kills} kills"
        rounds += 1
    await writers.compare(cluster.nodes, writers.known)
    assert writers.contradictions == []
    assert all(killer.kills.values()), "leader and followers"
    assert writers.in_doubt, "kills came in the middle of writes"
    assert writers.acknowledged > 50 * rounds, "a load worth the name"
    snapshots = sum(node.log.count("snapshot taken") for node in cluster.followers)
    assert min(snapshots, leader.status().floor) > 0, "changes were compacted away that a follower missed"
    assert killer.during_snapshots or killer.total < 100, "of so many kills, some come while one arrives"
    leader_kills = killer.kills[leader.name]
    print(
        f"kill -9: {killer.total} kills ({leader_kills} leader, {killer.total - leader_kills} followers, "
        f"{killer.during_snapshots} during one of {snapshots} snapshots) in {rounds} rounds, "
        f"{writers.acknowledged} acknowledged writes, {len(writers.contradictions)} lost, "
        "positions and values equal after each round"
    )


async def test_the_comparison_notices_a_store_replaced_by_an_older_copy(cluster: Cluster, tmp_path: Path) -> None:
    leader = cluster.start(1).leader
    writers = Writers(leader)
    async with writers.running():
        await asyncio.to_thread(eventually, lambda: writers.acknowledged > 300, "the first writes")
    leader.stop()
    shutil.copytree(leader.volume, tmp_path / "older")
    leader.start()
    await writers.compare([leader], writers.known)
    assert writers.contradictions == [], "a restart loses nothing"
    before = writers.acknowledged
    async with writers.running():
        await asyncio.to_thread(eventually, lambda: writers.acknowledged > before + 300, "writes behind the copy")
    leader.stop()
    shutil.rmtree(leader.volume)
    (tmp_path / "older").rename(leader.volume)
    leader.start()
    await writers.compare([leader], writers.known)
    assert len(writers.contradictions) > 10
    for what in ("gone", "back at"):
        assert any(what in problem for problem in writers.contradictions), what


GONE = Answer(404, None, b"")


@pytest.mark.parametrize(
    ("known", "answer", "problem"),
    [
        (Known(), GONE, None),
        (Known(5, b"v"), Answer(200, 5, b"v"), None),
        (Known(5, b"v", [b"w", b"x"]), Answer(200, 7, b"x"), None),
        (Known(5, b"v", [None]), GONE, None),
        (Known(5, None), GONE, None),
        (Known(5, None, [b"w"]), Answer(200, 6, b"w"), None),
        (Known(5, b"v"), GONE, "gone"),
        (Known(5, b"v", [b"w"]), GONE, "gone"),
        (Known(5, b"v"), Answer(200, 4, b"u"), "back at 4"),
        (Known(5, None), Answer(200, 4, b"u"), "back at 4"),
        (Known(5, b"v"), Answer(200, 5, b"w"), "not what was written"),
        (Known(5, b"v"), Answer(200, 6, b"w"), "not what was written"),
        (Known(5, b"v", [b"w"]), Answer(200, 6, b"v"), "not what was written"),
        (Known(5, None), Answer(200, 5, b"v"), "not what was written"),
        (Known(), Answer(200, 1, b"v"), "not what was written"),
    ],
)
def test_the_comparison_takes_what_may_be_and_notices_the_rest(
    known: Known, answer: Answer, problem: str | None
) -> None:
    found = known.contradiction(answer)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("seen", "later", "problem"),
    [
        (Answer(200, 7, b"x"), Answer(200, 7, b"x"), None),
        (Answer(200, 7, b"x"), Answer(200, 5, b"v"), "back at 5, acknowledged at 7"),
        (Answer(200, 7, b"x"), GONE, "gone"),
        (Answer(200, 5, b"v"), Answer(200, 7, b"x"), "not what was written"),
        (GONE, GONE, None),
        (GONE, Answer(200, 5, b"v"), "not what was written"),
        (GONE, Answer(200, 7, b"x"), "not what was written"),
    ],
)
def test_what_was_in_doubt_and_has_been_seen_is_missed_when_it_is_gone(
    seen: Answer, later: Answer, problem: str | None
) -> None:
    known = Known(5, b"v", [None, b"x"])
    assert known.settle(seen) is None
    found = known.settle(later)
    assert found is None if problem is None else problem in (found or "")
