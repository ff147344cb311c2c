"""The acknowledged mark: a store that lacks what it acknowledged is never taken for whole, nor for empty."""

import itertools
import shutil
from pathlib import Path
from typing import Final

import pytest

from disk import DATABASE, WAL, Disk
from mehdb.errors import Damaged
from mehdb.model import ORIGIN, Chain, Epoch, History, Position, Revision
from mehdb.store import Store, Write, read_mark, require_sound, write_mark
from mehdb.store.mark import FILE_NAME
from stores import catch_up, elsewhere, enqueue, fill, leading, opened, outcomes, put

HISTORY: Final = History("0123456789abcdef" * 2)
POSITION: Final = Position(HISTORY, Revision(77), Chain(bytes(range(16))))


# The file.


def test_a_mark_is_read_as_it_was_written(tmp_path: Path) -> None:
    for revision in (0, 1, 77, 2**62):
        position = elsewhere(POSITION, revision=Revision(revision))
        write_mark(tmp_path, position)
        assert read_mark(tmp_path) == position


def test_there_is_no_mark_of_a_store_without_history(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None
    write_mark(tmp_path, POSITION)
    write_mark(tmp_path, Position())
    assert read_mark(tmp_path) is None


def test_a_mark_that_is_damaged_itself_proves_nothing(tmp_path: Path) -> None:
    write_mark(tmp_path, POSITION)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    for offset, bit in itertools.product(range(len(whole)), range(8)):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
        assert read_mark(tmp_path) is None
    for other in (b"", whole[:-1], whole + b"\0", bytes(len(whole)), whole[1:]):
        path.write_bytes(other)
        assert read_mark(tmp_path) is None
    path.write_bytes(whole)
    assert read_mark(tmp_path) == POSITION


# When it moves.


async def test_the_mark_is_at_the_head_when_a_write_is_acknowledged(leader: Store, follower: Store) -> None:
    for n in range(1, 20):
        await put(leader, b"k", b"%d" % n)
        mark = read_mark(leader.directory)
        assert mark is not None
        assert mark.revision >= n
    assert read_mark(leader.directory) == leader.position
    await catch_up(follower, leader)
    assert read_mark(follower.directory) == follower.position == leader.position


async def test_the_mark_is_never_ahead_of_what_is_durable(disk: Disk, leader: Store) -> None:
    await put(leader, b"k", b"1")
    before = leader.position
    with disk.holding():
        tasks = await enqueue(leader, [Write(b"k", b"2")])
        disk.waiting.wait(10)
        assert read_mark(leader.directory) == before
    assert await outcomes(tasks) == [2]
    assert read_mark(leader.directory) == leader.position


# What it shows.


@pytest.fixture
async def rolled_back(directory: Path, tmp_path: Path) -> Path:
    """A closed store of ten acknowledged changes, whose file is the one from when it had four."""
    async with leading(directory) as store:
        await fill(store, 4)
    shutil.copy(directory / DATABASE, tmp_path)
    async with opened(directory) as store:
        await fill(store, 6)
        assert store.head == 10
    shutil.copy(tmp_path / DATABASE, directory)
    return directory


async def test_a_store_behind_its_mark_is_damaged_and_left_as_it_is(rolled_back: Path) -> None:
    before = (rolled_back / DATABASE).read_bytes()
    for _ in range(2):
        with pytest.raises(Damaged, match="ends at revision 4, but 10 has been acknowledged: 6 changes") as caught:
            await Store.open(rolled_back)
        assert caught.value.missing == 6
        with pytest.raises(Damaged):
            require_sound(rolled_back)
    assert (rolled_back / DATABASE).read_bytes() == before
    mark = read_mark(rolled_back)
    assert mark is not None
    assert mark.revision == 10


async def test_a_loss_that_was_accepted_is_no_damage_any_more(rolled_back: Path) -> None:
    write_mark(rolled_back, Position(HISTORY))
    async with opened(rolled_back) as store:
        assert store.head == 4
        assert read_mark(rolled_back) == store.position
        assert await put(store, b"k", b"v") == 5


@pytest.mark.parametrize("mark", ["missing", "empty", "damaged", "of another history", "behind"])
async def test_a_mark_that_proves_nothing_is_in_nobodys_way(directory: Path, mark: str) -> None:
    async with leading(directory) as store:
        await fill(store, 4)
        position = store.position
    path = directory / FILE_NAME
    if mark == "missing":
        path.unlink()
    elif mark == "empty":
        path.write_bytes(b"")
    elif mark == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif mark == "of another history":
        write_mark(directory, POSITION)
    else:
        write_mark(directory, elsewhere(position, revision=Revision(1)))
    assert require_sound(directory).position == position
    async with opened(directory) as store:
        assert store.position == position
        assert read_mark(directory) == position


async def test_a_store_that_has_gone_is_no_new_one(directory: Path) -> None:
    async with leading(directory) as store:
        await fill(store, 4)
    (directory / DATABASE).unlink()
    for _ in range(2):
        with pytest.raises(Damaged, match=r"has no store\.db, but had one that acknowledged 4") as caught:
            await Store.open(directory)
        assert caught.value.missing == 4
        with pytest.raises(Damaged):
            require_sound(directory)
        assert not (directory / DATABASE).exists()


async def test_what_is_left_of_a_store_without_a_mark_is_no_new_one_either(volume: Path) -> None:
    (volume / WAL).write_bytes(b"frames")
    with pytest.raises(Damaged, match="only what a lost one left"):
        await Store.open(volume)
    assert (volume / WAL).read_bytes() == b"frames"


@pytest.mark.parametrize("marked", [True, False])
async def test_a_file_of_0_bytes_is_damage(directory: Path, marked: bool) -> None:
    async with leading(directory) as store:
        await fill(store, 4)
    if not marked:
        (directory / FILE_NAME).unlink()
    (directory / DATABASE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(Damaged, match="0 bytes"):
            await Store.open(directory)
        assert (directory / DATABASE).stat().st_size == 0


async def test_a_directory_where_nothing_was_acknowledged_may_begin_anew(directory: Path) -> None:
    async with opened(directory) as store:
        assert read_mark(directory) is None
        await store.lead(Epoch(1))
    mark = read_mark(directory)
    assert mark is not None
    assert mark.revision == ORIGIN
    (directory / FILE_NAME).unlink()
    (directory / DATABASE).unlink()
    assert not (directory / WAL).exists()
    with pytest.raises(FileNotFoundError):
        require_sound(directory)
    async with opened(directory) as store:
        assert store.position == Position()
