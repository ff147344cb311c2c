"""One process per data directory: two on one volume would each believe to be the only writer."""

import fcntl
import os
from pathlib import Path

from mehdb.errors import DirectoryInUse


class DirectoryLock:
    """An exclusive `flock` on DIRECTORY/lock, held until `release`. The kernel drops it when the process dies."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises `DirectoryInUse`, naming the process that holds it."""
        # Opened without truncating: the file names its holder until the lock is ours.
        self._fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").partition("\n")[0] or "unknown"
            os.close(self._fd)
            raise DirectoryInUse(directory, holder) from error
        # Written before it is cut: whoever reads the file's first line finds one process or the other, never nothing.
        os.ftruncate(self._fd, os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0))

    def release(self) -> None:
        """Let the next process have the directory."""
        os.close(self._fd)


def lock_holder(directory: Path) -> str | None:
    """Return the process that has *directory*, as text; None if nobody has."""
    try:
        DirectoryLock(directory).release()
    except DirectoryInUse as error:
        return error.holder
    except OSError:  # there is no such directory, or not for us
        return None
    return None
