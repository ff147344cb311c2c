"""A disk that tests can hold, break and pull the plug of: a VFS of SQLite over the real files.

SQLite lets a program put a layer between it and the operating system, so no code of ours is patched: the store opens
its files as it always does, and finds this disk under them.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import apsw

DATABASE, WAL = "store.db", "store.db-wal"
HOLD_S = 30  # a test that forgot to release fails instead of hanging


class Disk(apsw.VFS):
    """The default disk of every connection opened in its `with` block."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.errors: dict[tuple[str, str], Exception] = {}  # by operation and file name: raised once, or while it stays
        self.waiting = threading.Event()  # a sync is being held
        self._released = threading.Event()
        self._released.set()
        self._durable: dict[str, bytes] = {}
        super().__init__("mehdb-tests", "unix", makedefault=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self.unregister()

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802  SQLite's name
        """Open a file of SQLite's."""
        return _File(self, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802  SQLite's name
        """Delete a file of SQLite's."""
        super().xDelete(name, sync_directory)
        self._durable.pop(Path(name).name, None)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let no sync of the WAL begin until the block ends."""
        self._released.clear()
        self.waiting.clear()
        try:
            yield
        finally:
            self._released.set()

    def fail_next(self, operation: str, file: str, error: Exception) -> None:
        """Let the next *operation*, "write" or "sync", on *file* fail, and those after it succeed again."""
        self.errors[operation, file] = error

    def after_power_loss(self, directory: Path) -> Path:
        """Write into *directory* what a power loss at this moment leaves: what was synced, and nothing more."""
        directory.mkdir()
        for name, data in self._durable.items():
            (directory / name).write_bytes(data)
        return directory

    def before(self, operation: str, file: str) -> None:
        """Raise what was set to fail."""
        if error := self.errors.pop((operation, file), None):
            raise error

    def before_sync(self, file: str) -> None:
        """Wait while held."""
        if file == WAL and not self._released.is_set():
            self.waiting.set()
            self._released.wait(HOLD_S)
        self.before("sync", file)

    def synced(self, file: str, data: bytes) -> None:
        """Take note of what is durable."""
        self.syncs[file] += 1
        self._durable[file] = data


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._disk = disk
        self._name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary").name
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802  SQLite's name
        self._disk.before("write", self._name)
        super().xWrite(data, offset)

    def xLock(self, level: int) -> None:  # noqa: N802  SQLite's name
        # The last reader to close tries to lock its read-only file. SQLite passes over that error, apsw raises it.
        try:
            super().xLock(level)
        except apsw.IOError as error:
            raise apsw.BusyError from error

    def xSync(self, flags: int) -> None:  # noqa: N802  SQLite's name
        self._disk.before_sync(self._name)
        super().xSync(flags)
        # Read through SQLite: to open and close the file beside it would drop the process's locks on it.
        self._disk.synced(self._name, self._all())

    def _all(self) -> bytes:
        size_bytes = super().xFileSize()
        return super().xRead(size_bytes, 0) if size_bytes else b""
