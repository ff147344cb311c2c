"""Whole stores over HTTP: what a node sends, and a follower that lacks too much takes it and goes on from there."""

import asyncio
import base64
import hashlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Final, Self

import httpx
import pytest

from cluster import ADDRESS, DEADLINE_S, Cluster, Node, clean_environment, curl, eventually, running
from fake_leader import copied, fake_leader, honest, leading, snapshot_answer, with_snapshots
from mehdb.store import Meta, Write, verify_snapshot
from volumes import MIB, fill, make_room, tmpfs

LARGE_BYTES: Final = 8 * MIB
LARGE_COUNT: Final = 4  # together more than the kernel's buffers take for a client that does not read
STALL_S: Final = 5.0  # how long a node waits for one
RETAINED: Final = 10
LAG: Final = 50


def written(leader: Node, count: int, key: str = "key") -> None:
    """Write *count* values, all to one *key*."""
    with httpx.Client(base_url=leader.url, trust_env=False, timeout=DEADLINE_S) as client:
        for number in range(count):
            assert client.put(f"/set/{key}", content=b"%d" % number).status_code == 200


def snapshots_taken(node: Node) -> list[int]:
    """Return the revisions of those that *node* has taken."""
    return [int(revision) for revision in re.findall(r"snapshot taken revision=(\d+)", node.log)]


def verified(data: bytes, path: Path) -> Meta:
    """Return the state of the snapshot in *data*, all of which was verified."""
    path.write_bytes(data)
    try:
        return verify_snapshot(path)
    finally:
        path.unlink()


def outgoing(node: Node) -> list[str]:
    """Return the files on the volume of *node* that are there only to be sent."""
    return [path.name for path in node.volume.iterdir() if "outgoing" in path.name]


