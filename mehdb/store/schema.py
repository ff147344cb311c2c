"""The tables, and how a connection to them is opened.

SQLite itself has no page checksums, so that a flipped bit in an inner page of an index would hide keys without a sign.
Its own extension `cksumvfs` (https://sqlite.org/cksumvfs.html) puts one at the end of each page of the file and
verifies it at each read. The WAL has checksums of its own, which SQLite verifies when it opens it.

Invariants, all verified by `check`:
- `change` holds revisions up to `head`, without gaps above `floor`; each row's `crc` and `chain` are those of `seal`.
- `entry` holds exactly the keys whose newest change is not a deletion, each with that change's revision.
- `meta` has one row; `head` and `chain` are those of the newest change, `keys` and `changes` are the
  numbers of rows of `entry` and `change`.
- `history` is NULL only while `head` is 0.
- `change_expiry` has the changes with an `expires_at`, in its order; SQLite sees to that.
"""

import functools
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import apsw
import apsw.sqlite_extra

from mehdb import __version__
from mehdb.errors import Damaged, DamagedRow, StoreFailed, UnknownSchema, UnsafeSqlite
from mehdb.model import GENESIS, ORIGIN, Chain, Change, Epoch, History, Position, Revision
from mehdb.store.files import sync_directory, sync_file
from mehdb.store.mark import read_mark
from mehdb.store.seal import is_intact

