"""A full or read-only volume: nothing is acknowledged that is not there, reads go on, and service comes back by itself.

Each such volume is a small file system of its own. A disk that fails ends the node: here one write fails for real, in
`tests/store` each in turn is made to.
"""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import httpx
import pytest

from cluster import Node, eventually
from scenes import WAL, Scene, grow, kept, rows, scene
from volumes import FOREIGN, MIB, ext4, fill, make_room, remount, tmpfs

VOLUME_BYTES: Final = 32 * MIB
VALUE_BYTES: Final = 128 << 10
BACK_WITHIN_S: Final = 5.0
FILLED_WITHIN_S: Final = 60.0  # dozens of writes, each with its sync

Volume = Callable[[Path, int], AbstractContextManager[Path]]
There = dict[str, bytes]
"""What must be there: each key whose write was acknowledged, with its value."""


@contextlib.contextmanager
def small(directory: Path, *ordinals: int, volume: Volume = tmpfs, replicas: int = 1) -> Iterator[Scene]:
    """Have a scene in which the nodes with *ordinals* have little room."""
    with contextlib.ExitStack() as mounted:
        for ordinal in ordinals:
            mounted.enter_context(volume(directory / f"mehdb-{ordinal}", VOLUME_BYTES))
        yield mounted.enter_context(scene(directory, replicas))


def put(node: Node, there: There, key: str, value_bytes: int = VALUE_BYTES) -> httpx.Response:
    """Write a value, and note it in *there* if that was acknowledged."""
    value = os.urandom(value_bytes)
    answer = node.put(key, value)
    if answer.is_success:
        there[key] = value
    return answer


