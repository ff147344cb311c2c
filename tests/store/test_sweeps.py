"""A sweep of compaction, step by step: bounded, never half done, and blamed for its own damage alone."""

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from disk import WAL, Disk
from mehdb.model import Epoch, History
from mehdb.store import Write
from mehdb.store.log import COMPACT_BYTES, COMPACT_STEP, Log
from mehdb.store.schema import open_writer
from stores import enqueue, leading, opened, outcomes, put, rewrite, sets, until

HISTORY = History("0123456789abcdef" * 2)
MIB = 1 << 20


@pytest.fixture
def log(volume: Path, disk: Disk) -> Iterator[Log]:
    """The tables of an empty store that keeps one change only, beside what is live."""
    assert disk.syncs.total() == 0
    connection = open_writer(volume)
    log = Log(connection, 1)
    log.adopt(HISTORY, Epoch(1))
    yield log
    connection.close()


def write(log: Log, keys: int, value: bytes = b"v") -> None:
    log.write([Write(b"key-%d" % number, value) for number in range(keys)], compact=False)


def test_a_step_removes_no_more_bytes_than_its_bound(log: Log) -> None:
    for _ in range(2):
        write(log, 20, bytes(MIB))
    assert log.compaction_due
    steps = 0
    while log.compaction_due:
        before = log.meta.changes
        log.compact()
        steps += 1
        assert before - log.meta.changes <= COMPACT_BYTES // MIB + 1
    assert log.meta.changes == 20
    assert steps >= 20 * MIB // COMPACT_BYTES


def test_a_value_larger_than_the_bound_is_removed_alone(log: Log) -> None:
    for _ in range(4):
        write(log, 1, bytes(2 * COMPACT_BYTES))
    while log.compaction_due:
        before = log.meta.changes
        log.compact()
        assert before - log.meta.changes <= 1
    assert log.meta.changes == 1


def test_a_step_that_fails_is_done_again(log: Log, disk: Disk) -> None:
    for _ in range(2):
        write(log, 100)
    disk.fail_next("write", WAL, apsw.FullError("injected"))
    with pytest.raises(apsw.FullError):
        log.compact()
    assert (log.meta.changes, log.meta.floor) == (200, 0)
    while log.compaction_due:
        log.compact()
    assert (log.meta.changes, log.meta.floor) == (100, 199)


def test_a_step_that_finds_nothing_commits_nothing(log: Log, disk: Disk) -> None:
    """Where the volume is short, sweeps are many."""
    write(log, 2 * COMPACT_STEP)
    for _ in range(2 * COMPACT_STEP):
        write(log, 1)
    log.compact()  # the first is of live keys alone, but the one; what it moves is the floor
    meta, syncs = log.meta, disk.syncs.total()
    log.compact()
    assert log.meta is meta
    assert disk.syncs.total() == syncs


def test_where_room_is_short_a_sweep_is_worth_it_for_few(log: Log) -> None:
    write(log, 160)
    log._retain_changes = 1000  # noqa: SLF001  a window that holds all
    write(log, 10)
    log.squeeze(log.meta.head)
    assert not log.compaction_due
    write(log, 2)
    log.squeeze(log.meta.head)
    assert log.compaction_due


async def test_damage_that_only_compaction_meets_is_told_and_writes_go_on(directory: Path) -> None:
    """So that a follower takes a snapshot, and an operator sees why the file grows."""
    async with leading(directory) as store:
        await outcomes(await enqueue(store, [Write(b"key-%d" % n, b"superseded") for n in range(400)]))
        await outcomes(await enqueue(store, sets(400)))
    data = (directory / "store.db").read_bytes()
    rewrite(directory, data.index(b"key-200superseded"), b"X", right_checksum=False)
    async with opened(directory, retain_changes=1) as store:
        for number in range(20):
            assert await put(store, b"key-%d" % number, b"new") == store.head
        await until(lambda: store.damage is not None)
        assert await put(store, b"key-0", b"newer") == store.head
