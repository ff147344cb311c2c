"""No read shows a value before it is durable, however long the disk takes: neither a key, a list nor a page."""

import asyncio
import itertools
import random
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from disk import WAL, Disk
from mehdb.model import Position
from mehdb.store import Store, Write
from stores import catch_up, held, keys_of, leading, opened, tables_of, until

SYNC_TAKES_S: Final = 0.3
SYNCS: Final = 20
READERS: Final = 12
STAMP: Final = re.compile(rb"<(\d+)>")  # each value and each key bears its number


class SlowDisk(Disk):
    """A disk whose every sync of the WAL takes long, and that knows which values are durable."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.durable: set[int] = set()
        self._written: set[int] = set()
        self._never = threading.Event()

    def wrote(self, file: str, offset: int, data: bytes) -> None:  # noqa: ARG002  where does not matter
        """Note the values that are on their way."""
        self._written.update(map(int, STAMP.findall(data)))

    def before_sync(self, file: str) -> None:
        """Take long."""
        if file == WAL and self.slow:
            self._never.wait(SYNC_TAKES_S)
        super().before_sync(file)

    def synced(self, file: str, read: Callable[[], bytes]) -> None:  # noqa: ARG002  the values are known
        """Note that they have arrived. One thread writes and syncs, so none was written meanwhile."""
        self.syncs[file] += 1
        if file == WAL:
            self.durable |= self._written


@dataclass
class Seen:
    """What the readers of a store saw."""

    disk: SlowDisk
    reads: int = 0
    values: set[int] = field(default_factory=set)
    early: set[int] = field(default_factory=set)

    def note(self, *texts: bytes | None) -> None:
        """Note an answer. It took microseconds or a few milliseconds, and a sync takes hundreds."""
        self.reads += 1
        numbers = {int(number) for text in texts for number in STAMP.findall(text or b"")}
        self.values |= numbers
        self.early |= numbers - self.disk.durable

    async def read_on(self, store: Store, chance: random.Random) -> None:
        """Read in every way until cancelled."""
        position = Position()
        while True:
            for key in (b"key", b"<%d>" % chance.randrange(1, max(2, 4 * SYNCS))):
                change = await store.get(key)
                self.note(change.value if change else None)
            self.note(*await keys_of(store, limit=5000))
            if page := await store.page_after(position):
                position = page.end
                self.note(*[change.key for change in page.changes], *[change.value for change in page.changes])
            await store.wait_beyond(store.head, 0.002)


async def write_on(store: Store, numbers: "itertools.count[int]") -> None:
    """Write new keys and overwrite one, until cancelled."""
    for number in numbers:
        await store.write(Write(b"<%d>" % number, b"value <%d>" % number))
        await store.write(Write(b"key", b"value <%d>" % number))


async def follow_on(follower: Store, leader: Store) -> None:
    """Apply the leader's pages until cancelled."""
    while True:
        await catch_up(follower, leader)
        await leader.wait_beyond(leader.head, 1)


@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_no_value_is_seen_before_its_sync_however_long_that_takes(
    role: str, directory: Path, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(leading(directory)) if role == "follower" else None
        disk = stack.enter_context(SlowDisk())
        store = await stack.enter_async_context(
            leading(tmp_path / "read") if leader is None else opened(tmp_path / "read")
        )
        await stack.enter_async_context(asyncio.timeout(200))
        clients = [asyncio.create_task(write_on(leader or store, number)) for number in [itertools.count(1)] * 4]
        if leader is not None:
            clients.append(asyncio.create_task(follow_on(store, leader)))
        seen, syncs = Seen(disk), disk.syncs[WAL]
        disk.slow = True
        clients += [asyncio.create_task(seen.read_on(store, random.Random(n))) for n in range(READERS)]
        await until(lambda: disk.syncs[WAL] >= syncs + SYNCS, timeout_s=25 * SYNCS * SYNC_TAKES_S)
        assert [client for client in clients if client.done()] == []

        # The control: what is on its way is in the files, so that a reader that only looked there would see it.
        looked = Seen(disk)
        with disk.holding():
            await held(disk)
            copy = shutil.copytree(store.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
            looked.note(*[row[2] for row in tables_of(copy)["change"]])

        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        disk.slow = False
    print(
        f"no early reads, {role}: {seen.reads:,} reads during {disk.syncs[WAL] - syncs} syncs of "
        f"{SYNC_TAKES_S * 1000:.0f} ms, {len(seen.early)} values seen before their fsync"
    )
    assert seen.early == set()
    assert len(seen.values) > SYNCS / 2
    assert looked.early, "the control must see what is not yet durable"
