"""`Store`: one node's store as the event loop sees it.

It outlives the files: they are opened, closed while another store takes their place, and opened again.
"""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, Self, TypeVar, cast

from mehdb.errors import (
    Compacted,
    Damaged,
    DamagedRow,
    DiskFull,
    MehdbError,
    ReadOnly,
    Stopping,
    StoreAway,
    StoreFailed,
)
from mehdb.figures import StoreFigures, Transfers
from mehdb.model import GENESIS, ORIGIN, Change, Epoch, History, Page, Position, Revision
from mehdb.store.check import CheckReport, check_directory
from mehdb.store.decision import Batch, Outcome, Request, Write
from mehdb.store.lock import DirectoryLock, take_directory
from mehdb.store.mark import read_mark
from mehdb.store.moments import Moments
from mehdb.store.pages import is_at_head, page_after
from mehdb.store.reader import Reader
from mehdb.store.room import Room
from mehdb.store.schema import FILE_NAME, WAL_NAME, Meta, new_history
from mehdb.store.session import Session, StoreOptions
from mehdb.store.snapshot import (
    INCOMING,
    OUTGOING,
    Snapshot,
    continues,
    install,
    make_snapshot,
    passed,
    remove_leftovers,
    take_back_half_kept,
)
from mehdb.store.tally import Tally
from mehdb.store.threads import in_thread, whole
from mehdb.store.waiters import Waiters
from mehdb.store.writer import Writer

T = TypeVar("T")

log = logging.getLogger("mehdb.store")

EMPTY: Final = Meta(None, Epoch(0), ORIGIN, GENESIS, ORIGIN, 0, 0)


