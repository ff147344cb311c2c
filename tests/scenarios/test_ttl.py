"""Lives: keys that are deleted when their time is over, by the leader alone, whatever the wall clocks say."""

import os
import shutil
import time
from pathlib import Path

import pytest

from cluster import Cluster, Node, eventually
from wire import Connection, ask

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
HOUR_S = 3600


def set_for(node: Node, key: str, ttl_s: float | str, value: bytes = b"v") -> int:
    reply = ask(node, "PUT", f"/set/{key}?ttl={ttl_s}", value)
    assert reply.status == 200
    return reply.revision


def left_s(node: Node, key: str) -> float | None:
    """Return how long *key* lives on, None if it has no end."""
    reply = ask(node, "GET", f"/get/{key}")
    assert reply.status == 200
    text = reply.headers["Mehdb-TTL"]
    return None if text is None else float(text)


def is_gone(node: Node, key: str) -> bool:
    return ask(node, "GET", f"/get/{key}").status == 404


def test_a_key_lives_as_long_as_was_said_on_every_node(cluster: Cluster) -> None:
    """Polled, until it is gone: neither early nor more than a second late."""
    cluster.start(2)
    begun_s = time.monotonic()
    set_for(cluster.leader, "k", "1.5")
    written_s = time.monotonic()
    cluster.converge()
    gone_s: dict[str, float] = {}

    def all_gone() -> bool:
        for node in cluster.nodes:
            before_s = time.monotonic()
            if node.name not in gone_s and is_gone(node, "k"):
                assert time.monotonic() - begun_s >= 1.5, "gone early"
                gone_s[node.name] = before_s - written_s
        return len(gone_s) == 2

    eventually(all_gone, "its end")
    print(f"a life of 1.5 s ended after {', '.join(f'{s:.2f} s' for s in gone_s.values())}")
    assert all(seconds <= 2.5 for seconds in gone_s.values())
    assert cluster.converge()["revision"] == 2  # a deletion like any other


def test_the_time_that_is_left_is_told_by_every_node(cluster: Cluster) -> None:
    cluster.start(2)
    set_for(cluster.leader, "long", 500)
    set_for(cluster.leader, "renewed", 500)
    set_for(cluster.leader, "renewed", 1000)
    set_for(cluster.leader, "unlimited", 500)
    assert ask(cluster.leader, "PUT", "/set/unlimited", b"v").status == 200
    cluster.converge()
    for node in cluster.nodes:
        left = {key: left_s(node, key) for key in ("long", "renewed", "unlimited")}
        assert left["unlimited"] is None
        assert 400 < (left["long"] or 0) <= 500 < 900 < (left["renewed"] or 0) <= 1000


