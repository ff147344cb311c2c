"""The open files of a store, from one opening to the next closing: a writer, a reader for points, readers for scans.

Where the volume can only be read there is no writer.
"""

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypeVar

import apsw

from mehdb.errors import Compacted, Damaged, DamagedRow, DiskFull, NotNow, StoreFailed
from mehdb.model import VALUE_BYTES_LIMIT, Change, Revision
from mehdb.store.clock import Clock
from mehdb.store.log import Log
from mehdb.store.mark import AcknowledgedMark
from mehdb.store.reader import LargeValue, Reader
from mehdb.store.room import Room
from mehdb.store.schema import FILE_NAME, WAL_NAME, Meta, is_damage, open_reader, open_writer, verify_opened
from mehdb.store.tally import Tally
from mehdb.store.writer import Writer

T = TypeVar("T")

SCAN_THREADS: Final = 4  # scans are short and share one interpreter: enough that one slow listing stops no follower
FEW_KEYS: Final = 128  # half a millisecond: less than a thread would cost the event loop
FEW_VALUE_BYTES: Final = 4 << 10  # so that all of them are little as well
SMALL_VALUE_BYTES: Final = 64 << 10  # 16 pages of the file: still quick if none of them is in the kernel's cache


@dataclass(frozen=True)
class StoreOptions:
    """How much may wait to be written, how much room is kept free, how many changes are retained, and what time it is.

    The clock is one for all openings of the store: it must not be set anew by one.
    """

    queue_bytes_max: int = 64 << 20
    disk_reserve_bytes: int = 64 << 20
    retain_changes: int = 100_000
    clock: Clock = field(default_factory=Clock)


class OpenFiles:
    """The files of a store in *directory*, as they are when it is opened."""

    def __init__(self, directory: Path) -> None:
        self._path, self._wal = directory / FILE_NAME, directory / WAL_NAME
        self._file, self._wal_file = _identity(self._path), _identity(self._wal)

    def vanished(self) -> bool:
        """Return whether one has been deleted, replaced or emptied behind this process's back."""
        lost_wal = self._wal_file is not None and _identity(self._wal) != self._wal_file
        return lost_wal or _identity(self._path) != self._file