class Store:
    """The store in one data directory. All methods belong to one event loop.

    `open` makes one and opens it; a node makes one that it opens itself with `start`. `close` ends it for good.
    """

    def __init__(self, directory: Path, options: StoreOptions | None = None) -> None:
        self.directory = directory
        self.failure: asyncio.Future[StoreFailed] = asyncio.get_running_loop().create_future()
        """Done when a write or a sync has failed for good: the process must end and acknowledge nothing more."""
        self.damaged: Damaged | None = None
        """Why the store could not be opened, if that is so: another one may take its place (`replace`)."""
        self.lineage = 0
        """Grows when a store is opened that is not certainly a later state of the one that was open before."""
        self.damage: DamagedRow | None = None
        """The first damaged row that was met since the store was opened."""
        self._options = options or StoreOptions()
        self._room = Room(directory, self._options.disk_reserve_bytes)
        self._lock: DirectoryLock | None = None
        self._session: Session | None = None
        self._meta = EMPTY  # while there is no session
        self._marked = Position()  # of a damaged store
        self._commits = 0  # of the sessions before
        self._tally = Tally()
        self._moments = Moments()
        self._waiters = Waiters()

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

        Raises `DirectoryInUse`, `CommandAtWork`, `UnsafeSqlite`, `UnknownSchema`, `Damaged`, `DiskFull` and
        `StoreFailed`. The lock is kept until `close`: after `DiskFull` it may be tried again, after `Damaged` `replace`
        may mend it.
        """
        if self._lock is None:
            self._lock = take_directory(self.directory)
            remove_leftovers(self.directory)
        self._open_files()

    def _open_files(self) -> None:
        """Open what there is: for writing, or for reading alone where the volume allows no more."""
        assert self._lock is not None, "the directory is ours first"  # noqa: S101  our own invariant
        take_back_half_kept(self.directory)
        before = self._meta
        self._meta, self.damage, self.damaged = EMPTY, None, None
        try:
            self._open_session(read_only=self._lock.read_only)
        except Damaged as error:
            self.damaged, self._marked = error, read_mark(self.directory) or Position()
            self.lineage += 1
            raise
        if self._session is not None and not self._session.continues(before):
            self.lineage += 1
        self._wake()

    def _open_session(self, *, read_only: bool) -> None:
        if read_only:
            log.warning("volume can only be read directory=%s", self.directory)
            self._session = Session.open_for_reading(self.directory)
        else:
            self._session = Session.open_for_writing(
                self.directory, self._options, self._room, self._tally,
                on_commit=self._wake, on_damage=self._note_damage, failure=self.failure,
            )  # fmt: skip

    async def reopen(self) -> None:
        """Open the files if they are closed, though sound: another store could not take their place.

        Raises `DiskFull`.
        """
        if self._session is None and self.damaged is None:
            with contextlib.suppress(Damaged):
                await self.start()

    async def close(self) -> None:
        """Finish the queued writes, checkpoint, and let the directory go."""
        self.stop_waiting()
        await self._close_files()
        if self._lock:
            self._lock.release()
            self._lock = None

    async def _close_files(self) -> None:
        session, self._session = self._session, None
        if session:
            self._meta = session.meta
            await session.close()
            self._meta = session.meta
            self._commits += session.writer.commits if session.writer else 0

    @contextlib.asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Have the files closed, but the directory still locked, while the block puts others there.

        Reads and writes meanwhile raise `StoreAway`. Raises what `start` does when they are opened again; they are not
        if the block fails, as nobody knows then what is there.
        """
        await whole(self._close_files())
        yield
        self._open_files()

    async def replace(self, incoming: Path, meta: Meta, keep: str | None) -> Path | None:
        """Put the verified store at *incoming* in this one's place; see `snapshot.install`, which says what is kept."""
        return await whole(self._replace(incoming, meta, keep))

    async def _replace(self, incoming: Path, meta: Meta, keep: str | None) -> Path | None:
        await self._close_files()
        try:
            kept = await asyncio.to_thread(install, self.directory, incoming, meta, keep)
        except BaseException as error:
            with contextlib.suppress(Damaged):  # as before: what was in the way is what has to be told
                self._open_files()
            if isinstance(error, OSError):
                kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreFailed
                raise kind(f"{incoming} cannot be put in the store's place: {error.strerror}") from error
            raise
        self._open_files()
        self._tally.taken.completed += 1
        return kept

    # What is known without a read. All of it is durable.

    @property
    def is_open(self) -> bool:
        """Whether reads are answered."""
        return self._session is not None

    @property
    def read_only(self) -> bool:
        """Whether the volume allows reads alone."""
        return self._session is not None and self._session.writer is None

    @property
    def meta(self) -> Meta:
        """History, epoch, head, chain, floor and number of keys, of one moment."""
        return self._session.meta if self._session else self._meta

    @property
    def head(self) -> Revision:
        """The newest revision."""
        return self.meta.head

    @property
    def position(self) -> Position:
        """History, head and the chain there."""
        return self.meta.position

    def reached(self) -> Position:
        """Return the position; of a damaged store the last one that it acknowledged, if that is known."""
        return self.position if self.damaged is None else self._marked

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

    @property
    def _writer(self) -> Writer | None:
        return self._session.writer if self._session else None

    def vanished(self) -> bool:
        """Return whether the store's file was deleted or replaced behind this process's back."""
        return self._session is not None and self._session.vanished()

    def free_bytes(self) -> int:
        """Return how much room the volume has."""
        return self._room.free_bytes()

    def size_bytes(self) -> int:
        """Return how much the store's files take."""
        return self._room.store_bytes()

    def came_at_s(self, revision: Revision) -> float | None:
        """Return when *revision* came to be, by the monotonic clock: when this store was opened, if it came before.

        It may be said to have come earlier than it did, by a hundredth of its age. None if it has not come yet.
        """
        return self._moments.came_at_s(revision)

    @property
    def sent(self) -> Transfers:
        """The snapshots that others have got of it."""
        return self._tally.sent

    @property
    def taken(self) -> Transfers:
        """The snapshots of others that have been put in its place."""
        return self._tally.taken

    def figures(self) -> StoreFigures:
        """Return what it has counted since the process started, and what room there is."""
        tally = self._tally
        return StoreFigures(
            commit_seconds=tally.commit_seconds.distribution(),
            commit_changes=tally.commit_changes.distribution(),
            sync_seconds=tally.sync_seconds.distribution(),
            compaction_backlog_changes=self._writer.backlog_changes() if self._writer else 0,
            compacted_changes=tally.compacted_changes,
            volume_size_bytes=self._room.volume_bytes(),
            store_size_bytes=self._room.file_bytes(FILE_NAME),
            wal_size_bytes=self._room.file_bytes(WAL_NAME),
            sent=replace(tally.sent),
            taken=replace(tally.taken),
        )

    # Writes.

    async def write(self, write: Write) -> Revision:
        """Commit *write* and return its revision, once it is durable.

        Raises `KeyNotFound` (a deletion of what was not there), `PreconditionFailed`, `QueueFull`, `DiskFull`,
        `ReadOnly`, `StoreAway`, `DamagedRow`, `StoreFailed` and `Stopping`.
        """
        return cast("Revision", await self._outcome(write))

    async def write_batch(self, batch: Batch) -> tuple[Revision, ...]:
        """Commit all of *batch* and return the revision of each operation, once all are durable; see `Outcome`.

        Raises what `write` does.
        """
        return cast("tuple[Revision, ...]", await self._outcome(batch))

    async def _outcome(self, request: Request) -> Outcome:
        outcome = await self._open_writer().write(request)
        if isinstance(outcome, DamagedRow):
            self._note_damage(outcome)
        if isinstance(outcome, MehdbError):
            raise outcome
        return outcome

    @property
    def expiry_due(self) -> bool:
        """Whether a key has outlived its time, or may have."""
        return self._writer is not None and self._writer.expiry_due

    async def expire(self) -> None:
        """Delete keys that have outlived their time: some of them, so often as it is due. Raises what `write` does.

        What is damaged stays, and is taken note of.
        """
        with self._noting():
            await self._open_writer().expire()

    def now_ms(self) -> int:
        """Return the time that expiry goes by, in milliseconds since the Unix epoch."""
        return self._options.clock.now_ms()

    async def apply(self, page: Page) -> None:
        """Commit a leader's *page*, whole or not at all.

        Raises `StaleEpoch`, `Diverged`, `PeerAnswerInvalid`, `DiskFull` and `StoreFailed`.
        """
        with self._noting():
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
        if self._writer is None:
            if self.read_only:
                raise ReadOnly("the volume can only be read, nothing was written: see to the disk")
            if self._waiters.ended:
                raise Stopping("the store is closed, nothing was written: try again in a moment")
            raise StoreAway("the store is not open just now, nothing was written: try again in a moment")
        return self._writer

    # Reads.

    async def get(self, key: bytes) -> Change | None:
        """Return the change that *key* is live with, None if it is not live. Raises `DamagedRow` and `StoreAway`."""
        session = self._reading()
        try:  # not `_noting`: each GET passes here
            return await session.get(key)
        except DamagedRow as error:
            self._note_damage(error)
            raise

    async def several(self, keys: tuple[bytes, ...], bytes_max: int) -> tuple[Revision, list[Change]]:
        """Return what those of *keys* that are live are live with, in any order, and the revision of that state.

        Raises `DamagedRow`, `StoreAway`, and `AnswerTooLarge` if they have more than *bytes_max* together.
        """
        with self._noting():
            return await self._reading().several(keys, bytes_max)

    async def page_after(self, position: Position) -> Page | None:
        """Return the next page for a store at *position*, None at the head. Raises what `page_after` does."""
        meta = self.meta
        if is_at_head(position, meta):
            return None
        return await self.scan(lambda reader: page_after(reader, position, meta))

    @property
    def watched_head(self) -> Revision:
        """The newest revision that `changes_after` gives without a look at the disk, where changes are fed at all."""
        return self._writer.feed.head if self._writer else self.head

    async def changes_after(self, revision: Revision, limit: int, bytes_max: int) -> Sequence[Change]:
        """Return changes after *revision*, up to *limit* from memory, or about *bytes_max* from the disk.

        Raises `Compacted` if it is behind the floor, `DamagedRow` and `StoreAway`.
        """
        found = self._writer.feed.after(revision, limit) if self._writer else None
        if found is not None:
            return found
        meta = self.meta
        if revision < meta.floor:
            raise Compacted(f"revision {revision} is behind the floor {meta.floor}", floor=meta.floor)
        page = await self.scan(lambda reader: reader.page(revision, meta, bytes_max))
        return page.changes if page else ()

    async def wait_to_watch(self, revision: Revision, timeout_s: float) -> bool:
        """Wait until there is a change after *revision* to watch, at most *timeout_s*. Return whether there is."""
        return await self._waiters.until(lambda: self.watched_head > revision, timeout_s)

    @property
    def waits_no_more(self) -> bool:
        """Whether every wait returns at once: the node stops."""
        return self._waiters.ended

    async def wait_beyond(self, revision: Revision, timeout_s: float) -> bool:
        """Wait until the head is beyond *revision*, at most *timeout_s*. Return whether it is."""
        return await self._waiters.until(lambda: self.head > revision, timeout_s)

    def interrupt_waiting(self) -> None:
        """Let every `wait_beyond` return that has begun: there is something else to say."""
        self._waiters.interrupt()

    def stop_waiting(self) -> None:
        """Let every `wait_beyond` return at once, from now on."""
        self._waiters.end()

    async def check(self) -> CheckReport:
        """Verify every invariant of the schema. Takes seconds a million changes; reads and writes go on."""
        return await in_thread(partial(check_directory, self.directory))

    async def snapshot(self) -> Snapshot:
        """Make a snapshot, which the caller removes. One at a time. Raises `DiskFull`, `DamagedRow` and `StoreAway`."""
        self._reading()
        with self._noting():
            return await in_thread(partial(make_snapshot, self.directory, self.directory / OUTGOING, self._room))

    @property
    def incoming(self) -> Path:
        """Where a snapshot from another node is put until `replace` takes it."""
        return self.directory / INCOMING

    async def continued_by(self, incoming: Path) -> bool:
        """Return whether the snapshot at *incoming* is a later state of this store; False if that cannot be told.

        Raises `Diverged` if it certainly is not. See `continues`; of a damaged store the mark is all there is.
        """
        reached = self.reached()
        if reached.revision == ORIGIN:
            return True
        if self.damaged is not None:
            return await asyncio.to_thread(passed, incoming, reached)
        try:
            return await asyncio.to_thread(continues, incoming, self.directory, self.head)
        except DamagedRow as error:
            self._note_damage(error)
            return False

    async def scan(self, read: Callable[[Reader], T]) -> T:
        """Return what *read* does, in a thread, with a reader of its own. Raises what it does, and `StoreAway`."""
        with self._noting():
            return await self._reading().scan(read)

    def _reading(self) -> Session:
        """Return the open files. Raises `StoreAway`."""
        if self._session is None:
            raise StoreAway("the store is not open just now: try again in a moment, or read another node")
        return self._session

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Take note of damage that the block meets."""
        try:
            yield
        except DamagedRow as error:
            self._note_damage(error)
            raise

    def _note_damage(self, error: DamagedRow) -> None:
        if self.damage is None:
            self.damage = error
            log.error('damaged reason="%s"', error)

    def _wake(self) -> None:
        self._moments.note(self.head, monotonic())
        if self._session:
            self._session.unpin()  # though nobody may read for a long time: a snapshot that is held lets the WAL grow
        self._waiters.wake()
