"""One process per data directory: two on one volume would each believe to be the only writer."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from mehdb.errors import DirectoryInUse

FILE_NAME: Final = "lock"


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
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = "unknown" if self.read_only else _named(self._fd)
            os.close(self._fd)
            raise DirectoryInUse(directory, holder) from error
        if not self.read_only:
            # Before it is cut: whoever reads the file's first line finds one process or the other, never nothing. On a
            # full volume it names nobody, or somebody who has gone: that is no reason not to start.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0))

    def release(self) -> None:
        """Let the next process have the directory."""
        os.close(self._fd)


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
