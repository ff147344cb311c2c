"""Compaction: the log forgets what is superseded behind its window, in small steps, and says so to who asks for it."""

import random
import threading
from pathlib import Path

import pytest

from disk import DATABASE, HOLD_S, WAL, Disk
from mehdb.errors import Compacted, Diverged
from mehdb.model import GENESIS, ORIGIN, PAGE_BYTES, Chain, Epoch, Position, Revision
from mehdb.store import Store, Write
from mehdb.store.log import COMPACT_STEP
from mehdb.store.reader import Reader
from mehdb.store.schema import PAGE_SIZE
from mehdb.store.writer import CHECKPOINT_PAGES
from stores import (
    catch_up,
    changes_of,
    enqueue,
    held,
    keys_of,
    leading,
    opened,
    outcomes,
    problems_of,
    put,
    rewrite,
    sql,
    until,
)

KEYS = 1000
AT_ONCE = 2000  # writes that wait together


async def overwrite(store: Store, count: int, first: int = 0, keys: int = KEYS) -> int:
    """Write *count* values, numbered from *first*, over and over the same *keys*. Return the most bytes it took."""
    peak_bytes = 0
    for start in range(first, first + count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, first + count))
        await outcomes(await enqueue(store, [Write(b"key-%d" % (n % keys), b"value %d" % n) for n in numbers]))
        # No more was between: neither file shrinks while it is open.
        peak_bytes = max(peak_bytes, sum((store.directory / name).stat().st_size for name in (DATABASE, WAL)))
    return peak_bytes


def bound(store: Store, window: int) -> int:
    """Return how many changes a store may hold: what is live, the window, and half of the larger before a sweep."""
    return store.meta.keys + window + max(window, store.meta.keys) // 2


async def compacted(store: Store, window: int) -> None:
    """Wait until no sweep is due."""
    await until(lambda: store.meta.changes <= bound(store, window))


@pytest.mark.parametrize(
    ("writes", "window"),
    [
        pytest.param(200_000, 10_000, id="short"),
        pytest.param(1_000_000, 100_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)], id="soak"),
    ],
)
async def test_a_store_is_as_large_as_its_window_however_much_is_written(
    directory: Path, writes: int, window: int
) -> None:
    async with leading(directory, retain_changes=window) as store:
        await overwrite(store, 2 * window)
        await compacted(store, window)
    size_bytes = (directory / DATABASE).stat().st_size
    async with opened(directory, retain_changes=window) as store:
        peak_bytes = await overwrite(store, writes - 2 * window, first=2 * window)
        await compacted(store, window)
        report = await store.check()
        assert report.problems == ()
        assert window <= report.changes <= bound(store, window)
        assert (report.keys, store.head) == (KEYS, writes)
        for n in random.Random(1).sample(range(writes - KEYS, writes), 50):
            change = await store.get(b"key-%d" % (n % KEYS))
            assert change is not None
            assert change.value == b"value %d" % n
    final_bytes = (directory / DATABASE).stat().st_size
    print(
        f"compaction: {writes} overwrites of {KEYS} keys, window {window}: {final_bytes / 2**20:.1f} MiB, after "
        f"{2 * window}: {size_bytes / 2**20:.1f} MiB; with the WAL at most {peak_bytes / 2**20:.1f} MiB"
    )
    assert final_bytes < 1.25 * size_bytes
    assert peak_bytes < 1.25 * (size_bytes + CHECKPOINT_PAGES * PAGE_SIZE)


async def test_the_floor_moves_while_writes_go_on(directory: Path) -> None:
    async with leading(directory, retain_changes=500) as store:
        floors = []
        for n in range(10):
            await overwrite(store, 1000, first=1000 * n, keys=10)
            floors.append(store.meta.floor)
        assert floors == sorted(floors)
        assert floors[-1] >= 10_000 - 3 * 500  # though there was no pause
        await compacted(store, 500)
        revisions = [change.revision for change in changes_of(directory)]
        assert revisions == list(range(10_001 - len(revisions), 10_001))
        assert len(revisions) >= 500


