"""Snapshots: a consistent copy of a whole store in one file; made, verified, and put in a store's place.

The invariant it owns (promise 4): what was there is never deleted but replaced by a store that was verified whole, and
a crash at any point leaves the old one or the new one.
"""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import apsw

from mehdb.errors import Damaged, DamagedRow, DiskFull, Diverged, StoreError, StoreFailed
from mehdb.model import Epoch, Position, Revision
from mehdb.store import mark
from mehdb.store.check import check
from mehdb.store.files import sync_directory, sync_file
from mehdb.store.room import BEHIND, Room
from mehdb.store.schema import (
    CHECKSUM_BYTES,
    FILE_NAME,
    PAGE_SIZE,
    SCHEMA_VERSION,
    SHM_NAME,
    WAL_NAME,
    Meta,
    is_damage,
    open_copy,
    open_reader,
    read_meta,
    refuse_other_schema,
    require_sound,
    require_whole_pages,
    use_page_checksums,
    verifies_checksums,
)
from mehdb.store.threads import OnProgress, unheard

INCOMING: Final = f"{FILE_NAME}.incoming"  # what arrives, until it is whole and verified
OUTGOING: Final = f"{FILE_NAME}.outgoing"  # what is sent
OF_COMMAND: Final = re.compile(rf"{re.escape(FILE_NAME)}\.(?:incoming|outgoing)-(\d+)")  # with the command's process
CHAINS: Final = "SELECT revision, chain FROM change WHERE revision <= ? ORDER BY revision DESC LIMIT 1000"
CHAIN: Final = "SELECT chain FROM change WHERE revision = ?"
COPY_PAGES: Final = 2000  # pages copied between two looks of other threads: 8 MB, a few milliseconds
CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of a store at *path*: its state, its size and its SHA-256."""

    path: Path
    meta: Meta
    size_bytes: int
    digest: bytes


def make_snapshot(directory: Path, path: Path, room: Room | None, on_progress: OnProgress = unheard) -> Snapshot:
    """Copy the store in *directory*, live or not, to *path*. It is not synced. *on_progress* is told bytes, of bytes.

    Raises `DiskFull` if that would leave less than the reserve of *room*, and `DamagedRow`. Nothing is left then.
    """
    try:
        meta = _copy(directory, path, room, on_progress)
        return Snapshot(path, meta, path.stat().st_size, _digest(path, on_progress))
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, apsw.FullError):
            raise DiskFull("the volume became full while a snapshot was made") from error
        if is_damage(error):
            raise DamagedRow("this node's store is damaged, so it cannot be copied whole: `mehdb check`") from error
        if isinstance(error, apsw.Error):
            raise StoreFailed(f"{directory} cannot be copied to {path}: {error}") from error
        raise


def _copy(directory: Path, path: Path, room: Room | None, on_progress: OnProgress) -> Meta:
    path.unlink(missing_ok=True)
    source = open_reader(directory)
    try:
        source.execute("BEGIN")
        meta = read_meta(source)
        size_bytes = int(source.pragma("page_count")) * PAGE_SIZE
        if room and room.free_bytes() < size_bytes + room.reserve_bytes():
            raise DiskFull(f"a snapshot takes {size_bytes} bytes, for which this node's volume has no room: enlarge it")
        _copy_pages(source, path, on_progress)
        return meta
    finally:
        source.close()  # before the digest is taken: while this reads, the WAL cannot be used from its start again


def _digest(path: Path, on_progress: OnProgress) -> bytes:
    """Return the SHA-256 of the file at *path*."""
    digest, size_bytes = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            on_progress(file.tell(), size_bytes)
    return digest.digest()


def _copy_pages(source: apsw.Connection, path: Path, on_progress: OnProgress) -> None:
    # By pages, not with VACUUM INTO: that writes the first page last, from which cksumvfs learns what to do.
    target = apsw.Connection(str(path))
    try:
        target.execute("PRAGMA synchronous = OFF")
        # cksumvfs learns from the first page in the file that pages have checksums. A copy that outgrows the cache
        # writes others before it, without: so there must be a first page already.
        target.reserve_bytes("main", CHECKSUM_BYTES)
        target.execute(f"PRAGMA page_size = {PAGE_SIZE}; PRAGMA user_version = {SCHEMA_VERSION}")
        with target.backup("main", source, "main") as copying:
            while not copying.done:
                copying.step(COPY_PAGES)
                on_progress((copying.page_count - copying.remaining) * PAGE_SIZE, copying.page_count * PAGE_SIZE)
        target.execute("PRAGMA journal_mode = DELETE").fetchall()  # so that it is one file, whoever opens it
    finally:
        target.close()


def verify_snapshot(path: Path, on_progress: OnProgress = unheard) -> Meta:
    """Return the state of the store in the one file at *path*, all of which was verified.

    Raises `UnknownSchema`, and `Damaged` saying what is wrong.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise Damaged(f"{path} is no store: there is nothing in it")
    use_page_checksums()
    try:
        connection = open_copy(path)
    except apsw.Error as error:
        raise Damaged(f"{path} cannot be opened: {error}") from error
    try:
        refuse_other_schema(connection, path)
        if not verifies_checksums(connection):
            raise Damaged(f"{path} has no page checksums")
        require_whole_pages(path)
        report = check(connection, on_progress)
        if report.problems:
            raise Damaged(f"{path} is damaged: {report.problems[0]}")
        return read_meta(connection)
    except apsw.Error as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    finally:
        connection.close()


