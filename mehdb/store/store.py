"""`Store`: one node's store as the event loop sees it.

It outlives the files: they are opened, closed while another store takes their place, and opened again.
"""

import asyncio
import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

import apsw

from mehdb.errors import (
    Compacted,
    Damaged,
    DamagedRow,
    DiskFull,
    Diverged,
    MehdbError,
    ReadOnly,
    Stopping,
    StoreAway,
    StoreFailed,
)
from mehdb.model import (
    GENESIS,
    ORIGIN,
    PAGE_BYTES,
    VALUE_BYTES_LIMIT,
    Chain,
    Change,
    Epoch,
    History,
    Page,
    Position,
    Revision,
)
from mehdb.store.check import CheckReport, check_directory
from mehdb.store.lock import DirectoryLock
from mehdb.store.log import Log, Write
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.reader import LargeValue, Reader
from mehdb.store.room import Room
from mehdb.store.schema import Meta, is_damage, new_history, open_reader, open_writer, sync_directory, verify_opened
from mehdb.store.snapshot import INCOMING, OUTGOING, Snapshot, install, make_snapshot, remove_leftovers, verify_snapshot
from mehdb.store.writer import Writer

T = TypeVar("T")

SCAN_THREADS: Final = 4  # scans are short and share one interpreter: enough that one slow listing stops no follower
SMALL_VALUE_BYTES: Final = 64 << 10  # 16 pages of the file: still quick if none of them is in the kernel's cache
EMPTY: Final = Meta(None, Epoch(0), ORIGIN, GENESIS, ORIGIN, 0)


@dataclass(frozen=True)
class StoreOptions:
    """How much may wait to be written, how much room is kept free, and how many changes are retained."""

    queue_bytes_max: int = 64 << 20
    disk_reserve_bytes: int = 64 << 20
    retain_changes: int = 100_000