async def test_what_is_live_is_kept_however_old(directory: Path) -> None:
    async with leading(directory, retain_changes=10) as store:
        await put(store, b"old", b"1", "text/plain")
        await put(store, b"gone", b"2")
        await put(store, b"gone", None)
        await overwrite(store, 100, keys=1)
        await compacted(store, 10)
        change = await store.get(b"old")
        assert change is not None
        assert (change.value, change.content_type, change.revision) == (b"1", "text/plain", 1)
        assert await store.get(b"gone") is None
        assert await keys_of(store) == [b"key-0", b"old"]
        first, *others = [change.revision for change in changes_of(directory)]
        assert (first, others) == (1, list(range(104 - len(others), 104)))
        assert (await store.check()).problems == ()


async def test_what_the_window_passed_while_it_was_live_goes_when_it_is_superseded(directory: Path) -> None:
    """With more keys than the window is long, that is each one. No deletion may go before what it deletes."""
    async with leading(directory, retain_changes=50) as store:
        for first in range(0, 3000, 500):
            await overwrite(store, 500, first=first, keys=500)
            assert (await store.check()).problems == ()
        await compacted(store, 50)
        assert (await store.check()).changes <= bound(store, 50)
        await outcomes(await enqueue(store, [Write(b"key-%d" % n, None) for n in range(0, 500, 2)]))
        await overwrite(store, 100, keys=1)
        await compacted(store, 50)
        report = await store.check()
        assert (report.problems, report.keys) == ((), 251)
        assert report.changes <= bound(store, 50)


async def test_the_head_is_never_compacted_away(directory: Path) -> None:
    async with leading(directory, retain_changes=1) as store:
        await put(store, b"k", b"v")
        await put(store, b"k", None)
        await compacted(store, 1)
        assert store.meta.floor == 1
    async with opened(directory, retain_changes=1) as store:
        assert (store.head, store.meta.keys) == (2, 0)
        assert await put(store, b"k", b"w") == 3
        assert (await store.check()).problems == ()


async def test_a_follower_compacts_its_own_log(leader: Store, tmp_path: Path) -> None:
    await overwrite(leader, 3000, keys=10)
    async with opened(tmp_path / "small", retain_changes=100) as follower:
        await catch_up(follower, leader)
        await compacted(follower, 100)
        assert follower.position == leader.position
        assert (await follower.check()).problems == ()
        await overwrite(leader, 3000, first=3000, keys=10)
        await catch_up(follower, leader)
        await compacted(follower, 100)
        assert follower.position == leader.position
        report = await follower.check()
        assert report.problems == ()
        assert 100 <= report.changes <= bound(follower, 100)
    assert leader.meta.floor == ORIGIN


async def test_a_store_with_a_smaller_window_shrinks_its_log_while_nobody_writes(directory: Path) -> None:
    async with leading(directory) as store:
        await overwrite(store, 5 * COMPACT_STEP, keys=10)
        assert store.meta.floor == ORIGIN
        epoch, position = store.meta.epoch, store.position
    async with opened(directory, retain_changes=100) as store:
        await until(lambda: store.meta.changes == 100)
        assert (store.position, store.meta.epoch) == (position, epoch)
        assert (await store.check()).problems == ()
        assert (await store.check()).changes == 100
    async with opened(directory) as store:  # a larger one brings nothing back
        assert store.meta.floor == 5 * COMPACT_STEP - 100


