"""One process per data directory: two on one volume would each believe to be the only writer.

And one operator's command, which has the files while the node there is suspended: if that ends, no other starts.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from mehdb.errors import CommandAtWork, DirectoryInUse, StoreFailed
from mehdb.store.files import sync_directory

FILE_NAME: Final = "lock"
COMMAND_NAME: Final = "operation"


class DirectoryLock:
    """An exclusive `flock` on DIRECTORY/lock, held until `release`. The kernel drops it when the process dies."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises `DirectoryInUse`, naming the process that holds it."""
        self.read_only = False
        """Whether the volume can only be read. The lock is then on the directory: nobody can have another."""
        try:
            # Opened without truncating: the file names its holder until the lock is ours.
            self._fd = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self.read_only = True
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not _locked(self._fd, fcntl.LOCK_EX):
            holder = "unknown" if self.read_only else _named(self._fd)
            os.close(self._fd)
            raise DirectoryInUse(directory, holder)
        if not self.read_only:
            _name(self._fd)

    def release(self) -> None:
        """Let the next process have the directory."""
        os.close(self._fd)


class CommandLock:
    """An exclusive `flock` on DIRECTORY/operation, held by a command while the files there are its own."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises `CommandAtWork`, naming the process that holds it."""
        self._fd = os.open(directory / COMMAND_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _locked(self._fd, fcntl.LOCK_EX):
            holder = _named(self._fd)
            os.close(self._fd)
            raise CommandAtWork(directory, holder)
        _name(self._fd)

    def release(self) -> None:
        """Let the next command, or a node that starts, have the files."""
        os.close(self._fd)


def take_directory(directory: Path) -> DirectoryLock:
    """Return the lock of *directory*, which is made if it does not exist.

    Raises `DirectoryInUse`, `CommandAtWork`, and `StoreFailed` where it cannot be used.
    """
    try:
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
        lock = DirectoryLock(directory)
        try:
            refuse_beside_command(directory)
        except BaseException:
            lock.release()
            raise
        return lock  # noqa: TRY300  what any of it raises is told alike
    except OSError as error:
        raise StoreFailed(
            f"{directory} cannot be used: {error.strerror}. In a pod, `fsGroup` makes a volume writable"
        ) from error


def refuse_beside_command(directory: Path) -> None:
    """Raise `CommandAtWork` if a command has the files in *directory*, whose lock is held."""
    try:
        fd = os.open(directory / COMMAND_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not _locked(fd, fcntl.LOCK_SH):
            raise CommandAtWork(directory, _named(fd))
    finally:
        os.close(fd)


def _locked(fd: int, kind: int) -> bool:
    """Take the lock on the file at once. Return whether nobody else has it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name(fd: int) -> None:
    """Have the locked file name this process."""
    # Before it is cut: whoever reads the file's first line finds one process or the other, never nothing. On a full
    # volume it names nobody, or somebody who has gone: that is no reason not to start.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, os.pwrite(fd, f"{os.getpid()}\n".encode(), 0))


def _named(fd: int) -> str:
    return os.pread(fd, 32, 0).decode(errors="replace").partition("\n")[0] or "unknown"


def lock_holder(directory: Path) -> str | None:
    """Return the process that has *directory*, as text; None if nobody has."""
    try:
        DirectoryLock(directory).release()
    except DirectoryInUse as error:
        return error.holder
    except OSError:  # there is no such directory, or not for us
        return None
    return None
