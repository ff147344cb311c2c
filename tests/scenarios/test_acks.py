"""A write that asks for followers is answered once so many hold it durably, or told as one that only the leader has."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import DEADLINE_S, Cluster, Node, eventually, lagging, running
from mehdb.api import Followers
from mehdb.model import History, Revision
from wire import Reply, ask

HISTORY, OTHER = History("aa" * 16), History("bb" * 16)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader and two followers. No test changes what they are."""
    with running(tmp_path_factory.mktemp("trio")) as nodes:
        yield nodes.start(3)


def not_confirmed(reply: Reply, acks: int) -> int:
    """Return the revision of a write that the leader has, and *acks* followers."""
    assert (reply.status, reply.error, reply.json["acks"]) == (504, "not_confirmed", acks)
    assert reply.headers["ETag"] == f'"{reply.json["revision"]}"'
    return int(reply.json["revision"])


def test_what_followers_have_confirmed_each_of_them_shows(trio: Cluster) -> None:
    for number in range(20):
        value = b"%d" % number
        assert ask(trio.leader, "PUT", "/set/k?acks=2&wait=20", value).status == 200
        assert [ask(node, "GET", "/get/k").body for node in trio.followers] == [value] * 2
    assert ask(trio.leader, "DELETE", "/delete/k?acks=2&wait=20").status == 200
    assert [ask(node, "GET", "/get/k").status for node in trio.followers] == [404] * 2


def test_a_write_that_too_few_confirm_in_time_is_written_all_the_same(trio: Cluster) -> None:
    reply = ask(trio.leader, "PUT", "/set/few?acks=3&wait=1", b"v")
    revision = not_confirmed(reply, 2)
    found = ask(trio.leader, "GET", "/get/few")
    assert (found.revision, found.body) == (revision, b"v")
    not_confirmed(ask(trio.leader, "DELETE", "/delete/few?acks=100&wait=0.2"), 2)
    assert ask(trio.leader, "GET", "/get/few").status == 404
    assert ask(trio.leader, "DELETE", "/delete/few?acks=3&wait=0").status == 404, "there is nothing to confirm"


@pytest.mark.parametrize(
    "query", ["acks=-1", "acks=101", "acks=", "acks=all", "acks=1&wait=61", "acks=1&acks=1", "ack=1"]
)
def test_what_is_asked_for_badly_writes_nothing(trio: Cluster, query: str) -> None:
    before = trio.leader.position()
    assert ask(trio.leader, "PUT", f"/set/k?{query}", b"v").error == "bad_parameter"
    assert ask(trio.leader, "DELETE", f"/delete/k?{query}").error == "bad_parameter"
    assert trio.leader.position() == before


def test_a_follower_that_is_down_confirms_when_it_is_back(cluster: Cluster) -> None:
    leader, follower, other = cluster.start(3).nodes
    follower.kill()
    revision = not_confirmed(ask(leader, "PUT", "/set/k?acks=2&wait=1", b"v"), 1)
    assert ask(leader, "GET", "/get/k").revision == revision
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, leader, "PUT", "/set/k?acks=2&wait=60", b"w")
        eventually(lambda: ask(other, "GET", "/get/k").body == b"w", "the write to be on one follower")
        assert not waiting.done()
        follower.start()
        assert waiting.result(DEADLINE_S).status == 200
    assert ask(follower, "GET", "/get/k").body == b"w"


def test_a_follower_that_stands_still_confirms_nothing(cluster: Cluster) -> None:
    """Though it counts as connected, and goes on asking for what comes after its last revision."""
    leader, follower = cluster.start(2).nodes
    assert ask(leader, "PUT", "/set/k?acks=1&wait=20", b"v").status == 200
    with lagging(follower, leader):
        not_confirmed(ask(leader, "PUT", "/set/k?acks=1&wait=1.5", b"w"), 0)
    assert ask(leader, "PUT", "/set/k?acks=1&wait=20", b"x").status == 200


def test_the_settings_hold_where_a_write_says_nothing(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_ACKS="1", MEHDB_ACKS_TIMEOUT="0.2").start()
    not_confirmed(ask(leader, "PUT", "/set/k", b"v"), 0)
    not_confirmed(ask(leader, "PUT", "/set/k?wait=0", b"v"), 0)
    assert ask(leader, "PUT", "/set/k?acks=0", b"w").status == 200
    not_confirmed(ask(leader, "DELETE", "/delete/k"), 0)
    cluster.add().start()
    assert ask(leader, "PUT", "/set/k?wait=20", b"v").status == 200


def test_a_leader_that_drains_still_confirms_what_it_took(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert leader.process is not None
    with ThreadPoolExecutor(1) as pool:
        with lagging(follower, leader):
            waiting = pool.submit(ask, leader, "PUT", "/set/k?acks=1&wait=60", b"v")
            eventually(lambda: ask(leader, "GET", "/get/k").status == 200, "the write to be on the leader")
            leader.process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(leader), "the leader to take no more writes")
            assert not waiting.done()
        assert waiting.result(DEADLINE_S).status == 200
    assert leader.process.wait(DEADLINE_S) == 0
    leader.process = None
    assert ask(follower, "GET", "/get/k").body == b"v"


def test_a_leader_that_drains_waits_for_followers_that_are_asked_for_though_not_there(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert ask(leader, "PUT", "/set/k", b"v").status == 200
    follower.stop()
    leader.stop()
    leader.start()  # it has heard of nobody
    assert leader.process is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, leader, "PUT", "/set/k?acks=1&wait=60", b"w")
        eventually(lambda: ask(leader, "GET", "/get/k").body == b"w", "the write to be on the leader")
        leader.process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(leader), "the leader to take no more writes")
        follower.start(ready=False)
        assert waiting.result(DEADLINE_S).status == 200
    assert leader.process.wait(DEADLINE_S) == 0
    leader.process = None
    assert ask(follower, "GET", "/get/k").body == b"w"


def refused(node: Node) -> bool:
    return ask(node, "PUT", "/set/other", b"v").status == 503


async def test_what_was_held_of_another_history_confirms_nothing() -> None:
    followers = Followers()
    followers.note("mehdb-1", Revision(9), HISTORY)
    assert await followers.held(Revision(9), HISTORY, 1, 0) == 1
    assert await followers.held(Revision(10), HISTORY, 1, 0) == 0
    assert await followers.held(Revision(3), OTHER, 1, 0) == 0, "another store is in this one's place"
    followers.note("mehdb-2", Revision(3), OTHER)
    assert await followers.held(Revision(3), OTHER, 2, 0) == 1, "who was seen before holds nothing of it"
    followers.refuse("mehdb-2", "diverged")
    assert await followers.held(Revision(3), OTHER, 1, 0) == 0


async def test_who_waits_is_told_as_soon_as_enough_hold_it() -> None:
    followers = Followers()
    waiting = asyncio.create_task(followers.held(Revision(5), HISTORY, 2, DEADLINE_S))
    for node, revision in (("mehdb-1", 5), ("mehdb-2", 4), ("mehdb-1", 6)):
        followers.note(node, Revision(revision), HISTORY)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        assert not waiting.done()
    followers.note("mehdb-2", Revision(5), HISTORY)
    assert await waiting == 2
