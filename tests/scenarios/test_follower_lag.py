"""How long ago a follower held everything, by what its leader knows; and what a follower has taken whole."""

import re
import signal
import time

from cluster import Cluster, Node, eventually
from mehdb.store.moments import EXACT_PART, STEP_S

ROUNDING_S = 0.001


def figure(node: Node, name: str) -> float | None:
    match = re.search(rf"^{re.escape(name)} (\S+)$", node.get("/metrics").text, re.MULTILINE)
    return None if match is None else float(match[1])


def lag_s(leader: Node, follower: Node) -> float | None:
    return figure(leader, f'mehdb_follower_lag_seconds{{node="{follower.name}"}}')


def assert_lags_since(leader: Node, follower: Node, sent_s: float, answered_s: float) -> float:
    """The *follower* has lacked something since a moment between these two, and that is what its leader tells."""
    before_s = time.monotonic()
    told_s = lag_s(leader, follower)
    after_s = time.monotonic()
    assert told_s is not None
    assert before_s - answered_s - ROUNDING_S <= told_s
    assert told_s <= (after_s - sent_s) * (1 + EXACT_PART) + STEP_S + ROUNDING_S
    return told_s


def test_a_follower_that_stands_still_lags_since_the_first_write_that_it_lacks(cluster: Cluster) -> None:
    leader, follower, other = cluster.start(3).nodes
    leader.put("k", b"0")
    cluster.converge()
    eventually(lambda: lag_s(leader, follower) == 0, "all of it to be acknowledged")
    assert lag_s(follower, leader) is None, "nobody follows a follower here"
    assert follower.process is not None
    follower.process.send_signal(signal.SIGSTOP)
    try:
        assert lag_s(leader, follower) == 0, "it holds all that there is, for all that its leader knows"
        sent_s = time.monotonic()
        leader.put("k", b"1")
        answered_s = time.monotonic()
        first_s = assert_lags_since(leader, follower, sent_s, answered_s)
        for number in range(50):  # what comes later changes nothing
            leader.put("k", b"%d" % number)
        eventually(lambda: (lag_s(leader, follower) or 0) > first_s + 1, "it to grow")
        assert_lags_since(leader, follower, sent_s, answered_s)
        assert figure(leader, f'mehdb_follower_lag_revisions{{node="{follower.name}"}}') == 51
        eventually(lambda: lag_s(leader, other) == 0, "the other one to have all of it")
        status = {one.node: one for one in leader.status().followers}
        assert (status[follower.name].lag_seconds or 0) > 1
    finally:
        follower.process.send_signal(signal.SIGCONT)
    eventually(lambda: lag_s(leader, follower) == 0, "it to catch up")
    cluster.converge()


def test_a_follower_that_was_there_before_its_leader_started_lags_since_then_at_most(cluster: Cluster) -> None:
    """A leader does not know when what it found on its volume was written."""
    leader, follower = cluster.start(2).nodes
    leader.put("k", b"1")
    held = cluster.converge()
    assert follower.process is not None
    follower.stop()
    leader.put("k", b"2")
    leader.stop()
    started_s = time.monotonic()
    leader.start()
    place = {"history": held["history"], "after": held["revision"], "chain": held["chain"], "node": "by-hand"}
    leader.get("/replicate", params=place | {"snapshot": "no"})
    told_s = figure(leader, 'mehdb_follower_lag_seconds{node="by-hand"}')
    assert told_s is not None
    assert 0 < told_s <= time.monotonic() - started_s


def test_what_a_follower_takes_whole_is_counted_on_both_sides(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    for number in range(20):
        leader.put(f"k/{number}", bytes(1000))
    follower = cluster.add().start()  # it has nothing: the leader gives it all at once
    assert figure(follower, 'mehdb_snapshots_total{direction="taken"}') == 1
    assert figure(follower, 'mehdb_snapshots_total{direction="sent"}') == 0
    assert figure(leader, 'mehdb_snapshots_total{direction="sent"}') == 1
    assert figure(follower, 'mehdb_snapshot_size_bytes{direction="taken"}') == 0
    leader.put("k", b"1")
    eventually(lambda: (figure(follower, "mehdb_commit_changes_sum") or 0) >= 1, "a page to be committed")
