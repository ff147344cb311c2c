"""A node that is about to stop: it takes no new writes, finishes those it took, and lets everybody go in peace."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Final

import httpx
import pytest

from cluster import DEADLINE_S, Cluster, Node, eventually, lagging
from commands import mehdb, started
from mehdb.replication import WAIT_S
from mehdb.store import lock_holder
from wire import Connection, lines, request

SOON_S: Final = 5.0  # far below what a bound would allow that is not meant to be reached
LONG: Final = {"MEHDB_LAME_DUCK": "30", "MEHDB_GRACE_PERIOD": "100"}


def tell(node: Node, number: int) -> "subprocess.Popen[bytes]":
    """Send a signal, and return the process that got it."""
    assert node.process is not None
    node.process.send_signal(number)
    return node.process


def ended(node: Node, within_s: float) -> None:
    """Wait until *node* has ended by itself: it must exit 0."""
    assert node.process is not None
    code = node.process.wait(within_s)
    node.process = None
    assert code == 0, node.log


def draining(node: Node) -> None:
    eventually(lambda: node.status().state == "draining", f"{node.name} to drain")


def heard_s(leader: Node, name: str = "mehdb-1") -> float:
    """Return how long ago a follower of *leader* asked for more."""
    return next(one.seen_seconds_ago for one in leader.status().followers if one.node == name)


@contextmanager
def half_written(node: Node, value: bytes) -> Iterator[Connection]:
    """Have a connection on which a PUT is under way: the second half of *value* is not sent yet."""
    with Connection(node) as connection:
        head = b"PUT /set/under/way HTTP/1.1\r\n" + lines({"Content-Length": len(value)}) + b"\r\n"
        connection.send(head + value[: len(value) // 2])
        # One answer on a later connection shows that the node has read what came before it.
        assert node.get("/livez").is_success
        yield connection


def assert_stopped_cleanly(node: Node) -> None:
    wal = node.volume / "store.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0, "all of it is in the database"
    assert not (node.volume / "control").exists()
    assert lock_holder(node.volume) is None
    assert "Traceback" not in node.log


# SIGUSR1.


def test_a_draining_leader_refuses_writes_and_answers_everything_else(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    for _ in range(2):  # once more changes nothing
        tell(leader, signal.SIGUSR1)
        draining(leader)
        for method, target in (("PUT", "/set/k"), ("PUT", "/set/new"), ("DELETE", "/delete/k")):
            answer = leader.request(method, target, content=b"w" if method == "PUT" else None)
            assert (answer.status_code, answer.json()["error"]) == (503, "draining")
            assert answer.headers["Retry-After"].isdigit()
            assert answer.headers["Mehdb-State"] == "draining"
            assert "nothing was written" in answer.json()["message"]
        ready = leader.get("/readyz")
        assert (ready.status_code, ready.text) == (
            503, "store: ok\nrunning: the node is about to stop\nleading: ok\n"
        )  # fmt: skip
        assert leader.get("/livez").status_code == 200
        assert leader.get("/get/k").content == b"v"
        assert leader.get("/keys").json() == ["k"]
        assert leader.get("/snapshot").status_code == 200
        assert "Connection" not in leader.get("/get/k").headers, "it may stay for long"
    assert leader.status().reason == "running: the node is about to stop"
    assert leader.log.count("draining node=") == 1
    assert follower.ready(), "it goes on"


def test_followers_stay_with_a_draining_leader_and_send_no_writer_there(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    assert follower.put("k", b"w").status_code == 307
    tell(leader, signal.SIGUSR1)
    answer = eventually(lambda: (a := follower.put("k", b"w")).status_code != 307 and a, "the follower to know")
    assert (answer.status_code, answer.json()["error"]) == (503, "draining")
    assert answer.headers["Retry-After"].isdigit()
    assert follower.request("DELETE", "/delete/k").status_code == 503
    for _ in range(2):  # one long poll after the other
        eventually(lambda: heard_s(leader) > WAIT_S / 2, "a long poll to last")
        eventually(lambda: heard_s(leader) < WAIT_S / 2, "the follower to ask again")
    status = follower.status()
    assert (status.state, status.ready) == ("serving", True)
    assert "leader not followed" not in follower.log
    leader.stop()
    leader.start()
    assert eventually(
        lambda: (a := follower.request("PUT", "/set/k", content=b"w", follow_redirects=True)).is_success and a,
        "writes to be taken again",
    )
    cluster.converge()
    assert follower.get("/get/k").content == b"w"


def test_a_follower_that_asks_after_the_drain_began_is_told_at_once_and_then_waits(cluster: Cluster) -> None:
    """A long poll would keep it from a follower for longer than the leader stays: writers would be sent nowhere."""
    leader = cluster.start(1).leader
    leader.put("k", b"v")
    position = leader.position()
    tell(leader, signal.SIGUSR1)
    draining(leader)
    query = f"history={position['history']}&after={position['revision']}&chain={position['chain']}&node=late&wait=4"
    with Connection(leader) as connection:
        for waits in (False, True):
            started_s = monotonic()
            reply = connection.ask("GET", f"/replicate?{query}")
            assert (reply.status, reply.headers["Mehdb-State"]) == (204, "draining")
            assert (monotonic() - started_s >= 4) == waits


def test_a_follower_that_comes_late_gets_everything_from_a_draining_leader(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    leader.put("k", b"v")
    tell(leader, signal.SIGUSR1)
    draining(leader)
    follower = cluster.add().start()
    assert follower.get("/get/k").content == b"v"
    assert follower.put("k", b"w").status_code == 503


def test_a_draining_follower_is_not_ready_and_reads_go_on(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    tell(follower, signal.SIGUSR1)
    draining(follower)
    leader.put("k", b"v")
    cluster.converge()
    assert follower.get("/get/k").content == b"v"
    assert follower.get("/readyz").status_code == 503
    assert follower.put("k", b"w").status_code == 307, "the leader takes it"
    assert leader.ready()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_write_under_way_is_finished_and_acknowledged(cluster: Cluster, number: int) -> None:
    leader, follower = cluster.start(2).nodes
    value = bytes(range(256)) * 4096
    with half_written(leader, value) as connection:
        tell(leader, number)
        draining(leader)
        assert leader.put("late", b"1").status_code == 503
        connection.send(value[len(value) // 2 :])
        reply = connection.reply()
        assert (reply.status, reply.body) == (200, b"WRITE completed")
        assert (reply.headers["Connection"] == "close") == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        ended(leader, SOON_S)
        assert_stopped_cleanly(leader)
        assert follower.get("/get/under/way").content == value, "it was waited for"
        leader.start()
    else:
        leader.stop()
        leader.start()
    assert leader.get("/get/under/way").content == value
    assert leader.get("/get/late").status_code == 404


# `mehdb drain`.


def test_a_drain_returns_when_the_followers_hold_the_head(cluster: Cluster) -> None:
    leader, *followers = cluster.start(3).nodes
    for number in range(200):
        leader.put(f"k/{number}", bytes(1000))
    done = mehdb("drain", "--wait", data_dir=leader.volume)
    assert (done.code, done.said) == (0, "")
    assert done.shown == "drained: all writes are durable here and on the followers that are connected\n"
    head = leader.position()
    assert [follower.position() for follower in followers] == [head, head]
    assert leader.put("k", b"v").status_code == 503
    assert mehdb("drain", "--wait", data_dir=leader.volume).code == 0, "again"
    leader.stop()
    leader.start()
    assert leader.put("k", b"v").status_code == 200, "a drain ends with a restart"


def test_a_drain_names_who_is_missing_and_fails(cluster: Cluster) -> None:
    leader, slow, quick = cluster.start(3).nodes
    leader.put("k", b"v")
    cluster.converge()
    with lagging(slow, leader):
        leader.put("k", b"w")
        tell(leader, signal.SIGUSR1)
        eventually(lambda: quick.put("k", b"x").status_code == 503, "the other follower to be told")
        eventually(lambda: quick.position() == leader.position(), "what came with that to be durable")
        done = mehdb("drain", "--wait", "--timeout", "0.5", data_dir=leader.volume)
        assert (done.code, done.shown) == (1, "")
        assert done.said == "draining: 0 bytes and 0 requests under way; behind the head: mehdb-1\n"
    assert mehdb("drain", "--wait", data_dir=leader.volume).code == 0
    assert slow.get("/get/k").content == b"w"


def test_a_drain_waits_for_writes_under_way(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    value = bytes(100_000)
    with half_written(leader, value) as connection:
        done = mehdb("drain", "--wait", "--timeout", "0.5", data_dir=leader.volume)
        assert (done.code, done.said) == (1, "draining: 0 bytes and 1 requests under way\n")
        waiting = started("drain", "--wait", data_dir=leader.volume)
        connection.send(value[len(value) // 2 :])
        assert connection.reply().status == 200
        assert waiting.communicate(timeout=DEADLINE_S)[0].startswith("drained: ")
        assert waiting.returncode == 0


def test_a_drain_without_wait_returns_at_once(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    with lagging(follower, leader):
        leader.put("k", b"w")
        done = mehdb("drain", data_dir=leader.volume)
        assert (done.code, done.said) == (0, "")
        assert done.shown.startswith("draining: ")
        assert "mehdb-1" in done.shown
    assert leader.status().state == "draining"
    cluster.converge()


def test_a_drain_where_no_node_runs_says_so(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        assert str(directory) in mehdb("drain", "--wait", data_dir=directory).failed_in_one_line


# SIGTERM.


def test_a_stopping_node_answers_unready_and_ends_connections_until_clients_have_been_told(cluster: Cluster) -> None:
    leader = cluster.add(**LONG).start()
    leader.put("k", b"v")
    with Connection(leader) as kept, Connection(leader) as idle:
        assert kept.ask("GET", "/get/k").headers["Connection"] is None
        assert idle.ask("GET", "/get/k").headers["Connection"] is None
        tell(leader, signal.SIGTERM)
        draining(leader)
        for _ in range(5):
            with Connection(leader) as new:
                reply = new.ask("GET", "/get/k")
                assert (reply.status, reply.body, reply.headers["Connection"]) == (200, b"v", "close")
                assert new.rest() == b"", "and it closes it"
            assert leader.get("/readyz").status_code == 503
            assert leader.get("/livez").status_code == 200
        reply = kept.ask("GET", "/get/k")
        assert (reply.status, reply.headers["Connection"], kept.rest()) == (200, "close", b"")
        tell(leader, signal.SIGTERM)  # else it would go on for long
        ended(leader, SOON_S)
        assert idle.rest() == b"", "closed without a reset"
    assert_stopped_cleanly(leader)
    with pytest.raises(httpx.ConnectError):
        leader.get("/livez")


def test_a_second_signal_hurries_a_stop(cluster: Cluster) -> None:
    leader = cluster.add(**LONG).start()
    leader.put("k", b"v")
    tell(leader, signal.SIGTERM)
    draining(leader)
    assert leader.get("/get/k").content == b"v"
    tell(leader, signal.SIGTERM)
    ended(leader, SOON_S)
    assert_stopped_cleanly(leader)
    leader.start()
    assert leader.get("/get/k").content == b"v"
    tell(leader, signal.SIGTERM)
    draining(leader)
    tell(leader, signal.SIGINT)  # as good
    ended(leader, SOON_S)


def test_a_second_signal_waits_for_no_request_either(cluster: Cluster) -> None:
    """One that only holds a stop up: its client has stalled, and would be waited for for 50 s otherwise."""
    leader = cluster.add(MEHDB_STOP_TIMEOUT="50", MEHDB_DRAIN_TIMEOUT="50", MEHDB_GRACE_PERIOD="200").start()
    leader.put("k", b"v")
    with half_written(leader, bytes(100)):
        tell(leader, signal.SIGTERM)
        draining(leader)
        tell(leader, signal.SIGTERM)
        ended(leader, SOON_S)
    assert_stopped_cleanly(leader)
    leader.start()
    assert leader.get("/keys").json() == ["k"], "what was not whole was not written"


def test_a_stop_waits_for_a_client_that_stalls_only_so_long(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_DRAIN_TIMEOUT="0.5", MEHDB_STOP_TIMEOUT="1").start()
    with half_written(leader, bytes(100)):
        started_s = monotonic()
        tell(leader, signal.SIGTERM)
        ended(leader, 0.5 + 1 + SOON_S)
        assert monotonic() - started_s >= 0.5
    assert "not drained queue_bytes=0 writes=1 missing=nobody" in leader.log
    assert_stopped_cleanly(leader)


def test_a_stop_waits_for_a_follower_that_is_behind(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"v")
    cluster.converge()
    with lagging(follower, leader):
        leader.put("k", b"w")
        tell(leader, signal.SIGTERM)
        draining(leader)
        assert leader.get("/get/k").content == b"w", "it waits"
    ended(leader, SOON_S)
    assert follower.get("/get/k").content == b"w"
    assert "not drained" not in leader.log


def test_a_stop_waits_for_a_follower_only_so_long_and_says_who_is_missing(cluster: Cluster) -> None:
    leader, follower = cluster.start(1, MEHDB_DRAIN_TIMEOUT="0.5").start(1).nodes
    leader.put("k", b"v")
    cluster.converge()
    with lagging(follower, leader):
        leader.put("k", b"w")
        tell(leader, signal.SIGTERM)
        ended(leader, 0.5 + SOON_S)
    assert "not drained queue_bytes=0 writes=0 missing=mehdb-1" in leader.log
    leader.start()
    cluster.converge()
    assert follower.get("/get/k").content == b"w"


def test_many_answers_under_way_at_a_stop_are_whole(cluster: Cluster) -> None:
    """Asked on kept connections, each just before the signal: every one is answered, and none is cut off."""
    leader = cluster.add(MEHDB_LAME_DUCK="1").start()
    value = bytes(4 << 20)
    leader.put("large", value)
    connections = [Connection(leader) for _ in range(8)]
    for connection in connections:
        connection.send(request("GET", "/get/large"))
    started_s = monotonic()
    tell(leader, signal.SIGTERM)
    for connection in connections:
        with connection:
            reply = connection.reply()
            assert (reply.status, len(reply.body)) == (200, len(value))
    ended(leader, 1 + SOON_S)
    assert monotonic() - started_s >= 1, "it stays until clients have been told"