class Session:
    """Open files. All methods belong to one event loop. *writer* is None where *meta* can only be read."""

    def __init__(
        self, directory: Path, files: "OpenFiles", writer: Writer | None, meta: Meta, point_reader: Reader
    ) -> None:
        self.writer = writer
        self.vanished = files.vanished
        self._meta = meta
        self._directory = directory
        self._point_reader = point_reader
        self._pinned: Meta | None = None  # the state that point reads share a snapshot of
        self._scanners: list[Reader] = []
        self._scanner = threading.local()
        self._pool = ThreadPoolExecutor(SCAN_THREADS, "mehdb-scan")

    @classmethod
    def open_for_reading(cls, directory: Path) -> Self:
        """Open the store in *directory*, on a volume that allows no more. Raises what `open_for_writing` does."""
        with _failures(directory):
            connection = open_reader(directory)
            try:
                meta = verify_opened(connection, directory)
            finally:
                connection.close()
            return cls(directory, OpenFiles(directory), None, meta, Reader(directory))

    @classmethod
    def open_for_writing(
        cls,
        directory: Path,
        options: StoreOptions,
        room: Room,
        tally: Tally,
        *,
        on_commit: Callable[[], None],
        on_damage: Callable[[DamagedRow], None],
        failure: "asyncio.Future[StoreFailed]",
    ) -> Self:
        """Open or create the store in *directory*.

        Raises `UnsafeSqlite`, `UnknownSchema`, `Damaged`, `DiskFull` and `StoreFailed`.
        """
        with _failures(directory):
            try:
                connection = open_writer(directory)
            except (apsw.Error, OSError) as error:
                if not (_lacks_room(error) and room.drop_ballast()):
                    raise
                connection = open_writer(directory)
            mark = None
            try:
                log = Log(connection, options.retain_changes, options.clock, tally)
                mark = AcknowledgedMark.open(directory)
                mark.move(log.meta.position)
                room.take_ballast()
                point_reader = Reader(directory)
            except BaseException:
                connection.close()
                if mark:
                    mark.close()
                raise
        files = OpenFiles(directory)
        writer = Writer(
            connection, log, mark, room, files.vanished,
            queue_bytes_max=options.queue_bytes_max, on_commit=on_commit, on_damage=on_damage, failure=failure,
        )  # fmt: skip
        return cls(directory, files, writer, log.meta, point_reader)

    async def close(self) -> None:
        """Finish the queued writes, checkpoint, close the files."""
        # The readers first: a snapshot that one of them holds would keep the last checkpoint from emptying the WAL.
        await asyncio.to_thread(self._pool.shutdown)
        self.unpin()
        for reader in (self._point_reader, *self._scanners):
            reader.close()
        if self.writer:
            await self.writer.close()

    @property
    def meta(self) -> Meta:
        """What is durable."""
        return self.writer.meta if self.writer else self._meta

    def continues(self, before: Meta) -> bool:
        """Return whether this is certainly a later state of a store that was at *before*."""
        if self.meta.history != before.history or self.meta.head < before.head:
            return False
        try:
            return self._point_reader.chain(before.head) == before.chain
        except (Compacted, DamagedRow):
            return False

    async def get(self, key: bytes) -> Change | None:
        """Return the change that *key* is live with, None if it is not live. Raises `DamagedRow`.

        A small value is read on the event loop, which takes microseconds, a large one in a thread.
        """
        self._pin()
        try:
            return self._point_reader.get(key, SMALL_VALUE_BYTES)
        except LargeValue:
            return await self.scan(lambda reader: reader.get(key, VALUE_BYTES_LIMIT))

    async def several(self, keys: tuple[bytes, ...], bytes_max: int) -> tuple[Revision, list[Change]]:
        """Return what those of *keys* that are live are live with, as `Reader.several` does.

        Some small values are read on the event loop, anything else in a thread.
        """
        if len(keys) <= FEW_KEYS:
            self._pin()
            with contextlib.suppress(LargeValue):
                return self._point_reader.several(keys, FEW_VALUE_BYTES, bytes_max)
        return await self.scan(lambda reader: reader.several(keys, VALUE_BYTES_LIMIT, bytes_max))

    async def scan(self, read: Callable[[Reader], T]) -> T:
        """Run *read* in a thread that has a reader of its own."""
        found = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: read(self._scanner_here()))
        self.unpin()  # it may have seen a commit that the point reads' snapshot has not: they must not go back
        return found

    def _scanner_here(self) -> Reader:
        """Return this thread's reader, opened by its first scan."""
        # Not in the pool's initializer: one that fails, for want of a file descriptor, ends the pool for good.
        reader: Reader | None = getattr(self._scanner, "reader", None)
        if reader is None:
            try:
                reader = self._scanner.reader = Reader(self._directory)
            except (apsw.Error, OSError) as error:
                if is_damage(error):
                    raise DamagedRow(f"the store cannot be opened again: {error}: read another node") from error
                raise NotNow(f"the store cannot be opened once more: {error}: try again in a moment") from error
            self._scanners.append(reader)
        return reader

    def _pin(self) -> None:
        """Have point reads share one snapshot, until the next commit or while a checkpoint is due.

        It is begun after `meta` was read, so that it is at that head or beyond.
        """
        meta = self.meta
        if meta is not self._pinned:
            self.unpin()
            if self.writer is None or not self.writer.checkpoint_due:
                self._point_reader.begin()
                self._pinned = meta

    def unpin(self) -> None:
        """Let go of the snapshot: while it is held, SQLite cannot use the WAL again from its start."""
        if self._pinned is not None:
            self._pinned = None
            self._point_reader.end()


@contextlib.contextmanager
def _failures(directory: Path) -> Iterator[None]:
    """Say of what opening a store may end in whether it can be mended, may pass, or neither."""
    try:
        yield
    except (apsw.Error, OSError) as error:
        if _lacks_room(error):
            raise DiskFull(
                f"the volume of {directory} is full, the store in it cannot be opened: make room or enlarge it"
            ) from error
        if is_damage(error):
            raise Damaged(f"{directory} cannot be read: {error}") from error
        raise StoreFailed(f"{directory} cannot be opened: {error}") from error


def _lacks_room(error: apsw.Error | OSError) -> bool:
    """Return whether *error*, of opening a store, says that the volume is full."""
    if isinstance(error, apsw.IOError):  # the index of the WAL needs room in a file of its own before anything is read
        return getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_SHMSIZE
    return isinstance(error, apsw.FullError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  a Path is not quicker
    except OSError:
        return None
    emptied = path.name == FILE_NAME and not found.st_size  # a WAL may be empty
    return None if emptied else (found.st_dev, found.st_ino)
