"""Group commit, acknowledgements and the bounded queue."""

import asyncio
from pathlib import Path
from typing import Final

import pytest

from disk import WAL, Disk
from mehdb.errors import Diverged, KeyNotFound, QueueFull, Stopping
from mehdb.model import Epoch, History
from mehdb.store import Store, Write
from mehdb.store.decision import OVERHEAD_BYTES
from mehdb.store.writer import BATCH_BYTES_MAX, BATCH_WRITES_MAX
from stores import (
    enqueue,
    held,
    keys_of,
    leading,
    next_page,
    one_in_flight,
    opened,
    outcomes,
    put,
    sets,
    tables_of,
    until,
)

HISTORY: Final = History("0123456789abcdef" * 2)


# Acknowledging.


async def test_a_write_is_neither_acknowledged_nor_shown_before_its_sync(
    disk: Disk, leader: Store, directory: Path
) -> None:
    await put(leader, b"key", b"old")
    before, tables, syncs = leader.position, tables_of(directory), disk.syncs[WAL]
    with disk.holding():
        [task] = await enqueue(leader, [Write(b"key", b"new")])
        await held(disk)
        assert not task.done()
        change = await leader.get(b"key")
        assert change is not None
        assert (change.value, leader.position, tables_of(directory)) == (b"old", before, tables)
        assert await leader.page_after(before) is None
        assert not await leader.wait_beyond(before.revision, 0)
        assert disk.syncs[WAL] == syncs
    assert await task == 2
    assert disk.syncs[WAL] == syncs + 1
    change = await leader.get(b"key")
    assert change is not None
    assert (change.value, change.revision, leader.head) == (b"new", 2, 2)


async def test_every_acknowledged_write_survives_a_power_loss(disk: Disk, directory: Path, tmp_path: Path) -> None:
    images = []
    async with leading(directory) as store:
        for n in range(12):
            results = await outcomes(await enqueue(store, sets(3, b"%d" % n, first=n)))
            assert results == [3 * n + 1, 3 * n + 2, 3 * n + 3]
            images.append((store.meta, disk.after_power_loss(tmp_path / f"image-{n}")))
            if n == 5:
                await store.close()
                store = await Store.open(directory)
    for meta, image in images:
        async with opened(image) as survivor:
            assert survivor.meta == meta
            assert (await survivor.check()).problems == ()


async def test_an_applied_page_survives_a_power_loss(leader: Store, disk: Disk, tmp_path: Path) -> None:
    await outcomes(await enqueue(leader, sets(10)))
    async with opened(tmp_path / "follower") as follower:
        await follower.apply(await next_page(leader, follower))
        image = disk.after_power_loss(tmp_path / "image")
    async with opened(image) as survivor:
        assert survivor.position == leader.position


async def test_an_epoch_survives_a_power_loss(disk: Disk, leader: Store, tmp_path: Path) -> None:
    await leader.lead(Epoch(5))
    async with opened(disk.after_power_loss(tmp_path / "image")) as survivor:
        assert survivor.meta == leader.meta
        assert survivor.meta.epoch == 5


# Group commit.


async def test_writes_that_wait_together_are_committed_together(disk: Disk, leader: Store) -> None:
    commits, syncs = leader.commits, disk.syncs[WAL]
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(leader, sets(500))
    assert await outcomes([first, *rest]) == list(range(1, 502))
    assert leader.commits == commits + 2
    assert disk.syncs[WAL] == syncs + 2
    assert (leader.head, leader.meta.keys, leader.queue_bytes) == (501, 501, 0)


async def test_outcomes_within_a_batch_are_decided_in_order(disk: Disk, leader: Store) -> None:
    commits = leader.commits
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(
            leader,
            [
                Write(b"k", b"1"),
                Write(b"k", None),
                Write(b"k", None),
                Write(b"first", None),
                Write(b"k", b"2"),
                Write(b"absent", None),
                Write(b"k", b"3"),
            ],
        )
    assert await outcomes([first, *rest]) == [1, 2, 3, KeyNotFound, 4, 5, KeyNotFound, 6]
    assert leader.commits == commits + 2
    assert (await leader.get(b"first"), leader.meta.keys, leader.head) == (None, 1, 6)
    change = await leader.get(b"k")
    assert change is not None
    assert (change.value, change.revision) == (b"3", 6)


async def test_a_batch_is_bounded_in_writes(disk: Disk, leader: Store) -> None:
    commits = leader.commits
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(leader, sets(2 * BATCH_WRITES_MAX + 1))
    assert await outcomes([first, *rest]) == list(range(1, 2 * BATCH_WRITES_MAX + 3))
    assert leader.commits == commits + 4