FILE_NAME: Final = "store.db"
WAL_NAME: Final = FILE_NAME + "-wal"
SHM_NAME: Final = FILE_NAME + "-shm"
PAGE_SIZE: Final = 4096
CHECKSUM_BYTES: Final = 8  # at the end of each page, for SQLite's cksumvfs
APPLICATION_ID: Final = 0x6D656864  # "mehd", so that `file` and we can tell the file from any other database
HEADER_BYTES, VERSION_AT, APPLICATION_AT = 100, 60, 68  # https://sqlite.org/fileformat.html
SCHEMA_VERSION: Final = 1  # a change of the tables raises it, brings the upgrade, and is refused by whoever is older
# Partial: it costs a change without a time to live nothing. A store made before there were any gets it when opened.
EXPIRY_INDEX: Final = "CREATE INDEX IF NOT EXISTS change_expiry ON change (expires_at) WHERE expires_at IS NOT NULL"
SCHEMA: Final = f"""
CREATE TABLE change (
    revision     INTEGER PRIMARY KEY,
    key          BLOB NOT NULL,
    value        BLOB,
    content_type TEXT,
    expires_at   INTEGER,
    crc          INTEGER NOT NULL,
    chain        BLOB NOT NULL
) STRICT;
CREATE TABLE entry (
    key          BLOB PRIMARY KEY,
    revision     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE meta (
    one          INTEGER PRIMARY KEY CHECK (one = 1),
    history      TEXT,
    epoch        INTEGER NOT NULL,
    head         INTEGER NOT NULL,
    chain        BLOB NOT NULL,
    floor        INTEGER NOT NULL,
    keys         INTEGER NOT NULL,
    changes      INTEGER NOT NULL,
    schema       INTEGER NOT NULL
) STRICT;
{EXPIRY_INDEX};
INSERT INTO meta VALUES (1, NULL, 0, 0, zeroblob(16), 0, 0, 0, {SCHEMA_VERSION});
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""  # noqa: S608  our own constants
WRITER_CACHE_KIB: Final = 32 << 10  # holds the inner pages of both trees and a batch's leaves at a million keys
READER_CACHE_KIB: Final = 4 << 10  # inner pages; leaves come from the kernel's cache as quickly
BUSY_TIMEOUT_MS: Final = 1000
WAL_BYTES_KEPT: Final = 64 << 20  # a WAL that a long scan made larger is cut back to this
# All that a read can fail with, and no write: SQLITE_IOERR_READ, _SHORT_READ, _CORRUPTFS and cksumvfs' _DATA.
READ_ERRORS: Final = frozenset(
    {apsw.SQLITE_IOERR_READ, apsw.SQLITE_IOERR_SHORT_READ, apsw.SQLITE_IOERR_CORRUPTFS, apsw.SQLITE_IOERR_DATA}
)
FIRST_SAFE_SQLITE: Final = (3, 51, 3)  # 3.7.0 to 3.51.2 have the WAL-reset bug; https://sqlite.org/wal.html


@dataclass(frozen=True)
class Meta:
    """The one row of `meta`."""

    history: History | None
    epoch: Epoch
    head: Revision
    chain: Chain
    floor: Revision
    keys: int
    changes: int

    @property
    def position(self) -> Position:
        """The position of a store with this row."""
        return Position(self.history, self.head, self.chain)


def sqlite_version() -> str:
    """Return the version of SQLite that this process uses: apsw brings its own."""
    return apsw.sqlite_lib_version()


def refuse_unsafe_sqlite(version: str) -> None:
    """Raise `UnsafeSqlite` if SQLite *version*, as in "3.51.2", may corrupt a database in WAL mode."""
    if tuple(int(part) for part in version.split(".")) < FIRST_SAFE_SQLITE:
        raise UnsafeSqlite(f"SQLite {version} can corrupt a database in WAL mode: install apsw 3.53 or newer")


def is_damage(error: BaseException) -> bool:
    """Return whether *error* says that what was read is damaged: nothing was written, and the process may live on."""
    if isinstance(error, apsw.IOError):
        return getattr(error, "extendedresult", None) in READ_ERRORS
    return isinstance(error, apsw.CorruptError | apsw.NotADBError | UnicodeDecodeError)


@functools.cache
def use_page_checksums() -> None:
    """Have every connection that is opened from here on write and verify page checksums. Raises `UnsafeSqlite`."""
    refuse_unsafe_sqlite(sqlite_version())
    connection = apsw.Connection(":memory:")
    try:
        apsw.sqlite_extra.load(connection, "cksumvfs")
    except (apsw.sqlite_extra.NotAvailable, LookupError, apsw.Error) as error:
        raise UnsafeSqlite(f"this apsw lacks SQLite's cksumvfs ({error}): install its wheel from PyPI") from error
    finally:
        connection.close()


def open_writer(directory: Path) -> apsw.Connection:
    """Open, or create, the store in *directory* for the one thread that writes.

    Raises `UnsafeSqlite`, `UnknownSchema` and `Damaged` before anything is changed, `StoreFailed`, and SQLite's own
    errors where the volume is full or can only be read.
    """
    use_page_checksums()
    path = directory / FILE_NAME
    if not path.exists():
        _create(directory)
    _refuse_newer_file(path)
    _fill_last_page(directory)
    connection = _connect(path, apsw.SQLITE_OPEN_READWRITE)
    try:
        # A file that is not ours, or not sound, keeps its WAL too: closing would move that into it.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        verify_opened(connection, directory)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        _require_wal(connection, path)
        # FULL, not NORMAL: an acknowledged write must survive power loss. NORMAL does not sync at commit in WAL mode.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}").fetchall()
        connection.execute(EXPIRY_INDEX)
        # What a killed process wrote into the WAL may not be synced, yet SQLite would show it: a checkpoint syncs it.
        try:
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except (apsw.FullError, apsw.BusyError):  # no room, or a backup reads: then the WAL stays, synced as well
            sync_file(directory / WAL_NAME)
    except BaseException:
        connection.close()
        raise
    return connection


def _fill_last_page(directory: Path) -> None:
    """Have the file end with a whole page. Raises `Damaged` if nothing explains that it does not.

    What is missing of a page, SQLite reads as zeros, and cksumvfs verifies none that it cannot read whole. A checkpoint
    that the power ended leaves such a page as well, but then the WAL still has it.
    """
    path = directory / FILE_NAME
    size_bytes = path.stat().st_size
    if size_bytes % PAGE_SIZE:
        ours = _header(path).application == APPLICATION_ID
        if ours and not _has_frames(directory / WAL_NAME):
            raise Damaged(f"{path} ends within a page")
        if ours:
            os.truncate(path, size_bytes + -size_bytes % PAGE_SIZE)


class _Header(NamedTuple):
    """What the file's first bytes say of it, behind a WAL that may say otherwise."""

    version: int
    application: int


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        first = file.read(HEADER_BYTES)
    return _Header(*(int.from_bytes(first[start : start + 4], "big") for start in (VERSION_AT, APPLICATION_AT)))


