"""Two small files beside the store: the acknowledged mark, and the note that it has diverged.

The mark says up to which revision this store has acknowledged.

It is written after each commit and before the acknowledgement, without a sync. So it is never ahead of what is durable,
and after a crash a store that is behind it has lost changes that were acknowledged: the end of a damaged WAL goes
silently, as SQLite takes what follows the damage for the rest of an older WAL.

The note outlives the process that found it out: a leader that has compacted since can no longer tell.
"""

import contextlib
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Final, Self

from mehdb.model import Chain, History, Position, Revision
from mehdb.store.files import sync_directory

log = logging.getLogger("mehdb.store")

FILE_NAME: Final = "acknowledged"
DIVERGED_NAME: Final = "diverged"
# History, revision, chain. Behind them a CRC-32: what is damaged itself proves nothing.
_MARK = struct.Struct("<16sQ16s")
_CRC = struct.Struct("<I")


class AcknowledgedMark:
    """The mark of an open store, for the one thread that writes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the mark in *directory*, or make one."""
        return cls(os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))

    def move(self, position: Position) -> None:
        """Say that everything up to *position* is durable. A store without history has acknowledged nothing."""
        if position.history is None:
            return
        record = _MARK.pack(bytes.fromhex(position.history), position.revision, position.chain)
        try:
            os.pwrite(self._fd, record + _CRC.pack(zlib.crc32(record)), 0)
        except OSError:
            # It stays behind, so it proves less. A disk that fails is for the database to notice, which syncs.
            return

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_mark(directory: Path) -> Position | None:
    """Return what the mark in *directory* says; None if there is none, or none that can be believed."""
    try:
        data = (directory / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return None
    record, crc = data[: _MARK.size], data[_MARK.size :]
    if len(data) != _MARK.size + _CRC.size or crc != _CRC.pack(zlib.crc32(record)):
        if data:
            log.warning(
                "acknowledged mark damaged, whether changes are missing cannot be told file=%s", directory / FILE_NAME
            )
        return None
    history, revision, chain = _MARK.unpack(record)
    return Position(History(history.hex()), Revision(revision), Chain(chain))


def write_mark(directory: Path, position: Position) -> None:
    """Replace the mark in *directory*, durably: another store has taken its place."""
    mark = AcknowledgedMark.open(directory)
    try:
        if position.history is None:
            os.ftruncate(mark._fd, 0)  # noqa: SLF001  its own module
        mark.move(position)
        os.fsync(mark._fd)  # noqa: SLF001
    finally:
        mark.close()


def note_divergence(directory: Path, reason: str) -> None:
    """Take down, durably if there is room, why the store in *directory* has diverged from its leader's."""
    with contextlib.suppress(OSError):
        with (directory / DIVERGED_NAME).open("w") as file:
            file.write(reason)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(directory)


def read_divergence(directory: Path) -> str | None:
    """Return why the store in *directory* has diverged; None if it has not, as far as is known."""
    try:
        return (directory / DIVERGED_NAME).read_text(errors="replace") or "it was found to have diverged"
    except OSError:
        return None


def forget_divergence(directory: Path) -> None:
    """Take down that the store in *directory* has not diverged, or no longer."""
    with contextlib.suppress(OSError):
        (directory / DIVERGED_NAME).unlink()