def put_until_full(node: Node, there: There) -> None:
    """Write until the volume is full."""
    for number in range(2 * VOLUME_BYTES // VALUE_BYTES):
        answer = put(node, there, f"key-{number}")
        if not answer.is_success:
            assert (answer.status_code, answer.json()["error"]) == (507, "disk_full")
            return
    raise AssertionError("the volume does not fill up")


def delete(node: Node, there: There, count: int) -> int:
    """Delete *count* of the keys that are there. Return how many of these deletions were taken."""
    done = 0
    for key in list(there)[:count]:
        answer = node.request("DELETE", f"/delete/{key}")
        assert answer.status_code in (200, 507), answer.text
        if answer.is_success:
            done += 1
            del there[key]
    return done


def all_is_there(node: Node, there: There) -> None:
    """Expect that every acknowledged value can be read, and nothing else is."""
    assert set(node.get("/keys", params={"limit": 10_000}).json()) == set(there)
    none_is_lost(node, there)


def none_is_lost(node: Node, there: There) -> None:
    """Expect that every acknowledged value can be read."""
    for key, value in there.items():
        assert node.get(f"/get/{key}").content == value


def back_after_s(node: Node, there: There, deadline_s: float = BACK_WITHIN_S) -> float:
    """Return after how many seconds the node takes writes again."""
    since_s = time.monotonic()
    eventually(lambda: put(node, there, "back").is_success, "writes to succeed again", deadline_s)
    return time.monotonic() - since_s


@pytest.mark.parametrize("volume", [tmpfs, pytest.param(ext4, marks=pytest.mark.soak)])
def test_a_full_volume_refuses_sets_alone_and_is_back_as_soon_as_there_is_room(tmp_path: Path, volume: Volume) -> None:
    there: There = {}
    with small(tmp_path, 0, volume=volume) as stage:
        node = stage.leader.start()
        put_until_full(node, there)
        acknowledged = len(there)
        all_is_there(node, there)
        assert node.get("/livez").is_success
        snapshot = node.get("/snapshot")
        assert (snapshot.status_code, snapshot.json()["error"]) == (507, "disk_full")
        assert delete(node, there, 5) == 5
        fill(node.volume)
        assert put(node, there, "another", 10).status_code in (200, 507)  # the file may have room from the deletions
        assert delete(node, there, 5) == 5
        all_is_there(node, there)
        node.kill()
        node.start(ready=False)  # on the volume that is still full
        all_is_there(node, there)
        fill(node.volume)
        make_room(node.volume)
        took_s = back_after_s(node, there)
        all_is_there(node, there)
    print(f"full disk ({volume.__name__}): 0 false acknowledgements of {acknowledged}, back after {took_s:.2f} s")


def test_deletions_alone_bring_a_full_volume_back(tmp_path: Path) -> None:
    there: There = {}
    with small(tmp_path, 0) as stage:
        node = stage.leader.start()
        for _ in range(3):
            put_until_full(node, there)
            assert delete(node, there, half := len(there) // 2) == half
            took_s = back_after_s(node, there)
            all_is_there(node, there)
    print(f"full disk: back {took_s:.2f} s after half of its keys were deleted")


def test_a_leader_on_a_volume_without_any_room_starts_and_reads_and_leads_when_there_is_some(tmp_path: Path) -> None:
    """All that it holds is in the WAL, and there is no room for it a second time: it must not be needed."""
    there: There = {}
    with small(tmp_path, 0) as stage:
        node = stage.leader.start()
        for number in range(20):
            assert put(node, there, f"key-{number}").is_success
        for number in range(300):
            assert put(node, there, f"small-{number}", 10).is_success
        fill(node.volume)
        assert put(node, there, "another", 10).status_code == 507
        assert delete(node, there, 15) == 15  # from the ballast
        node.kill()
        assert (node.volume / WAL).stat().st_size > 15 * VALUE_BYTES
        fill(node.volume)
        node.start(ready=False)
        stage.until(node, "recovering", "the volume is full")
        assert not node.get("/readyz").is_success
        all_is_there(node, there)
        assert put(node, there, "another", 10).status_code == 503
        make_room(node.volume)
        took_s = back_after_s(node, there)
        all_is_there(node, there)
        stage.until(node, "serving")
    print(f"full disk: a leader that had no room to lead was back after {took_s:.2f} s")


def test_a_follower_without_room_keeps_serving_and_catches_up_by_itself(tmp_path: Path) -> None:
    there: There = {}
    with small(tmp_path, 1, replicas=2) as stage:
        [follower] = stage.followers
        for node in stage.cluster.nodes:
            node.start()
        assert put(stage.leader, there, "early").is_success
        stage.equal()
        before = dict(there)
        fill(follower.volume)
        for number in range(40):
            assert put(stage.leader, there, f"key-{number}").is_success

        def says_why() -> bool:
            leader = follower.status().leader
            return leader is not None and (leader.problem or "").startswith("disk_full")

        eventually(says_why, "the follower to say that its volume is full")
        assert follower.status().state == "serving"
        assert follower.get("/get/early").content == before["early"]
        make_room(follower.volume)
        since_s = time.monotonic()
        stage.equal()
        took_s = time.monotonic() - since_s
        assert took_s < BACK_WITHIN_S
        all_is_there(follower, there)
    print(f"full disk: a follower had caught up {took_s:.2f} s after there was room")


def test_a_snapshot_that_does_not_fit_leaves_the_follower_what_it_has(tmp_path: Path) -> None:
    with small(tmp_path, 1, replicas=2) as stage:
        [follower] = stage.followers
        grow(stage.leader.volume, 2000)
        stage.note()
        follower.volume.joinpath(FOREIGN).touch()
        fill(follower.volume, 64 << 10)
        stage.leader.start()
        follower.start(ready=False)
        stage.until(follower, "syncing", "disk_full")
        make_room(follower.volume)
        assert stage.equal().revision == 2000
        assert rows(follower.volume) == rows(stage.leader.volume)
        assert kept(follower.volume) == []


@pytest.mark.parametrize("ended", ["kill", "stop"])
def test_a_volume_that_can_only_be_read_serves_reads(tmp_path: Path, ended: str) -> None:
    """A clean stop leaves one file; kill -9 leaves a WAL that nobody can move into it."""
    with small(tmp_path, 0, 1, replicas=2) as stage:
        there: There = {}
        for node in stage.cluster.nodes:
            node.start()
        for number in range(10):
            assert put(stage.leader, there, f"key-{number}", 100).is_success
        stage.equal()
        for node in reversed(stage.cluster.nodes):
            node.kill() if ended == "kill" else node.stop()
            remount(node.volume, "ro")
            assert (node.volume / WAL).exists() == (ended == "kill")
        for node in stage.cluster.nodes:
            node.start(ready=False)
        for node in stage.cluster.nodes:
            all_is_there(node, there)
            status = node.status()
            assert not status.ready
            assert "store: the volume can only be read" in (status.reason or "")
            assert node.get("/livez").is_success
        for answer in (put(stage.leader, there, "new", 10), stage.leader.request("DELETE", "/delete/key-1")):
            assert (answer.status_code, answer.json()["error"]) == (503, "read_only")
        stage.until(stage.leader, "recovering", "leading: read_only")
        for node in reversed(stage.cluster.nodes):
            assert node.log.count("volume can only be read directory=") == 1
            node.stop()
            remount(node.volume, "rw")
        for node in stage.cluster.nodes:
            node.start()
        assert stage.equal().revision == len(there)
        all_is_there(stage.leader, there)


@pytest.mark.parametrize("ordinal", [0, 1], ids=["leader", "follower"])
@pytest.mark.parametrize("file_bytes_max", [4 * MIB, 24 * MIB], ids=["a commit", "a checkpoint"])
def test_a_node_whose_disk_fails_ends_and_loses_nothing(tmp_path: Path, ordinal: int, file_bytes_max: int) -> None:
    """No file may get larger: the WAL comes to the lower limit, only the database behind it to the higher one."""
    there: There = {}
    taken: list[bool] = []
    with scene(tmp_path) as stage:
        for node in stage.cluster.nodes:
            node.start()
        node = stage.cluster.nodes[ordinal]
        process = node.process
        assert process is not None
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))

        def ended() -> bool:
            taken.append(False)
            with contextlib.suppress(httpx.TransportError):  # it ends in the middle of it
                taken[-1] = put(stage.leader, there, f"key-{len(taken)}", MIB // 2).is_success
            return process.poll() is not None

        eventually(ended, f"{node.name} to end", FILLED_WITHIN_S)
        assert taken == sorted(taken, reverse=True), "a failure is final"
        assert all(taken) or node is stage.leader
        assert process.returncode == 1
        assert "nothing more is acknowledged, restart the node: IOError" in node.log
        node.process = None
        node.start()
        stage.equal()
        none_is_lost(node, there)
    print(f"failing disk: 0 of {len(there)} acknowledged writes lost")