def _refuse_newer_file(path: Path) -> None:
    """Raise `UnknownSchema` if the file is ours and of a newer schema, before SQLite makes anything beside it."""
    header = _header(path)
    if header.application == APPLICATION_ID and header.version > SCHEMA_VERSION:
        raise _unknown(path, header.version)


def _has_frames(wal: Path) -> bool:
    return wal.exists() and wal.stat().st_size > 0


def _require_wal(connection: apsw.Connection, path: Path) -> None:
    if connection.execute("PRAGMA journal_mode = WAL").get != "wal":
        raise StoreFailed(f"{path} cannot be in WAL mode there: a volume must be a block device, never NFS")


def open_reader(directory: Path) -> apsw.Connection:
    """Open the store in *directory* for reading. The connection is for one thread at a time."""
    use_page_checksums()
    if not (directory / WAL_NAME).exists() and os.statvfs(directory).f_flag & os.ST_RDONLY:
        connection = open_copy(directory / FILE_NAME)  # SQLite would make a WAL, and nobody can: it is all in one file
    else:
        connection = _connect(directory / FILE_NAME, apsw.SQLITE_OPEN_READONLY)
    connection.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}")
    return connection


def open_copy(path: Path) -> apsw.Connection:
    """Open a whole store in one file, without a WAL, for reading: a snapshot or a backup. Nothing is made beside it."""
    use_page_checksums()
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"{path.absolute().as_uri()}?immutable=1", flags=flags)


def require_sound(directory: Path) -> Meta:
    """Return `meta` of the store in *directory*, live or not. Nothing is changed.

    Raises `FileNotFoundError` if there never was one, what `verify_opened` does, and `StoreFailed`.
    """
    if not (directory / FILE_NAME).exists():
        refuse_lost_store(directory)
        raise FileNotFoundError(directory / FILE_NAME)
    _refuse_newer_file(directory / FILE_NAME)
    try:
        connection = open_reader(directory)
        try:
            connection.execute("BEGIN")  # one state of it
            return verify_opened(connection, directory)
        finally:
            connection.close()
    except apsw.Error as error:
        kind = Damaged if is_damage(error) else StoreFailed
        raise kind(f"{directory / FILE_NAME} cannot be opened: {error}") from error


def verify_opened(connection: apsw.Connection, directory: Path) -> Meta:
    """Return `meta` of a store that is ours and can be trusted at its head.

    Raises `UnknownSchema`, and `Damaged` where it cannot be read, contradicts itself or lacks acknowledged changes.
    """
    path = directory / FILE_NAME
    mark = read_mark(directory)  # before the store, which a live node goes on writing
    if path.stat().st_size == 0:
        raise Damaged(f"{path} has 0 bytes")
    try:
        refuse_other_schema(connection, path)
        if not verifies_checksums(connection):
            raise Damaged(f"{path} has lost its page checksums: its first page is damaged")
        require_whole_pages(path)
        meta = read_meta(connection)
        _verify_head(connection, meta)
    except (apsw.Error, UnicodeDecodeError, DamagedRow) as error:
        if is_damage(error) or isinstance(error, apsw.SQLError | DamagedRow):
            raise Damaged(f"{path} cannot be trusted: {error}") from error
        raise
    if missing := missing_behind(mark, meta.position):
        raise Damaged(
            f"{path} ends at revision {meta.head}, but {meta.head + missing} has been acknowledged: {missing} changes "
            "are missing at its end",
            missing,
        )
    return meta


