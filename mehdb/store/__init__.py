"""The store: one SQLite database on this node's volume, and the only code that opens it.

    store.py    `Store`: what the rest of mehdb sees, on the event loop
    session.py  its open files, from one opening to the next closing
    writer.py   the one thread that writes: queue, group commit, checkpoints
    decision.py what clients ask to be written, on which conditions, and what becomes of it
    log.py      what a batch or a page does to the tables, inside a transaction
    expiry.py   which changes have outlived their time
    clock.py    the time that this goes by
    reader.py   point reads and scans on read-only connections
    feed.py     the newest changes in memory, for those who watch
    listing.py  live keys in order, page by page
    past.py     what a key was
    pages.py    what another store is given
    schema.py   the tables, the pragmas, opening and creating
    seal.py     the CRC of a row and the chain over all of them
    mark.py     the acknowledged mark: up to where the store must reach; the note that it has diverged
    tally.py    what it counts of its own work
    moments.py  when each revision came to be
    room.py     the reserve of the volume, and the ballast
    snapshot.py a copy of the whole store: made, verified, put in a store's place
    check.py    every invariant of the schema, verified
    lock.py     one process per data directory
    files.py    what makes files and names durable
    waiters.py  those that wait for a commit
    threads.py  long work that nobody may wait for any more

It knows nothing of roles, peers or HTTP. It owns promises 1, 2 and 5: a write is acknowledged after its commit is
durable, shown after it is durable, and shown as it was written or not at all.
"""

from mehdb.store.check import CheckReport, check_directory
from mehdb.store.clock import Clock
from mehdb.store.decision import Batch, Check, Condition, Write
from mehdb.store.files import sync_directory, sync_file
from mehdb.store.listing import Folder, Query, list_page
from mehdb.store.lock import FILE_NAME as LOCK_NAME
from mehdb.store.lock import CommandLock, DirectoryLock, lock_holder
from mehdb.store.mark import forget_divergence, note_divergence, read_divergence, read_mark, write_mark
from mehdb.store.past import history, value_at
from mehdb.store.room import Room
from mehdb.store.schema import SCHEMA_VERSION, Meta, missing_behind, new_history, require_sound, sqlite_version
from mehdb.store.session import StoreOptions
from mehdb.store.snapshot import (
    INCOMING,
    OUTGOING,
    Snapshot,
    abandon,
    begin_new_history,
    install,
    keep_copy,
    make_snapshot,
    raise_epoch,
    remove_leftovers_of_commands,
    take_back_half_kept,
    verify_snapshot,
)
from mehdb.store.store import Store
from mehdb.store.threads import OnProgress, in_thread

__all__ = [
    "INCOMING",
    "LOCK_NAME",
    "OUTGOING",
    "SCHEMA_VERSION",
    "Batch",
    "Check",
    "CheckReport",
    "Clock",
    "CommandLock",
    "Condition",
    "DirectoryLock",
    "Folder",
    "Meta",
    "OnProgress",
    "Query",
    "Room",
    "Snapshot",
    "Store",
    "StoreOptions",
    "Write",
    "abandon",
    "begin_new_history",
    "check_directory",
    "forget_divergence",
    "history",
    "in_thread",
    "install",
    "keep_copy",
    "list_page",
    "lock_holder",
    "make_snapshot",
    "missing_behind",
    "new_history",
    "note_divergence",
    "raise_epoch",
    "read_divergence",
    "read_mark",
    "remove_leftovers_of_commands",
    "require_sound",
    "sqlite_version",
    "sync_directory",
    "sync_file",
    "take_back_half_kept",
    "value_at",
    "verify_snapshot",
    "write_mark",
]  # fmt: skip
