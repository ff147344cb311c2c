"""One process per data directory."""

import os
from pathlib import Path

import pytest

from mehdb.errors import CommandAtWork, Damaged, DirectoryInUse, StoreFailed
from mehdb.store import Store
from mehdb.store.lock import CommandLock, DirectoryLock
from stores import child, leading, opened, put

HOLDER = """
import asyncio, os, sys
from pathlib import Path
from mehdb.store import Store

async def main():
    store = await Store.open(Path(sys.argv[1]))
    print(os.getpid(), flush=True)
    sys.stdin.read()
    await store.close()

asyncio.run(main())
"""


async def test_a_second_process_is_refused_and_told_which_one_is_first(directory: Path) -> None:
    with child(HOLDER, directory) as holder:
        assert holder.stdout
        pid = int(holder.stdout.readline())
        assert pid == holder.pid
        with pytest.raises(DirectoryInUse, match=f"in use by process {pid}:"):
            await Store.open(directory)
        holder.communicate("", timeout=30)
        assert holder.returncode == 0
    async with leading(directory) as store:
        assert await put(store, b"a", b"1") == 1


async def test_the_directory_is_free_once_its_process_was_killed(directory: Path) -> None:
    with child(HOLDER, directory) as holder:
        assert holder.stdout
        holder.stdout.readline()
        holder.kill()
        holder.wait(30)
    async with opened(directory) as store:
        assert store.head == 0


async def test_one_process_cannot_open_a_store_twice(directory: Path) -> None:
    async with opened(directory) as store:
        with pytest.raises(DirectoryInUse, match=f"process {os.getpid()}:"):
            await Store.open(directory)
        await store.lead(store.meta.epoch)  # the first is none the worse
        assert await put(store, b"a", b"1") == 1


async def test_a_store_that_cannot_be_opened_lets_the_directory_go(volume: Path) -> None:
    (volume / "store.db").write_bytes(b"no database" * 1000)
    for _ in range(2):
        with pytest.raises(Damaged):
            await Store.open(volume)
    DirectoryLock(volume).release()


def test_the_lock_names_only_its_present_holder(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1234567890123456789\n")
    lock = DirectoryLock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(DirectoryInUse, match=f"process {os.getpid()}:"):
        DirectoryLock(tmp_path)
    lock.release()


async def test_no_store_is_opened_where_a_command_is_at_work(directory: Path) -> None:
    async with leading(directory) as store:
        await put(store, b"a", b"1")
    command = CommandLock(directory)
    with pytest.raises(CommandAtWork, match=f"a command, process {os.getpid()}, is at work"):
        await Store.open(directory)
    DirectoryLock(directory).release()  # it was let go
    command.release()
    async with opened(directory) as store:
        assert store.head == 1


async def test_a_store_that_a_command_has_suspended_is_opened_again_by_its_holder(directory: Path) -> None:
    async with leading(directory) as store:
        command = CommandLock(directory)
        async with store.suspended():
            pass
        await store.start()
        assert await put(store, b"a", b"1") == 1
        command.release()


def test_two_commands_are_not_at_work_at_once(tmp_path: Path) -> None:
    command = CommandLock(tmp_path)
    with pytest.raises(CommandAtWork, match=f"process {os.getpid()},"):
        CommandLock(tmp_path)
    command.release()
    CommandLock(tmp_path).release()


async def test_a_directory_that_cannot_be_made_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="file/store cannot be used: Not a directory"):
        await Store.open(tmp_path / "file" / "store")
