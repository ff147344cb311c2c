"""`mehdb check` and `mehdb backup`: on a node that runs, on a volume alone, and on what is no store or a bad backup."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import httpx
import pytest

from cluster import Cluster, eventually, running
from commands import at_terminal, entries, mehdb, refused, write
from mehdb.store.schema import use_page_checksums
from volumes import MIB, fill, free_bytes, tmpfs

KEYS = 20
HISTORY = "[0-9a-f]{32}"


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
    done = mehdb("backup", path, data_dir=pair.leader.volume)
    assert (done.code, done.shown) == (0, ""), done
    assert re.fullmatch(f"{path}: history {HISTORY}, revision {KEYS}, {KEYS} keys\n", done.said)
    return path


# Check.


@pytest.mark.parametrize("ordinal", [0, 1])
def test_check_verifies_a_store_while_its_node_runs(pair: Cluster, ordinal: int) -> None:
    volume = pair.nodes[ordinal].volume
    done = mehdb("check", data_dir=volume)
    assert re.fullmatch(
        f"{volume}: sound, history {HISTORY}, revision {KEYS}, {KEYS} keys, {KEYS} changes\n", done.shown
    )
    assert (done.code, done.said) == (0, "")  # nor a progress bar: this is no terminal


def test_check_draws_its_progress_on_a_terminal_and_leaves_stdout_alone(backup: Path, tmp_path: Path) -> None:
    with (tmp_path / "stdout").open("wb") as stdout:
        done = at_terminal("check", backup, stdout=stdout.fileno())
    assert done.code == 0
    assert re.search(r"check .*%", done.shown)
    assert "sound" not in done.shown
    assert (tmp_path / "stdout").read_text().startswith(f"{backup}: sound, history ")


def test_check_says_what_is_wrong_and_fails(backup: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "store.db"
    data = bytearray(backup.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert f"{damaged} is damaged" in mehdb("check", damaged).failed_in_one_line
    done = mehdb("check", data_dir=tmp_path)
    assert done.code == 1
    *problems, last = done.shown.splitlines()
    assert problems
    assert last.startswith(f"{tmp_path}: DAMAGED, history ")


@pytest.mark.parametrize("command", [["check"], ["backup", "-"], ["backup", "backup.db"]])
def test_where_there_is_no_store_there_is_nothing_to_check_or_to_copy(tmp_path: Path, command: list[str]) -> None:
    assert (
        f"{tmp_path} holds no store: name another with --data-dir"
        in mehdb(*command, data_dir=tmp_path).failed_in_one_line
    )
    assert not list(tmp_path.iterdir())
    assert not Path("backup.db").exists()


# Backup.


def test_a_backup_under_writes_is_a_prefix_of_them(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.start(1).leader
    acknowledged, enough = 0, threading.Event()

    def writer() -> None:
        nonlocal acknowledged
        with httpx.Client(base_url=node.url, trust_env=False) as client:
            while not enough.is_set():
                assert client.put(f"/set/{acknowledged + 1}", content=b"v" * 1000).is_success
                acknowledged += 1

    writing = threading.Thread(target=writer)
    writing.start()
    try:
        eventually(lambda: acknowledged > 100, "some writes")
        before = acknowledged
        assert mehdb("backup", tmp_path / "backup.db", data_dir=node.volume).code == 0
        after = acknowledged
    finally:
        enough.set()
        writing.join()
    assert mehdb("check", tmp_path / "backup.db").code == 0
    database = apsw.Connection(str(tmp_path / "backup.db"), flags=apsw.SQLITE_OPEN_READONLY)
    keys = [int(key) for (key,) in database.execute("SELECT CAST(key AS TEXT) FROM change ORDER BY revision")]
    database.close()
    assert keys == list(range(1, len(keys) + 1))
    assert before <= len(keys) <= after + 1


def test_a_backup_holds_what_only_the_wal_has_however_much_that_is(cluster: Cluster, tmp_path: Path) -> None:
    """Pages get their checksums on the way into the database's file: those of the WAL have none yet."""
    node = cluster.start(1).leader
    write(node, 6, bytes(1 << 20))
    assert (node.volume / "store.db-wal").stat().st_size > 6 << 20
    assert mehdb("backup", tmp_path / "backup.db", data_dir=node.volume).code == 0
    assert "sound, history" in mehdb("check", tmp_path / "backup.db").shown


def test_a_backup_to_standard_output_is_the_same_file(pair: Cluster, backup: Path) -> None:
    with (backup.parent / "piped").open("wb") as stdout:
        done = at_terminal("backup", "-", data_dir=pair.leader.volume, stdout=stdout.fileno())
    assert done.code == 0
    assert (backup.parent / "piped").read_bytes() == backup.read_bytes()
    assert not list(pair.leader.volume.glob("store.db.outgoing*"))