class SteppedDisk(Disk):
    """A disk that syncs the WAL only as often as it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self._allowed = threading.Semaphore(0)

    def allow(self, syncs: int) -> None:
        """Let as many syncs happen."""
        self.waiting.clear()
        self._allowed.release(syncs)

    def before_sync(self, file: str) -> None:
        """Wait until it is allowed."""
        if file == WAL:
            self.waiting.set()
            self._allowed.acquire(timeout=HOLD_S)


async def test_writes_come_before_compaction(directory: Path) -> None:
    """It gives way after each step: as long as one is held at its sync, no other can have been before the write."""
    async with leading(directory) as store:
        await overwrite(store, 40 * COMPACT_STEP, keys=10)
    with SteppedDisk() as disk:
        async with opened(directory, retain_changes=100) as store:
            disk.allow(1)  # the WAL's header
            left = [store.meta.changes]
            try:
                for n in range(5):
                    await held(disk)
                    [write] = await enqueue(store, [Write(b"key", b"%d" % n)])
                    disk.allow(2)  # the step that is under way, and the write
                    assert await outcomes([write], timeout_s=10) == [40 * COMPACT_STEP + 1 + n]
                    left.append(store.meta.changes)
            finally:
                disk.allow(1000)
            assert left[-1] > COMPACT_STEP
            assert left == sorted(left, reverse=True)
            await compacted(store, 100)


async def test_damage_in_the_way_stops_compaction_and_no_write(directory: Path) -> None:
    async with leading(directory) as store:
        await overwrite(store, 5000, keys=10)
    pages = sql(directory, "SELECT pageno FROM dbstat WHERE name = 'change' AND pagetype = 'leaf' ORDER BY path")
    [(number,)] = pages[10:11]
    rewrite(directory, 4096 * number - 1000, b"\xa5", right_checksum=False)
    async with opened(directory, retain_changes=100) as store:
        for n in range(20):
            assert await put(store, b"new-%d" % n, b"value") == 5001 + n
        assert await keys_of(store, b"new-", limit=100) == sorted(b"new-%d" % n for n in range(20))
        assert store.meta.changes > 1000
        assert not store.failure.done()
        assert (await store.check()).problems
        await store.lead(Epoch(9))
    async with opened(directory, retain_changes=100) as store:
        assert (store.head, store.meta.epoch) == (5020, 9)


# Who asks for what has gone.


@pytest.fixture
async def with_a_floor(directory: Path) -> Path:
    """A closed store of ten changes to two keys, from which those superseded below revision 6 are gone."""
    async with leading(directory) as store:
        for n in range(10):
            await put(store, b"key-%d" % (n % 2), b"%d" % n)
    sql(directory, "DELETE FROM change WHERE revision < 6; UPDATE meta SET floor = 6, changes = 5")
    assert problems_of(directory) == ()
    return directory


@pytest.mark.parametrize("revision", [0, 1, 5])
async def test_a_position_behind_the_floor_is_compacted(with_a_floor: Path, revision: int) -> None:
    async with opened(with_a_floor) as store:
        with pytest.raises(Compacted, match=f"revision {revision} is behind the floor 6"):
            await store.page_after(Position(store.meta.history, Revision(revision), GENESIS))


async def test_pages_go_on_from_the_floor(with_a_floor: Path) -> None:
    [(chain,)] = sql(with_a_floor, "SELECT chain FROM change WHERE revision = 6")
    async with opened(with_a_floor) as store:
        page = await store.page_after(Position(store.meta.history, Revision(6), Chain(chain)))
        assert page is not None
        assert [change.revision for change in page.changes] == [7, 8, 9, 10]
        assert page.end == store.position
        with pytest.raises(Diverged):
            await store.page_after(Position(store.meta.history, Revision(6), GENESIS))


async def test_a_page_never_has_a_hole(with_a_floor: Path) -> None:
    """Compaction may come between the look at the floor and the reading of the rows."""
    async with opened(with_a_floor) as store:
        reader = Reader(with_a_floor)
        for after in (0, 4):
            with pytest.raises(Compacted):
                reader.page(Revision(after), store.meta, PAGE_BYTES)
        with pytest.raises(Compacted):
            reader.chain(Revision(3))
        reader.close()
