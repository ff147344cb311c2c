"""A disk that fails at any one of the things asked of it: nothing is acknowledged that is not there later.

These are SQLite's writes, syncs, truncations and deletions, on every file that it has: the database, as it is made and
later, the WAL and the journals. What is there later is asked twice: of what the store left when it was closed, and of
what would have been left had the power gone instead. A follower acknowledges a page when it has applied it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import apsw
import pytest

from disk import DATABASE, WAL, Disk, Lie
from mehdb.errors import DiskFull, MehdbError, StoreFailed
from mehdb.model import ORIGIN, Change, Epoch
from mehdb.store import Store, Write
from mehdb.store.decision import decide
from stores import enqueue, leading, opened, pages_of, put, tables_of

BATCHES: Final = 5  # or pages
WRITES: Final = 5  # in each
TRIES: Final = 2  # of a page
ONCE, FOR_GOOD = 1, 1 << 30
OPTIONS: Final = {"retain_changes": 8, "disk_reserve_bytes": 0}


class FailingDisk(Disk):
    """A disk that counts what is asked of it, and fails from one operation on: for a while, or for good."""

    def __init__(self, first: int = 0, count: int = 0, error: Callable[[], Exception] = Lie) -> None:
        super().__init__()
        self.asked: Counter[tuple[str, str]] = Counter()  # by operation and file
        self._failing = range(first, first + count)
        self._error = error

    def before_write(self, file: str) -> None:
        """Count a write."""
        self._count("write", file)

    def before_sync(self, file: str) -> None:
        """Count a sync."""
        self._count("sync", file)

    def before_truncate(self, file: str) -> None:
        """Count a truncation."""
        self._count("truncate", file)

    def before_delete(self, file: str) -> None:
        """Count a deletion."""
        self._count("delete", file)

    def _count(self, operation: str, file: str) -> None:
        self.asked[operation, file] += 1
        if self.asked.total() in self._failing:
            # A WAL that cannot be deleted stays: SQLite passes over that error, apsw would raise it.
            raise Lie if (operation, file) == ("delete", WAL) else self._error()


def batches() -> list[list[Write]]:
    """Return what is written: the same keys over and over."""
    return [
        [Write(b"key-%d" % (n % 4), b"%d of %d " % (n, batch) * 300) for n in range(WRITES)] for batch in range(BATCHES)
    ]


@dataclass
class Told:
    """What those who wrote were told: a leader's clients, or a leader by its follower."""

    acknowledged: dict[bytes, Change] = field(default_factory=dict)  # the last one of each key
    refused: list[MehdbError] = field(default_factory=list)

    async def live(self, role: str, directory: Path, disk: Disk, lost_power: Path) -> None:
        """Open the store, write, have *lost_power* hold what the power would leave now, and close the store."""
        try:
            async with opened(directory, **OPTIONS) as store:
                await (self.lead(store) if role == "leader" else self.follow(store))
                disk.after_power_loss(lost_power)
                assert (await store.get(b"absent")) is None  # reads go on, whatever the writes do
        except MehdbError as error:
            self.refused.append(error)

    async def lead(self, store: Store) -> None:
        """Write in batches."""
        await store.lead(Epoch(store.meta.epoch + 1))
        for writes in batches():
            for write, task in zip(writes, await enqueue(store, writes), strict=True):
                try:
                    self._acknowledge(Change(await task, write.key, write.value))
                except MehdbError as error:
                    self.refused.append(error)

    async def follow(self, store: Store) -> None:
        """Apply pages, up to one that is refused again and again."""
        _, changes = decide([write for batch in batches() for write in batch], {}, ORIGIN)
        for page in pages_of(changes, WRITES):
            for _ in range(TRIES):
                try:
                    await store.apply(page)
                except MehdbError as error:
                    self.refused.append(error)
                else:
                    for change in page.changes:
                        self._acknowledge(change)
                    break
            else:
                return

    def _acknowledge(self, change: Change) -> None:
        assert not any(isinstance(error, StoreFailed) for error in self.refused), "a failure is final"
        self.acknowledged[change.key] = change

    async def compare(self, directory: Path) -> None:
        """Hold what was told against the store, on a disk that is well again."""
        if not (directory / DATABASE).exists():
            assert not self.acknowledged
        async with leading(directory, **OPTIONS) as store:
            assert (await store.check()).problems == ()
            held = {row[0]: (row[1], row[2]) for row in tables_of(directory)["change"]}
            for key, told in self.acknowledged.items():
                change = await store.get(key)
                assert change is not None
                assert change.revision > told.revision or change == told
                assert held.get(told.revision, (key, told.value)) == (key, told.value)
            assert await put(store, b"again", b"v") == store.head


async def operations(role: str, folder: Path) -> range:
    """Return the numbers of all operations that are asked of a disk that is well."""
    well = Told()
    with FailingDisk() as disk:
        await well.live(role, folder / "well", disk, folder / "well-lost-power")
    assert well.refused == []
    assert {file for _, file in disk.asked} >= {WAL, DATABASE, f"{DATABASE}.new", f"{DATABASE}-journal"}
    assert {operation for operation, _ in disk.asked} == {"write", "sync", "truncate", "delete"}
    for directory in (folder / "well", folder / "well-lost-power"):
        await well.compare(directory)
    return range(1, disk.asked.total() + 1)


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError], ids=["fails", "full"])
@pytest.mark.parametrize("count", [ONCE, FOR_GOOD], ids=["once", "for good"])
@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_nothing_is_acknowledged_falsely_by_a_disk_that_fails_anywhere(
    in_memory: Path, role: str, error: type[Exception], count: int
) -> None:
    every, acknowledged = await operations(role, in_memory), 0
    for first in every:
        told, directory, lost_power = Told(), in_memory / f"{first}", in_memory / f"{first}-lost-power"
        with FailingDisk(first, count, lambda: error("injected")) as disk:
            await told.live(role, directory, disk, lost_power)
        assert {type(refusal) for refusal in told.refused} <= {StoreFailed, DiskFull}
        await told.compare(directory)
        await told.compare(lost_power)
        acknowledged += len(told.acknowledged)
    print(f"failing disk, {role}: {len(every)} operations, each failed; 0 false acknowledgements")
    assert len(every) > 100
    assert acknowledged


@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_on_a_disk_that_lies_acknowledgements_are_false(in_memory: Path, role: str) -> None:
    """The control: the same disk, but SQLite is told that all went well, and with it everybody else."""
    every, found = await operations(role, in_memory), 0
    for first in every:
        told, directory, lost_power = Told(), in_memory / f"{first}", in_memory / f"{first}-lost-power"
        with FailingDisk(first, FOR_GOOD, Lie) as disk:
            await told.live(role, directory, disk, lost_power)
        try:
            await told.compare(lost_power)
        except (AssertionError, MehdbError):
            found += 1
    print(f"lying disk, {role}: {len(every)} operations, from each on all a lie; {found} times acknowledged falsely")
    assert found > len(every) / 2  # the others were before the first acknowledgement, or behind the last
