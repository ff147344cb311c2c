"""Snapshots: a whole store in one file, or refused."""

import asyncio
import hashlib
import os
import shutil
from pathlib import Path
from typing import Final

import apsw
import pytest

from disk import DATABASE, WAL
from mehdb.errors import Damaged, DamagedRow, DiskFull, StoreError, UnknownSchema
from mehdb.store import (
    Meta,
    Store,
    Write,
    begin_new_history,
    make_snapshot,
    new_history,
    verify_snapshot,
)
from mehdb.store.room import Room
from mehdb.store.schema import SCHEMA
from mehdb.store.snapshot import INCOMING, OUTGOING
from stores import enqueue, fill, leading, opened, put, rewrite, sql, tables_of

OLD_CHANGES: Final = 40
NEW_CHANGES: Final = 60


@pytest.fixture
async def old(directory: Path) -> Path:
    """A closed store."""
    async with leading(directory) as store:
        await fill(store, OLD_CHANGES, b"old")
    return directory


@pytest.fixture
async def incoming(tmp_path: Path) -> tuple[Path, Meta]:
    """A snapshot of another store, and its state."""
    async with leading(tmp_path / "other") as store:
        await fill(store, NEW_CHANGES, b"new")
    snapshot = make_snapshot(tmp_path / "other", tmp_path / "incoming", None)
    return snapshot.path, verify_snapshot(snapshot.path)


# Making.


async def test_a_snapshot_is_the_whole_store_at_one_moment(leader: Store, tmp_path: Path) -> None:
    await fill(leader, 500)
    writing = [Write(b"later-%d" % n, b"value") for n in range(3000)]
    tasks = await enqueue(leader, writing)
    snapshot = await leader.snapshot()
    await asyncio.gather(*tasks)
    assert verify_snapshot(snapshot.path) == snapshot.meta
    assert 500 <= snapshot.meta.head <= leader.head
    data = snapshot.path.read_bytes()
    assert (len(data), hashlib.sha256(data).digest()) == (snapshot.size_bytes, snapshot.digest)
    (tmp_path / "restored").mkdir()
    shutil.copy(snapshot.path, tmp_path / "restored" / DATABASE)
    log = tables_of(leader.directory)["change"]
    assert tables_of(tmp_path / "restored")["change"] == log[: snapshot.meta.head]
    async with opened(tmp_path / "restored") as store:
        assert store.meta == snapshot.meta
        assert (await store.check()).problems == ()
        await put(store, b"k", b"v")


async def test_a_snapshot_holds_what_is_only_in_the_wal_yet(leader: Store) -> None:
    await fill(leader, 50)
    assert (leader.directory / WAL).stat().st_size > 0
    assert (await leader.snapshot()).meta == leader.meta


