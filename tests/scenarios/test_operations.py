"""An operator's commands that change a node: what each does, what it refuses, and that it asks before it destroys."""

import asyncio
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, Node, eventually, lagging, running
from commands import asked_and_answered, at_terminal, entries, kept, mehdb, refused, values, write
from mehdb.control import Control
from mehdb.store import check_directory

KEYS = 20
HISTORY = "[0-9a-f]{32}"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader and a follower with the same changes, for the tests that must change nothing."""
    with running(tmp_path_factory.mktemp("pair")) as nodes:
        nodes.start(2)
        write(nodes.leader, KEYS)
        nodes.converge()
        yield nodes


@pytest.fixture(scope="module")
def backup(pair: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of theirs."""
    path = tmp_path_factory.mktemp("backup") / "backup.db"
    assert mehdb("backup", path, data_dir=pair.leader.volume).code == 0
    return path


# Restore.


def test_a_restore_begins_a_cluster_before_its_first_start(cluster: Cluster, pair: Cluster, backup: Path) -> None:
    node, follower = cluster.add(), cluster.add()
    done = mehdb("restore", backup, data_dir=node.volume)
    assert (done.code, done.said) == (0, "")
    restored, advice = done.shown.splitlines()
    assert re.fullmatch(f"restored {KEYS} keys at revision {KEYS}, history {HISTORY}", restored)
    assert advice == "no node runs here: start it"
    node.start()
    follower.start()
    assert values(node) == values(follower) == values(pair.leader)
    position, old = cluster.converge(), pair.leader.position()
    assert position["revision"] == old["revision"]
    assert position["history"] != old["history"]


def test_a_restore_into_an_empty_leader_that_runs_reaches_its_followers(cluster: Cluster, backup: Path) -> None:
    leader, follower = cluster.start(2).nodes
    done = mehdb("restore", "-", data_dir=leader.volume, stdin=backup.read_bytes())
    assert (done.code, done.said) == (0, ""), done
    assert done.shown.endswith(f"mehdb-0 is serving at revision {KEYS}: ready\n")
    eventually(lambda: follower.status().revision == KEYS, "the follower to have it too")
    assert cluster.converge()["revision"] == KEYS
    assert leader.put("more", b"v").headers["ETag"] == f'"{KEYS + 1}"'
    cluster.converge()


def test_commands_refuse_what_they_are_not_for_and_change_nothing(pair: Cluster, backup: Path, tmp_path: Path) -> None:
    leader, follower = pair.nodes
    before = [(node.position(), node.status().epoch, entries(node.volume)) for node in pair.nodes]
    refused(mehdb("restore", backup, data_dir=leader.volume), "say --replace")
    refused(mehdb("restore", backup, "--replace", data_dir=leader.volume), "Say --yes")
    refused(mehdb("restore", backup, "--replace", "--yes", data_dir=follower.volume), "mehdb-1 follows: restore on")
    refused(mehdb("rejoin", "--yes", data_dir=leader.volume), "mehdb-0 leads: `mehdb adopt --from URL`")
    refused(mehdb("rejoin", "--yes", data_dir=follower.volume), "and follows: nothing to do")
    refused(mehdb("rejoin", "--yes", "--from", NOWHERE, data_dir=follower.volume), "nobody listens there")
    refused(mehdb("rejoin", "--yes", data_dir=tmp_path), "name it with --from URL")
    refused(mehdb("adopt", "--from", leader.url, "--yes", data_dir=follower.volume), "mehdb-1 follows: `mehdb rejoin`")
    refused(mehdb("adopt", "--from", NOWHERE, "--yes", data_dir=leader.volume), "nobody listens there")
    refused(mehdb("adopt", "--from", follower.url, data_dir=leader.volume), "Say --yes")
    refused(mehdb("adopt", "--from", leader.url, "--yes", data_dir=leader.volume), "is mehdb-0 itself")
    refused(mehdb("adopt", "--from", f"localhost:{follower.port}", "--yes", data_dir=leader.volume), "base URL such as")
    refused(mehdb("accept-loss", "--yes", data_dir=leader.volume), "nothing is missing")
    refused(mehdb("accept-loss", "--yes", "--start-empty", data_dir=leader.volume), "nothing is missing")
    refused(mehdb("drain", "--wait", data_dir=tmp_path), "no node runs on")
    refused(mehdb("check", data_dir=backup), "Not a directory")
    assert [(node.position(), node.status().epoch, entries(node.volume)) for node in pair.nodes] == before


