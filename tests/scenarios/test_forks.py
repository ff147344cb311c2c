"""Copies of one history that contradict each other, or cannot give what they hold: nobody chooses or waits silently.

What the table of a leader's start says of one peer after the other is in `test_never_wiped`.
"""

from pathlib import Path

from cluster import Node, eventually
from mehdb.store import note_divergence, raise_epoch
from scenes import DATABASE, Scene, copy, flip, grow, kept, mehdb, never_wiped, rows
from volumes import MIB, tmpfs

SMALL_WINDOW = {"MEHDB_RETAIN_CHANGES": "5", "MEHDB_SNAPSHOT_LAG": "50"}
COMPACTED = 200  # changes that leave a store with such a window without those before them


def overwrite(leader: Node) -> None:
    """Have *leader* compact what followers could be compared with."""
    for number in range(COMPACTED):
        assert leader.put("hot", b"%d" % number).is_success
    eventually(lambda: leader.status().floor > COMPACTED // 2, "the leader to compact")


def damage_change(volume: Path, revision: int) -> None:
    """Flip a bit of the page on *volume* that holds the change of *revision*."""
    value = next(row.value for row in rows(volume) if row.revision == revision)
    flip(volume / DATABASE, (volume / DATABASE).read_bytes().index(value))


def forked_peers(stage: Scene, base: Path) -> tuple[Node, Node]:
    """Have the followers hold different changes after those of *base*. Return the one with more of them first."""
    more, fewer = stage.followers
    grow(copy(base, more.volume), 5, key="more")
    grow(copy(base, fewer.volume), 2, key="fewer")
    stage.note()
    stage.start(more, fewer)
    return more, fewer


def adopt(stage: Scene, chosen: Node, other: Node) -> None:
    """Have the leader take what *chosen* holds: the other one keeps its own."""
    mehdb("adopt", "--from", chosen.url, "--data-dir", str(stage.leader.volume), "--yes")
    stage.until(stage.leader, "serving")
    stage.diverged_and_whole(other)
    stage.until(chosen, "serving")
    assert stage.leader.position() == chosen.position()


def test_an_empty_leader_does_not_choose_between_peers_that_contradict_each_other(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", 3) as stage:
        more, fewer = forked_peers(stage, grow(tmp_path / "base", 3))
        stage.start(stage.leader)
        status = stage.until(stage.leader, "failed", "peers hold different changes in one history")
        assert f"{more.url} at revision 8; {fewer.url} at revision 5" in (status.reason or "")
        assert stage.leader.put("key", b"v").status_code == 503
        adopt(stage, fewer, more)


def test_a_leader_that_is_behind_does_not_choose_between_them_either(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", 3) as stage:
        base = grow(tmp_path / "base", 3)
        copy(base, stage.leader.volume)
        more, fewer = forked_peers(stage, base)
        stage.start(stage.leader)
        stage.until(stage.leader, "failed", "peers hold different changes in one history")
        adopt(stage, more, fewer)


def test_a_damaged_leader_does_not_take_what_contradicts_its_mark(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene") as stage:
        base = grow(tmp_path / "base", 3)
        grow(copy(base, stage.leader.volume), 2, key="own")
        grow(copy(base, stage.followers[0].volume), 4, key="other")
        (stage.leader.volume / DATABASE).write_bytes(b"damaged")
        stage.note_damage(stage.leader)
        stage.start(*stage.followers)
        stage.start(stage.leader)
        stage.until(stage.leader, "failed", "has other changes than it had acknowledged")
        mehdb("adopt", "--from", stage.followers[0].url, "--data-dir", str(stage.leader.volume), "--yes")
        stage.equal()


def test_a_leader_leads_on_beside_a_fork_that_has_compacted(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", **SMALL_WINDOW) as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        grow(copy(base, stage.leader.volume), 2, key="own")
        grow(copy(base, follower.volume), 4, key="other", retain=5)
        grow(follower.volume, COMPACTED, key="hot", retain=5)
        stage.note()
        stage.start(follower)
        stage.start(stage.leader)
        eventually(lambda: "forked peer=" in stage.leader.log, "the leader to find the fork")
        stage.until(stage.leader, "serving")
        assert stage.leader.status().revision == 5
        stage.diverged_and_whole(follower)


def test_a_leader_keeps_what_nobody_can_compare_any_more_and_says_so(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", **SMALL_WINDOW) as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        grow(copy(base, stage.leader.volume), 2, key="own")
        grow(copy(base, follower.volume), COMPACTED, key="hot", retain=5)
        stage.note()
        stage.start(follower)
        stage.start(stage.leader)
        stage.equal()
        assert f"perhaps forked, nobody can tell any more revision=5 peer={follower.url}" in stage.leader.log
        assert len(kept(stage.leader.volume, "replaced")) == 1


def test_a_leader_does_not_take_a_diverged_peer_for_more_advanced_where_nobody_can_tell(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", **SMALL_WINDOW) as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        grow(copy(base, stage.leader.volume), 2, key="own")
        grow(copy(base, follower.volume), COMPACTED, key="hot", retain=5)
        note_divergence(follower.volume, "it was found to have")
        stage.note()
        stage.start(follower)
        stage.until(follower, "diverged")
        stage.start(stage.leader)
        stage.until(stage.leader, "failed", f"{follower.url} holds more and is diverged")
        assert stage.leader.status().revision == 5
        mehdb("adopt", "--from", follower.url, "--data-dir", str(stage.leader.volume), "--yes")
        stage.equal()


def test_a_damaged_leader_passes_over_a_peer_that_never_was_at_its_mark(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", 3) as stage:
        more, fewer = forked_peers(stage, grow(tmp_path / "base", 3))
        copy(fewer.volume, stage.leader.volume)
        (stage.leader.volume / DATABASE).write_bytes(b"damaged")
        stage.note_damage(stage.leader)
        stage.start(stage.leader)
        stage.until(stage.leader, "serving")
        assert stage.leader.position() == fewer.position()
        stage.diverged_and_whole(more)


def test_a_diverged_follower_stays_so_after_a_restart_though_its_leader_has_compacted(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", **SMALL_WINDOW) as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        grow(copy(base, stage.leader.volume), 6, key="new")
        grow(copy(base, follower.volume), 2, key="hot")
        grow(follower.volume, 1, key="old")
        stage.note()
        stage.start(stage.leader)
        stage.start(follower)
        stage.diverged_and_whole(follower)
        overwrite(stage.leader)
        for node in (follower, stage.leader):
            node.kill()
            node.start(ready=False)
            stage.diverged_and_whole(follower)
        assert kept(follower.volume) == []
        mehdb("rejoin", "--data-dir", str(follower.volume), "--yes")
        stage.equal()
        follower.kill()
        stage.start(follower)
        stage.equal()


def test_a_peer_that_cannot_give_what_it_holds_is_not_waited_for_where_another_can(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene", 3) as stage:
        damaged, sound = stage.followers
        copy(grow(damaged.volume, 300), sound.volume)
        stage.note()
        damage_change(damaged.volume, 150)
        stage.start(damaged, sound)
        stage.start(stage.leader)
        stage.until(stage.leader, "serving")
        assert stage.equal().revision == 300


def test_the_only_holder_of_more_is_damaged_and_the_leader_says_what_to_do(tmp_path: Path) -> None:
    """It cannot give all that it holds, and its leader cannot give it a snapshot before it leads."""
    with never_wiped(tmp_path / "scene") as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        copy(base, stage.leader.volume)
        grow(copy(base, follower.volume), 300)
        damage_change(follower.volume, 150)
        stage.note_damage(follower)
        stage.start(follower)
        stage.start(stage.leader)
        said = f"mend {follower.url}, or, if its store is damaged, have it given up with `mehdb accept-loss"
        stage.until(stage.leader, "recovering", said)
        volume = str(follower.volume)
        assert "nothing is missing" in mehdb("accept-loss", "--data-dir", volume, "--yes", code=1)
        mehdb("accept-loss", "--start-empty", "--data-dir", volume, "--yes")
        status = stage.equal()
        assert 3 <= status.revision < 303
        assert len(kept(follower.volume, "abandoned")) == 1


def test_an_empty_leader_without_room_for_all_that_a_peer_holds_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "scene"
    with tmpfs(directory / "mehdb-0", 2 * MIB), never_wiped(directory) as stage:
        grow(stage.followers[0].volume, 20_000)
        stage.note()
        stage.start(*stage.followers)
        stage.start(stage.leader)
        status = stage.until(stage.leader, "recovering", "does not fit on this volume: make room or enlarge it")
        assert "epoch" not in (status.reason or "")
        stage.nothing_is_gone()


# Epochs.


def test_a_leader_goes_beyond_an_epoch_that_a_follower_has_seen(tmp_path: Path) -> None:
    """Its volume is of an earlier start, at the same head; and it starts when no follower is there to tell."""
    with never_wiped(tmp_path / "scene") as stage:
        [follower] = stage.followers
        copy(grow(stage.leader.volume, 3), follower.volume)
        raise_epoch(follower.volume / DATABASE, 9)  # type: ignore[arg-type]  a plain number will do
        stage.note()
        stage.leader.start()
        assert stage.leader.status().epoch == 2
        stage.start(follower)
        assert stage.equal().epoch == 10


def test_a_leader_that_has_written_since_is_not_obeyed_before_a_restart(tmp_path: Path) -> None:
    """It might be an old process that goes on beside a newer one."""
    with never_wiped(tmp_path / "scene") as stage:
        [follower] = stage.followers
        copy(grow(stage.leader.volume, 3), follower.volume)
        raise_epoch(follower.volume / DATABASE, 9)  # type: ignore[arg-type]
        stage.leader.start()
        assert stage.leader.put("key", b"v").is_success
        stage.note()
        stage.start(follower)
        stage.until(follower, "syncing", "stale_epoch: ")
        assert "if none does, restart it" in (follower.status().reason or "")
        assert follower.status().revision == 3
        stage.leader.kill()
        stage.start(stage.leader)
        assert stage.equal().epoch == 10


def test_an_adopted_store_is_not_led_at_an_epoch_that_was_led_at(tmp_path: Path) -> None:
    with never_wiped(tmp_path / "scene") as stage:
        base = grow(tmp_path / "base", 3)
        [follower] = stage.followers
        grow(copy(base, follower.volume), 2)
        copy(base, stage.leader.volume)
        for _ in range(6):
            grow(stage.leader.volume, 1)
        stage.note()
        stage.start(stage.leader)
        led_at = stage.leader.status().epoch
        stage.start(follower)
        stage.diverged_and_whole(follower)
        mehdb("adopt", "--from", follower.url, "--data-dir", str(stage.leader.volume), "--yes")
        assert stage.equal().epoch > led_at