class Store:
    """The store in one data directory. All methods belong to one event loop.

    `open` makes one and opens it; a node makes one that it opens itself with `start`. `close` ends it for good.
    """

    def __init__(self, directory: Path, options: StoreOptions | None = None) -> None:
        self.directory = directory
        self.failure: asyncio.Future[StoreFailed] = asyncio.get_running_loop().create_future()
        """Done when a write or a sync has failed for good: the process must end and acknowledge nothing more."""
        self.damage: DamagedRow | None = None
        """The first damaged row that was met since the store was opened."""
        self._options = options or StoreOptions()
        self._room = Room(directory, self._options.disk_reserve_bytes)
        self._lock: DirectoryLock | None = None
        self._advanced = asyncio.Event()  # set, and replaced, after each commit
        self._interrupts = 0
        self._closing = False
        self._meta = EMPTY  # while there is no writer
        self._commits = 0  # of the writers before
        self._writer: Writer | None = None
        self._point_reader: Reader | None = None  # None: the files are not open
        self._pinned: Meta | None = None  # the state that point reads share a snapshot of
        self._scanners: list[Reader] = []
        self._scanner = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    async def open(cls, directory: Path, options: StoreOptions | None = None) -> Self:
        """Open the store in *directory*, which is made if it does not exist. Raises what `start` does."""
        store = cls(directory, options)
        try:
            await store.start()
        except BaseException:
            await store.close()
            raise
        return store

    async def start(self) -> None:
        """Take the directory's lock and open the store in it.

        Raises `DirectoryInUse`, `UnsafeSqlite`, `UnknownSchema`, `Damaged`, `DiskFull` and `StoreFailed`. The lock is
        kept until `close`: after `DiskFull` it may be tried again, after `Damaged` `replace` may mend it.
        """
        if self._lock is None:
            self._lock = self._locked()
            remove_leftovers(self.directory)
        self._open_files()

    def _locked(self) -> DirectoryLock:
        try:
            if not self.directory.exists():
                self.directory.mkdir(parents=True, exist_ok=True)
                sync_directory(self.directory.parent)
            return DirectoryLock(self.directory)
        except OSError as error:
            raise StoreFailed(
                f"{self.directory} cannot be used: {error.strerror}. In a pod, `fsGroup` makes a volume writable"
            ) from error

    def _open_files(self) -> None:
        """Open what there is: for writing, or for reading alone where the volume allows no more."""
        assert self._lock is not None, "the directory is ours first"  # noqa: S101  our own invariant
        try:
            if self._lock.read_only:
                self._open_for_reading()
            else:
                self._open_for_writing()
        except apsw.FullError as error:
            raise _no_room_to_open(self.directory) from error
        except apsw.Error as error:
            if is_damage(error):
                raise Damaged(f"{self.directory} cannot be read: {error}") from error
            raise StoreFailed(f"{self.directory} cannot be opened: {error}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room_to_open(self.directory) from error
            raise StoreFailed(f"{self.directory} cannot be opened: {error}") from error
        self.damage = None
        self._pool = ThreadPoolExecutor(SCAN_THREADS, "mehdb-scan")
        self._wake()

    def _open_for_reading(self) -> None:
        connection = open_reader(self.directory)
        try:
            self._meta = verify_opened(connection, self.directory)
        finally:
            connection.close()
        self._point_reader = Reader(self.directory)

    def _open_for_writing(self) -> None:
        try:
            connection = open_writer(self.directory)
        except (apsw.FullError, OSError):
            if not self._room.drop_ballast():
                raise
            connection = open_writer(self.directory)
        mark = None
        try:
            log = Log(connection, self._options.retain_changes)
            mark = AcknowledgedMark.open(self.directory)
            mark.move(log.meta.position)
            self._room.take_ballast()
            self._point_reader = Reader(self.directory)
        except BaseException:
            connection.close()
            if mark:
                mark.close()
            raise
        self._writer = Writer(
            connection, log, mark, self._room,
            queue_bytes_max=self._options.queue_bytes_max, on_commit=self._wake, failure=self.failure,
        )  # fmt: skip

    async def close(self) -> None:
        """Finish the queued writes, checkpoint, and let the directory go."""
        self.stop_waiting()
        await self._close_files()
        if self._lock:
            self._lock.release()
            self._lock = None

    async def _close_files(self) -> None:
        if self._point_reader is None or self._pool is None:
            return
        # The readers first: a snapshot that one of them holds would keep the last checkpoint from emptying the WAL.
        self._unpin()
        point_reader, self._point_reader = self._point_reader, None
        point_reader.close()
        await asyncio.to_thread(self._pool.shutdown)
        for reader in self._scanners:
            reader.close()
        self._scanners, self._scanner = [], threading.local()
        if self._writer:
            await self._writer.close()
            self._meta = self._writer.meta
            self._commits += self._writer.commits
            self._writer = None

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Have the files closed, but the directory still locked, while the block puts others there.

        Reads and writes meanwhile raise `StoreAway`. Raises what `start` does when they are opened again; they are not
        if the block fails, as nobody knows then what is there.
        """
        await self._close_files()
        yield
        self._meta = EMPTY
        self._open_files()

    async def replace(
        self, incoming: Path, meta: Meta, keep: str | None, *, only_at: Revision | None = None
    ) -> Path | None:
        """Put the verified store at *incoming* in this one's place; see `snapshot.install`, which says what is kept.

        Raises `Diverged`, and replaces nothing, if a write has moved the head from *only_at*.
        """
        await self._close_files()
        try:
            if only_at not in (None, self._meta.head):
                raise Diverged(f"a write came in between: the head is {self._meta.head}, no longer {only_at}")
            return await asyncio.to_thread(install, self.directory, incoming, meta, keep)
        except OSError as error:
            raise DiskFull(f"{incoming} cannot be installed: {error.strerror}") from error
        finally:
            self._meta = EMPTY
            self._open_files()

    # What is known without a read. All of it is durable.

    @property
    def is_open(self) -> bool:
        """Whether reads are answered."""
        return self._point_reader is not None

    @property
    def read_only(self) -> bool:
        """Whether the volume allows reads alone."""
        return self.is_open and self._writer is None

    @property
    def meta(self) -> Meta:
        """History, epoch, head, chain, floor and number of keys, of one moment."""
        return self._writer.meta if self._writer else self._meta

    @property
    def head(self) -> Revision:
        """The newest revision."""
        return self.meta.head

    @property
    def position(self) -> Position:
        """History, head and the chain there."""
        return self.meta.position

    @property
    def queue_bytes(self) -> int:
        """How many bytes wait to be written."""
        return self._writer.queue_bytes if self._writer else 0

    @property
    def commits(self) -> int:
        """How many transactions have been committed since the process started."""
        return self._commits + (self._writer.commits if self._writer else 0)

    @property
    def short_of_room(self) -> bool:
        """Whether the volume had less than the reserve left when last looked at: sets are refused."""
        return self._writer is not None and self._writer.short_of_room

    def free_bytes(self) -> int:
        """Return how much room the volume has."""
        return self._room.free_bytes()

    # Writes.

    async def write(self, write: Write) -> Revision:
        """Commit *write* and return its revision, once it is durable.

        Raises `KeyNotFound` (a deletion of what was not there), `QueueFull`, `DiskFull`, `ReadOnly`, `StoreAway`,
        `DamagedRow`, `StoreFailed` and `Stopping`.
        """
        outcome = await self._open_writer().write(write)
        if isinstance(outcome, MehdbError):
            raise outcome
        return outcome

    async def apply(self, page: Page) -> None:
        """Commit a leader's *page*, whole or not at all.

        Raises `StaleEpoch`, `Diverged`, `PeerAnswerInvalid`, `DiskFull` and `StoreFailed`.
        """
        await self._open_writer().run(lambda log: log.apply(page))

    async def adopt(self, history: History, epoch: Epoch) -> None:
        """Take *history* into an empty store, and *epoch* into any. Raises `StaleEpoch` and `Diverged`."""
        await self._open_writer().run(lambda log: log.adopt(history, epoch))

    async def lead(self, epoch: Epoch, history: History | None = None) -> None:
        """Begin *epoch*, in *history* or a new one if there is none yet."""
        await self.adopt(self.meta.history or history or new_history(), epoch)

    async def queue_worked_off(self) -> None:
        """Wait until everything that is queued now is durable, or refused."""
        if self._writer:
            await self._writer.run(lambda _log: None)

    def _open_writer(self) -> Writer:
        if self._writer is None or not self.is_open:
            if self.read_only:
                raise ReadOnly("the volume can only be read, nothing was written: see to the disk")
            if self._closing:
                raise Stopping("the store is closed, nothing was written: try again in a moment")
            raise StoreAway("the store is not open just now, nothing was written: try again in a moment")
        return self._writer

    # Reads.

    async def get(self, key: bytes) -> Change | None:
        """Return the change that *key* is live with, None if it is not live. Raises `DamagedRow` and `StoreAway`.

        A small value is read on the event loop, which takes microseconds, a large one in a thread.
        """
        if self._point_reader is None:
            raise _away()
        try:
            self._pin(self._point_reader)
            return self._point_reader.get(key, SMALL_VALUE_BYTES)
        except LargeValue:
            return await self._scan(lambda reader: reader.get(key, VALUE_BYTES_LIMIT))
        except DamagedRow as error:
            self._note_damage(error)
            raise

    async def keys(self, prefix: bytes = b"", after: bytes = b"", limit: int = 1000) -> list[bytes]:
        """Return live keys that start with *prefix* and sort after *after*, in byte order, at most *limit*."""
        return await self._scan(lambda reader: reader.keys(prefix, after, limit))

    async def page_after(self, position: Position) -> Page | None:
        """Return the next page for a store at *position*, None at the head.

        Raises `Diverged` if that is no place in this history, `Compacted` if it is behind the floor, and `DamagedRow`.
        """
        meta = self.meta
        if position.history not in (None, meta.history) and position.revision > ORIGIN:
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
                interrupts = self._interrupts
                while self.head <= revision and self._interrupts == interrupts and not self._closing:
                    await self._advanced.wait()
        except TimeoutError:
            pass
        return self.head > revision

    def interrupt_waiting(self) -> None:
        """Let every `wait_beyond` return that has begun: there is something else to say."""
        self._interrupts += 1
        self._wake()

    def stop_waiting(self) -> None:
        """Let every `wait_beyond` return at once, from now on."""
        self._closing = True
        self._wake()

    async def check(self) -> CheckReport:
        """Verify every invariant of the schema. Takes seconds a million changes; reads and writes go on."""
        return await asyncio.to_thread(check_directory, self.directory)

    async def snapshot(self) -> Snapshot:
        """Make a snapshot, which the caller removes. One at a time. Raises `DiskFull`, `DamagedRow` and `StoreAway`."""
        if self._point_reader is None:
            raise _away()
        try:
            return await asyncio.to_thread(make_snapshot, self.directory, self.directory / OUTGOING, self._room)
        except DamagedRow as error:
            self._note_damage(error)
            raise

    @property
    def incoming(self) -> Path:
        """Where a snapshot from another node is put until `replace` takes it."""
        return self.directory / INCOMING

    async def verified(self, incoming: Path) -> Meta:
        """Return the state of the store at *incoming*, all of it verified. Raises `Damaged` and `UnknownSchema`."""
        return await asyncio.to_thread(verify_snapshot, incoming)

    async def _scan(self, read: Callable[[Reader], T]) -> T:
        """Run *read* in a thread that has a reader of its own."""
        if self._pool is None or self._point_reader is None:
            raise _away()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: read(self._scanner_here()))
        except DamagedRow as error:
            self._note_damage(error)
            raise

    def _note_damage(self, error: DamagedRow) -> None:
        self.damage = self.damage or error

    def _scanner_here(self) -> Reader:
        """Return this thread's reader, opened by its first scan."""
        # Not in the pool's initializer: one that fails, for want of a file descriptor, ends the pool for good.
        reader: Reader | None = getattr(self._scanner, "reader", None)
        if reader is None:
            reader = self._scanner.reader = Reader(self.directory)
            self._scanners.append(reader)
        return reader

    def _pin(self, reader: Reader) -> None:
        """Have point reads share one snapshot, until the next commit or while a checkpoint is due.

        It is begun after `meta` was read, so that it is at that head or beyond.
        """
        meta = self.meta
        if meta is not self._pinned:
            self._unpin()
            if self._writer is None or not self._writer.checkpoint_due:
                reader.begin()
                self._pinned = meta

    def _unpin(self) -> None:
        if self._pinned is not None and self._point_reader is not None:
            self._pinned = None
            self._point_reader.end()

    def _wake(self) -> None:
        self._unpin()  # though nobody may read for a long time: a snapshot that is held lets the WAL grow
        self._advanced.set()
        self._advanced = asyncio.Event()


def _away() -> StoreAway:
    return StoreAway("the store is not open just now: try again in a moment, or read another node")


def _no_room_to_open(directory: Path) -> DiskFull:
    return DiskFull(f"the volume of {directory} is full, the store in it cannot be opened: make room or enlarge it")


def _page_after(reader: Reader, position: Position, meta: Meta) -> Page | None:
    _compare(position, reader.chain(position.revision))
    return reader.page(position.revision, meta, PAGE_BYTES)


def _compare(position: Position, chain: Chain) -> None:
    if position.chain != chain:
        raise Diverged(f"the chain at revision {position.revision} is another: the changes before it differ")
