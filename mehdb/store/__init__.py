"""The store: one SQLite database on this node's volume, and the only code that opens it.

    store.py    `Store`: what the rest of mehdb sees, on the event loop
    writer.py   the one thread that writes: queue, group commit, checkpoints
    log.py      what a batch or a page does to the tables, inside a transaction
    reader.py   point reads and scans on read-only connections
    schema.py   the tables, the pragmas, opening and creating
    seal.py     the CRC of a row and the chain over all of them
    check.py    every invariant of the schema, verified
    lock.py     one process per data directory

It knows nothing of roles, peers or HTTP. It owns promises 1, 2 and 5: a write is acknowledged after its commit is
durable, shown after it is durable, and shown as it was written or not at all.
"""

from mehdb.store.check import CheckReport
from mehdb.store.lock import lock_holder
from mehdb.store.log import Write
from mehdb.store.store import Store

__all__ = ["CheckReport", "Store", "Write", "lock_holder"]
