"""Opening: what is refused, what is set, and what is made durable before anything is shown."""

import os
from pathlib import Path

import apsw
import pytest

from disk import DATABASE, WAL, Disk
from mehdb.errors import Damaged, StoreFailed, UnknownSchema, UnsafeSqlite
from mehdb.model import GENESIS, ORIGIN, Epoch, Position
from mehdb.store import Store
from mehdb.store.schema import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    Meta,
    open_reader,
    open_writer,
    read_meta,
    refuse_unsafe_sqlite,
)
from stores import child, leading, opened, put, sql

KILLED_WITH_A_WAL = """
import asyncio, os, signal, sys
from pathlib import Path
from mehdb.store import Store, Write

async def main():
    store = await Store.open(Path(sys.argv[1]))
    await store.lead(1)
    for n in range(10):
        await store.write(Write(b"key-%d" % n, b"value"))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_with_a_wal(directory: Path) -> None:
    """Leave a store of ten changes in *directory* whose WAL was not checkpointed."""
    with child(KILLED_WITH_A_WAL, directory) as writer:
        writer.wait(30)
    assert (directory / WAL).stat().st_size > 0


def files_of(directory: Path) -> dict[str, bytes]:
    """Return what each file holds. An empty WAL and the memory that connections share hold nothing."""
    held = {path.name: path.read_bytes() for path in directory.iterdir()}
    return {name: data for name, data in held.items() if data and name not in ("lock", "store.db-shm")}


# The library.


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.51.2", "3.9.99", "2.8.17", "3.51"])
def test_a_sqlite_that_may_lose_data_is_refused(version: str) -> None:
    with pytest.raises(UnsafeSqlite, match=f"SQLite {version} can corrupt"):
        refuse_unsafe_sqlite(version)


@pytest.mark.parametrize("version", ["3.51.3", "3.51.10", "3.53.0", "3.100.0", "4.0.0", apsw.sqlite_lib_version()])
def test_a_sqlite_without_the_bug_is_taken(version: str) -> None:
    refuse_unsafe_sqlite(version)


# What is opened.


def test_a_new_store_is_empty_and_bears_our_mark(tmp_path: Path) -> None:
    connection = open_writer(tmp_path)
    assert read_meta(connection) == Meta(None, Epoch(0), ORIGIN, GENESIS, ORIGIN, 0, 0)
    assert read_meta(connection).position == Position(None, ORIGIN, GENESIS)
    assert connection.pragma("application_id") == APPLICATION_ID == 0x6D656864
    assert connection.pragma("user_version") == SCHEMA_VERSION
    assert connection.execute("SELECT schema FROM meta").get == SCHEMA_VERSION
    connection.close()


def test_a_store_made_before_there_were_lives_gets_their_index_when_opened(tmp_path: Path) -> None:
    open_writer(tmp_path).close()
    sql(tmp_path, "DROP INDEX change_expiry")
    open_writer(tmp_path).close()
    assert sql(tmp_path, "SELECT name FROM sqlite_schema WHERE type = 'index' AND name LIKE 'change%'")


def test_the_schema_never_changes_without_its_version(tmp_path: Path) -> None:
    open_writer(tmp_path).close()
    columns = {
        table: [(name, kind) for _, name, kind, *_ in sql(tmp_path, f"PRAGMA table_info({table})")]
        for (table,) in sql(tmp_path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
    }
    assert (SCHEMA_VERSION, columns) == (
        1,
        {
            "change": [
                ("revision", "INTEGER"),
                ("key", "BLOB"),
                ("value", "BLOB"),
                ("content_type", "TEXT"),
                ("expires_at", "INTEGER"),
                ("crc", "INTEGER"),
                ("chain", "BLOB"),
            ],
            "entry": [("key", "BLOB"), ("revision", "INTEGER")],
            "meta": [
                ("one", "INTEGER"),
                ("history", "TEXT"),
                ("epoch", "INTEGER"),
                ("head", "INTEGER"),
                ("chain", "BLOB"),
                ("floor", "INTEGER"),
                ("keys", "INTEGER"),
                ("changes", "INTEGER"),
                ("schema", "INTEGER"),
            ],
        },
    )


def test_the_writer_syncs_at_each_commit(tmp_path: Path) -> None:
    for _ in ("new", "again"):
        connection = open_writer(tmp_path)
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2  # FULL
        connection.close()


async def test_a_disk_that_connections_cannot_share_memory_over_is_refused(volume: Path) -> None:
    """They need it for the WAL, and find something else in its place."""
    (volume / "store.db-shm").mkdir()
    with pytest.raises(StoreFailed, match="cannot be opened"):
        await Store.open(volume)


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    open_writer(tmp_path).close()
    connection = open_reader(tmp_path)
    with pytest.raises(apsw.ReadOnlyError):
        connection.execute("UPDATE meta SET epoch = 9")
    connection.close()


async def test_what_a_killed_process_left_unsynced_is_synced_before_it_is_shown(
    directory: Path, disk: Disk, tmp_path: Path
) -> None:
    """The power may go a second time: what the first life's WAL says must then still be there."""
    killed_with_a_wal(directory)
    connection = open_writer(directory)
    shown = read_meta(connection)
    image = disk.after_power_loss(tmp_path / "image")
    connection.close()
    assert shown.head == 10
    async with opened(image) as store:
        assert store.meta == shown
        assert (await store.check()).problems == ()