def test_a_restore_in_place_keeps_what_was_there_and_followers_rejoin(
    cluster: Cluster, pair: Cluster, backup: Path
) -> None:
    leader, *followers = cluster.start(3).nodes
    write(leader, 5, b"written since")
    old = cluster.converge()
    done = asked_and_answered("restore", backup, "--replace", node=leader, question="will be kept aside")
    assert done.code == 0, done
    assert f"restored {KEYS} keys at revision {KEYS}" in done.shown
    assert f"mehdb-0 is serving at revision {KEYS}: ready" in done.shown
    assert values(leader) == values(pair.leader)
    assert leader.position()["history"] not in (old["history"], pair.leader.position()["history"])
    (aside,) = kept(leader.volume, "replaced")
    assert str(aside) in done.shown
    assert f"sound, history {old['history']}, revision 5, 5 keys" in mehdb("check", data_dir=aside).shown
    for follower in followers:
        eventually(lambda: follower.status().state == "diverged", "the follower to notice")  # noqa: B023
        assert follower.position() == old
        assert "`mehdb rejoin`" in follower.get("/status?level=full").json()["message"]
    done = asked_and_answered("rejoin", node=followers[0], question=f"that of mehdb-0 ({leader.url}) put in its place")
    assert done.code == 0, done
    done = mehdb("rejoin", "--yes", data_dir=followers[1].volume)
    assert done.shown.endswith(f"mehdb-2 is serving at revision {KEYS}: ready\n")
    cluster.converge()
    for follower in followers:
        assert values(follower) == values(pair.leader)
        (aside,) = kept(follower.volume, "rejoined")
        assert check_directory(aside).position.history == old["history"]
    leader.put("more", b"v")
    assert cluster.converge()["revision"] == KEYS + 1


# Rejoin and adopt.


def diverged(cluster: Cluster) -> tuple[Node, Node]:
    """Return a leader and a follower, each with a history of its own."""
    leader, follower = cluster.start(2).nodes
    write(leader, 7, b"the follower's")
    cluster.converge()
    cluster.stop()
    leader.volume.rename(leader.volume.with_name("away"))
    leader.start()
    write(leader, 3, b"the leader's")
    follower.start(ready=False)
    eventually(lambda: follower.status().state == "diverged", "the follower to notice")
    return leader, follower


def test_a_leader_adopts_the_history_of_a_follower(cluster: Cluster) -> None:
    leader, follower = diverged(cluster)
    old, wanted = leader.position(), follower.position()
    done = asked_and_answered(
        "adopt", "--from", follower.url, node=leader, question=f"that of mehdb-1 ({follower.url})"
    )
    assert done.code == 0, done
    assert "mehdb-0 is serving at revision 7: ready" in done.shown
    assert leader.position() == wanted
    eventually(follower.ready, "the follower to go on by itself")
    assert set(values(leader).values()) == set(values(follower).values()) == {b"the follower's"}
    (aside,) = kept(leader.volume, "adopted")
    assert check_directory(aside).position.history == old["history"]


def test_a_follower_drops_nothing_while_its_leader_cannot_be_asked(cluster: Cluster) -> None:
    leader, follower = diverged(cluster)
    before = follower.position(), entries(follower.volume)
    leader.stop()
    refused(mehdb("rejoin", "--yes", data_dir=follower.volume), "nobody listens there")
    assert (follower.position(), entries(follower.volume)) == before
    follower.stop()
    leader.start()
    done = mehdb("rejoin", "--yes", "--from", leader.url, data_dir=follower.volume)
    assert (done.code, done.shown.splitlines()[-1]) == (0, "no node runs here: start it")
    follower.start()
    assert cluster.converge()["revision"] == 3


def test_a_follower_is_one_while_it_has_no_leader_too(pair: Cluster) -> None:
    leader, follower = pair.nodes
    before = [(node.position(), entries(node.volume)) for node in pair.nodes]

    async def ask() -> None:
        async with Control(follower.volume) as control, control.suspended():
            assert (await control.status()).leader is None
            adopt = await asyncio.to_thread(mehdb, "adopt", "--from", leader.url, "--yes", data_dir=follower.volume)
            refused(adopt, "mehdb-1 follows: `mehdb rejoin`")
            rejoin = await asyncio.to_thread(mehdb, "rejoin", "--yes", data_dir=follower.volume)
            refused(rejoin, "mehdb-1 has no leader just now: name it with --from URL")

    asyncio.run(ask())
    eventually(follower.ready, "the follower to go on")
    assert [(node.position(), entries(node.volume)) for node in pair.nodes] == before


