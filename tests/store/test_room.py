"""Room on the volume: sets stop before it is used up, deletions go on, and the node recovers by itself.

How much is left is what these tests decide; how a real small volume behaves is among the scenarios.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import apsw
import pytest

from cluster import DEADLINE_S
from disk import DATABASE, WAL, Disk
from mehdb.errors import DiskFull, KeyNotFound, MehdbError, StoreFailed
from mehdb.model import Change, Epoch, History, Page, Revision
from mehdb.store import Store, Write
from mehdb.store.log import Log
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.room import BALLAST_BYTES_MAX, BALLAST_NAME, RESERVE_SHARE, Room
from mehdb.store.schema import open_writer
from mehdb.store.seal import seal
from mehdb.store.writer import SQUEEZE_HARD_AFTER_S, Writer
from stores import enqueue, leading, outcomes, problems_of, put, until
from volumes import tmpfs

HISTORY = History("0123456789abcdef" * 2)
MIB = 1 << 20
RESERVE_BYTES = 16 * MIB


class VolumeOf(Room):
    """A volume with as much room as a test says."""

    free = 1 << 40

    def free_bytes(self) -> int:
        """Return how much may still be written."""
        return self.free

    def may_hold(self, size_bytes: int) -> bool:
        """Return whether so much more may fit."""
        return size_bytes <= self.free


@pytest.fixture
def room(volume: Path) -> VolumeOf:
    """A volume with plenty of room, of which a little is held back."""
    return VolumeOf(volume, RESERVE_BYTES)


# The reserve and the ballast.


def test_what_is_free_is_what_the_volume_says(volume: Path) -> None:
    free = os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize
    assert abs(Room(volume, 0).free_bytes() - free) < 256 * MIB  # others write there too


def test_the_reserve_is_never_more_than_a_part_of_the_volume(volume: Path) -> None:
    blocks = os.statvfs(volume)
    assert Room(volume, RESERVE_BYTES).reserve_bytes() == RESERVE_BYTES
    assert Room(volume, 1 << 62).reserve_bytes() == blocks.f_blocks * blocks.f_frsize // RESERVE_SHARE


def test_room_is_lacking_below_the_reserve(room: VolumeOf) -> None:
    room.free = RESERVE_BYTES
    assert not room.lacks()
    room.free -= 1
    assert room.lacks()
    assert not room.lacks(reusable_bytes=1)


def test_the_ballast_is_set_down_once_and_given_up_once(room: VolumeOf, volume: Path) -> None:
    ballast = volume / BALLAST_NAME
    for _ in range(2):
        room.take_ballast()
        assert ballast.stat().st_size == RESERVE_BYTES // 4 == BALLAST_BYTES_MAX
        assert ballast.stat().st_blocks * 512 >= BALLAST_BYTES_MAX  # no hole: it takes the room that it gives back
    assert room.drop_ballast()
    assert not ballast.exists()
    assert not room.drop_ballast()


def test_a_ballast_from_an_earlier_life_is_known(room: VolumeOf, volume: Path) -> None:
    room.take_ballast()
    assert Room(volume, RESERVE_BYTES).drop_ballast()
    assert not (volume / BALLAST_NAME).exists()


def test_the_ballast_is_only_set_down_where_there_is_plenty(room: VolumeOf, volume: Path) -> None:
    room.free = RESERVE_BYTES + BALLAST_BYTES_MAX
    room.take_ballast()
    assert not (volume / BALLAST_NAME).exists()
    Room(volume, 0).take_ballast()  # no reserve, no ballast
    assert not (volume / BALLAST_NAME).exists()


# The writer on such a volume.


@pytest.fixture
async def failure() -> "asyncio.Future[StoreFailed]":
    """What is done when nothing can be written any more."""
    return asyncio.get_running_loop().create_future()


@pytest.fixture
async def writer(
    volume: Path, room: VolumeOf, failure: "asyncio.Future[StoreFailed]", disk: Disk
) -> AsyncIterator[Writer]:
    """A writer that holds the keys `old-0` to `old-9`, each written 20 times."""
    assert disk.syncs.total() == 0
    connection = open_writer(volume)
    writer = Writer(
        connection, Log(connection, 1000), AcknowledgedMark.open(volume), room, lambda: False,
        queue_bytes_max=64 * MIB, on_commit=lambda: None, on_damage=pytest.fail, failure=failure,
    )  # fmt: skip
    await writer.run(lambda log: log.adopt(HISTORY, Epoch(1)))
    for n in range(200):
        await writer.write(Write(b"old-%d" % (n % 10), b"%d" % n))
    yield writer
    await writer.close()


async def ends_in(writer: Writer, write: Write) -> type[MehdbError] | None:
    """Return the class of the error that *write* ends in."""
    try:
        outcome = await writer.write(write)
    except MehdbError as error:
        return type(error)
    return type(outcome) if isinstance(outcome, MehdbError) else None


async def test_sets_stop_at_the_reserve_and_deletions_do_not(writer: Writer, room: VolumeOf) -> None:
    room.free = RESERVE_BYTES - 1
    assert await ends_in(writer, Write(b"new", b"v")) is DiskFull
    assert writer.short_of_room
    together = [Write(b"new", b"v"), Write(b"old-0", None), Write(b"old-1", b"v"), Write(b"never", None)]
    assert await asyncio.gather(*[ends_in(writer, write) for write in together]) == [
        DiskFull, None, DiskFull, KeyNotFound,
    ]  # fmt: skip
    assert (writer.meta.head, writer.meta.keys) == (201, 9)
    room.free = RESERVE_BYTES + MIB  # what is in the WAL will take some of it
    assert await ends_in(writer, Write(b"new", b"v")) is None
    assert not writer.short_of_room


async def test_a_node_without_work_notices_that_there_is_room_again(writer: Writer, room: VolumeOf) -> None:
    room.free = 0
    assert await ends_in(writer, Write(b"new", b"v")) is DiskFull
    room.free = 1 << 40
    await until(lambda: not writer.short_of_room, timeout_s=5 * SQUEEZE_HARD_AFTER_S)


async def test_a_page_is_applied_below_the_reserve(writer: Writer, room: VolumeOf) -> None:
    """A follower must not fall behind while there is any room: its leader decides what is written."""
    room.free = RESERVE_BYTES - 1
    change = Change(Revision(201), b"new", b"v")
    _, chain = seal(writer.meta.chain, change)
    await writer.run(lambda log: log.apply(Page(HISTORY, Epoch(1), Revision(200), chain, (change,))))
    assert (writer.meta.head, writer.short_of_room) == (201, True)


async def test_a_volume_short_of_room_lets_go_of_what_the_window_retains(writer: Writer, room: VolumeOf) -> None:
    assert writer.meta.floor == 0
    room.free = 0
    assert await ends_in(writer, Write(b"new", b"v")) is DiskFull
    await until(lambda: writer.meta.floor == 199, timeout_s=DEADLINE_S)
    assert writer.meta.head == 200
    room.free = 1 << 40
    assert await ends_in(writer, Write(b"new", b"v")) is None


async def test_between_one_and_two_reserves_a_follower_that_restarts_has_time(writer: Writer, room: VolumeOf) -> None:
    room.free = RESERVE_BYTES * 7 // 4
    end_s = monotonic() + 2.5 * SQUEEZE_HARD_AFTER_S
    while monotonic() < end_s:
        await writer.write(Write(b"old-0", b"v"))
        await asyncio.sleep(SQUEEZE_HARD_AFTER_S / 20)  # between two writes: so few do not pass the window
    assert writer.meta.head < 1000
    assert not writer.short_of_room
    assert writer.meta.floor == 0


async def test_the_ballast_lets_deletions_through_a_volume_that_is_full_to_the_last_byte(
    writer: Writer, room: VolumeOf, volume: Path, disk: Disk
) -> None:
    room.take_ballast()
    disk.fail_next("write", WAL, apsw.FullError("injected"))
    assert await ends_in(writer, Write(b"old-0", None)) is None
    assert (volume / BALLAST_NAME).exists()  # the WAL had room in it
    disk.fail_next("write", WAL, apsw.FullError("injected"), times=2)
    assert await ends_in(writer, Write(b"old-1", None)) is None
    assert not (volume / BALLAST_NAME).exists()
    assert writer.meta.keys == 8


async def test_sets_do_not_cost_the_ballast(writer: Writer, room: VolumeOf, volume: Path, disk: Disk) -> None:
    room.take_ballast()
    room.free = RESERVE_BYTES + MIB  # not enough to set another down
    disk.fail_next("write", WAL, apsw.FullError("injected"))
    assert await ends_in(writer, Write(b"new", b"v")) is DiskFull
    assert (volume / BALLAST_NAME).exists()


async def test_on_a_full_volume_the_ballast_is_spent_once(
    writer: Writer, room: VolumeOf, volume: Path, disk: Disk, failure: "asyncio.Future[StoreFailed]"
) -> None:
    room.take_ballast()
    room.free = 0
    disk.fail_next("write", WAL, apsw.FullError("injected"), times=2)  # at once, and again without the ballast
    assert await ends_in(writer, Write(b"old-0", None)) is DiskFull
    assert not (volume / BALLAST_NAME).exists()
    assert not failure.done()
    assert await ends_in(writer, Write(b"old-0", None)) is None
    assert problems_of(volume) == ()


async def test_a_store_that_is_closed_without_room_for_what_is_in_the_wal_keeps_it_there(
    writer: Writer, room: VolumeOf, volume: Path
) -> None:
    """Half of it in the file would take what deletions need after the restart."""
    room.free = 0
    before = (volume / DATABASE).stat().st_size
    await writer.close()
    assert (volume / DATABASE).stat().st_size == before
    assert (volume / WAL).stat().st_size > 0
    assert problems_of(volume) == ()


def test_a_volume_that_does_not_tell_its_size_may_hold_anything(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "limited", MIB) as limited:
        assert Room(limited, 0).may_hold(MIB // 2)
        assert not Room(limited, 0).may_hold(MIB + 1)
    with tmpfs(tmp_path / "unlimited", 0) as unlimited:
        assert Room(unlimited, 0).may_hold(1 << 50)


async def test_a_store_says_how_much_room_it_has(leader: Store) -> None:
    assert not leader.short_of_room
    assert leader.free_bytes() > 0
    assert (leader.directory / BALLAST_NAME).exists()
    assert await outcomes(await enqueue(leader, [Write(b"k", b"v")])) == [1]
    assert await put(leader, b"k", b"w") == 2


async def taken(store: Store) -> int:
    """Write until that is refused. Return how many bytes were taken."""
    size_bytes = 0
    with contextlib.suppress(DiskFull):
        while True:
            await store.write(Write(b"key-%d" % store.head, bytes(200_000)))
            size_bytes += 200_000
    return size_bytes


async def test_on_a_small_volume_the_wal_gives_back_the_room_that_it_takes(tmp_path: Path) -> None:
    """Or half of it would be taken by what is in the file as well."""
    with tmpfs(tmp_path / "volume", 24 * MIB) as volume:
        async with leading(volume, disk_reserve_bytes=RESERVE_BYTES) as store:
            at_first = await taken(store)
            assert at_first < 12 * MIB
            await until(lambda: not store.short_of_room, timeout_s=20)
            assert at_first + await taken(store) > 12 * MIB
