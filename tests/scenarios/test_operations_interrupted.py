"""An operator's commands that are killed, that come two at once, and a volume whose path is long."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster, Node, check_volume, clean_environment, eventually
from commands import arguments_of, entries, kept, mehdb, refused, started
from mehdb import operations
from mehdb.errors import Refused
from mehdb.store import CommandLock, Store, StoreOptions, Write, check_directory

KEYS = 8
VALUE = bytes(1 << 20)  # large enough that each step of a command can be met
TRIES = 3  # to meet it, where the machine has other things to do as well
LOOK_EVERY_S = 0.0005


def write(node: Node, prefix: str, keys: int) -> None:
    for number in range(keys):
        assert node.put(f"{prefix}/{number}", VALUE).is_success


def backup_of(node: Node, path: Path) -> Path:
    assert mehdb("backup", path, data_dir=node.volume).code == 0
    return path


Moment = Callable[[Node, bool, bool], bool]
"""Whether it has come: on which node, whether a store is arriving there, and whether the node is suspended."""

MOMENTS: dict[str, Moment] = {
    "while a store arrives": lambda _node, arriving, _suspended: arriving,
    "when the node is suspended": lambda _node, _arriving, suspended: suspended,
    "when the old one is kept": lambda node, _arriving, suspended: suspended and bool(newest_kept(node)),
    "when the new one is there": lambda _node, arriving, suspended: suspended and not arriving,
}


def newest_kept(node: Node) -> list[Path]:
    """Return the folders that keep a store which is still in its place too."""
    store = (node.volume / "store.db").stat().st_ino
    return [path for path in node.volume.glob("re*ed-*/store.db") if path.stat().st_ino == store]


def killed(node: Node, moment: str, *command: object) -> bool:
    """Run a command on *node*'s volume, and kill it at *moment*. Return whether it had not ended before."""
    before = node.log.count(" suspended ")
    process = started(*command, data_dir=node.volume)
    incoming = node.volume / f"store.db.incoming-{process.pid}"
    end_s = time.monotonic() + 20
    try:
        while process.poll() is None:
            if MOMENTS[moment](node, incoming.exists(), node.log.count(" suspended ") > before):
                break
            assert time.monotonic() < end_s
            time.sleep(LOOK_EVERY_S)  # between two looks
    finally:
        process.kill()
        process.communicate()
    return process.returncode == -signal.SIGKILL


def settled(node: Node, states: tuple[str, ...]) -> bool:
    """Return whether the node has gone on, in one of *states*."""
    return node.answers() and node.status().state in states