def verifies_checksums(connection: apsw.Connection) -> bool:
    """Return whether the file that *connection* has read from has page checksums, which its first page says."""
    return str(connection.pragma("checksum_verification")) == "1"  # cksumvfs answers in text, and others not at all


def require_whole_pages(path: Path) -> None:
    """Raise `Damaged` if the file ends within a page: cksumvfs does not verify that one."""
    if path.stat().st_size % PAGE_SIZE:
        raise Damaged(f"{path} ends within a page")


def missing_behind(mark: Position | None, position: Position) -> int:
    """Return how many acknowledged changes a store at *position* lacks at its end, as *mark* has it."""
    # One at its origin may lack its history too: until the first checkpoint, all of it is in the WAL. Another history
    # with changes has been installed, by a process that ended before it could write the mark.
    if mark is None or (mark.history != position.history and position.revision > ORIGIN):
        return 0
    return max(0, mark.revision - position.revision)


def read_meta(connection: apsw.Connection) -> Meta:
    """Return the row of `meta` as *connection* sees it. Raises `DamagedRow` if that is gone."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT history, epoch, head, chain, floor, keys, changes FROM meta"
    ).fetchall()
    if len(rows) != 1 or None in rows[0][1:]:
        raise DamagedRow("`meta` has not one row")
    return Meta(*rows[0])


def _create(directory: Path) -> None:
    """Make an empty store in *directory*, whole or not at all. Raises `Damaged` if there has been one.

    An empty file that a crash left would look like a damaged store, so it gets its name when it is complete.
    """
    refuse_lost_store(directory)
    new = directory / f"{FILE_NAME}.new"
    new.unlink(missing_ok=True)
    connection = apsw.Connection(str(new))
    try:
        connection.reserve_bytes("main", CHECKSUM_BYTES)
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}; PRAGMA synchronous = FULL; BEGIN; {SCHEMA}; COMMIT")
    finally:
        connection.close()
    new.rename(directory / FILE_NAME)
    sync_directory(directory)


def refuse_lost_store(directory: Path) -> None:
    """Raise `Damaged` if *directory* has no store, but had one."""
    mark = read_mark(directory)
    if mark is not None:
        raise Damaged(f"{directory} has no {FILE_NAME}, but had one that acknowledged {mark.revision}", mark.revision)
    if (directory / WAL_NAME).exists():
        raise Damaged(f"{directory} has no {FILE_NAME}, only what a lost one left")


def _connect(path: Path, flags: int) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=flags)
    # Only a foreign process, such as an operator's sqlite3, makes us wait at all.
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def _verify_head(connection: apsw.Connection, meta: Meta) -> None:
    """Raise `DamagedRow` unless the newest change is the one that `meta` says: old and new pages may be mixed."""
    row = connection.execute(
        "SELECT revision, key, value, content_type, expires_at, crc, chain FROM change ORDER BY revision DESC LIMIT 1"
    ).fetchone()
    if row is None:
        if (meta.head, meta.chain) != (ORIGIN, GENESIS):
            raise DamagedRow(f"the head is {meta.head}, but there are no changes")
        return
    *columns, expected_crc, chain = row
    change = Change(*columns)
    if (change.revision, chain) != (meta.head, meta.chain) or not is_intact(change, expected_crc):
        raise DamagedRow(f"the newest change, {change.revision}, is not the head {meta.head}")


def refuse_other_schema(connection: apsw.Connection, path: Path) -> None:
    """Raise `UnknownSchema` unless the file is ours."""
    version, application = connection.pragma("user_version"), connection.pragma("application_id")
    if application != APPLICATION_ID:
        raise UnknownSchema(f"{path} is not a mehdb store: move it away or choose another --data-dir")
    if version != SCHEMA_VERSION:
        raise _unknown(path, version)


def _unknown(path: Path, version: object) -> UnknownSchema:
    return UnknownSchema(
        f"{path} has schema {version}, this mehdb ({__version__}) knows {SCHEMA_VERSION}: run the one that wrote it, "
        "or a newer one"
    )


def new_history() -> History:
    """Return an ID that no history has had."""
    return History(secrets.token_hex(16))
