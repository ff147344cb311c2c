"""Reads: point reads and pages, on a read-only connection that one thread uses at a time.

The invariant it owns (promise 5): nothing leaves here whose CRC does not match. SQLite shows a commit only after its
sync (promise 2).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import apsw

from mehdb.errors import AnswerTooLarge, Compacted, DamagedRow
from mehdb.model import GENESIS, ORIGIN, Chain, Change, Page, Revision
from mehdb.store.schema import Meta, is_damage, open_reader, read_meta
from mehdb.store.seal import is_intact

# The hottest statement of all. A sub-select, not a join: SQLite runs it with half the instructions. What lies behind a
# value that is too large is not touched, as SQLite would read the whole value to get there.
GET: Final = """
    SELECT revision, key, length(value), iif(length(value) <= ?2, value, NULL),
        iif(length(value) <= ?2, content_type, NULL), iif(length(value) <= ?2, expires_at, NULL),
        iif(length(value) <= ?2, crc, NULL)
    FROM change WHERE revision = (SELECT revision FROM entry WHERE key = ?1)"""
SEVERAL: Final = """
    SELECT entry.key, entry.revision, length(value), change.revision, change.key,
        iif(length(value) <= ?2, value, NULL), iif(length(value) <= ?2, content_type, NULL),
        iif(length(value) <= ?2, expires_at, NULL), iif(length(value) <= ?2, crc, NULL)
    FROM entry LEFT JOIN change ON change.revision = entry.revision WHERE entry.key IN carray(?1)"""
DANGLING: Final = """
    SELECT revision FROM entry
    WHERE key = ? AND NOT EXISTS (SELECT 1 FROM change WHERE change.revision = entry.revision)"""
# A page of nothing but zeros matches its checksum, as that is zero too. Where it held the end of a long key, there are
# zeros now, which no key holds. So that key is not found, but its beginning is, which the index holds on another page.
KEY_BYTES_IN_PLACE: Final = 480  # at least, of a key too long to be there whole; https://sqlite.org/fileformat.html
ZEROED: Final = "SELECT revision FROM entry WHERE key > ? AND key < ? AND instr(key, x'00') LIMIT 1"
CHAIN: Final = "SELECT chain FROM change WHERE revision = ?"
CHANGES: Final = """
    SELECT revision, key, value, content_type, expires_at, crc, chain FROM change
    WHERE revision > ? AND revision <= ? ORDER BY revision"""
AFTER_UTF8: Final = b"\xff"  # greater than any byte of UTF-8, so that PREFIX + this ends the keys with a prefix
CHANGE_OVERHEAD_BYTES: Final = 32  # about what a change occupies in a page beside its key and value


class LargeValue(Exception):
    """The value is larger than the caller wants to wait for."""


class Reader:
    """Reads of the store in one directory."""

    def __init__(self, directory: Path) -> None:
        self.connection = open_reader(directory)
        self._cursor = self.connection.cursor()

    def begin(self) -> None:
        """Read from one snapshot from now on: to begin one for each read takes as long as the read itself."""
        self.connection.execute("BEGIN")

    def end(self) -> None:
        """Let go of that snapshot. While one is held, SQLite cannot use the WAL again from its start."""
        if self.connection.in_transaction:  # SQLite has ended it by itself over a page that could not be read
            self.connection.execute("ROLLBACK")  # a COMMIT would fail again over such a page

    def get(self, key: bytes, value_bytes_max: int) -> Change | None:
        """Return the change that *key* is live with, None if it is not live.

        Raises `DamagedRow`, and `LargeValue` before it has read a value of more than *value_bytes_max*.
        """
        try:
            # All rows, though there is one at most: a statement that has not ended holds its snapshot.
            rows = self._cursor.execute(GET, (key, value_bytes_max)).fetchall()
            dangling = [] if rows else self._cursor.execute(DANGLING, (key,)).fetchall()
            if not rows:
                require_absent(self.connection, key)
        except (apsw.Error, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            raise DamagedRow(
                f"the key {_shown(key)} cannot be read from this node's disk, as a page is damaged: read another node"
            ) from error
        for (revision,) in dangling:
            raise _damaged_change(cast("int", revision), key)
        if not rows:
            return None
        columns: tuple[Any, ...] = rows[0]
        revision, stored_key, value_bytes, value, content_type, expires_at, expected_crc = columns
        if value_bytes is not None and value_bytes > value_bytes_max:
            raise LargeValue
        change = Change(revision, stored_key, value, content_type, expires_at)
        if change.key != key or change.value is None or not is_intact(change, expected_crc):
            raise _damaged_change(revision, key)
        return change

    def several(self, keys: tuple[bytes, ...], value_bytes_max: int, bytes_max: int) -> tuple[Revision, list[Change]]:
        """Return the changes that those of *keys* that are live are live with, and the revision of that state.

        Raises `DamagedRow`, `LargeValue` as `get` does, and `AnswerTooLarge` if all are larger than *bytes_max*.
        """
        changes: list[Change] = []
        size_bytes = 0
        try:
            with self.snapshot() as meta:
                for row in self.connection.execute(SEVERAL, (apsw.carray(keys), value_bytes_max)):
                    columns: tuple[Any, ...] = row
                    entry_key, entry_revision, value_bytes, *stored, expected_crc = columns
                    size_bytes += value_bytes or 0
                    if size_bytes > bytes_max:
                        raise AnswerTooLarge(
                            f"the values have more than {bytes_max} bytes together: ask for fewer keys at once"
                        )
                    if value_bytes is not None and value_bytes > value_bytes_max:
                        raise LargeValue
                    change = Change(*stored)
                    if change.key != entry_key or change.value is None or not is_intact(change, expected_crc):
                        raise _damaged_change(entry_revision, entry_key)
                    changes.append(change)
                found = {change.key for change in changes}
                for key in keys:
                    if key not in found:
                        require_absent(self.connection, key)
                return meta.head, changes
        except (apsw.Error, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            raise DamagedRow("the keys cannot be read whole from this node's disk: read another node") from error

    def change(self, query: str, parameters: tuple[int | bytes, ...]) -> Change | None:
        """Return the one change that *query* finds, with its CRC behind its columns. Raises `DamagedRow`."""
        try:
            rows: list[tuple[Any, ...]] = self.connection.execute(query, parameters).fetchall()
        except (apsw.Error, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            raise DamagedRow("the log cannot be read whole from this node's disk: read another node") from error
        for *columns, expected_crc in rows:
            change = Change(*columns)
            if not is_intact(change, expected_crc):
                raise _damaged(change.revision)
            return change
        return None

    def meta(self) -> Meta:
        """Return the state of the store, as this reader sees it. Raises `DamagedRow`."""
        try:
            return read_meta(self.connection)
        except apsw.Error as error:
            if not is_damage(error):
                raise
            raise DamagedRow("the store's state cannot be read from this node's disk: read another node") from error

    @contextmanager
    def snapshot(self) -> Iterator[Meta]:
        """Have all reads of the block see one state, which it gives. Within another one: that one's."""
        begins = not self.connection.in_transaction
        if begins:
            self.begin()
        try:
            yield self.meta()
        finally:
            if begins:
                self.end()

    def chain(self, revision: Revision) -> Chain:
        """Return the chain at *revision*. Raises `Compacted` if its change is gone."""
        if revision == ORIGIN:
            return GENESIS
        try:
            row = self.connection.execute(CHAIN, (revision,)).fetchone()
        except apsw.Error as error:
            if not is_damage(error):
                raise
            raise _damaged(revision) from error
        if row is None:
            raise Compacted(f"the change of revision {revision} has been compacted away")
        return Chain(cast("bytes", row[0]))

    def page(self, after: Revision, meta: Meta, bytes_max: int) -> Page | None:
        """Return the changes after *after*, up to the head of *meta*, about *bytes_max* of them; None at the head.

        Raises `DamagedRow`, and `Compacted`, if the first of them is damaged or gone. A page ends before such a one.
        """
        changes: list[Change] = []
        size_bytes, chain = 0, GENESIS
        try:
            for change, chain in self._changes(after, meta.head):  # noqa: B007  that of the last is wanted
                changes.append(change)
                size_bytes += len(change.key) + len(change.value or b"") + CHANGE_OVERHEAD_BYTES
                if size_bytes >= bytes_max:
                    break
        except (DamagedRow, Compacted):
            if not changes:
                raise
        if not changes:
            return None
        assert meta.history is not None, "a store with changes has a history"  # noqa: S101  the schema's invariant
        return Page(meta.history, meta.epoch, after, chain, tuple(changes))

    def _changes(self, after: Revision, head: Revision) -> Iterator[tuple[Change, Chain]]:
        """Yield each change after *after*, up to *head*, with the chain at it. Raises `DamagedRow` and `Compacted`."""
        expected = after
        try:
            for row in self.connection.execute(CHANGES, (after, head)):
                *columns, expected_crc, chain = row
                change, expected = Change(*columns), Revision(expected + 1)
                if change.revision != expected:
                    raise Compacted(f"the change of revision {expected} has been compacted away")
                if not is_intact(change, expected_crc):
                    raise _damaged(expected)
                yield change, chain
        except (apsw.Error, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
            raise _damaged(expected + 1) from error

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def require_absent(connection: apsw.Connection, key: bytes) -> None:
    """Raise `DamagedRow` if *key* was not found because of a page of zeros; see `ZEROED`. SQLite's own errors pass."""
    start = key[:KEY_BYTES_IN_PLACE]
    if len(key) > KEY_BYTES_IN_PLACE and connection.execute(ZEROED, (start, start + AFTER_UTF8)).fetchall():
        raise DamagedRow(f"the key {_shown(key)} or one like it is damaged on this node's disk: read another node")


def _shown(key: bytes) -> str:
    return repr(key.decode(errors="backslashreplace"))


def _damaged_change(revision: int, key: bytes) -> DamagedRow:
    return DamagedRow(
        f"the change of revision {revision}, of the key {_shown(key)}, is damaged on this node's disk: "
        "read another node"
    )


def _damaged(revision: int) -> DamagedRow:
    # The key may be what is damaged, so the revision names the row.
    return DamagedRow(f"the change of revision {revision} is damaged on this node's disk: read another node")
