"""Promise 4: no volume that is empty, rolled back, foreign, forked or damaged costs anybody what they hold.

Each row of the leader's recovery table is a scene of real processes; so is each state in which a follower's volume can
come back. What the volumes held before is compared with what they hold after, the folders of what was kept included.
"""

import itertools
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from cluster import ADDRESS, eventually
from mehdb.recovery import SILENT_TIMEOUT_S
from scenes import (
    DAMAGES,
    DATABASE,
    Scene,
    copy,
    garbage,
    gone,
    grow,
    kept,
    mehdb,
    never_wiped,
    proven,
    resume,
    rows,
    scene,
    scenes_in,
    suspend,
)

SILENT_DEADLINE_S: Final = SILENT_TIMEOUT_S + 15
NEW: Final = b"new"  # a value that is written when all is well again


def history_of(volume: Path) -> str:
    return next(iter(rows(volume))).history


def leader_looked(stage: Scene) -> None:
    """Wait until the leader has looked whether a follower that is ahead of it continues it. It does not."""
    eventually(lambda: "forked peer=" in stage.leader.log, "the leader to find the fork")
    stage.until(stage.leader, "serving")


# The leader asks first: its peers are there.


def test_a_leader_that_is_at_its_peers_raises_the_highest_epoch(tmp_path: Path) -> None:
    with never_wiped(tmp_path) as stage:
        copy(grow(stage.leader.volume, 3), stage.followers[0].volume)
        for _ in range(4):
            grow(stage.followers[0].volume, 0)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        assert (stage.equal().epoch, stage.leader.status().revision) == (6, 3)


def test_a_leader_that_is_ahead_leads(tmp_path: Path) -> None:
    with never_wiped(tmp_path) as stage:
        copy(grow(stage.leader.volume, 3), stage.followers[0].volume)
        grow(stage.leader.volume, 4)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        assert (stage.equal().epoch, stage.leader.status().revision) == (3, 7)


def test_a_leader_that_is_behind_catches_up_from_the_most_advanced(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 3) as stage:
        leader, behind, ahead = stage.cluster.nodes
        grow(copy(grow(leader.volume, 2), behind.volume), 3)
        grow(copy(behind.volume, ahead.volume), 4)
        stage.note()
        stage.start(behind, ahead)
        stage.start(leader)
        assert (stage.equal().epoch, leader.status().revision) == (4, 9)
        assert f"caught up revision=9 from={ahead.url}" in leader.log
        assert "snapshot taken" not in leader.log
        assert kept(leader.volume) == []


def test_a_leader_behind_the_floor_of_its_peer_takes_its_snapshot(tmp_path: Path) -> None:
    with never_wiped(tmp_path) as stage:
        copy(grow(stage.leader.volume, 3), stage.followers[0].volume)
        grow(stage.followers[0].volume, 30, key="hot", retain=2)
        grow(stage.followers[0].volume, 3, retain=2)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        assert stage.equal().revision == 36
        assert f"snapshot taken revision=36 from={stage.followers[0].url}" in stage.leader.log
        assert len(kept(stage.leader.volume, "replaced")) == 1