async def test_a_batch_is_bounded_in_bytes(disk: Disk, leader: Store) -> None:
    commits = leader.commits
    with disk.holding():
        first = await one_in_flight(leader, disk)
        rest = await enqueue(leader, sets(5, bytes(BATCH_BYTES_MAX // 2)))
    assert await outcomes([first, *rest]) == [1, 2, 3, 4, 5, 6]
    assert leader.commits == commits + 4


async def test_many_writers_need_far_fewer_commits_than_writes(leader: Store) -> None:
    commits = leader.commits

    async def client(name: int) -> None:
        for n in range(10):
            await put(leader, b"%d-%d" % (name, n), b"value")

    await asyncio.gather(*[client(name) for name in range(64)])
    assert leader.head == 640
    assert leader.commits - commits <= 640 / 8


async def test_what_failed_is_not_counted_as_a_commit(leader: Store) -> None:
    await put(leader, b"k", b"v")
    commits = leader.commits
    with pytest.raises(Diverged):
        await leader.adopt(HISTORY, leader.meta.epoch)
    await leader.adopt(leader.meta.history or HISTORY, leader.meta.epoch)  # says nothing new
    assert leader.commits == commits


# The queue.


async def test_a_full_queue_refuses_and_recovers(disk: Disk, directory: Path) -> None:
    size_bytes = len(b"key-0") + 1000 + OVERHEAD_BYTES
    first_bytes = len(b"first") + len(b"in flight") + OVERHEAD_BYTES
    async with leading(directory, queue_bytes_max=first_bytes + 3 * size_bytes) as store:
        with disk.holding():
            first = await one_in_flight(store, disk)
            taken = await enqueue(store, sets(3, bytes(1000)))
            assert store.queue_bytes == first_bytes + 3 * size_bytes
            refused = await enqueue(store, [*sets(2, bytes(1000), first=3), Write(b"k", b""), Write(b"first", None)])
            assert await outcomes(refused) == [QueueFull] * 4
            assert store.queue_bytes == first_bytes + 3 * size_bytes
        assert await outcomes([first, *taken]) == [1, 2, 3, 4]
        assert store.queue_bytes == 0
        assert await outcomes(await enqueue(store, sets(3, bytes(1000), first=10))) == [5, 6, 7]
        assert await keys_of(store) == [b"first", b"key-0", b"key-1", b"key-10", b"key-11", b"key-12", b"key-2"]


async def test_a_full_queue_says_when_to_come_back(disk: Disk, directory: Path) -> None:
    async with leading(directory, queue_bytes_max=1) as store:
        with disk.holding():
            first = await one_in_flight(store, disk)
            with pytest.raises(QueueFull, match="bytes wait to be written, nothing of this was") as caught:
                await put(store, b"k", b"v")
        assert caught.value.retry_after_s
        assert await first == 1


async def test_an_empty_queue_takes_a_value_that_is_larger_than_itself(directory: Path) -> None:
    async with leading(directory, queue_bytes_max=1000) as store:
        assert await put(store, b"large", bytes(5000)) == 1
        assert await put(store, b"larger", bytes(50_000)) == 2


async def test_a_cancelled_writer_still_commits(disk: Disk, leader: Store) -> None:
    """Its client has gone, its write has not, and its bytes go out of the queue like any other's."""
    with disk.holding():
        first = await one_in_flight(leader, disk)
        tasks = await enqueue(leader, sets(3))
        tasks[1].cancel()
        first.cancel()
        await until(lambda: first.done() and tasks[1].done())
        assert leader.queue_bytes > 0
    assert await outcomes([first, *tasks]) == [asyncio.CancelledError, 2, asyncio.CancelledError, 4]
    assert leader.queue_bytes == 0
    assert leader.head == 4
    assert await keys_of(leader) == [b"first", b"key-0", b"key-1", b"key-2"]


async def test_a_page_waits_for_the_writes_before_it_and_goes_before_those_after_it(disk: Disk, leader: Store) -> None:
    with disk.holding():
        first = await one_in_flight(leader, disk)
        before = await enqueue(leader, sets(3))
        epoch = asyncio.create_task(leader.adopt(leader.meta.history or HISTORY, Epoch(7)))
        await asyncio.sleep(0)
        wrong = asyncio.create_task(leader.adopt(HISTORY, Epoch(7)))
        await asyncio.sleep(0)
        after = await enqueue(leader, sets(3))
        commits = leader.commits
    assert await outcomes([first, *before, *after]) == [1, 2, 3, 4, 5, 6, 7]
    await epoch
    with pytest.raises(Diverged):
        await wrong
    assert leader.meta.epoch == 7
    assert leader.commits == commits + 4  # the first, those before, the epoch, those after, and not the wrong one


# Closing.


async def test_a_close_finishes_what_is_queued(disk: Disk, directory: Path) -> None:
    store = await Store.open(directory)
    await store.lead(Epoch(1))
    with disk.holding():
        first = await one_in_flight(store, disk)
        rest = await enqueue(store, sets(50))
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
    await closing
    assert await outcomes([first, *rest]) == list(range(1, 52))
    async with opened(directory) as store:
        assert (store.head, store.meta.keys) == (51, 51)


async def test_a_write_after_the_close_is_refused(directory: Path) -> None:
    store = await Store.open(directory)
    await store.lead(Epoch(1))
    await store.close()
    async with asyncio.timeout(10):
        with pytest.raises(Stopping):
            await put(store, b"k", b"v")
        with pytest.raises(Stopping):
            await store.lead(Epoch(2))


async def test_a_close_leaves_everything_in_one_file(directory: Path) -> None:
    async with leading(directory) as store:
        await outcomes(await enqueue(store, sets(50)))
    assert not (directory / WAL).exists() or (directory / WAL).stat().st_size == 0
    (directory / WAL).unlink(missing_ok=True)
    async with opened(directory) as store:
        assert store.head == 50
