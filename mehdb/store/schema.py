"""The tables, and how a connection to them is opened.

Invariants, all verified by `check`:
- `change` holds revisions up to `head`, without gaps above `floor`; each row's `crc` and `chain` are those of `seal`.
- `entry` holds exactly the keys whose newest change is not a deletion, each with that change's revision.
- `meta` has one row; `head` and `chain` are those of the newest change, `keys` is the number of rows of `entry`.
- `history` is NULL only while `head` is 0.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw

from mehdb.errors import StoreError, StoreFailed, UnknownSchema, UnsafeSqlite
from mehdb.model import Chain, Epoch, History, Position, Revision

FILE_NAME: Final = "store.db"
APPLICATION_ID: Final = 0x6D656864  # "mehd", so that `file` and we can tell the file from any other database
SCHEMA_VERSION: Final = 1
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
    schema       INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES (1, NULL, 0, 0, zeroblob(16), 0, 0, {SCHEMA_VERSION});
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""  # noqa: S608  our own constants
WRITER_CACHE_KIB: Final = 32 << 10  # holds the inner pages of both trees and a batch's leaves at a million keys
READER_CACHE_KIB: Final = 4 << 10  # inner pages; leaves come from the kernel's cache as quickly
BUSY_TIMEOUT_MS: Final = 1000  # only a foreign process, such as an operator's sqlite3, makes us wait at all
WAL_BYTES_KEPT: Final = 64 << 20  # a WAL that a long scan made larger is cut back to this
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

    @property
    def position(self) -> Position:
        """The position of a store with this row."""
        return Position(self.history, self.head, self.chain)


def refuse_unsafe_sqlite(version: str) -> None:
    """Raise `UnsafeSqlite` if SQLite *version*, as in "3.51.2", may corrupt a database in WAL mode."""
    if tuple(int(part) for part in version.split(".")) < FIRST_SAFE_SQLITE:
        raise UnsafeSqlite(f"SQLite {version} can corrupt a database in WAL mode: install apsw 3.53 or newer")


def open_writer(directory: Path) -> apsw.Connection:
    """Open, or create, the store in *directory* for the one thread that writes.

    Raises `UnsafeSqlite` and `UnknownSchema` before anything is changed, and `StoreFailed`.
    """
    refuse_unsafe_sqlite(apsw.sqlite_lib_version())
    path = directory / FILE_NAME
    connection = apsw.Connection(str(path))
    try:
        # A file that is not ours keeps its WAL too: closing would move that into it.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        _refuse_other_schema(connection, path)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        if connection.execute("PRAGMA journal_mode = WAL").get != "wal":
            raise StoreFailed(f"{path} cannot be in WAL mode there: a volume must be a block device, never NFS")
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        # FULL, not NORMAL: an acknowledged write must survive power loss. NORMAL does not sync at commit in WAL mode.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}").fetchall()
        if connection.pragma("user_version") == 0:
            connection.execute(f"BEGIN IMMEDIATE; {SCHEMA}; COMMIT")
            sync_directory(directory)
        # What a killed process wrote into the WAL may not be synced, yet SQLite would show it: a checkpoint syncs it.
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        read_meta(connection)
    except apsw.Error as error:
        connection.close()
        raise StoreFailed(f"{path} cannot be opened: {error}") from error
    except StoreError:
        connection.close()
        raise
    return connection


def open_reader(directory: Path) -> apsw.Connection:
    """Open the store in *directory* for reading. The connection is for one thread at a time."""
    connection = apsw.Connection(str(directory / FILE_NAME), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    connection.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}")
    return connection


def read_meta(connection: apsw.Connection) -> Meta:
    """Return the row of `meta` as *connection* sees it. Raises `StoreFailed` if it is gone."""
    row = connection.execute("SELECT history, epoch, head, chain, floor, keys FROM meta").get
    if row is None:
        raise StoreFailed("`meta` has no row, the file is damaged: keep a copy, then start from a backup or empty")
    return Meta(*row)


def _refuse_other_schema(connection: apsw.Connection, path: Path) -> None:
    """Raise `UnknownSchema` unless the file is ours, or new."""
    version, application = connection.pragma("user_version"), connection.pragma("application_id")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    if (version, application) == (0, 0) and not tables:
        return
    if application != APPLICATION_ID:
        raise UnknownSchema(f"{path} is not a mehdb store: move it away or choose another --data-dir")
    if version != SCHEMA_VERSION:
        raise UnknownSchema(
            f"{path} has schema {version}, this mehdb knows {SCHEMA_VERSION}: run the one that wrote it, or a newer one"
        )


def sync_directory(directory: Path) -> None:
    """Make the names in *directory* durable, not only what the files hold."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
