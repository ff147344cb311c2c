"""A disk that tests can hold, break, record and pull the plug of: a VFS of SQLite over the real files.

SQLite lets a program put a layer between it and the operating system, so no code of ours is patched: the store opens
its files as it always does, and finds this disk under them. The layer is there for the whole process, as the store's
page checksums go on top of whatever was the default when they were first asked for; a test puts a `Disk` behind it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

import apsw

DATABASE, WAL = "store.db", "store.db-wal"
HOLD_S = 30  # a test that forgot to release fails instead of hanging


class Lie(Exception):
    """What a disk raises before an operation that it does not do, for SQLite to be told that it was done."""


class Disk:
    """The disk under every store that is opened in its `with` block. A subclass may take note of more."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self._errors: dict[tuple[str, str], list[Exception]] = {}  # by operation and file name: each raised once
        self.waiting = threading.Event()  # a sync is being held
        self._released = threading.Event()
        self._released.set()
        self._durable: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        assert VOLUMES.disk is None, "one disk at a time"
        VOLUMES.disk = self
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        VOLUMES.disk = None

    # What a test does.

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let no sync of the WAL begin until the block ends."""
        self._released.clear()
        self.waiting.clear()
        try:
            yield
        finally:
            self._released.set()

    def fail_next(self, operation: str, file: str, error: Exception, times: int = 1) -> None:
        """Let the next *operation* on *file* fail, and those after it succeed again.

        It is "write", "sync", "truncate" or "delete".
        """
        self._errors[operation, file] = [error] * times

    def after_power_loss(self, directory: Path) -> Path:
        """Write into *directory* what a power loss at this moment leaves: what was synced, and nothing more."""
        directory.mkdir()
        for name, data in list(self._durable.items()):  # at one moment: a writer may go on
            (directory / name).write_bytes(data)
        return directory

    # What SQLite does. An exception is its error.

    def opened(self, file: str) -> None:
        """Take note of *file*, which may be new. A store gets its name when it is whole, and synced under another."""
        if new := self._durable.pop(f"{file}.new", None):
            self._durable[file] = new

    def before_delete(self, file: str) -> None:
        """Raise what was set to fail."""
        self._fail("delete", file)

    def deleted(self, file: str) -> None:
        """Take note that *file* has gone."""
        self._durable.pop(file, None)

    def before_write(self, file: str) -> None:
        """Raise what was set to fail."""
        self._fail("write", file)

    def wrote(self, file: str, offset: int, data: bytes) -> None:
        """Take note of what *file* holds now, if the power stays."""

    def before_truncate(self, file: str) -> None:
        """Raise what was set to fail."""
        self._fail("truncate", file)

    def truncated(self, file: str, size_bytes: int) -> None:
        """Take note of how long *file* is now, if the power stays."""

    def before_sync(self, file: str) -> None:
        """Wait while held, and raise what was set to fail."""
        if file == WAL and not self._released.is_set():
            self.waiting.set()
            self._released.wait(HOLD_S)
        self._fail("sync", file)

    def synced(self, file: str, read: Callable[[], bytes]) -> None:
        """Take note of what is durable, which *read* returns."""
        self.syncs[file] += 1
        self._durable[file] = read()

    def _fail(self, operation: str, file: str) -> None:
        if errors := self._errors.get((operation, file)):
            raise errors.pop()


class _Volumes(apsw.VFS):
    """What lies under all stores of this process: the operating system's files, and a test's disk in front of them."""

    def __init__(self) -> None:
        self.disk: Disk | None = None
        super().__init__("mehdb-tests", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802  SQLite's name
        """Open a file of SQLite's. It stays on the disk that it was opened on."""
        return _File(name, flags) if self.disk is None else _FileOnDisk(self.disk, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802  SQLite's name
        """Delete a file of SQLite's."""
        file = Path(name).name
        with suppress(Lie):
            if self.disk is not None:
                self.disk.before_delete(file)
            super().xDelete(name, sync_directory)
            if self.disk is not None:
                self.disk.deleted(file)


class _File(apsw.VFSFile):
    def __init__(self, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("unix", name, flags)

    def xLock(self, level: int) -> None:  # noqa: N802  SQLite's name
        # The last reader to close tries to lock its read-only file. SQLite passes over that error, apsw raises it.
        try:
            super().xLock(level)
        except apsw.IOError as error:
            raise apsw.BusyError from error


class _FileOnDisk(_File):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._disk = disk
        self._name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary").name
        super().__init__(name, flags)
        disk.opened(self._name)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802  SQLite's name
        with suppress(Lie):
            self._disk.before_write(self._name)
            super().xWrite(data, offset)
            self._disk.wrote(self._name, offset, data)

    def xTruncate(self, size_bytes: int) -> None:  # noqa: N802  SQLite's name
        with suppress(Lie):
            self._disk.before_truncate(self._name)
            super().xTruncate(size_bytes)
            self._disk.truncated(self._name, size_bytes)

    def xSync(self, flags: int) -> None:  # noqa: N802  SQLite's name
        with suppress(Lie):
            self._disk.before_sync(self._name)
            super().xSync(flags)
            # Read through SQLite: to open and close the file beside it would drop the process's locks on it.
            self._disk.synced(self._name, self._all)

    def _all(self) -> bytes:
        size_bytes = super().xFileSize()
        return super().xRead(size_bytes, 0) if size_bytes else b""


VOLUMES: Final = _Volumes()
