"""Room on the volume: how much is left, and a little of it held back.

A deletion is a change too, and takes room before it makes any. So sets stop while there is still a reserve, and beside
it lies a ballast: a file of nothing, given up when the volume is full to the last byte all the same.
"""

import os
import shutil
from pathlib import Path
from typing import Final

from mehdb.store.schema import FILE_NAME, WAL_NAME

BEHIND: Final = "behind"  # the copy of a store that may or may not have been an earlier state of what replaced it
BALLAST_NAME: Final = "ballast"
BALLAST_BYTES_MAX: Final = 4 << 20  # a few thousand deletions: each dirties a handful of pages
RESERVE_SHARE: Final = 8  # on a small volume the reserve is at most this part of it


class Room:
    """The volume that holds *directory*, of which *reserve_bytes* are kept free."""

    def __init__(self, directory: Path, reserve_bytes: int) -> None:
        self._directory = directory
        self._ballast = directory / BALLAST_NAME
        self._reserve_bytes = reserve_bytes
        self._has_ballast = self._ballast.exists() and self._ballast.stat().st_size > 0  # a kill may leave it empty

    def free_bytes(self) -> int:
        """Return how much may still be written."""
        volume = os.statvfs(self._directory)
        return volume.f_bavail * volume.f_frsize

    def volume_bytes(self) -> int:
        """Return how much the volume holds, free or not; 0 if it has gone, or does not tell."""
        try:
            volume = os.statvfs(self._directory)
        except OSError:
            return 0
        return volume.f_blocks * volume.f_frsize

    def file_bytes(self, name: str) -> int:
        """Return how much the file *name* takes; 0 where there is none, as another store may be on its way there."""
        try:
            return (self._directory / name).stat().st_size
        except OSError:
            return 0

    def store_bytes(self) -> int:
        """Return how much the store takes: the database, and what has been written since into its log."""
        return self.file_bytes(FILE_NAME) + self.file_bytes(WAL_NAME)

    def may_hold(self, size_bytes: int) -> bool:
        """Return whether so much more may fit: what is left to root counts, and not every volume tells."""
        volume = os.statvfs(self._directory)
        return volume.f_blocks == 0 or size_bytes <= volume.f_bfree * volume.f_frsize

    def reserve_bytes(self) -> int:
        """Return how much of this volume is kept free."""
        volume = os.statvfs(self._directory)
        return min(self._reserve_bytes, volume.f_blocks * volume.f_frsize // RESERVE_SHARE)

    def lacks(self, reusable_bytes: int = 0, factor: float = 1) -> bool:
        """Return whether less than *factor* reserves are left. *reusable_bytes* are free in the file, or owed to it."""
        return self.free_bytes() + reusable_bytes < factor * self.reserve_bytes()

    def take_ballast(self) -> None:
        """Set the ballast down, if there is plenty of room."""
        if self._has_ballast:
            return
        size_bytes = min(BALLAST_BYTES_MAX, self.reserve_bytes() // 4)
        if size_bytes == 0 or self.free_bytes() < self.reserve_bytes() + 2 * size_bytes:
            return
        fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            self._has_ballast = True
        except OSError:  # it was plenty a moment ago: without ballast then
            self._ballast.unlink()
        finally:
            os.close(fd)

    def drop_ballast(self) -> bool:
        """Give the ballast up, and a copy that is kept only while there is room. Return whether there was any."""
        copies = list(self._directory.glob(f"{BEHIND}-*"))
        had = self._has_ballast or bool(copies)
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)
        self._ballast.unlink(missing_ok=True)
        self._has_ballast = False
        return had