def test_a_life_that_is_none_is_refused(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    for ttl in ("0", "-1", "x", "", "1e3", "0.0001", "99999999999", "1.5.5", "inf"):
        reply = ask(node, "PUT", f"/set/k?ttl={ttl}", b"v")
        assert (reply.status, reply.error) == (400, "bad_parameter")
    assert is_gone(node, "k")


def test_what_has_been_written_anew_outlives_the_old_value(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    set_for(node, "anew", 1)
    set_for(node, "witness", 1)
    assert ask(node, "PUT", "/set/anew", b"new").status == 200
    eventually(lambda: is_gone(node, "witness"), "the end of one that began later")
    assert ask(node, "GET", "/get/anew").body == b"new"


def test_a_long_life_is_not_in_the_way_of_a_short_one(cluster: Cluster) -> None:
    """The leader waits for the next end; one that comes sooner is not slept through."""
    node = cluster.start(1).leader
    set_for(node, "long", 1000)
    set_for(node, "short", "0.2")
    eventually(lambda: is_gone(node, "short"), "the end of the short one", deadline_s=5)
    assert left_s(node, "long")


def test_many_lives_end_together(cluster: Cluster) -> None:
    """More than one step deletes, and none is left."""
    node = cluster.start(1).leader
    with Connection(node) as connection:
        for batch in range(3):
            body = "".join(f'{{"op":"set","key":"{batch}/{n}","value":"","ttl":1}}\n' for n in range(1000))
            assert connection.ask("POST", "/batch", body.encode()).status == 200
        assert connection.ask("PUT", "/set/stays", b"v").status == 200
    eventually(lambda: ask(node, "GET", "/status?level=full").body == b"1", "all of them to be gone")
    assert ask(node, "GET", "/keys").json == ["stays"]


def test_a_follower_decides_nothing(cluster: Cluster) -> None:
    """While its leader is away it serves on what has expired; the leader's return ends that."""
    cluster.start(2)
    leader, follower = cluster.nodes
    set_for(leader, "k", "0.3")
    set_for(leader, "witness", 100)
    cluster.converge()
    leader.kill()
    eventually(lambda: left_s(follower, "k") == 0, "its time to be over")
    assert not is_gone(follower, "k")
    leader.start()
    eventually(lambda: is_gone(follower, "k"), "the leader to delete it")
    assert (left_s(follower, "witness") or 0) > 50
    assert cluster.converge()["revision"] == 3


def test_a_leader_that_starts_first_deletes_nothing_before_a_follower_that_holds_more_could_come(
    cluster: Cluster,
) -> None:
    """The whole cluster restarts, with an older volume on the leader, on which a key has expired meanwhile.

    A deletion of its own would have made another history: it could not recover from its follower.
    """
    cluster.start(2)
    leader, follower = cluster.nodes
    set_for(leader, "k", "0.2", b"old")
    cluster.converge()
    cluster.introduce()
    leader.stop()
    old = leader.volume.with_name("old")
    shutil.copytree(leader.volume, old)
    leader.start()
    eventually(lambda: is_gone(follower, "k"), "the end of its life")
    assert ask(leader, "PUT", "/set/newer", b"v").status == 200
    newest = cluster.converge()
    cluster.stop()
    shutil.rmtree(leader.volume)
    shutil.copytree(old, leader.volume)
    leader.start()  # alone, with a key whose time is over
    assert left_s(leader, "k") == 0
    follower.start()
    eventually(lambda: leader.position() == newest, "the leader to recover from its follower")
    assert cluster.converge() == newest


def test_a_leader_without_others_deletes_at_once_what_expired_while_it_was_away(cluster: Cluster) -> None:
    node = cluster.add(MEHDB_HOST="alone")
    node.start()
    set_for(node, "k", "0.2")
    eventually(lambda: is_gone(node, "k"), "its end")
    set_for(node, "again", "0.2")
    node.kill()
    node.start()
    eventually(lambda: is_gone(node, "again"), "its end after the restart", deadline_s=5)


def test_the_wall_clock_may_jump_while_the_leader_runs(cluster: Cluster, tmp_path: Path) -> None:
    if FAKETIME is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs libfaketime")
        pytest.skip("no libfaketime here to set a process's wall clock: apt install faketime")
    clock = tmp_path / "clock"

    def set_clock(offset_s: int) -> None:
        new = tmp_path / "new"
        new.write_text(f"{offset_s:+d}")
        new.rename(clock)

    set_clock(0)
    node = cluster.add(
        MEHDB_HOST="alone", LD_PRELOAD=str(FAKETIME), FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )  # fmt: skip
    node.start()
    set_for(node, "long", 1000)
    set_clock(HOUR_S)
    dated = ask(node, "GET", "/get/long")
    assert dated.status == 200
    set_for(node, "short", 1)
    set_clock(-HOUR_S)
    assert dated.headers["Date"] > ask(node, "GET", "/get/long").headers["Date"], "the clock of the node did not jump"
    eventually(lambda: is_gone(node, "short"), "the end of a life during which the clock went back", deadline_s=5)
    set_clock(HOUR_S)
    assert 900 < (left_s(node, "long") or 0) <= 1000