def keep_copy(directory: Path, reason: str) -> Path | None:
    """Keep the store in *directory* in a folder called after *reason* and the date. Return it; None without a store.

    The copy is a store directory of its own, made of links: it takes no room until the store itself is replaced.
    """
    names = [name for name in (WAL_NAME, FILE_NAME, mark.FILE_NAME) if (directory / name).exists()]
    if not names:
        return None
    kept = directory / f"{reason}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    kept.mkdir()
    for name in names:
        if name == mark.FILE_NAME:  # its file goes on being written
            (kept / name).write_bytes((directory / name).read_bytes())
            sync_file(kept / name)
        else:
            os.link(directory / name, kept / name)
    sync_directory(kept)
    sync_directory(directory)
    return kept


def install(directory: Path, incoming: Path, meta: Meta, keep: str | None) -> Path | None:
    """Put the verified store at *incoming*, whose state is *meta*, in place of the one in *directory*, which is closed.

    What was there is kept under the name *keep* first, where that is given or where it could not be closed cleanly.
    Returns where. A crash leaves the old store or the new one, or the old one in a way that shows its damage.
    """
    sync_file(incoming)
    left_open = _holds_bytes(directory / WAL_NAME)  # by a backup that reads: all the same it was only older
    keep = keep or (BEHIND if left_open else None)
    if keep == BEHIND:
        for earlier in directory.glob(f"{BEHIND}-*"):  # one is enough: they are made without an operator
            shutil.rmtree(earlier, ignore_errors=True)
    kept = keep_copy(directory, keep) if keep else None
    if left_open and (directory / mark.FILE_NAME).exists():
        sync_file(directory / mark.FILE_NAME)  # without its WAL the old store ends earlier, which nothing else tells
    # A WAL must never meet a database that it is not of.
    for name in (WAL_NAME, SHM_NAME):
        (directory / name).unlink(missing_ok=True)
    sync_directory(directory)
    incoming.replace(directory / FILE_NAME)
    sync_directory(directory)
    mark.forget_divergence(directory)
    mark.write_mark(directory, meta.position)
    sync_directory(directory)
    return kept


def abandon(directory: Path) -> Path | None:
    """Leave *directory* without a store, as if it never had one. Return where that is kept which was there."""
    kept = keep_copy(directory, "abandoned")
    # The mark last: until it goes, it shows that there was a store.
    for name in (WAL_NAME, SHM_NAME, FILE_NAME, mark.DIVERGED_NAME, mark.FILE_NAME):
        (directory / name).unlink(missing_ok=True)
        sync_directory(directory)
    return kept


