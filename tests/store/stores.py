"""What the tests of the store share: opening, filling, copying, and tampering with a closed one behind its back."""

import asyncio
import hashlib
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import apsw

from disk import Disk
from mehdb.model import GENESIS, Chain, Change, Epoch, History, Page, Position, Revision
from mehdb.store import Query, Store, StoreOptions, Write, list_page
from mehdb.store.check import check
from mehdb.store.schema import CHECKSUM_BYTES, PAGE_SIZE, open_reader, use_page_checksums

TABLES = ("meta", "entry", "change")
HISTORY: Final = History("0123456789abcdef" * 2)
RAM: Final = Path("/dev/shm")  # noqa: S108  no file of these is worth a disk


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Store]:
    """Have the store in *directory* open."""
    store = await Store.open(directory, StoreOptions(**options))
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def leading(directory: Path, **options: Any) -> AsyncIterator[Store]:
    """Have the store in *directory* open, at the start of its next epoch."""
    async with opened(directory, **options) as store:
        await store.lead(Epoch(store.meta.epoch + 1))
        yield store


async def put(store: Store, key: bytes, value: bytes | None, content_type: str | None = None) -> Revision:
    """Write one change; a value of None deletes."""
    return await store.write(Write(key, value, content_type))


async def keys_of(store: Store, prefix: bytes = b"", after: bytes = b"", limit: int = 1000) -> list[bytes]:
    """Return live keys in order, as a listing has them."""
    page = await store.scan(lambda reader: list_page(reader, Query(prefix, after, limit=limit)))
    return [item for item in page.items if isinstance(item, bytes)]


async def next_page(leader: Store, follower: Store) -> Page:
    """Return the page that the follower needs next."""
    page = await leader.page_after(follower.position)
    assert page is not None
    return page


async def catch_up(follower: Store, leader: Store) -> int:
    """Apply pages until the follower is at the leader's head. Return how many."""
    pages = 0
    while (page := await leader.page_after(follower.position)) is not None:
        await follower.apply(page)
        pages += 1
    return pages


def problems_of(directory: Path) -> tuple[str, ...]:
    """Return what `check` finds in a store, open or closed."""
    connection = open_reader(directory)
    try:
        return check(connection).problems
    finally:
        connection.close()


def seal_anew(previous: bytes, change: Change) -> tuple[int, Chain]:
    """Return CRC and chain by the format's definition, written here a second time so that no change of it is silent."""
    content_type = b"" if change.content_type is None else change.content_type.encode()
    value = b"" if change.value is None else change.value
    encoded = struct.pack("<Q", change.revision)
    encoded += struct.pack("<I", len(change.key))
    encoded += struct.pack("<i", -1 if change.content_type is None else len(content_type))
    encoded += struct.pack("<q", -1 if change.value is None else len(value))
    encoded += struct.pack("<q", -1 if change.expires_at is None else change.expires_at)
    encoded += change.key + content_type + value
    return zlib.crc32(encoded), Chain(hashlib.blake2b(previous + encoded, digest_size=16).digest())


def chain_anew(changes: list[Change]) -> Chain:
    """Return the chain at the last of *changes*, which start at revision 1."""
    chain = GENESIS
    for change in changes:
        _, chain = seal_anew(chain, change)
    return chain


def pages_of(changes: Sequence[Change], count: int) -> list[Page]:
    """Return *changes*, which start at revision 1, as a leader hands them on: *count* to a page."""
    pages, chain = [], GENESIS
    for start in range(0, len(changes), count):
        some = tuple(changes[start : start + count])
        for change in some:
            _, chain = seal_anew(chain, change)
        pages.append(Page(HISTORY, Epoch(1), Revision(start), chain, some))
    return pages


def sql(directory: Path, statements: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Run SQL on the file of a closed store, as no mehdb would. The checksums of its pages are right afterwards."""
    use_page_checksums()
    connection = apsw.Connection(str(directory / "store.db"))
    try:
        return connection.execute(statements, bindings).fetchall()
    finally:
        connection.close()


def checksum_of(page: bytes) -> bytes:
    """Return the checksum at the end of a page by its definition (https://sqlite.org/cksumvfs.html), written anew."""
    one = two = 0
    for first, second in struct.iter_unpack("<II", page[:-CHECKSUM_BYTES]):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return struct.pack("<II", one, two)


def rewrite(directory: Path, offset: int, data: bytes, *, right_checksum: bool) -> None:
    """Put *data* into the file of a closed store behind its back; into one page, whose checksum may then be right."""
    with (directory / "store.db").open("r+b") as file:
        file.seek(offset)
        file.write(data)
        if right_checksum:
            start = offset - offset % PAGE_SIZE
            file.seek(start)
            checksum = checksum_of(file.read(PAGE_SIZE))
            file.seek(start + PAGE_SIZE - CHECKSUM_BYTES)
            file.write(checksum)


def tables_of(directory: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table, of an open store or a closed one."""
    use_page_checksums()
    connection = apsw.Connection(str(directory / "store.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return {table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in TABLES}  # noqa: S608
    finally:
        connection.close()


def changes_of(directory: Path) -> list[Change]:
    """Return the rows of the log, unverified, by their columns' names."""
    rows = sql(directory, "SELECT revision, key, value, content_type, expires_at FROM change ORDER BY revision")
    return [Change(*row) for row in rows]


def elsewhere(position: Position, **fields: Any) -> Position:
    """Return *position* with other *fields*."""
    return Position(**{name: getattr(position, name) for name in Position.__struct_fields__} | fields)


@contextmanager
def child(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Have another Python run *code*, with pipes to it; it is gone at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Wait for *condition* to hold."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.002)


async def enqueue(store: Store, writes: Iterable[Write]) -> list["asyncio.Task[Revision]"]:
    """Put *writes* into the queue, in order, and return before any of them is acknowledged."""
    tasks = [asyncio.create_task(store.write(write)) for write in writes]
    await asyncio.sleep(0)  # each task runs up to its wait for the acknowledgement
    return tasks


async def outcomes(tasks: Iterable["asyncio.Task[Revision]"], timeout_s: float = 30) -> list[Revision | type]:
    """Return what each task ended with: its revision, or the class of its error."""
    async with asyncio.timeout(timeout_s):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(result) if isinstance(result, BaseException) else result for result in results]


async def fill(store: Store, count: int, value: bytes = b"value") -> None:
    """Write *count* changes of half as many keys."""
    await outcomes(await enqueue(store, [Write(b"key-%d" % (n // 2), value + b"-%d" % n) for n in range(count)]))


def sets(count: int, value: bytes = b"value", first: int = 0) -> Iterable[Write]:
    """Return *count* writes of different keys."""
    return [Write(b"key-%d" % n, value) for n in range(first, first + count)]


async def held(disk: Disk) -> None:
    """Wait until a commit stands before its sync."""
    assert await asyncio.to_thread(disk.waiting.wait, 10)


async def one_in_flight(store: Store, disk: Disk) -> "asyncio.Task[int]":
    """Return a write whose commit stands before its sync: what is enqueued now waits for the batch after it."""
    [task] = await enqueue(store, [Write(b"first", b"in flight")])
    await held(disk)
    return task