class Unread:
    """A client that asks for a snapshot, and reads no more than the beginning."""

    def __init__(self, node: Node) -> None:
        self._connection = socket.socket()
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._connection.settimeout(DEADLINE_S)
        self._connection.connect((ADDRESS, node.port))
        self._connection.sendall(b"GET /snapshot HTTP/1.1\r\nHost: mehdb\r\n\r\n")
        self.status = int(self._connection.recv(12).split()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def rest(self) -> int:
        """Return how many bytes come before the connection ends."""
        size_bytes = 0
        try:
            while chunk := self._connection.recv(1 << 20):
                size_bytes += len(chunk)
        except ConnectionResetError:
            pass
        return size_bytes


# What is sent.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A leader with large values, and a follower."""
    with running(tmp_path_factory.mktemp("large")) as nodes:
        nodes.start(1)
        for number in range(LARGE_COUNT):
            assert nodes.leader.put(f"large/{number}", bytes(LARGE_BYTES)).is_success
        nodes.leader.put("small", b"1")
        yield nodes.start(1)


def test_a_snapshot_is_a_store_with_its_length_digest_and_position(large: Cluster, tmp_path: Path) -> None:
    for node in large.nodes:
        answer = node.get("/snapshot")
        headers = answer.headers
        assert (answer.status_code, headers["Content-Type"]) == (200, "application/vnd.sqlite3")
        assert int(headers["Content-Length"]) == len(answer.content)
        match = re.fullmatch(r"sha-256=:([A-Za-z0-9+/]{43}=):", headers["Repr-Digest"])  # RFC 9530, 3
        assert match
        assert base64.b64decode(match[1]) == hashlib.sha256(answer.content).digest()
        position = {name: headers[f"Mehdb-Snapshot-{name}"] for name in ("History", "Revision", "Chain")}
        assert position == {name.title(): str(value) for name, value in node.position().items()}
        meta = verified(answer.content, tmp_path / "snapshot")
        assert [str(value) for value in (meta.history, meta.head, meta.chain.hex())] == list(position.values())
        assert not outgoing(node)


def test_a_snapshot_that_curl_saves_is_sound_and_the_check_says_what_it_is(large: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "backup.db"
    curl("-o", str(path), "--fail", f"{large.leader.url}/snapshot")
    position = large.leader.position()
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", "check", str(path)], env=clean_environment(), capture_output=True, text=True,
        timeout=DEADLINE_S * 2, check=True,
    )  # fmt: skip
    told = f"{path}: sound, history {position['history']}, revision {position['revision']}, {LARGE_COUNT + 1} keys\n"
    assert done.stdout == told
    path.write_bytes(path.read_bytes()[:-4096])
    done = subprocess.run(
        [sys.executable, "-m", "mehdb", "check", str(path)], env=clean_environment(), capture_output=True, text=True,
        timeout=DEADLINE_S * 2, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")


def test_snapshots_are_consistent_while_writes_go_on(cluster: Cluster, tmp_path: Path) -> None:
    """Each is the state at one revision: all keys up to it, with the chain that the leader has there."""
    leader = cluster.start(1).leader
    with ThreadPoolExecutor(4) as threads:
        writing = [threads.submit(written, leader, 150, f"key/{number}") for number in range(4)]
        metas = []
        while not all(one.done() for one in writing):
            answer = leader.get("/snapshot")
            assert answer.status_code == 200, answer.text
            metas.append(verified(answer.content, tmp_path / "snapshot"))
            told = [answer.headers[f"Mehdb-Snapshot-{name}"] for name in ("History", "Revision", "Chain")]
            assert told == [str(metas[-1].history), str(metas[-1].head), metas[-1].chain.hex()]
        for one in writing:
            one.result()
    heads = [meta.head for meta in metas]
    assert heads == sorted(heads)
    assert len(set(heads)) > 3, "writes went on meanwhile"
    for meta in metas:  # a place in the leader's history: it would say 409 otherwise
        target = f"/replicate?history={meta.history}&after={meta.head}&chain={meta.chain.hex()}"
        assert leader.get(target).status_code in (200, 204)


def test_there_is_no_snapshot_of_a_store_that_holds_nothing(cluster: Cluster) -> None:
    cluster.add()
    answer = cluster.add().start(ready=False).get("/snapshot")
    assert (answer.status_code, answer.json()["error"]) == (503, "not_synced")
    assert answer.headers["Retry-After"].isdigit()


def test_a_snapshot_has_no_parameters_and_is_only_read(large: Cluster) -> None:
    assert large.leader.get("/snapshot?x=1").json()["error"] == "bad_parameter"
    answer = large.leader.request("PUT", "/snapshot")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


def test_one_is_sent_at_a_time_and_whoever_stops_reading_is_cut_off(large: Cluster) -> None:
    leader = large.leader
    with Unread(leader) as unread:
        assert unread.status == 200
        answer = leader.get("/snapshot")
        assert (answer.status_code, answer.json()["error"]) == (503, "snapshot_busy")
        assert answer.headers["Retry-After"].isdigit()
        started_s = monotonic()
        assert leader.put("small", b"2").is_success, "writes go on"
        assert leader.get("/get/small").content == b"2"
        eventually(lambda: leader.get("/snapshot").status_code == 200, "the next one's turn", STALL_S + DEADLINE_S)
        assert monotonic() - started_s > STALL_S / 2, "it had its time"
        assert unread.rest() < LARGE_COUNT * LARGE_BYTES
    eventually(lambda: not outgoing(leader), "what was to be sent to be removed")


def test_the_turn_of_a_client_that_goes_away_ends_at_once(large: Cluster) -> None:
    leader = large.leader
    with Unread(leader) as unread:
        assert unread.status == 200
    started_s = monotonic()
    eventually(lambda: leader.get("/snapshot").status_code == 200, "the next one's turn")
    assert monotonic() - started_s < STALL_S
    assert not outgoing(leader)


def test_a_stop_does_not_wait_for_a_client_that_does_not_read(cluster: Cluster) -> None:
    leader = cluster.add(MEHDB_STOP_TIMEOUT="1").start()
    for number in range(LARGE_COUNT):
        leader.put(f"large/{number}", bytes(LARGE_BYTES))
    with Unread(leader) as unread:
        assert unread.status == 200
        started_s = monotonic()
        leader.stop()
        assert monotonic() - started_s < STALL_S
    leader.start()
    assert not outgoing(leader)


# What a follower takes.


def test_an_empty_follower_takes_the_snapshot(cluster: Cluster) -> None:
    leader = cluster.start(1).leader
    written(leader, 30, "a")
    leader.put("b", b"1")
    follower = cluster.add().start()
    assert cluster.converge() == leader.position()
    assert snapshots_taken(follower) == [31]
    assert (follower.get("/get/a").content, follower.get("/get/b").content) == (b"29", b"1")
    leader.put("b", b"2")
    cluster.converge()
    assert follower.get("/get/b").content == b"2"
    assert snapshots_taken(follower) == [31]


def test_an_empty_leader_has_nothing_to_send_and_its_follower_is_ready(cluster: Cluster) -> None:
    leader, follower = cluster.start(2).nodes
    assert snapshots_taken(follower) == []
    leader.put("k", b"v")
    cluster.converge()
    assert snapshots_taken(follower) == []


def test_a_follower_behind_the_floor_takes_the_snapshot(cluster: Cluster) -> None:
    leader, follower = cluster.start(2, MEHDB_RETAIN_CHANGES=str(RETAINED)).nodes
    written(leader, 5)
    cluster.converge()
    follower.stop()
    written(leader, 5 * RETAINED)
    eventually(lambda: leader.status().floor > 5, "compaction")
    follower.start()
    cluster.converge()
    assert snapshots_taken(follower) == [5 + 5 * RETAINED]
    assert follower.status().floor == leader.status().floor
    written(leader, 3)
    cluster.converge()
    assert "leader not followed" not in follower.log


@pytest.mark.parametrize(("behind", "snapshots"), [(LAG, []), (LAG + 1, [1 + LAG + 1])])
def test_a_follower_further_behind_than_the_set_lag_takes_the_snapshot(
    cluster: Cluster, behind: int, snapshots: list[int]
) -> None:
    leader, follower = cluster.start(2, MEHDB_SNAPSHOT_LAG=str(LAG)).nodes
    written(leader, 1)
    cluster.converge()
    follower.stop()
    written(leader, behind)
    follower.start()
    cluster.converge()
    assert snapshots_taken(follower) == snapshots


def test_a_leader_without_room_for_a_snapshot_says_so_and_followers_get_pages(cluster: Cluster) -> None:
    with tmpfs(cluster.directory / "small", 128 * MIB) as volume:
        leader = cluster.add(MEHDB_DATADIR=str(volume / "data"), MEHDB_DISK_RESERVE="2MiB").start()
        for number in range(3):
            assert leader.put(f"large/{number}", bytes(LARGE_BYTES)).is_success
        leader.put("small", b"1")
        fill(volume, leave_bytes=LARGE_BYTES)
        answer = leader.get("/snapshot")
        assert (answer.status_code, answer.json()["error"]) == (507, "disk_full")
        assert "enlarge" in answer.json()["message"]
        assert not [path.name for path in (volume / "data").iterdir() if "outgoing" in path.name]
        follower = cluster.add().start()
        assert cluster.converge() == leader.position()
        assert snapshots_taken(follower) == []
        make_room(volume)
        assert leader.get("/snapshot").status_code == 200
        leader.stop()


def test_a_follower_without_room_for_the_snapshot_keeps_what_it_has_and_takes_it_when_there_is_room(
    cluster: Cluster,
) -> None:
    with tmpfs(cluster.directory / "small", 128 * MIB) as volume:
        leader = cluster.add(MEHDB_RETAIN_CHANGES=str(RETAINED)).start()
        follower = cluster.add(MEHDB_DATADIR=str(volume / "data"), MEHDB_DISK_RESERVE="2MiB").start()
        written(leader, 5)
        cluster.converge()
        follower.stop()
        for number in range(2):
            leader.put(f"large/{number}", bytes(LARGE_BYTES))
        written(leader, 5 * RETAINED)
        eventually(lambda: leader.status().floor > 5, "compaction")
        fill(volume, leave_bytes=LARGE_BYTES)
        follower.start(ready=False)
        eventually(lambda: "disk_full" in (follower.status().reason or ""), "the follower to say so")
        assert follower.get("/get/key").content == b"4"
        make_room(volume)
        eventually(follower.ready, "the follower to take it")
        cluster.converge()
        follower.stop()


# A download that goes wrong, or takes long.


async def test_reads_go_on_during_a_long_download_and_an_interrupted_one(cluster: Cluster, tmp_path: Path) -> None:
    changes, more = 20, 200
    async with leading(tmp_path / "truth", changes) as truth, fake_leader(honest(truth)) as leader:
        cluster.add()
        node = cluster.add(MEHDB_PEERS=leader.url)
        await asyncio.to_thread(node.start)
        await asyncio.to_thread(node.stop)
        await asyncio.gather(*(truth.write(Write(b"key/%d" % number, b"newer")) for number in range(more)))
        copy = await copied(truth)
        half = len(copy.data) // 2
        cut_off = snapshot_answer(copy, copy.data[:half])
        pieces = [copy.data[start : start + half // 5] for start in range(0, len(copy.data), half // 5)]
        leader.answer = with_snapshots(truth, cut_off, below=changes + more, pages=False)
        await asyncio.to_thread(node.start, ready=False)

        def read() -> tuple[int, bytes, str]:
            answer = node.get("/get/key/1")
            return answer.status_code, answer.content, answer.headers["Mehdb-Revision"]

        old, new = (200, b"value 1", str(changes)), (200, b"newer", str(changes + more))
        tried = 3
        async with asyncio.timeout(DEADLINE_S):
            while sum(asked.path == "/snapshot" for asked in leader.asked) < tried:
                assert await asyncio.to_thread(read) == old
        reason = (await asyncio.to_thread(node.status)).reason or ""
        assert "peer_unreachable" in reason
        assert node.log.count("leader not followed") == 1, "one line for a change of state"
        slow = snapshot_answer(copy, *pieces, pause_s=0.2)
        leader.answer = with_snapshots(truth, slow, below=changes + more, pages=False)
        during = 0
        async with asyncio.timeout(DEADLINE_S):
            while (shown := await asyncio.to_thread(read)) != new:
                if shown[0] == 503:  # the files change hands: a moment, in which nobody can say
                    continue
                assert shown == old
                during += (node.volume / "store.db.incoming").exists()
        assert during > 5, "it was read while the snapshot came"
        await asyncio.to_thread(eventually, node.ready, "the node to be ready")
        assert snapshots_taken(node) == [changes + more]