def test_an_empty_leader_takes_the_snapshot_of_the_most_advanced_peer(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 4) as stage:
        _, first, second, _ = stage.cluster.nodes
        copy(grow(first.volume, 3), second.volume)
        grow(second.volume, 3)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        status = stage.equal()
        assert (status.history, status.revision) == (history_of(first.volume), 6)
        assert f"snapshot taken revision=6 from={second.url} kept=nothing" in stage.leader.log


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_leader_with_a_damaged_store_keeps_it_and_takes_a_snapshot(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with never_wiped(tmp_path) as stage:
        copy(grow(stage.leader.volume, 20), stage.followers[0].volume)
        stage.note()
        damage(stage.leader.volume / DATABASE)
        if damage is not gone:
            stage.note_damage(stage.leader)
        stage.start(*stage.followers)
        stage.start(stage.leader)
        assert stage.equal().revision == 20
        assert f"snapshot taken revision=20 from={stage.followers[0].url}" in stage.leader.log
        assert len(kept(stage.leader.volume, "damaged")) == 1


def test_a_leader_with_a_damaged_store_refuses_until_a_peer_shows_up_that_has_a_copy(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 3) as stage:
        leader, empty, holder = stage.cluster.nodes
        copy(grow(leader.volume, 20), holder.volume)
        stage.note()
        garbage(leader.volume / DATABASE)
        stage.note_damage(leader)
        stage.start(empty)
        stage.start(leader)
        stage.until(leader, "failed", "no peer holds a copy: bring the volume back, restore a backup")
        assert "`mehdb accept-loss`" in (leader.status().reason or "")
        assert leader.put("key", NEW).status_code == leader.get("/get/key").status_code == 503
        stage.start(holder)
        assert stage.equal().revision == 20
        assert len(kept(leader.volume, "damaged")) == 1


def test_a_leader_among_empty_peers_begins_a_history_or_takes_theirs(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "none", 3) as stage:
        stage.start(*stage.followers)
        stage.start(stage.leader)
        first = stage.equal()
        assert (first.revision, first.epoch) == (0, 1)
        stage.leader.stop()
        stage.leader.volume.rename(tmp_path / "lost")
        stage.start(stage.leader)
        second = stage.equal()
        assert (second.history, second.epoch) == (first.history, 2)
    with never_wiped(tmp_path / "alone", 3) as stage:
        stage.start(stage.leader)
        assert stage.equal().history


def test_a_leader_waits_for_silent_peers_only_as_long_as_it_has_something_to_lose(tmp_path: Path) -> None:
    """Four at once, as each waits for the bound: an empty one, a damaged one, one with data, one at a dead address."""
    with (
        never_wiped(tmp_path / "empty") as empty,
        never_wiped(tmp_path / "damaged") as damaged,
        never_wiped(tmp_path / "full") as full,
        never_wiped(tmp_path / "deaf", 1) as deaf,
        socket.create_server((ADDRESS, 0)) as listener,
    ):
        deaf_url = f"http://{ADDRESS}:{listener.getsockname()[1]}"
        deaf.leader.environment["MEHDB_PEERS"] = f"{deaf.leader.url},{deaf_url}"
        grow(empty.followers[0].volume, 3)
        for stage in (damaged, full):
            copy(grow(stage.leader.volume, 3), stage.followers[0].volume)
        for stage in (empty, damaged, full):
            stage.note()
        garbage(damaged.leader.volume / DATABASE)
        damaged.note_damage(damaged.leader)
        for stage in (empty, damaged, full):
            stage.start(*stage.followers)
            suspend(stage.followers[0])
        for stage in (empty, damaged, full, deaf):
            stage.start(stage.leader)
        full.until(full.leader, "serving", deadline_s=SILENT_DEADLINE_S)
        assert f"{full.followers[0].url} was not asked" in full.leader.log
        for stage, silent in ((empty, empty.followers[0].url), (damaged, damaged.followers[0].url), (deaf, deaf_url)):
            status = stage.until(stage.leader, "recovering", "which may hold data", SILENT_DEADLINE_S)
            assert f"waiting for {silent}" in (status.reason or "")
            assert not status.ready
            assert stage.leader.put("key", NEW).status_code == 503
        assert deaf.leader.status().history is None
        for stage in (empty, damaged, full):
            resume(stage.followers[0])
            assert stage.equal().revision == 3
        assert "snapshot taken" in empty.leader.log
        assert len(kept(damaged.leader.volume, "damaged")) == 1
        listener.close()  # nobody is there now
        assert deaf.equal().history


@pytest.mark.parametrize("shared", [0, 2])
def test_a_leader_of_another_history_or_chain_leaves_its_peers_alone(tmp_path: Path, shared: int) -> None:
    """Peers whose first 2 changes are the leader's have forked from it; with none they are of another cluster."""
    with never_wiped(tmp_path, 3) as stage:
        for node in stage.cluster.nodes:
            if shared:
                copy(stage.leader.volume, node.volume) if node is not stage.leader else grow(node.volume, shared)
        for node, count in zip(stage.cluster.nodes, (2, 1, 4), strict=True):
            grow(node.volume, count)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        stage.until(stage.leader, "serving")
        assert stage.leader.status().revision == shared + 2
        for follower in stage.followers:
            stage.diverged_and_whole(follower)
        named = {node.url for node in stage.followers if f"{node.url} has other changes" in stage.leader.log}
        assert named == {node.url for node in stage.followers[shared // 2 :]}  # one that is not ahead is no riddle


def test_an_empty_leader_among_several_histories_leaves_the_choice_to_an_operator(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 3) as stage:
        for count, node in enumerate(stage.followers, 3):
            grow(node.volume, count)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        first, second = stage.followers
        status = stage.until(stage.leader, "failed", "`mehdb adopt --from URL`")
        assert status.reason
        assert all(history_of(node.volume) in status.reason and node.url in status.reason for node in stage.followers)
        assert stage.leader.put("key", b"value").status_code == 503
        mehdb("adopt", "--from", second.url, "--data-dir", str(stage.leader.volume), "--yes")
        stage.until(stage.leader, "serving")
        stage.until(second, "serving")
        stage.diverged_and_whole(first)
        mehdb("rejoin", "--data-dir", str(first.volume), "--yes")
        assert stage.equal().history == history_of(second.volume)
        assert len(kept(first.volume, "rejoined")) == 1


# As in a StatefulSet after the whole cluster was down: the leader starts first, and nobody is there yet.


def test_a_rolled_back_leader_recovers_when_a_follower_shows_up_that_is_ahead(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 3) as stage:
        copy(grow(stage.leader.volume, 3), stage.followers[0].volume)
        grow(copy(stage.followers[0].volume, stage.followers[1].volume), 4)
        stage.note()
        for node in stage.cluster.nodes:
            node.start()
        status = stage.equal()
        assert (status.revision, status.epoch) == (7, 3)
        assert stage.leader.put("key", NEW).is_success
        stage.equal()


def test_an_empty_leader_recovers_when_a_follower_shows_up_that_has_data(tmp_path: Path) -> None:
    with never_wiped(tmp_path, 3) as stage:
        grow(stage.followers[1].volume, 4)
        stage.note()
        for node in stage.cluster.nodes:
            node.start()
        status = stage.equal()
        assert (status.revision, status.history) == (4, history_of(stage.followers[1].volume))


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_leader_that_has_accepted_a_write_keeps_it_and_its_followers_keep_theirs(
    tmp_path: Path, rolled_back: bool
) -> None:
    with never_wiped(tmp_path) as stage:
        [follower] = stage.followers
        grow(follower.volume, 3)
        if rolled_back:
            copy(follower.volume, stage.leader.volume)
            grow(follower.volume, 3)
        stage.leader.start()
        assert stage.leader.put("accepted", NEW).is_success
        stage.note()
        stage.start(follower)
        stage.diverged_and_whole(follower)
        assert stage.leader.get("/get/accepted").content == NEW
        # An operator takes the follower's side, over a node that runs.
        mehdb("adopt", "--from", follower.url, "--data-dir", str(stage.leader.volume), "--yes")
        assert stage.equal().history == history_of(follower.volume)
        assert len(kept(stage.leader.volume, "adopted")) == 1


# A follower's volume comes back empty, older, of another cluster, of another past, or damaged.


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_follower_that_is_empty_or_rolled_back_catches_up(tmp_path: Path, rolled_back: bool) -> None:
    with never_wiped(tmp_path) as stage:
        grow(stage.leader.volume, 3)
        if rolled_back:
            copy(stage.leader.volume, stage.followers[0].volume)
        grow(stage.leader.volume, 3)
        stage.note()
        for node in stage.cluster.nodes:
            node.start()
        assert stage.equal().revision == 6


@pytest.mark.parametrize(
    ("shared", "count"),
    [(0, 4), (3, 2), (3, 6), *(pytest.param(*one, marks=pytest.mark.soak) for one in ((0, 2), (0, 6), (3, 4)))],
)
def test_a_follower_of_another_cluster_or_past_is_diverged_until_it_rejoins(
    tmp_path: Path, shared: int, count: int
) -> None:
    """It holds *count* changes of its own after those that are *shared*: fewer, as many or more than the leader."""
    with never_wiped(tmp_path) as stage:
        [follower] = stage.followers
        if shared:
            copy(grow(stage.leader.volume, shared), follower.volume)
        grow(stage.leader.volume, 4)
        grow(follower.volume, count)
        stage.note()
        stage.leader.start()
        stage.start(follower)
        stage.diverged_and_whole(follower)
        if shared and count > 4:
            leader_looked(stage)
        mehdb("rejoin", "--data-dir", str(follower.volume), "--yes")
        assert stage.equal().revision == shared + 4
        assert len(kept(follower.volume, "rejoined")) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_a_fork_is_not_dropped_when_the_leader_can_no_longer_tell_it_from_an_older_state(
    tmp_path: Path, restarted: bool
) -> None:
    """The leader has compacted away what would show it. Behind its floor, a follower takes snapshots by itself."""
    with never_wiped(tmp_path, MEHDB_RETAIN_CHANGES="2") as stage:
        [follower] = stage.followers
        copy(grow(stage.leader.volume, 3), follower.volume)
        grow(stage.leader.volume, 1, key="hot")
        grow(follower.volume, 3)
        stage.note()
        stage.leader.start()
        if not restarted:
            stage.start(follower)
            stage.diverged_and_whole(follower)
            leader_looked(stage)
        for _ in range(10):
            assert stage.leader.put("hot", NEW).is_success
        eventually(lambda: stage.leader.status().floor > 6, "the floor to pass the fork")
        if restarted:
            stage.start(follower)
            stage.equal()
            assert len(kept(follower.volume, "behind")) == 1
        else:
            stage.until(follower, "diverged", "behind the floor", SILENT_DEADLINE_S)
            stage.diverged_and_whole(follower)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_follower_with_a_damaged_store_keeps_it_and_takes_a_snapshot(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with never_wiped(tmp_path) as stage:
        [follower] = stage.followers
        copy(grow(stage.leader.volume, 20), follower.volume)
        stage.note()
        damage(follower.volume / DATABASE)
        if damage is not gone:
            stage.note_damage(follower)
        stage.leader.start()
        follower.start()
        assert stage.equal().revision == 20
        assert len(kept(follower.volume, "damaged")) == 1


@pytest.mark.parametrize("rolled_back", [False, True])
def test_what_is_gone_would_be_missed(tmp_path: Path, rolled_back: bool) -> None:
    """The control: a follower whose data is dropped for the leader's, and not kept."""

    def drop() -> None:
        with scene(tmp_path) as stage:
            leader, follower = stage.cluster.nodes
            copy(grow(leader.volume, 3), follower.volume)
            grow(follower.volume, 1)
            stage.note()
            shutil.rmtree(follower.volume)
            if rolled_back:
                copy(leader.volume, follower.volume)

    with pytest.raises(AssertionError, match=r"gone: .*revision=4"):
        drop()


@pytest.mark.parametrize("run", ["test", pytest.param("soak", marks=pytest.mark.soak)])
def test_nothing_was_lost_in_any_scene(request: pytest.FixtureRequest, run: str) -> None:
    """Of those that were selected, by whatever means: one that failed is missing here too."""
    selected = itertools.takewhile(lambda item: item is not request.node, request.session.items)
    scenes = sum(scenes_in(item) for item in selected if isinstance(item, pytest.Function))
    if not scenes:
        pytest.skip("no scene was selected")
    print(f"never wiped: {len(proven)} of {scenes} scenarios, 0 data lost ({run})")
    assert len(proven) == scenes
