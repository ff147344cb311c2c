"""What happens when the disk does not do as it is told: full, failing, or unable to hold a log at all."""

import asyncio
from pathlib import Path
from typing import Final

import apsw
import pytest

from disk import DATABASE, WAL, Disk
from mehdb.errors import Damaged, DiskFull, ReadOnly, StoreFailed
from mehdb.model import Epoch, History, Position
from mehdb.store import Store, Write
from mehdb.store.log import Log
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.room import Room
from mehdb.store.schema import open_writer
from mehdb.store.writer import CHECKPOINT_PAGES, Writer
from stores import child, enqueue, leading, next_page, one_in_flight, opened, outcomes, put, sets, sql, until

HISTORY: Final = History("0123456789abcdef" * 2)


@pytest.mark.parametrize(("operation", "file"), [("sync", WAL), ("write", WAL)])
async def test_a_failed_write_or_sync_is_final(disk: Disk, directory: Path, operation: str, file: str) -> None:
    """Even though the very next sync would succeed: it proves nothing about what the failed one lost."""
    async with leading(directory) as store:
        await outcomes(await enqueue(store, sets(3)))
        before = store.meta
        assert not store.failure.done()
        disk.fail_next(operation, file, apsw.IOError("injected"))
        with pytest.raises(StoreFailed, match="restart the node: IOError"):
            await put(store, b"lost", b"?")
        assert isinstance(await asyncio.wait_for(store.failure, 10), StoreFailed)
        assert await outcomes(await enqueue(store, [*sets(2), Write(b"key-0", None)])) == [StoreFailed] * 3
        with pytest.raises(StoreFailed):
            await store.lead(Epoch(2))
        assert (store.meta, store.queue_bytes, await store.get(b"lost")) == (before, 0, None)
        change = await store.get(b"key-0")  # reads go on
        assert change is not None
        assert change.value == b"value"
    async with opened(directory) as store:
        assert store.head in (3, 4)  # the lost one was not acknowledged: it may be there or not
        assert (await store.check()).problems == ()


async def test_after_a_failed_sync_the_wal_is_left_to_the_restart(disk: Disk, directory: Path) -> None:
    """To close with a checkpoint would pass frames on that may never have reached the disk, and delete them."""
    async with leading(directory) as store:
        await outcomes(await enqueue(store, sets(3)))
        disk.fail_next("sync", WAL, apsw.IOError("injected"))
        with pytest.raises(StoreFailed):
            await put(store, b"lost", b"?")
        before, syncs = (directory / DATABASE).read_bytes(), disk.syncs.total()
    assert (directory / DATABASE).read_bytes() == before
    assert disk.syncs.total() == syncs
    assert (directory / WAL).stat().st_size > 0


async def test_a_failure_reaches_all_who_wait(disk: Disk, leader: Store) -> None:
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(leader, sets(5))
        disk.fail_next("sync", WAL, apsw.IOError("injected"))
    assert await outcomes([first, *rest]) == [StoreFailed] * 6
    assert (leader.head, leader.queue_bytes) == (0, 0)
    assert leader.failure.done()


async def test_a_failed_checkpoint_is_a_failure_though_nobody_writes(disk: Disk, leader: Store) -> None:
    disk.fail_next("sync", DATABASE, apsw.IOError("injected"))
    pages = 0
    while pages < CHECKPOINT_PAGES:
        await put(leader, b"large", bytes(8 << 20))
        pages += (8 << 20) // 4096
    assert not leader.failure.done()
    await put(leader, b"small", b"")  # the commit that checkpoints: acknowledged before, and nobody writes after it
    assert isinstance(await asyncio.wait_for(leader.failure, 10), StoreFailed)


@pytest.mark.parametrize("error", [apsw.FullError("injected"), apsw.ReadOnlyError("injected")])
async def test_that_the_volume_refuses_writes_is_told_once_and_not_for_each(
    disk: Disk, leader: Store, caplog: pytest.LogCaptureFixture, error: apsw.Error
) -> None:
    for _ in range(3):
        disk.fail_next("write", WAL, error)
        with pytest.raises((DiskFull, ReadOnly)):
            await put(leader, b"k", b"v")
        await put(leader, b"other", b"v")  # as small as it is, it may fit
    [told] = caplog.messages
    assert told.startswith("volume refuses writes code=")


