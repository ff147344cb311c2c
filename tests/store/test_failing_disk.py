"""A disk that fails at any one of its writes and syncs: nothing is acknowledged that is not there later."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import pytest

from disk import DATABASE, WAL, Disk
from mehdb.errors import DiskFull, MehdbError, StoreFailed
from mehdb.model import Epoch, Revision
from mehdb.store import Store, Write
from stores import enqueue, opened, put, tables_of

BATCHES = 6
WRITES = 5  # in each
OPTIONS = {"retain_changes": 8, "disk_reserve_bytes": 0}


class FailingDisk(Disk):
    """A disk that counts what is done to it, and fails from one operation on: for a while, or for good."""

    def __init__(self, first: int, count: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.done = 0
        self._failing = range(first, first + count)
        self._error = error

    def before_write(self, file: str) -> None:
        """Count a write."""
        self._count(file)

    def before_sync(self, file: str) -> None:
        """Count a sync."""
        self._count(file)

    def _count(self, file: str) -> None:
        if file in (DATABASE, WAL):
            self.done += 1
            if self.done in self._failing:
                raise self._error()


@dataclass
class Told:
    """What a client was told."""

    acknowledged: dict[bytes, tuple[Revision, bytes]] = field(default_factory=dict)
    refused: list[MehdbError] = field(default_factory=list)

    async def live(self, directory: Path) -> None:
        """Open the store, write, overwrite and delete in batches, and close it."""
        try:
            async with opened(directory, **OPTIONS) as store:
                await store.lead(Epoch(store.meta.epoch + 1))
                for batch in range(BATCHES):
                    await self.write(store, batch)
                assert (await store.get(b"absent")) is None  # reads go on, whatever the writes do
        except MehdbError as error:
            self.refused.append(error)

    async def write(self, store: Store, batch: int) -> None:
        """Write one batch."""
        writes = [Write(b"key-%d" % (n % 4), b"value %d of %d " % (n, batch) * 200) for n in range(WRITES)]
        for write, task in zip(writes, await enqueue(store, writes), strict=True):
            try:
                revision = await task
            except MehdbError as error:
                self.refused.append(error)
            else:
                assert not any(isinstance(error, StoreFailed) for error in self.refused), "a failure is final"
                self.acknowledged[write.key] = revision, write.value or b""

    async def compare(self, directory: Path) -> None:
        """Hold what was told against the store, on a disk that is well again."""
        if not (directory / "store.db").exists():
            assert not self.acknowledged
        async with opened(directory, **OPTIONS) as store:
            assert (await store.check()).problems == ()
            held = {row[0]: (row[1], row[2]) for row in tables_of(directory)["change"]}
            for key, (revision, value) in self.acknowledged.items():
                change = await store.get(key)
                assert change is not None
                assert change.revision >= revision
                assert change.revision > revision or change.value == value
                assert held.get(revision, (key, value)) == (key, value)
            assert await put(store, b"again", b"v") == store.head


@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError], ids=["fails", "full"])
@pytest.mark.parametrize("count", [1, 1 << 30], ids=["once", "for good"])
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)], ids=["short", "soak"])
async def test_nothing_is_acknowledged_falsely_by_a_disk_that_fails_anywhere(
    tmp_path: Path, error: type[Exception], count: int, every: int
) -> None:
    with FailingDisk(0, 0, error) as disk:
        well = Told()
        await well.live(tmp_path / "well")
        assert well.refused == []
    runs, acknowledged = disk.done, 0
    assert runs > 40
    for first in range(1, runs + 1, every):
        told, directory = Told(), tmp_path / f"{first}"
        with FailingDisk(first, count, lambda: error("injected")):
            await told.live(directory)
        kinds = {type(refusal) for refusal in told.refused}
        assert kinds <= {StoreFailed, DiskFull}
        await told.compare(directory)
        acknowledged += len(told.acknowledged)
    print(f"failing disk: {len(range(1, runs + 1, every))} operations, each failed; 0 false acknowledgements")
    assert acknowledged
