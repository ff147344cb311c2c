"""Lives in the store: what has outlived its time is deleted, once, and nothing else is."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mehdb.model import Epoch, History, Page, Revision
from mehdb.store import Clock, Write
from mehdb.store.log import EXPIRE_STEP, Log
from mehdb.store.schema import open_writer
from stores import catch_up, chain_anew, changes_of, leading, opened, problems_of, rewrite, sql

SECOND_NS = 10**9
LEAVES = "SELECT pageno FROM dbstat WHERE name = 'entry' AND pagetype = 'leaf' ORDER BY path"


class Hands:
    """A clock's hands, set by a test."""

    def __init__(self) -> None:
        self.elapsed_s = 0

    def clock(self) -> Clock:
        return Clock(lambda: 1_000_000 * SECOND_NS, lambda: self.elapsed_s * SECOND_NS)


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def log(tmp_path: Path, hands: Hands) -> Iterator[Log]:
    """The log of an empty store, which nobody else uses."""
    connection = open_writer(tmp_path)
    log = Log(connection, 100_000, hands.clock())
    log.adopt(History("0" * 32), Epoch(1))
    yield log
    connection.close()


def expire(log: Log) -> None:
    """Do one step of it."""
    due = log.due()
    if due.deletions:
        log.write(due.deletions)
    log.expired(due)


def expire_all(log: Log) -> int:
    """Expire whatever is due. Return how many changes that made."""
    head = log.meta.head
    while log.expiry_due:
        expire(log)
    return log.meta.head - head


def put_for(log: Log, key: bytes, ttl_s: float | None) -> None:
    log.write([Write(key, b"v", ttl_ms=None if ttl_s is None else round(ttl_s * 1000))])


def test_a_wall_clock_counts_once() -> None:
    walls = iter([5_000_000_000, 9_000_000_000_000])
    elapsed = iter([100, 100 + 2_000_000, 100 + 3_500_000])
    clock = Clock(lambda: next(walls), lambda: next(elapsed))
    assert [clock.now_ms(), clock.now_ms()] == [5002, 5003]


def test_what_is_due_is_deleted_and_nothing_else(log: Log, hands: Hands) -> None:
    for second in range(1, 6):
        put_for(log, b"%d" % second, second)
    put_for(log, b"for ever", None)
    assert expire_all(log) == 0
    hands.elapsed_s = 3
    assert expire_all(log) == 3
    assert log.meta.keys == 3
    assert not log.expiry_due
    hands.elapsed_s = 100
    assert expire_all(log) == 2
    assert log.meta.keys == 1


def test_a_newer_value_has_its_own_life(log: Log, hands: Hands) -> None:
    put_for(log, b"renewed", 1)
    put_for(log, b"renewed", 5)
    put_for(log, b"kept", 1)
    put_for(log, b"kept", None)
    put_for(log, b"deleted", 1)
    log.write([Write(b"deleted", None)])
    hands.elapsed_s = 2
    assert expire_all(log) == 0
    hands.elapsed_s = 6
    assert expire_all(log) == 1
    assert log.meta.keys == 1


def test_one_step_is_bounded_and_all_steps_delete_everything(log: Log, hands: Hands) -> None:
    count = 2 * EXPIRE_STEP + 7
    log.write([Write(b"%d" % n, b"", ttl_ms=1000) for n in range(count)])
    hands.elapsed_s = 1
    expire(log)
    assert log.meta.keys == count - EXPIRE_STEP
    assert expire_all(log) == count - EXPIRE_STEP


def test_each_change_is_looked_at_once(log: Log, hands: Hands) -> None:
    """A key that is renewed all the time leaves superseded changes behind: they cost no later look."""
    for _ in range(3 * EXPIRE_STEP):
        put_for(log, b"renewed", 1)
    hands.elapsed_s = 2
    put_for(log, b"renewed", 1)
    assert expire_all(log) == 0
    hands.elapsed_s = 4
    before = log.commits
    expire(log)
    assert (log.commits - before, log.meta.keys, log.expiry_due) == (1, 0, False)


def test_a_page_may_bring_what_expired_before(log: Log, hands: Hands, tmp_path: Path) -> None:
    """A node that has led and then takes another's changes looks at all of them, also those that ended long ago."""
    other = tmp_path / "other"
    other.mkdir()
    connection = open_writer(other)
    leader = Log(connection, 100_000, hands.clock())
    leader.adopt(History("0" * 32), Epoch(1))
    put_for(leader, b"k", 1)
    [change] = changes_of(other)
    connection.close()
    hands.elapsed_s = 10
    assert expire_all(log) == 0
    log.apply(Page(History("0" * 32), Epoch(1), Revision(0), chain_anew([change]), (change,)))
    assert expire_all(log) == 1
    assert log.meta.keys == 0


async def test_an_expired_key_is_gone_after_a_restart_and_from_followers(tmp_path: Path, hands: Hands) -> None:
    clock = hands.clock()
    async with leading(tmp_path / "leader", clock=clock) as leader, opened(tmp_path / "follower") as follower:
        await leader.write(Write(b"k", b"v", ttl_ms=500))
        await leader.write(Write(b"k2", b"v", ttl_ms=90_000))
        await catch_up(follower, leader)
        hands.elapsed_s = 1
        assert await follower.get(b"k") is not None
        await asyncio.gather(leader.expire(), leader.write(Write(b"other", b"v")))
        await catch_up(follower, leader)
        for store in (leader, follower):
            assert await store.get(b"k") is None
            assert await store.get(b"k2") is not None
    hands.elapsed_s = 100
    async with leading(tmp_path / "leader", clock=clock) as leader:
        assert leader.expiry_due
        while leader.expiry_due:
            await leader.expire()
        assert await leader.get(b"k2") is None
    assert problems_of(tmp_path / "leader") == problems_of(tmp_path / "follower") == ()


async def test_a_damaged_page_ends_no_other_keys_life(directory: Path, hands: Hands) -> None:
    clock = hands.clock()
    keys = [b"%02d" % n + b"k" * 300 for n in range(90)]
    async with leading(directory, clock=clock) as store:
        for key in keys:
            await store.write(Write(key, b"v", ttl_ms=500))
    leaves = [page for (page,) in sql(directory, LEAVES)]
    assert len(leaves) > 3
    rewrite(directory, 4096 * (leaves[1] - 1) + 2000, b"\xa5\x5a", right_checksum=False)
    hands.elapsed_s = 1
    async with leading(directory, clock=clock) as store:
        while store.expiry_due:
            await store.expire()
        assert 0 < store.meta.keys < len(keys) // 2  # also a neighbour of that page may need it, to give its room away
        assert store.damage is not None
        assert not store.expiry_due