async def test_the_wal_is_checkpointed_before_it_grows_long(leader: Store, directory: Path) -> None:
    for n in range(20):
        await put(leader, b"large", bytes([n]) * (4 << 20))
    assert (directory / WAL).stat().st_size < CHECKPOINT_PAGES * 4096 * 2


async def test_a_full_disk_fails_the_batch_and_the_store_lives_on(disk: Disk, leader: Store) -> None:
    await put(leader, b"key-0", b"old")
    before, commits = leader.meta, leader.commits
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(leader, sets(3))
        disk.fail_next("write", WAL, apsw.FullError("injected"))
    assert await first == 2
    assert await outcomes(rest) == [DiskFull] * 3
    assert (leader.head, leader.meta.keys, leader.commits) == (2, before.keys + 1, commits + 1)
    assert not leader.failure.done()
    change = await leader.get(b"key-0")
    assert change is not None
    assert change.value == b"old"
    assert await outcomes(await enqueue(leader, sets(3))) == [3, 4, 5]
    assert (await leader.check()).problems == ()


async def test_a_page_that_found_no_room_can_be_applied_again(disk: Disk, leader: Store, follower: Store) -> None:
    await outcomes(await enqueue(leader, sets(10)))
    page = await next_page(leader, follower)
    await until(lambda: leader.queue_bytes == 0)
    disk.fail_next("write", WAL, apsw.FullError("injected"), times=2)  # the second with the ballast given up
    with pytest.raises(DiskFull):
        await follower.apply(page)
    assert follower.position == Position()
    await follower.apply(page)
    assert follower.position == leader.position


async def test_sqlite_that_may_not_grow_its_file_reports_a_full_disk(volume: Path) -> None:
    """SQLite's own limit on the pages of a file, which it answers like a volume without room."""
    connection = open_writer(volume)
    failure: asyncio.Future[StoreFailed] = asyncio.get_running_loop().create_future()
    writer = Writer(
        connection, Log(connection, 1000), AcknowledgedMark.open(volume), Room(volume, 0), lambda: False,
        queue_bytes_max=64 << 20, on_commit=lambda: None, on_damage=pytest.fail, failure=failure,
    )  # fmt: skip

    async def allow(pages: int) -> None:
        await writer.run(lambda _: connection.pragma("max_page_count", pages))

    await writer.run(lambda log: log.adopt(HISTORY, Epoch(1)))
    assert await writer.write(Write(b"small", b"1")) == 1
    await allow(connection.pragma("page_count") + 10)
    for _ in range(3):
        with pytest.raises(DiskFull, match="make room"):
            await writer.write(Write(b"large", bytes(1 << 20)))
    assert await writer.write(Write(b"small", b"2")) == 2
    assert not failure.done()
    await allow(1 << 30)
    assert await writer.write(Write(b"large", bytes(1 << 20))) == 3
    await writer.close()
    assert sql(volume, "SELECT key, revision FROM entry ORDER BY key") == [(b"large", 3), (b"small", 2)]


FILE_TOO_LARGE = """
import asyncio, resource, signal, sys
from pathlib import Path
from mehdb.errors import MehdbError
from mehdb.store import Store, Write

def limit(size_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = await Store.open(Path(sys.argv[1]))
    await store.lead(1)
    limit(300_000)
    for n in range(100):
        if n == 50:
            limit(resource.RLIM_INFINITY)
        try:
            print(await store.write(Write(b"key-%d" % n, bytes(10_000))))
        except MehdbError as error:
            print(error.code)
    print("failed" if store.failure.done() else "well")
    await store.close()

asyncio.run(main())
"""


async def test_the_kernels_refusal_of_a_write_is_final(directory: Path) -> None:
    """A real error of the kernel: the WAL may grow no further (EFBIG), and later it may again."""
    with child(FILE_TOO_LARGE, directory) as writer:
        output, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    *lines, state = output.split()
    acknowledged = [int(line) for line in lines if line.isdigit()]
    assert 5 < len(acknowledged) < 50
    assert lines == [*map(str, range(1, len(acknowledged) + 1)), *["store_failed"] * (100 - len(acknowledged))]
    assert state == "failed"
    async with opened(directory) as store:
        assert store.head >= len(acknowledged)
        assert (await store.check()).problems == ()
        assert await put(store, b"again", b"1") == store.head


def test_a_log_that_cannot_be_read_is_no_writer(tmp_path: Path) -> None:
    open_writer(tmp_path).close()
    sql(tmp_path, "DELETE FROM meta")
    with pytest.raises(Damaged, match="`meta` has not one row"):
        open_writer(tmp_path)