# What is refused, and left as it was.


def foreign_database(directory: Path) -> None:
    """Make a database of another program."""
    sql(directory, "CREATE TABLE users (name TEXT); INSERT INTO users VALUES ('ada')")


def foreign_database_with_a_version(directory: Path) -> None:
    """Make one whose own version happens to be ours."""
    sql(directory, f"CREATE TABLE users (name TEXT); PRAGMA user_version = {SCHEMA_VERSION}")


def foreign_database_with_a_wal(directory: Path) -> None:
    """Make one whose program was killed, so that a part of it is in its WAL."""
    code = """
import os, signal, sys, apsw
connection = apsw.Connection(sys.argv[1])
connection.execute("PRAGMA journal_mode = WAL; CREATE TABLE users (name TEXT)").fetchall()
os.kill(os.getpid(), signal.SIGKILL)
"""
    with child(code, directory / DATABASE) as other:
        other.wait(30)


def newer_store(directory: Path) -> None:
    """Make a store of the next schema."""
    open_writer(directory).close()
    sql(directory, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def newer_store_with_a_wal(directory: Path) -> None:
    """Make one whose mehdb was killed."""
    newer_store(directory)
    code = """
import os, signal, sys, apsw
connection = apsw.Connection(sys.argv[1])
connection.execute("UPDATE meta SET epoch = 9")
os.kill(os.getpid(), signal.SIGKILL)
"""
    with child(code, directory / DATABASE) as other:
        other.wait(30)


def older_store(directory: Path) -> None:
    """Make a store of a schema that was never released."""
    open_writer(directory).close()
    sql(directory, "PRAGMA user_version = 0")


def empty_database_of_another(directory: Path) -> None:
    """Make a database without tables that another program has marked as its own."""
    sql(directory, "PRAGMA application_id = 77; PRAGMA user_version = 3")


@pytest.mark.parametrize(
    "make",
    [
        foreign_database,
        foreign_database_with_a_version,
        foreign_database_with_a_wal,
        empty_database_of_another,
        newer_store,
        newer_store_with_a_wal,
        older_store,
    ],
)
async def test_a_file_that_is_not_ours_to_change_is_refused_and_left_as_it_is(volume: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(volume)
    before = files_of(volume)
    with pytest.raises(UnknownSchema, match=r"store\.db"):
        await Store.open(volume)
    assert files_of(volume) == before


async def test_the_refusal_of_a_newer_schema_says_what_to_do(volume: Path) -> None:
    newer_store(volume)
    with pytest.raises(UnknownSchema, match=r"has schema 2, this mehdb \(.*\) knows 1: run "):
        await Store.open(volume)


@pytest.mark.parametrize("size", [2, 100, 512, 100_000])
async def test_a_random_file_is_refused_and_left_as_it_is(volume: Path, size: int) -> None:
    (volume / DATABASE).write_bytes(os.urandom(size))
    before = files_of(volume)
    with pytest.raises(Damaged, match="cannot be trusted"):
        await Store.open(volume)
    assert files_of(volume) == before


async def test_a_store_without_its_meta_row_is_refused(directory: Path) -> None:
    async with leading(directory) as store:
        await put(store, b"a", b"1")
    sql(directory, "DELETE FROM meta")
    before = files_of(directory)
    with pytest.raises(Damaged, match="`meta` has not one row"):
        await Store.open(directory)
    assert files_of(directory) == before
