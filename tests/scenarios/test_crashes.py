"""Kills, restarts and a leader that goes away: nothing acknowledged is lost, and nodes come to one position again."""

import asyncio
import random
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, eventually

WRITERS = 8
NOT_NOW = ("draining", "stopping", "store_away", "recovering")  # what a leader says that stops or starts


class Load:
    """Writers that go on through errors, and know what was acknowledged, in the order of revisions."""

    def __init__(self, url: str) -> None:
        self.acknowledged: dict[str, tuple[int, bytes]] = {}
        self._url = url
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Write while the block runs."""
        client = httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False, follow_redirects=True)
        async with client, asyncio.TaskGroup() as tasks:
            for number in range(WRITERS):
                tasks.create_task(self._write(client, number))
            try:
                yield self
            finally:
                self._stopping = True

    async def _write(self, client: httpx.AsyncClient, number: int) -> None:
        shuffled = random.Random(number)
        while not self._stopping:
            key, value = f"{number}/{shuffled.randrange(50)}", shuffled.randbytes(shuffled.randrange(2000))
            try:
                answer = await client.put(f"{self._url}/set/{key}", content=value)
            except httpx.TransportError:
                await asyncio.sleep(0.01)  # the node is gone: give it the core to come back on
                continue
            if answer.status_code == 503:
                assert answer.json()["error"] in NOT_NOW
                await asyncio.sleep(0.01)  # its Retry-After is longer, but this test has to meet the node's return
                continue
            assert answer.status_code == 200, answer.text
            self.acknowledged[key] = (int(answer.headers["ETag"].strip('"')), value)

    async def more(self, count: int) -> None:
        """Wait until *count* more writes are acknowledged."""
        goal = self.revision + count
        async with asyncio.timeout(DEADLINE_S):
            while self.revision < goal:  # noqa: ASYNC110  the writers take it further, in this same loop
                await asyncio.sleep(0.01)

    @property
    def revision(self) -> int:
        """The newest revision acknowledged."""
        return max((revision for revision, _ in self.acknowledged.values()), default=0)


def assert_holds(node: Node, load: Load) -> None:
    """Every acknowledged value is there, or one written after it: a later write may be durable but unacknowledged."""
    for key, (revision, value) in load.acknowledged.items():
        answer = node.get(f"/get/{key}")
        assert answer.status_code == 200, f"{key}, acknowledged at {revision}, is gone from {node.name}"
        shown = int(answer.headers["ETag"].strip('"'))
        assert shown >= revision, f"{key} went back from {revision} to {shown} on {node.name}"
        assert shown > revision or answer.content == value, f"{key} is not what was acknowledged at {revision}"


async def test_a_killed_follower_goes_on_where_its_disk_says(cluster: Cluster) -> None:
    """Killed again and again while pages arrive, so that some kills are in the middle of one."""
    leader, follower = cluster.start(2).nodes
    async with Load(leader.url).running() as load:
        for _ in range(5):
            await load.more(200)
            follower.kill()
            await load.more(100)
            follower.start(ready=False)
    cluster.converge()
    assert_holds(follower, load)


async def test_a_killed_leader_loses_nothing_that_it_acknowledged(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    async with Load(leader.url).running() as load:
        for _ in range(5):
            await load.more(200)
            leader.kill()
            leader.start()
    cluster.converge()
    assert_holds(leader, load)
    assert_holds(follower, load)


def test_a_follower_serves_while_the_leader_is_away_and_says_since_when(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    leader.stop()
    eventually(lambda: "leader not followed" in follower.log, "the follower to notice")

    def silent_s() -> float:
        status = follower.status()
        assert (status.ready, status.state) == (True, "serving")
        assert status.leader is not None
        return status.leader.heard_seconds_ago or 0

    first_s = silent_s()
    eventually(lambda: silent_s() > first_s, "the silence to grow")
    assert follower.get("/get/k").content == b"v"
    assert follower.get("/status?level=full").text == "1"
    leader.start()
    leader.put("k", b"w")
    eventually(lambda: follower.get("/get/k").content == b"w", "the follower to find its leader again")
    assert follower.log.count("leader not followed") == 1, "an outage is one change of state, so one line"


def test_a_follower_without_a_leader_serves_what_it_has_but_is_not_ready(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    follower.stop()
    leader.stop()
    follower.start(ready=False)
    answer = follower.get("/get/k")
    assert (answer.content, answer.headers["Mehdb-State"]) == (b"v", "syncing")
    assert follower.get("/readyz").status_code == 503
    answer = follower.get("/status?level=full")
    assert (answer.status_code, answer.json()["error"]) == (500, "not_ready")
    leader.start()
    eventually(follower.ready, "the follower to be ready once it has reached the leader")


def test_a_follower_that_holds_nothing_yet_cannot_say_that_a_key_is_missing(cluster: Cluster) -> None:
    cluster.add()
    follower = cluster.add().start(ready=False)
    for target in ("/get/k", "/keys"):
        answer = follower.get(target)
        assert (answer.status_code, answer.json()["error"]) == (503, "not_synced")
        assert answer.headers["Retry-After"] == "1"
    assert follower.status().history is None


def test_a_follower_is_ready_only_at_the_head_that_the_leader_had_when_first_asked(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    for number in range(30):
        leader.put(f"large/{number}", bytes(1 << 20))
    follower = cluster.add().start(ready=False)
    eventually(lambda: follower.get("/readyz").is_success, "the follower to be ready")
    assert follower.position() == leader.position()


def test_a_leader_that_returns_empty_takes_its_followers_data_and_loses_nothing(cluster: Cluster) -> None:
    leader, *followers = cluster.start(3).nodes
    cluster.introduce()
    for number in range(20):
        leader.put(f"k/{number}", b"%d" % number)
    before = cluster.converge()
    leader.stop()
    shutil.rmtree(leader.volume)
    leader.start()
    assert leader.position() == before
    assert [leader.get(f"/get/k/{number}").content for number in range(20)] == [b"%d" % n for n in range(20)]
    leader.put("k/20", b"20")
    assert cluster.converge()["revision"] == before["revision"] + 1
    assert all(follower.status().state == "serving" for follower in followers)
    assert not any("code=diverged" in follower.log for follower in followers)


def test_followers_keep_their_data_when_the_leader_returns_empty_and_cannot_ask_them(cluster: Cluster) -> None:
    """Its MEHDB_PEERS name nobody but itself."""
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    before = cluster.converge()
    leader.stop()
    leader.volume.rename(leader.volume.with_name("away"))
    leader.start()
    eventually(lambda: follower.status().state == "diverged", "the follower to notice another history")
    assert not follower.ready()
    answer = follower.get("/get/k")
    assert (answer.content, answer.headers["Mehdb-State"]) == (b"v", "diverged")
    assert follower.position() == before
    assert "diverged" in follower.get("/status?level=full").json()["message"]
    assert "code=diverged" in follower.log


def test_a_lost_leader_volume_is_replaced_by_a_copy_of_a_followers(cluster: Cluster) -> None:
    """By hand, for a leader that cannot ask its followers: its MEHDB_PEERS name nobody but itself."""
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    before = cluster.converge()
    leader.stop()
    shutil.rmtree(leader.volume)
    leader.start()
    eventually(lambda: follower.status().state == "diverged", "the follower to notice another history")
    assert "bring the leader's own volume back" in (follower.status().reason or "")
    cluster.stop()
    shutil.rmtree(leader.volume)
    leader.volume.mkdir()
    shutil.copy(follower.volume / "store.db", leader.volume)
    leader.start()
    follower.start()
    assert cluster.converge() == before
    assert leader.get("/get/k").content == b"v"


def roll_back(cluster: Cluster) -> None:
    """Write to the leader, and start it again on its volume as that was before the last write."""
    leader, backup = cluster.leader, cluster.directory / "backup"
    leader.put("k", b"old")
    cluster.converge()
    leader.stop()
    shutil.copytree(leader.volume, backup)
    leader.start()
    leader.put("k", b"new")
    cluster.converge()
    leader.stop()
    shutil.rmtree(leader.volume)
    backup.rename(leader.volume)
    leader.start()


def test_a_leader_that_was_rolled_back_takes_what_it_lacks_from_its_followers(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    cluster.introduce()
    roll_back(cluster)
    assert leader.get("/get/k").content == b"new"
    assert "caught up revision=2" in leader.log
    leader.put("k", b"newer")
    cluster.converge()
    assert follower.get("/get/k").content == b"newer"
    assert "code=diverged" not in follower.log


def test_a_rolled_back_leader_does_not_roll_its_followers_back(cluster: Cluster) -> None:
    """Even if it cannot ask them: its MEHDB_PEERS name nobody but itself."""
    leader, follower = cluster.start(2).nodes
    roll_back(cluster)
    eventually(lambda: follower.status().state == "diverged", "the follower to notice that it is ahead")
    assert follower.get("/get/k").content == b"new"
    leader.put("k", b"forked")
    eventually(lambda: "chain" in (follower.status().reason or ""), "the follower to notice the fork", 30)
    assert follower.get("/get/k").content == b"new"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_under_load_exits_0_and_keeps_what_was_acknowledged(cluster: Cluster, number: int) -> None:
    """`Node.stop` asserts the exit code."""
    leader, follower = cluster.start(2).nodes
    load = Load(leader.url)
    async with load.running():
        await load.more(200)
        await asyncio.to_thread(leader.stop, number)
        assert not (leader.volume / "store.db-wal").exists(), "closed properly: all of it is in the database"
        stopped_at = load.revision
        await asyncio.to_thread(leader.start)
        await load.more(50)
    assert load.revision > stopped_at >= 200
    cluster.converge()
    assert_holds(leader, load)
    assert_holds(follower, load)


def test_a_reader_that_stalls_does_not_hold_up_a_stop_beyond_its_limit(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_STOP_TIMEOUT="2").start()
    leader.put("large", bytes(8 << 20))
    with socket.create_connection((ADDRESS, leader.port)) as stalled:
        stalled.sendall(b"GET /get/large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert stalled.recv(12) == b"HTTP/1.1 200"
        started_s = time.monotonic()
        leader.stop()
        assert time.monotonic() - started_s < 2 + DEADLINE_S / 4


@pytest.mark.parametrize("always", [False, True], ids=["one read", "reads all the time"])
def test_reads_do_not_keep_the_wal_from_being_used_again(cluster: Cluster, always: bool) -> None:
    """A snapshot that is held keeps SQLite from starting the WAL anew: it would grow with every write."""
    leader = cluster.start(1).leader
    leader.put("small", b"1")
    for number in range(60):
        if always or number == 0:
            assert leader.get("/get/small").content == b"1"
        leader.put(f"large/{number}", bytes(1 << 20))
    wal_bytes = (leader.volume / "store.db-wal").stat().st_size
    assert wal_bytes < 32 << 20, "60 MiB were written, 16 MiB are kept before a checkpoint"