async def test_a_snapshot_of_a_snapshot_is_the_same(old: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    one = make_snapshot(old, tmp_path / "again" / DATABASE, None)
    two = make_snapshot(tmp_path / "again", tmp_path / "two", None)
    assert (two.meta, two.size_bytes) == (one.meta, one.size_bytes)
    assert tables_of(tmp_path / "again") == tables_of(old)
    assert verify_snapshot(two.path) == one.meta


async def test_a_snapshot_takes_no_room_that_is_reserved(old: Path, tmp_path: Path) -> None:
    class Small(Room):
        def free_bytes(self) -> int:
            return (old / DATABASE).stat().st_size - 1

    with pytest.raises(DiskFull, match="no room"):
        make_snapshot(old, tmp_path / "snapshot", Small(old, 0))
    assert not (tmp_path / "snapshot").exists()


async def test_no_snapshot_is_made_of_a_damaged_page(old: Path) -> None:
    [(number,)] = sql(old, "SELECT pageno FROM dbstat WHERE name = 'entry'")
    rewrite(old, 4096 * number - 100, b"\xa5", right_checksum=False)
    async with opened(old) as store:
        with pytest.raises(DamagedRow, match="cannot be copied whole"):
            await store.snapshot()
        assert store.damage is not None
    assert not (old / OUTGOING).exists()


async def test_what_a_killed_process_left_half_made_is_removed(old: Path) -> None:
    leftovers = [old / name for name in (INCOMING, OUTGOING, f"{OUTGOING}-journal", "store.db.new")]
    for path in leftovers:
        path.write_bytes(b"half")
    async with opened(old) as store:
        assert store.head == OLD_CHANGES
    assert [path for path in leftovers if path.exists()] == []


# Verifying.


def flipped(path: Path) -> None:
    """Flip a bit in the middle of some page."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 100] ^= 4
    path.write_bytes(data)


def run(path: Path, statements: str) -> None:
    """Run SQL on a snapshot: every checksum of a page is right afterwards."""
    connection = apsw.Connection(str(path))
    connection.execute(statements).fetchall()
    connection.close()


REFUSED: Final = {
    "nothing": (lambda path: path.unlink(), Damaged, "nothing in it"),
    "0 bytes": (lambda path: path.write_bytes(b""), Damaged, "nothing in it"),
    "a byte": (lambda path: path.write_bytes(b"S"), UnknownSchema, "no"),
    "a page less": (lambda path: os.truncate(path, path.stat().st_size - 4096), Damaged, "damaged"),
    "half a page less": (lambda path: os.truncate(path, path.stat().st_size - 2048), Damaged, "within a page"),
    "all but a page less": (lambda path: os.truncate(path, 4096), Damaged, "damaged"),
    "a flipped bit": (flipped, Damaged, "damaged"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 64), Damaged, "damaged"),
    "text": (lambda path: path.write_text("<html>502 Bad Gateway</html>" * 99), Damaged, "damaged"),
    "another program's database": (lambda path: run(path, "PRAGMA application_id = 77"), UnknownSchema, "no"),
    "a newer schema": (lambda path: run(path, "PRAGMA user_version = 2"), UnknownSchema, "has schema 2"),
    "a wrong value": (
        lambda path: run(path, "UPDATE change SET value = x'00' WHERE revision = 50"),
        Damaged,
        "revision 50: the CRC",
    ),
    "a missing change": (
        lambda path: run(path, "DELETE FROM change WHERE revision = 20"),
        Damaged,
        "counts 60 changes, the log has 59",
    ),
    "a missing key": (lambda path: run(path, "DELETE FROM entry WHERE key = CAST('key-7' AS BLOB)"), Damaged, "keys"),
    "another head": (lambda path: run(path, "UPDATE meta SET head = 59"), Damaged, "head is 59"),
    "another chain": (lambda path: run(path, "UPDATE meta SET chain = zeroblob(16)"), Damaged, "chains differ"),
    "no state": (lambda path: run(path, "DELETE FROM meta"), Damaged, "cannot be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_whole_store_is_refused(incoming: tuple[Path, Meta], what: str) -> None:
    damage, error, reason = REFUSED[what]
    path, _ = incoming
    damage(path)
    with pytest.raises(error, match=reason):
        verify_snapshot(path)


def test_a_store_without_page_checksums_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    plain = apsw.Connection(str(path), vfs="unix")
    plain.execute(SCHEMA)
    plain.close()
    with pytest.raises(Damaged, match="no page checksums"):
        verify_snapshot(path)


def test_a_snapshot_is_verified_without_a_trace(incoming: tuple[Path, Meta], tmp_path: Path) -> None:
    path, meta = incoming
    before = path.read_bytes()
    steps: list[tuple[int, int]] = []
    assert verify_snapshot(path, lambda done, every: steps.append((done, every))) == meta
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir() if found.name.startswith("incoming")] == ["incoming"]
    assert steps
    assert all(0 <= done <= every == NEW_CHANGES for done, every in steps)


def test_another_history_is_no_place_in_the_old_one(incoming: tuple[Path, Meta]) -> None:
    path, meta = incoming
    history = new_history()
    begin_new_history(path, history)
    verified = verify_snapshot(path)
    assert (verified.history, verified.head, verified.chain) == (history, meta.head, meta.chain)
    assert verified.history != meta.history
    path.write_text("no store" * 1000)
    with pytest.raises(StoreError, match="cannot be changed"):
        begin_new_history(path, history)
