"""A store that has lost the end of what it acknowledged is recovered from a peer that has it, or an operator decides.

SQLite says nothing when a WAL is gone, or is damaged in the middle: it takes what follows for the rest of an older one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from cluster import Node
from scenes import DATABASE, WAL, copy, flip, grow, kept, mehdb, never_wiped, rows

WRITES: Final = 20
FRAME_BYTES: Final = 24 + 4096
WAL_HEADER_BYTES: Final = 32


def without_wal(volume: Path) -> None:
    (volume / WAL).unlink()


def with_a_flip_in_the_wal(volume: Path) -> None:
    frames = ((volume / WAL).stat().st_size - WAL_HEADER_BYTES) // FRAME_BYTES
    assert frames >= 4, "of the last commit, and of one before"
    flip(volume / WAL, WAL_HEADER_BYTES + frames // 2 * FRAME_BYTES + 1000)


def with_an_older_database(volume: Path) -> None:
    """Put back the file as it was in a backup of the volume, which had no WAL."""
    (volume / WAL).unlink()
    shutil.copy(volume.with_name("older") / DATABASE, volume / DATABASE)


LOSSES: Final = [
    with_a_flip_in_the_wal,
    *(pytest.param(one, marks=pytest.mark.soak) for one in (without_wal, with_an_older_database)),
]


def write(leader: Node, count: int) -> None:
    start = leader.status().revision
    for number in range(start, start + count):
        assert leader.put(f"written-{number}", b"value %d" % number).is_success


def lose(node: Node, loss: Callable[[Path], None]) -> None:
    node.kill()
    loss(node.volume)


@pytest.mark.parametrize("role", ["leader", "follower"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_peer_has_is_taken_from_it(tmp_path: Path, role: str, loss: Callable[[Path], None]) -> None:
    with never_wiped(tmp_path) as stage:
        [follower] = stage.followers
        node = stage.leader if role == "leader" else follower
        copy(grow(stage.leader.volume, 1), follower.volume)
        copy(node.volume, tmp_path / "older")
        stage.leader.start()
        follower.start()
        write(stage.leader, WRITES)
        history = stage.equal().history
        stage.note()
        lose(node, loss)
        stage.note_damage(node)
        node.start()
        status = stage.equal()
        assert (status.revision, status.history) == (WRITES + 1, history)
        assert len(kept(node.volume, "damaged")) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_peer_an_operator_accepts_the_loss(tmp_path: Path, loss: Callable[[Path], None]) -> None:
    with never_wiped(tmp_path, 1) as stage:
        [node] = stage.cluster.nodes
        copy(grow(node.volume, 1), tmp_path / "older")
        node.start()
        write(node, WRITES)
        lose(node, loss)
        stage.note()
        left = len(rows(node.volume))
        assert left < WRITES
        node.start(ready=False)
        stage.until(node, "failed", f"{WRITES + 1 - left} changes are missing at its end")
        assert "`mehdb accept-loss`" in (node.status().reason or "")
        assert node.put("key", b"value").status_code == 503
        assert node.get("/get/written-1").status_code == 503
        mehdb("accept-loss", "--data-dir", str(node.volume), "--yes")
        stage.until(node, "serving")
        assert node.status().revision == left
        assert node.put("key", b"value").is_success


def test_a_peer_that_lacks_acknowledged_changes_is_not_enough(tmp_path: Path) -> None:
    with never_wiped(tmp_path) as stage:
        [follower] = stage.followers
        for node in stage.cluster.nodes:
            node.start()
        write(stage.leader, WRITES)
        stage.equal()
        follower.kill()
        write(stage.leader, 5)
        lose(stage.leader, without_wal)
        stage.note()
        stage.start(follower)
        stage.start(stage.leader)
        stage.until(stage.leader, "failed", f"{follower.url} holds the most, but lacks 5 acknowledged changes")
        assert stage.leader.put("key", b"value").status_code == 503
        mehdb("adopt", "--from", follower.url, "--data-dir", str(stage.leader.volume), "--yes")
        assert stage.equal().revision == WRITES
        assert len(kept(stage.leader.volume, "adopted")) == 1
        assert stage.leader.put("key", b"value").is_success
        stage.equal()


def test_a_store_that_has_lost_all_of_its_first_run_is_not_an_empty_one(tmp_path: Path) -> None:
    """Until the first checkpoint even its history is in the WAL alone: without that the file looks brand-new."""
    with never_wiped(tmp_path, 1) as stage:
        [node] = stage.cluster.nodes
        node.start()
        write(node, WRITES)
        lose(node, without_wal)
        node.start(ready=False)
        stage.until(node, "failed", f"{WRITES} changes are missing at its end")
        mehdb("accept-loss", "--data-dir", str(node.volume), "--yes")
        stage.until(node, "serving")
        assert node.status().revision == 0
