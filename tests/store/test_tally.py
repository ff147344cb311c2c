"""What a store counts of its own work is what it did, however often its files are closed and opened."""

import asyncio
from pathlib import Path

from mehdb.model import Revision
from mehdb.store import OUTGOING, Batch, Store, Write
from mehdb.store.schema import FILE_NAME, WAL_NAME
from stores import leading, put, until


async def test_each_batch_is_timed_and_its_changes_counted(leader: Store) -> None:
    await put(leader, b"a", b"1")
    await leader.write_batch(Batch(tuple(Write(b"k/%d" % number, b"v") for number in range(30))))
    found = leader.figures()
    assert (found.commit_changes.count, found.commit_changes.total) == (2, 31)
    assert found.commit_seconds.count == 2
    assert found.sync_seconds.count == leader.commits == 3  # the epoch's as well
    assert 0 < found.sync_seconds.total < found.commit_seconds.total + found.sync_seconds.total


async def test_writes_that_share_a_commit_are_one_batch(leader: Store) -> None:
    await asyncio.gather(*(put(leader, b"%d" % number, b"v") for number in range(200)))
    found = leader.figures()
    assert found.commit_changes.total == 200
    assert found.commit_changes.count == leader.commits - 1 < 200


async def test_what_changes_nothing_is_no_batch(leader: Store) -> None:
    before = leader.figures()
    await leader.queue_worked_off()
    await leader.adopt(leader.meta.history, leader.meta.epoch)  # type: ignore[arg-type]  it has a history
    assert leader.figures() == before


async def test_a_followers_pages_are_batches(leader: Store, follower: Store) -> None:
    for number in range(5):
        await put(leader, b"%d" % number, b"v")
    page = await leader.page_after(follower.position)
    assert page is not None
    await follower.apply(page)
    assert (follower.figures().commit_changes.count, follower.figures().commit_changes.total) == (1, 5)


async def test_compaction_tells_what_is_left_to_do_and_what_it_has_done(directory: Path) -> None:
    async with leading(directory, retain_changes=10) as store:
        for number in range(14):
            await put(store, b"k", b"%d" % number)
        assert store.figures().compaction_backlog_changes == 3  # of 14 changes 10 are retained, and one is live
        assert store.figures().compacted_changes == 0
        for number in range(30):
            await put(store, b"k", b"%d" % number)
        await until(lambda: store.figures().compacted_changes > 0)
        await until(lambda: store.figures().compaction_backlog_changes <= 5)
        assert store.figures().compacted_changes == store.head - store.meta.changes


async def test_the_sizes_are_those_of_the_files(leader: Store, directory: Path) -> None:
    await put(leader, b"k", bytes(100_000))
    found = leader.figures()
    assert found.store_size_bytes == (directory / FILE_NAME).stat().st_size
    assert found.wal_size_bytes == (directory / WAL_NAME).stat().st_size > 100_000
    assert found.volume_size_bytes >= leader.free_bytes() > 0


async def test_figures_outlive_the_files(leader: Store) -> None:
    await put(leader, b"k", b"1")
    before = leader.figures()
    async with leader.suspended():
        away = leader.figures()
        assert (away.commit_changes, away.sync_seconds) == (before.commit_changes, before.sync_seconds)
    await put(leader, b"k", b"2")
    assert leader.figures().commit_changes.total == 2
    assert leader.figures().sync_seconds.count == leader.commits


async def test_a_snapshot_that_takes_the_stores_place_is_counted(leader: Store, follower: Store) -> None:
    await put(leader, b"k", b"1")
    snapshot = await leader.snapshot()
    snapshot.path.rename(follower.incoming)
    assert follower.figures().taken.completed == 0
    await follower.replace(follower.incoming, snapshot.meta, None)
    assert follower.figures().taken.completed == 1
    assert snapshot.path.name == OUTGOING


async def test_when_a_revision_came_is_known(leader: Store) -> None:
    assert leader.came_at_s(Revision(1)) is None
    before_s = asyncio.get_running_loop().time()
    revision = await put(leader, b"k", b"1")
    came_at_s = leader.came_at_s(revision)
    assert came_at_s is not None
    assert before_s <= came_at_s <= asyncio.get_running_loop().time()
    await put(leader, b"k", b"2")
    assert leader.came_at_s(revision) == came_at_s