# What is said when it is done.


def test_a_command_that_is_done_succeeds_though_its_node_is_not_ready(cluster: Cluster, backup: Path) -> None:
    node = cluster.start(1).leader
    assert mehdb("drain", "--wait", data_dir=node.volume).code == 0
    began_s = time.monotonic()
    done = mehdb("restore", backup, "--replace", "--yes", data_dir=node.volume)
    assert (done.code, done.said) == (0, "")
    assert "mehdb-0 is draining" in done.shown.splitlines()[-1]
    assert time.monotonic() - began_s < 15, "it does not wait for what will not come"


# Accept a loss.


def cut_tail(node: Node) -> None:
    """Lose what the WAL holds, as a flipped bit at its start would: SQLite then sees none of it."""
    node.kill()
    os.truncate(node.volume / "store.db-wal", 0)


def test_a_loss_at_the_end_is_told_counted_and_accepted(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    write(node, 4)
    node.stop()
    node.start()
    write(node, 3, b"lost")
    cut_tail(node)
    done = mehdb("check", data_dir=node.volume)
    assert done.code == 1
    assert "3 acknowledged changes are missing at the end" in done.shown
    node.start(ready=False)
    eventually(lambda: node.status().state == "failed", "the leader to refuse")
    assert "3 changes are missing at its end" in node.get("/status?level=full").json()["message"]
    refused(mehdb("accept-loss", data_dir=node.volume), "Say --yes")
    done = at_terminal("accept-loss", data_dir=node.volume, answer="n\n")
    assert (done.code, node.status().state) == (1, "failed")
    done = at_terminal("accept-loss", data_dir=node.volume, answer="y\n")
    assert done.code == 0, done
    assert "accepted: the store is trusted as it is" in done.shown
    assert "mehdb-0 is serving at revision 4: ready" in done.shown
    assert node.put("more", b"v").headers["ETag"] == '"5"'


def test_what_is_more_broken_begins_empty_only_when_told_so(cluster: Cluster) -> None:
    node = cluster.start(1).leader
    write(node, 3)
    node.stop()
    os.truncate(node.volume / "store.db", 0)
    node.start(ready=False)
    eventually(lambda: node.status().state == "failed", "the leader to refuse")
    refused(mehdb("accept-loss", "--yes", data_dir=node.volume), "say --start-empty")
    done = mehdb("accept-loss", "--yes", "--start-empty", data_dir=node.volume)
    assert done.code == 0, done
    assert "mehdb-0 is serving at revision 0: ready" in done.shown
    (aside,) = kept(node.volume, "abandoned")
    assert (aside / "store.db").stat().st_size == 0
    write(node, 1)


# Drain.


def test_a_drain_waits_until_the_followers_hold_everything(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    write(leader, KEYS)
    done = mehdb("drain", "--wait", data_dir=leader.volume)
    assert (done.code, done.shown) == (
        0,
        "drained: all writes are durable here and on the followers that are connected\n",
    )
    assert follower.position() == leader.position()
    answer = leader.put("k", b"v")
    assert (answer.status_code, answer.json()["error"]) == (503, "draining")
    assert answer.headers["Retry-After"]
    assert leader.get("/get/k/1").content == b"v"
    assert not leader.ready()
    leader.stop()
    leader.start()
    write(leader, 1)
    cluster.converge()


def test_a_drain_says_who_is_missing(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    with lagging(follower, leader):
        write(leader, KEYS)
        done = mehdb("drain", "--wait", "--timeout", "0.2", data_dir=leader.volume)
        assert (done.code, done.shown) == (1, "")
        assert done.said == "draining: 0 bytes and 0 requests under way; behind the head: mehdb-1\n"
        assert mehdb("drain", data_dir=leader.volume).code == 0, "it does not wait unless told so"
    done = mehdb("drain", "--wait", data_dir=leader.volume)
    assert done.code == 0, done