def test_a_restore_that_is_killed_leaves_the_old_store_or_the_new_one(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.start(1).leader
    write(node, "backup", KEYS)
    backup = backup_of(node, tmp_path / "backup.db")
    met = set()
    for number, moment in enumerate(list(MOMENTS) * TRIES):
        if moment in met:
            continue
        write(node, f"since/{number}", 1)
        old, keys = node.position(), node.get("/keys").json()
        if killed(node, moment, "restore", backup, "--replace", "--yes"):
            met.add(moment)
        eventually(lambda: settled(node, ("serving",)), f"the leader to go on, killed {moment}")
        if node.position()["history"] == old["history"]:
            assert (node.position(), node.get("/keys").json()) == (old, keys), moment
        else:
            assert node.position()["revision"] == KEYS, moment
            assert all(key.startswith("backup/") for key in node.get("/keys").json()), moment
        assert not check_directory(node.volume).problems, moment
    assert len(met) >= len(MOMENTS) - 1, "the links in between are there for microseconds only"
    assert mehdb("restore", backup, "--replace", "--yes", data_dir=node.volume).code == 0
    assert not list(node.volume.glob("store.db.incoming*")), "the next command removes what one has left half made"


@pytest.mark.timeout(600)
def test_a_rejoin_that_is_killed_leaves_the_old_store_or_the_new_one(cluster: Cluster, tmp_path: Path) -> None:
    leader, follower = cluster.start(2).nodes
    write(leader, "k", KEYS)
    cluster.converge()
    backup = backup_of(leader, tmp_path / "backup.db")
    before, met = follower.position(), set()
    for moment in list(MOMENTS) * TRIES:
        if moment in met:
            continue
        if follower.position() == leader.position():  # nothing to rejoin: the one before was done
            assert mehdb("restore", backup, "--replace", "--yes", data_dir=leader.volume).code == 0
            eventually(lambda: settled(follower, ("diverged",)), "the follower to notice")
        old = follower.position()
        if killed(follower, moment, "rejoin", "--yes"):
            met.add(moment)
        eventually(lambda: settled(follower, ("diverged", "serving")), f"the follower to go on, killed {moment}")
        assert follower.position() in (old, leader.position()), moment
        assert not check_directory(follower.volume).problems, moment
    assert len(met) >= len(MOMENTS) - 1
    if follower.position() != leader.position():  # the last of those that were killed may have been done before
        assert mehdb("rejoin", "--yes", data_dir=follower.volume).code == 0
    assert cluster.converge() == leader.position()
    # Whatever the kills left, one of the kept stores is what the follower had.
    reports = [check_directory(folder) for folder in kept(follower.volume, "rejoined")]
    assert any(not report.problems and report.position.history == before["history"] for report in reports)


@pytest.mark.parametrize("runs", [True, False], ids=["on a node that runs", "on a volume alone"])
def test_of_two_commands_at_once_each_is_done_whole_or_refused(cluster: Cluster, tmp_path: Path, runs: bool) -> None:
    node = cluster.start(1).leader
    backups = []
    for name in ("first", "second"):
        write(node, name, 1)
        backups.append(backup_of(node, tmp_path / name))
    if not runs:
        node.stop()
    commands = [started("restore", backup, "--replace", "--yes", data_dir=node.volume) for backup in backups]
    said = [command.communicate(timeout=30)[0] for command in commands]
    codes = [command.returncode for command in commands]
    assert 0 in codes
    for code, line in zip(codes, said, strict=True):
        assert code == 0 or "mehdb: another command, process " in line, line
    if not runs:
        node.start()
    assert node.status().revision in (1, 2)
    assert len(kept(node.volume, "replaced")) == codes.count(0)
    assert len(node.get("/keys").json()) == node.status().revision


def test_a_volume_whose_path_is_longer_than_a_sockets_may_be(cluster: Cluster, tmp_path: Path) -> None:
    volume = tmp_path / ("v" * 120) / "mehdb-0"
    node = cluster.add(MEHDB_DATADIR=str(volume))
    volume.parent.mkdir()
    node.volume = volume
    node.start()
    write(node, "k", 1)
    assert len(str(volume)) > 108
    assert mehdb("restore", backup_of(node, tmp_path / "b"), "--replace", "--yes", data_dir=volume).code == 0
    assert mehdb("drain", "--wait", data_dir=volume).code == 0


def test_a_node_that_is_stopped_while_a_command_has_its_store_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.start(1).leader
    write(node, "backup", KEYS)
    backup = backup_of(node, tmp_path / "backup.db")
    before = node.log.count(" suspended ")
    process = started("restore", backup, "--replace", "--yes", data_dir=node.volume)
    try:
        eventually(lambda: process.poll() is not None or node.log.count(" suspended ") > before, "the command to begin")
        node.stop(signal.SIGTERM)
    finally:
        process.communicate(timeout=30)
    asyncio.run(check_volume(node.volume))
    node.start()
    assert node.status().keys == KEYS


def test_a_node_whose_process_ends_under_a_command_waits_for_its_end(cluster: Cluster) -> None:
    """The suspension ends with the process, and the next one would have the files under the command's hands."""
    node = cluster.start(1).leader
    for number in range(4):
        node.put(f"k/{number}", b"v")
    node.stop()
    node.start()
    node.put("lost", b"v")
    node.kill()
    os.truncate(node.volume / "store.db-wal", 0)
    node.start(ready=False)
    eventually(lambda: node.status().state == "failed", "the leader to refuse")
    codes: list[int] = []

    def during(_step: str, _done: int, _total: int) -> None:
        """Play Kubernetes, while the command checks what is there."""
        if codes:
            return
        node.kill()
        with node.volume.with_suffix(".log").open("ab") as log:
            command = arguments_of(("serve",), node.volume)
            again = subprocess.run(
                command, env=clean_environment() | node.environment, stdout=log, stderr=log, timeout=20, check=False
            )
        codes.append(again.returncode)

    assert asyncio.run(operations.accept_loss(node.volume, start_empty=False, on_step=during)) is None
    assert codes == [1]
    assert f"mehdb: a command, process {os.getpid()}, is at work on {node.volume}" in node.log
    node.start()
    assert node.status().revision == 4


@pytest.mark.parametrize("runs", [True, False], ids=["on a node that runs", "on a volume alone"])
def test_a_command_refuses_to_work_beside_another(cluster: Cluster, tmp_path: Path, runs: bool) -> None:
    node = cluster.start(1).leader
    node.put("k", b"v")
    backup = backup_of(node, tmp_path / "backup.db")
    if not runs:
        node.stop()
    other = CommandLock(node.volume)
    before = entries(node.volume)
    done = mehdb("restore", backup, "--replace", "--yes", data_dir=node.volume)
    refused(done, f"another command, process {os.getpid()}, is at work on {node.volume}: wait for it")
    assert entries(node.volume) == before
    other.release()
    assert mehdb("restore", backup, "--replace", "--yes", data_dir=node.volume).code == 0


def test_what_is_written_while_a_backup_is_read_is_not_replaced(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.start(1).leader
    node.put("k", b"old")
    backup = backup_of(node, tmp_path / "backup.db").read_bytes()
    empty = cluster.add().start()
    node.stop()
    empty.stop()
    empty.volume = tmp_path / "empty"
    empty.environment |= {"MEHDB_HOST": "mehdb-0", "MEHDB_DATADIR": str(empty.volume), "MEHDB_PEERS": empty.url}
    empty.start()
    with subprocess.Popen(
        arguments_of(("restore", "-"), empty.volume), env=clean_environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False,
    ) as command:  # fmt: skip
        assert command.stdin
        command.stdin.write(backup[:4096])
        command.stdin.flush()
        eventually(lambda: list(empty.volume.glob("store.db.incoming-*")), "the command to read")
        assert empty.put("k", b"acknowledged").is_success
        _, said = command.communicate(backup[4096:], timeout=30)
    assert (command.returncode, "holds a store: say --replace" in said.decode()) == (1, True), said
    eventually(empty.ready, "the node to go on")
    assert empty.get("/get/k").content == b"acknowledged"
    assert not kept(empty.volume, "replaced")


def test_a_store_under_writes_never_looks_as_if_changes_were_missing(tmp_path: Path) -> None:
    ended = threading.Event()

    async def write_on() -> None:
        store = await Store.open(tmp_path / "store", StoreOptions())
        await store.lead(store.meta.epoch)
        while not ended.is_set():
            await store.write(Write(b"k", b"v"))
        await store.close()

    writing = threading.Thread(target=asyncio.run, args=[write_on()])
    writing.start()
    try:
        eventually(lambda: (tmp_path / "store" / "acknowledged").exists(), "the first write")
        for _ in range(1000):
            with pytest.raises(Refused, match="nothing is missing"):
                operations.loss(tmp_path / "store", start_empty=False, on_step=lambda *_: None)
    finally:
        ended.set()
        writing.join()