def continues(incoming: Path, directory: Path, head: Revision) -> bool:
    """Return whether the store at *incoming* is certainly a later state of that in *directory*, whose head is *head*.

    Where the change of *head* has been compacted away in it, that can no longer be told: False. Raises `Diverged` if it
    certainly is not.
    """
    later, earlier = open_copy(incoming), open_reader(directory)
    try:
        return _has_chain_of(later, earlier, head)
    except apsw.Error as error:
        if is_damage(error):
            raise DamagedRow(f"this node's store is damaged, so it cannot be compared: {error}") from error
        raise
    finally:
        later.close()
        earlier.close()


def _has_chain_of(later: apsw.Connection, earlier: apsw.Connection, head: Revision) -> bool:
    for revision, chain in later.execute(CHAINS, (head,)):
        own = earlier.execute(CHAIN, (revision,)).get
        if own not in (None, chain):
            raise Diverged(f"the chain at revision {revision} is another in the snapshot: the changes differ")
        if revision == head:
            return True
    return False


def passed(incoming: Path, position: Position) -> bool:
    """Return whether the store at *incoming* was once at *position*; False if that can no longer be told.

    Raises `Diverged` if it certainly was not.
    """
    later = open_copy(incoming)
    try:
        chain = later.execute(CHAIN, (position.revision,)).get
    finally:
        later.close()
    if chain not in (None, position.chain):
        raise Diverged(f"the chain at revision {position.revision} is another in the snapshot: the changes differ")
    return chain is not None


def raise_epoch(path: Path, epoch: Epoch) -> None:
    """Have the store in the one file at *path* know of *epoch*: its node has led at it, and must not again."""
    _change_copy(path, "UPDATE meta SET epoch = max(epoch, ?)", epoch)


def begin_new_history(path: Path, history: str) -> None:
    """Give the store in the one file at *path* another history, so that nobody takes it for a place in its old one."""
    _change_copy(path, "UPDATE meta SET history = ?", history)


def _change_copy(path: Path, statement: str, value: str | int) -> None:
    use_page_checksums()
    connection = apsw.Connection(str(path))
    try:
        connection.execute("PRAGMA synchronous = FULL; PRAGMA journal_mode = DELETE").fetchall()
        connection.execute(statement, (value,))
    except apsw.Error as error:
        raise StoreError(f"{path} cannot be changed: {error}") from error
    finally:
        connection.close()


def remove_leftovers(directory: Path) -> None:
    """Remove what a process that was killed has left half made in *directory*, which is ours. No store is lost."""
    remove_leftovers_of_commands(directory)
    for name in (INCOMING, OUTGOING, f"{FILE_NAME}.new"):
        for path in directory.glob(f"{name}*"):
            if not OF_COMMAND.match(path.name):
                with suppress(OSError):
                    path.unlink()


def remove_leftovers_of_commands(directory: Path) -> None:
    """Remove what commands have left half made in *directory* whose process is no more, whoever works there."""
    for path in directory.glob(f"{FILE_NAME}.*"):
        of_command = OF_COMMAND.match(path.name)
        if of_command and not Path("/proc", of_command[1]).exists():
            with suppress(OSError):
                path.unlink()


def take_back_half_kept(directory: Path) -> None:
    """Remove each kept copy of the store that is still in its place: who kept it was killed before it was replaced.

    A WAL that only the copy still has goes back. Nobody has the store open.
    """
    for folder in directory.glob("*-*Z"):
        with suppress(OSError, StoreError, apsw.Error):
            if (folder / FILE_NAME).samefile(directory / FILE_NAME):
                _take_back(directory, folder)


def _take_back(directory: Path, folder: Path) -> None:
    wal, kept_wal = directory / WAL_NAME, folder / WAL_NAME
    if _holds_bytes(kept_wal) and not (wal.exists() and wal.samefile(kept_wal)):
        try:
            require_sound(directory)  # then it has been written since, or all of that WAL is in it
        except Damaged as error:
            # Without what is in the WAL nobody has opened it for writing: so the one still belongs to the other.
            if not error.missing or _holds_bytes(wal) or mark.read_mark(directory) != mark.read_mark(folder):
                return
            kept_wal.replace(wal)
            sync_directory(directory)
    shutil.rmtree(folder, ignore_errors=True)


def _holds_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