def test_a_backup_asks_before_it_replaces_a_file(pair: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "backup.db"
    file.write_text("mine")
    assert "Say --yes" in mehdb("backup", file, data_dir=pair.leader.volume).failed_in_one_line
    done = at_terminal("backup", file, data_dir=pair.leader.volume, answer="n\n")
    assert done.code == 1
    assert "exists and will be replaced. Go on? [y/N]" in done.shown
    assert file.read_text() == "mine"
    assert at_terminal("backup", file, data_dir=pair.leader.volume, answer="y\n").code == 0
    assert mehdb("check", file).code == 0
    assert mehdb("backup", file, "--yes", data_dir=pair.leader.volume).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["backup.db"]


def test_a_backup_that_cannot_be_written_leaves_nothing(pair: Cluster, tmp_path: Path) -> None:
    volume = pair.leader.volume
    assert "is no directory: make it" in mehdb("backup", tmp_path / "no" / "b.db", data_dir=volume).failed_in_one_line
    assert "is a directory: name a file" in mehdb("backup", tmp_path, "--yes", data_dir=volume).failed_in_one_line
    with Path("/dev/full").open("wb") as full:
        done = at_terminal("backup", "-", data_dir=volume, stdout=full.fileno())
    assert done.code != 0
    assert "mehdb: - cannot be written: No space left on device" in done.shown
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.parent.glob("*.part"))


def test_no_backup_is_made_of_a_store_that_lacks_what_it_acknowledged(cluster: Cluster, tmp_path: Path) -> None:
    """What is left of it is sound, and would pass for a backup."""
    node = cluster.add().start()
    write(node, 20)
    node.kill()
    (node.volume / "store.db-wal").unlink()
    line = mehdb("backup", tmp_path / "backup.db", data_dir=node.volume).failed_in_one_line
    assert "20 acknowledged changes are missing at its end): back up another node" in line
    assert not (tmp_path / "backup.db").exists()
    cluster.nodes.clear()  # what is left is damaged


def test_a_backup_without_a_change_is_not_restored(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add().start()
    assert mehdb("backup", tmp_path / "empty.db", data_dir=node.volume).code == 0
    write(node, 1)
    refused(
        mehdb("restore", tmp_path / "empty.db", "--replace", "--yes", data_dir=node.volume), "holds no change at all"
    )
    assert node.get("/get/k/0").content == b"v"


def test_a_backup_to_standard_output_leaves_the_node_its_room(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add()
    with tmpfs(node.volume, 64 * MIB):
        node.start()
        write(node, 8, bytes(MIB))
        node.stop()  # so that all of it is in one file
        node.start()
        fill(node.volume, 12 * MIB)
        room = free_bytes(node.volume)
        refused(mehdb("backup", "-", data_dir=node.volume), "for which this node's volume has no room: enlarge it")
        assert free_bytes(node.volume) == room
        assert mehdb("backup", tmp_path / "backup.db", data_dir=node.volume).code == 0
        node.stop()


@pytest.mark.parametrize("target", ["-", "backup.db"])
def test_no_backup_is_made_that_a_restore_would_refuse(backup: Path, tmp_path: Path, target: str) -> None:
    volume = tmp_path / "mehdb-0"
    volume.mkdir()
    (volume / "store.db").write_bytes(backup.read_bytes())
    use_page_checksums()
    database = apsw.Connection(str(volume / "store.db"))
    database.execute("UPDATE change SET value = CAST('another' AS BLOB) WHERE revision = 3")
    database.close()
    before = entries(volume)
    file = target if target == "-" else tmp_path / target
    done = mehdb("backup", file, data_dir=volume)
    refused(done, f"mehdb: the store in {volume} cannot be backed up (the copy is damaged: revision 3: the CRC")
    assert done.said.endswith("): back up another node\n")
    assert entries(volume) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mehdb-0"]


def test_what_a_killed_backup_has_left_is_removed_by_the_next(pair: Cluster) -> None:
    volume = pair.leader.volume
    ended, lives = volume / "store.db.outgoing-99999999", volume / f"store.db.outgoing-{os.getpid()}"
    for left in (ended, lives):
        left.write_bytes(b"half")
    assert mehdb("backup", "-", data_dir=volume).code == 0
    assert (ended.exists(), lives.exists()) == (False, True)
    lives.unlink()


# A bad one is not restored.


def foreign(_data: bytes) -> bytes:
    """Return an SQLite database, but none of ours."""
    database = apsw.Connection(":memory:")
    database.execute("CREATE TABLE t(a); PRAGMA user_version = 1")
    return database.serialize("main")


BAD_BACKUPS = {
    "empty": lambda _data: b"",
    "random": lambda data: os.urandom(len(data)),
    "foreign": foreign,
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[: len(data) - 100] + bytes([data[len(data) - 100] ^ 1]) + data[len(data) - 99 :],
}


@pytest.mark.parametrize("kind", BAD_BACKUPS)
def test_a_bad_backup_is_refused_and_nothing_is_changed(pair: Cluster, backup: Path, tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad.db"
    bad.write_bytes(BAD_BACKUPS[kind](backup.read_bytes()))
    before = pair.leader.position(), entries(pair.leader.volume)
    line = mehdb("restore", bad, "--replace", "--yes", data_dir=pair.leader.volume).failed_in_one_line
    assert str(bad) in line
    assert "nothing was changed" in line
    assert (pair.leader.position(), entries(pair.leader.volume)) == before
    assert pair.leader.ready()
