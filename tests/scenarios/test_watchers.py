"""Watchers of a cluster: nothing is skipped or told twice, whatever dies; slow ones are cut off; many are cheap."""

import asyncio
import contextlib
import itertools
import json
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, eventually
from commands import mehdb
from watching import Watcher, watching
from wire import Connection, ask

MIB = 1 << 20
WATCHERS = 1000
GONE = (OSError, HTTPException, AssertionError)  # what a client sees of a node that dies


@contextmanager
def writing(leader: Node) -> Iterator[list[int]]:
    """Have a client write all the time while the block runs, and collect what was acknowledged, by revision."""
    acknowledged: list[int] = []
    over = threading.Event()

    def write() -> None:
        for number in itertools.count():
            if over.is_set():
                return
            with contextlib.suppress(*GONE):
                if number % 5 == 4:
                    reply = ask(leader, "DELETE", f"/delete/w/{(number - 1) % 50}")
                else:
                    reply = ask(leader, "PUT", f"/set/w/{number % 50}", b"%d" % number)
                if reply.status == 200:
                    acknowledged.append(reply.revision)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield acknowledged
    finally:
        over.set()
        writer.join()


class Wanderer:
    """A client that watches everything, at one node after the other, and goes on from what it had last."""

    def __init__(self, begin: int) -> None:
        self.position = begin
        self.changes: list[dict[str, Any]] = []
        self.visits = 0

    def visit(self, node: Node, count: int, until: int = 1 << 62) -> None:
        """Watch at *node* until *count* events have come, revision *until* has, or it goes away."""
        with contextlib.suppress(*GONE):
            watcher = Watcher(node, f"/watch?after={self.position}")
            self.visits += 1
            try:
                for _ in range(count):
                    if self.position >= until or not self._take(watcher.line()):
                        return
            finally:
                watcher.close()

    def _take(self, line: bytes) -> bool:
        """Take in *line*; return whether there may be more."""
        if not line.endswith(b"\n"):  # nobody may believe half a line
            return False
        event = json.loads(line)
        if event["op"] == "error":
            return False
        if event["op"] != "heartbeat":
            self.changes.append(event)
        assert event["revision"] >= self.position
        self.position = event["revision"]
        return True


def test_a_watcher_that_wanders_through_deaths_gets_every_change_once_and_in_order(cluster: Cluster) -> None:
    cluster.start(3)
    rng = random.Random(4)
    wanderer = Wanderer(0)
    end_s = time.monotonic() + 8
    kills = 0
    with writing(cluster.leader) as acknowledged:
        while time.monotonic() < end_s:
            node = rng.choice(cluster.nodes)
            dying = rng.random() < 0.3
            if dying:
                timer = threading.Timer(0.1, node.kill)
                timer.start()
                wanderer.visit(node, 100_000)
                timer.join()
                node.start()
                kills += 1
            else:
                wanderer.visit(node, rng.randrange(1, 60))
    head = cluster.converge()["revision"]
    eventually(
        lambda: wanderer.visit(cluster.followers[0], 1000, head) or wanderer.position == head, "the last of them"
    )
    revisions = [change["revision"] for change in wanderer.changes]
    assert revisions == list(range(1, head + 1))
    assert set(acknowledged) <= set(revisions)
    assert kills >= 2
    print(
        f"wandering watcher: {head} changes, {wanderer.visits} visits, {kills} nodes killed: "
        "each once, in order, none skipped"
    )


def test_a_watcher_of_a_follower_that_takes_a_snapshot_is_told_or_goes_on(cluster: Cluster) -> None:
    """What a snapshot passes over is not skipped without a word."""
    cluster.start(1, MEHDB_RETAIN_CHANGES="50", MEHDB_SNAPSHOT_LAG="50")
    follower = cluster.add()
    follower.start()
    assert ask(cluster.leader, "PUT", "/set/k", b"v").status == 200
    cluster.converge()
    with watching(follower, "after=0") as watcher:
        assert watcher.change()["revision"] == 1
        follower.stop()
        assert watcher.line().startswith(b'{"op":"error","error":"stopping"')
        assert watcher.line() == b""
    with Connection(cluster.leader) as connection:
        for number in range(400):
            connection.ask("PUT", "/set/k", b"%d" % number)
    eventually(lambda: cluster.leader.status().floor > 100, "a compaction")
    follower.start()
    cluster.converge()
    reply = ask(follower, "GET", "/watch?after=1")
    assert (reply.status, reply.json["floor"] > 1) == (410, True)
    with watching(follower, f"after={reply.json['floor']}") as watcher:
        found = watcher.until(401)
        assert [change["revision"] for change in found] == list(range(reply.json["floor"] + 1, 402))


def test_a_watcher_at_the_head_of_a_replaced_store_goes_on(cluster: Cluster) -> None:
    """The follower's store is replaced under it by a snapshot: it is told that changes are missing, not skipped."""
    cluster.start(2, MEHDB_RETAIN_CHANGES="50", MEHDB_SNAPSHOT_LAG="50")
    leader, follower = cluster.nodes
    assert ask(leader, "PUT", "/set/k", b"v").status == 200
    cluster.converge()
    with watching(follower) as watcher:
        begun = watcher.event()["revision"]
        assert follower.process is not None
        follower.process.send_signal(signal.SIGSTOP)
        try:
            with Connection(leader) as connection:
                for number in range(400):
                    connection.ask("PUT", "/set/k", b"%d" % number)
            eventually(lambda: leader.status().floor > 100, "a compaction")
        finally:
            follower.process.send_signal(signal.SIGCONT)
        told, last = watcher.change(), begun
        while told["op"] != "error":  # what was on its way before it stood still
            assert told["revision"] == last + 1
            told, last = watcher.change(), told["revision"]
        assert (told["error"], told["revision"]) == ("compacted", last)
        assert told["floor"] > 100
        assert watcher.line() == b""


