"""`Store`: one node's store as the event loop sees it."""

import asyncio
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self, TypeVar

from mehdb.errors import Compacted, Diverged, MehdbError, StoreFailed
from mehdb.model import PAGE_BYTES, VALUE_BYTES_LIMIT, Chain, Change, Epoch, History, Page, Position, Revision
from mehdb.store.check import CheckReport, check
from mehdb.store.lock import DirectoryLock
from mehdb.store.log import Write
from mehdb.store.reader import LargeValue, Reader
from mehdb.store.schema import Meta, open_reader, open_writer, sync_directory
from mehdb.store.writer import Writer

T = TypeVar("T")

SCAN_THREADS: Final = 4  # scans are short and share one interpreter: enough that one slow listing stops no follower
SMALL_VALUE_BYTES: Final = 64 << 10  # 16 pages of the file: still quick if none of them is in the kernel's cache
QUEUE_BYTES_MAX: Final = 64 << 20


class Store:
    """The store in one data directory. Made by `open`, ended by `close`; all methods belong to one event loop."""

    def __init__(self, directory: Path, lock: DirectoryLock, queue_bytes_max: int) -> None:
        self._directory = directory
        self._lock = lock
        self._advanced = asyncio.Event()  # set, and replaced, after each commit
        self._closing = False
        self._pinned: Meta | None = None  # the state that point reads share a snapshot of
        connection = open_writer(directory)
        try:
            self._point_reader = Reader(directory)
        except BaseException:
            connection.close()
            raise
        self._writer = Writer(connection, queue_bytes_max, self._wake)
        self._scanners: list[Reader] = []
        self._scanner = threading.local()
        self._pool = ThreadPoolExecutor(SCAN_THREADS, "mehdb-scan")

    @classmethod
    async def open(cls, directory: Path, *, queue_bytes_max: int = QUEUE_BYTES_MAX) -> Self:
        """Open the store in *directory*, which is made if it does not exist.

        Raises `DirectoryInUse`, `UnsafeSqlite`, `UnknownSchema` and `StoreFailed`.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  once, before anything is served
            sync_directory(directory.parent)
            lock = DirectoryLock(directory)
        except OSError as error:
            raise StoreFailed(
                f"{directory} cannot be used: {error.strerror}. In a pod, `fsGroup` makes a volume writable"
            ) from error
        try:
            return cls(directory, lock, queue_bytes_max)
        except BaseException:
            lock.release()
            raise

    async def close(self) -> None:
        """Finish the queued writes, checkpoint, and let the directory go."""
        self.stop_waiting()
        # The readers first: a snapshot that one of them holds would keep the last checkpoint from emptying the WAL.
        await asyncio.to_thread(self._pool.shutdown)
        self._unpin()
        for reader in (self._point_reader, *self._scanners):
            reader.close()
        await self._writer.close()
        self._lock.release()

    # What is known without a read. All of it is durable.

    @property
    def meta(self) -> Meta:
        """History, epoch, head, chain, floor and number of keys, of one moment."""
        return self._writer.meta

    @property
    def head(self) -> Revision:
        """The newest revision."""
        return self._writer.meta.head

    @property
    def position(self) -> Position:
        """History, head and the chain there."""
        return self._writer.meta.position

    @property
    def queue_bytes(self) -> int:
        """How many bytes wait to be written."""
        return self._writer.queue_bytes

    @property
    def commits(self) -> int:
        """How many transactions have been committed since the store was opened."""
        return self._writer.commits

    @property
    def failure(self) -> "asyncio.Future[StoreFailed]":
        """Done when a write or a sync has failed for good: the process must end without acknowledging anything more."""
        return self._writer.failure

    # Writes.

    async def write(self, write: Write) -> Revision:
        """Commit *write* and return its revision, once it is durable.

        Raises `KeyNotFound` (a deletion of what was not there), `QueueFull`, `DiskFull`, `StoreFailed` and `Stopping`.
        """
        outcome = await self._writer.write(write)
        if isinstance(outcome, MehdbError):
            raise outcome
        return outcome

    async def apply(self, page: Page) -> None:
        """Commit a leader's *page*, whole or not at all.

        Raises `StaleEpoch`, `Diverged`, `PeerAnswerInvalid`, `DiskFull` and `StoreFailed`.
        """
        await self._writer.run(lambda log: log.apply(page))

    async def adopt(self, history: History, epoch: Epoch) -> None:
        """Take *history* into an empty store, and *epoch* into any. Raises `StaleEpoch` and `Diverged`."""
        await self._writer.run(lambda log: log.adopt(history, epoch))

    async def lead(self, epoch: Epoch) -> None:
        """Begin *epoch*, with a new history if there is none yet."""
        await self.adopt(self.meta.history or History(secrets.token_hex(16)), epoch)

    # Reads.

    async def get(self, key: bytes) -> Change | None:
        """Return the change that *key* is live with, None if it is not live. Raises `DamagedRow`.

        A small value is read on the event loop, which takes microseconds, a large one in a thread.
        """
        self._pin()
        try:
            return self._point_reader.get(key, SMALL_VALUE_BYTES)
        except LargeValue:
            return await self._scan(lambda reader: reader.get(key, VALUE_BYTES_LIMIT))

    async def keys(self, prefix: bytes = b"", after: bytes = b"", limit: int = 1000) -> list[bytes]:
        """Return live keys that start with *prefix* and sort after *after*, in byte order, at most *limit*."""
        return await self._scan(lambda reader: reader.keys(prefix, after, limit))

    async def page_after(self, position: Position) -> Page | None:
        """Return the next page for a store at *position*, None at the head.

        Raises `Diverged` if that is no place in this history, `Compacted` if it is behind the floor, and `DamagedRow`.
        """
        meta = self.meta
        if position.history not in (None, meta.history):
            raise Diverged(f"history {position.history} is another than {meta.history}")
        if position.revision > meta.head:
            raise Diverged(f"revision {position.revision} is ahead of the head {meta.head}")
        if position.revision < meta.floor:
            raise Compacted(f"revision {position.revision} is behind the floor {meta.floor}")
        if position.revision == meta.head:
            _compare(position, meta.chain)
            return None
        return await self._scan(lambda reader: _page_after(reader, position, meta))

    async def wait_beyond(self, revision: Revision, timeout_s: float) -> bool:
        """Wait until the head is beyond *revision*, at most *timeout_s*. Return whether it is."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.head <= revision and not self._closing:
                    await self._advanced.wait()
        except TimeoutError:
            pass
        return self.head > revision

    def stop_waiting(self) -> None:
        """Let every `wait_beyond` return at once, from now on."""
        self._closing = True
        self._wake()

    async def check(self) -> CheckReport:
        """Verify every invariant of the schema. Takes seconds a million changes; reads and writes go on."""
        return await asyncio.to_thread(self._check)

    def _check(self) -> CheckReport:
        connection = open_reader(self._directory)
        try:
            return check(connection)
        finally:
            connection.close()

    async def _scan(self, read: Callable[[Reader], T]) -> T:
        """Run *read* in a thread that has a reader of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: read(self._scanner_here()))

    def _scanner_here(self) -> Reader:
        """Return this thread's reader, opened by its first scan."""
        # Not in the pool's initializer: one that fails, for want of a file descriptor, ends the pool for good.
        reader: Reader | None = getattr(self._scanner, "reader", None)
        if reader is None:
            reader = self._scanner.reader = Reader(self._directory)
            self._scanners.append(reader)
        return reader

    def _pin(self) -> None:
        """Have point reads share one snapshot, until the next commit or while a checkpoint is due.

        It is begun after `meta` was read, so that it is at that head or beyond.
        """
        meta = self._writer.meta
        if meta is not self._pinned:
            self._unpin()
            if not self._writer.checkpoint_due:
                self._point_reader.begin()
                self._pinned = meta

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned = None
            self._point_reader.end()

    def _wake(self) -> None:
        self._unpin()  # though nobody may read for a long time: a snapshot that is held lets the WAL grow
        self._advanced.set()
        self._advanced = asyncio.Event()


def _page_after(reader: Reader, position: Position, meta: Meta) -> Page | None:
    _compare(position, reader.chain(position.revision))
    return reader.page(position.revision, meta, PAGE_BYTES)


def _compare(position: Position, chain: Chain) -> None:
    if position.chain != chain:
        raise Diverged(f"the chain at revision {position.revision} is another: the changes before it differ")