def test_a_slow_watcher_is_cut_off_with_the_reason_and_the_memory_is_bounded(cluster: Cluster) -> None:
    node = cluster.start(1, MEHDB_BODY_TIMEOUT="1").leader
    peak_before = resident_bytes(node)
    slow = [Watcher(node, "/watch") for _ in range(20)]
    with watching(node) as quick, Connection(node) as connection:
        for number in range(300):
            assert connection.ask("PUT", f"/set/{number % 3}", b"%d " % number + bytes(100_000)).status == 200
            assert quick.change()["revision"] == number + 1
    grown = resident_bytes(node) - peak_before
    assert grown < 60 * MIB  # all that was written to each would be 600 MB
    reasons = []
    for watcher in slow:
        last = 0
        while line := watcher.line():
            event = json.loads(line)
            if event["op"] == "error":
                reasons.append(event["error"])
                assert event["revision"] == last
            last = event["revision"]
        assert last < 300
        watcher.close()
    assert reasons == ["too_slow"] * 20
    eventually(lambda: node.status().watchers == 0, "nobody to watch any more")
    print(f"20 slow watchers of 30 MB: cut off with the reason, memory +{grown / MIB:.0f} MiB")


def resident_bytes(node: Node) -> int:
    assert node.process is not None
    with open(f"/proc/{node.process.pid}/statm") as statm:  # noqa: PTH123  a file of the kernel
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_a_thousand_watchers_of_one_node_each_get_every_change_in_order(cluster: Cluster, role: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, WATCHERS + 500)), hard))
    cluster.start(1 if role == "leader" else 2)
    node, count = cluster.nodes[-1], 50
    begun = asyncio.Semaphore(0)

    async def watch(number: int) -> list[int]:
        reader, writer = await asyncio.open_connection(ADDRESS, node.port)
        query = f"prefix=k/&after={number % 2}" if number % 10 else "prefix=k/"
        writer.write(f"GET /watch?{query} HTTP/1.0\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        revisions = []
        await reader.readline()
        begun.release()
        async with asyncio.timeout(DEADLINE_S):
            while not revisions or revisions[-1] < count + 1:
                event = json.loads(await reader.readline())
                if event["op"] == "set":
                    revisions.append(event["revision"])
        writer.close()
        return revisions

    async with httpx.AsyncClient(base_url=cluster.leader.url, trust_env=False, timeout=DEADLINE_S) as client:
        assert (await client.put("/set/other", content=b"")).status_code == 200
        await asyncio.to_thread(cluster.converge)
        tasks = [asyncio.create_task(watch(number)) for number in range(WATCHERS)]
        for _ in range(WATCHERS):
            await begun.acquire()
        assert (await asyncio.to_thread(node.status)).watchers == WATCHERS
        started_s = time.monotonic()
        for number in range(count):
            assert (await client.put(f"/set/k/{number}", content=b"v")).status_code == 200
        seen = await asyncio.gather(*tasks)
    assert all(revisions == list(range(2, count + 2)) for revisions in seen)
    seconds = time.monotonic() - started_s
    print(f"{WATCHERS} watchers of a {role}: {count * WATCHERS} changes delivered, in order, in {seconds:.1f} s")


def test_a_drain_ends_no_watch_and_a_stop_does_with_the_reason(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    with Connection(node) as connection, watching(node) as watcher:
        watcher.event()
        revision = connection.ask("PUT", "/set/k", b"v").revision
        assert watcher.change()["revision"] == revision
        assert node.process is not None
        node.process.send_signal(signal.SIGUSR1)
        eventually(lambda: ask(node, "GET", "/readyz").status == 503, "the drain")
        assert watcher.event() == {"op": "heartbeat", "revision": revision}
        node.stop()
        assert watcher.event()["error"] == "stopping"
        assert watcher.line() == b""


def test_a_watch_ends_when_another_history_takes_the_place_of_the_one_that_it_is_of(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    assert ask(node, "PUT", "/set/k", b"v").status == 200
    backup = cluster.directory / "backup.db"
    assert mehdb("backup", backup, data_dir=node.volume).code == 0
    with watching(node) as watcher:
        begun = watcher.event()["revision"]
        assert mehdb("restore", "--replace", "--yes", backup, data_dir=node.volume).code == 0
        told = watcher.change()
        assert (told["op"], told["error"], told["revision"]) == ("error", "diverged", begun)
        assert watcher.line() == b""


def test_an_empty_follower_cannot_be_watched(cluster: Cluster) -> None:
    cluster.add()
    follower = cluster.add()
    follower.start(ready=False)
    reply = ask(follower, "GET", "/watch")
    assert (reply.status, reply.error) == (503, "not_synced")


def test_a_client_that_has_gone_is_noticed(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    watcher = Watcher(node, "/watch")
    eventually(lambda: node.status().watchers == 1, "the watch")
    watcher.socket.shutdown(socket.SHUT_RDWR)
    watcher.close()
    eventually(lambda: node.status().watchers == 0, "its end")
