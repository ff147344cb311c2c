"""Listings: live keys in byte order, page by page, each page one state of the store.

With a delimiter, as in S3 and Consul, the keys that have it behind the prefix are folded into folders; what is in a
folder is skipped, not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from time import sleep
from typing import Any, Final

import apsw

from mehdb.errors import DamagedRow
from mehdb.model import Change, Revision
from mehdb.store.reader import AFTER_UTF8, CHANGE_OVERHEAD_BYTES, Reader, require_absent
from mehdb.store.schema import is_damage
from mehdb.store.seal import is_intact

KEYS: Final = "SELECT key FROM entry WHERE key >= ? AND key < ? ORDER BY key LIMIT ?"
# Many in one step, during which SQLite needs no interpreter: row by row, it takes eight times as long.
KEYS_JOINED: Final = f"SELECT CAST(group_concat(key, x'ff') AS BLOB) FROM ({KEYS})"  # noqa: S608  our own constant
VALUES: Final = """
    SELECT entry.key, entry.revision, change.revision, change.key, value, content_type, expires_at, crc
    FROM entry LEFT JOIN change ON change.revision = entry.revision
    WHERE entry.key >= ? AND entry.key < ? ORDER BY entry.key LIMIT ?"""
KEYS_STRETCH: Final = 1000  # keys in one step, between two pauses: a fraction of a millisecond
PAUSE_S: Final = 0.0002  # in which the event loop answers what has come meanwhile
LISTING_BYTES: Final = 1 << 20  # of values in a page: one round trip for a program, little memory for a node


@dataclass(frozen=True)
class Query:
    """What is to be listed: keys that start with *prefix*, sort after *after* and before *before*, at most *limit*.

    Empty bounds and an empty delimiter are none. *values* asks for what the keys are live with.
    """

    prefix: bytes = b""
    after: bytes = b""
    before: bytes = b""
    limit: int = 1000
    delimiter: bytes = b""
    values: bool = False

    @property
    def first(self) -> bytes:
        """The least key that may be listed."""
        if not self.after:
            return self.prefix
        is_folder = self.folder(self.after) == self.after  # it has been listed, with all that is in it
        return max(self.prefix, self.after + (AFTER_UTF8 if is_folder else b"\0"))

    @property
    def end(self) -> bytes:
        """The least key behind all that may be listed."""
        end = self.prefix + AFTER_UTF8
        return min(end, self.before) if self.before else end

    def folder(self, key: bytes) -> bytes | None:
        """Return the folder that *key* is in, with the delimiter at its end; None if it is in none."""
        if not (self.delimiter and key.startswith(self.prefix)):
            return None
        at = key.find(self.delimiter, len(self.prefix))
        return key[: at + len(self.delimiter)] if at >= 0 else None


@dataclass(frozen=True)
class Folder:
    """Stands for all keys that start with *prefix*."""

    prefix: bytes


Item = bytes | Change | Folder


@dataclass(frozen=True)
class Listing:
    """A page: keys, or changes where values were asked for, and folders, in order. *revision* is that of its state.

    *last* is what to list on after, None if nothing more follows.
    """

    revision: Revision
    items: tuple[Item, ...]
    last: bytes | None


def list_page(reader: Reader, query: Query) -> Listing:
    """Return the first page of what *query* asks for. Raises `DamagedRow`."""
    try:
        with reader.snapshot() as meta:
            if query.values or query.delimiter:
                return Listing(meta.head, *_page(_items(reader.connection, query), query))
            return Listing(meta.head, *_keys_alone(reader.connection, query))
    except apsw.Error as error:
        if not is_damage(error):
            raise
        raise DamagedRow("the index cannot be read whole from this node's disk: read another node") from error


def _keys_alone(connection: apsw.Connection, query: Query) -> tuple[tuple[bytes, ...], bytes | None]:
    """Return what `_page` would of keys without values or folders, in a fraction of the time."""
    keys: list[bytes] = []
    first, left = query.first, query.limit + 1
    if first < query.end:
        require_absent(connection, first)
    while first < query.end and left > 0:
        joined: bytes | None = connection.execute(KEYS_JOINED, (first, query.end, min(left, KEYS_STRETCH))).get
        if joined is None:
            break
        found = _whole(joined).split(AFTER_UTF8)
        keys += found
        first, left = found[-1] + b"\0", left - len(found)
        if len(found) == KEYS_STRETCH:
            sleep(PAUSE_S)
    return tuple(keys[: query.limit]), None if left > 0 else keys[query.limit - 1]


def _page(found: Iterator[Item], query: Query) -> tuple[tuple[Item, ...], bytes | None]:
    """Return what one page has room for, and where it ends if there is more."""
    items: list[Item] = []
    size_bytes, last = 0, b""
    for item in found:
        if len(items) == query.limit or size_bytes >= LISTING_BYTES:
            return tuple(items), last
        items.append(item)
        if isinstance(item, Change):
            size_bytes += len(item.value or b"") + CHANGE_OVERHEAD_BYTES
        last = item.key if isinstance(item, Change) else item.prefix if isinstance(item, Folder) else item
    return tuple(items), None


def _items(connection: apsw.Connection, query: Query) -> Iterator[Item]:
    """Yield all that is to be listed, and one more than the limit at most."""
    first: bytes | None = query.first
    left = query.limit + 1
    while first is not None and first < query.end:
        require_absent(connection, first)
        rows = (_changes if query.values else _keys)(connection, first, query.end, left)
        first = None
        for item in rows:
            left -= 1
            folder = query.folder(item.key if isinstance(item, Change) else item)
            if folder is not None:
                yield Folder(folder)
                first = folder + AFTER_UTF8
                break
            yield item


def _keys(connection: apsw.Connection, first: bytes, end: bytes, limit: int) -> Iterator[bytes]:
    for (key,) in connection.execute(KEYS, (first, end, limit)):
        yield _whole(key)


def _changes(connection: apsw.Connection, first: bytes, end: bytes, limit: int) -> Iterator[Change]:
    for row in connection.execute(VALUES, (first, end, limit)):
        columns: tuple[Any, ...] = row
        entry_key, entry_revision, *stored, expected_crc = columns
        change = Change(*stored)
        if change.key != _whole(entry_key) or change.value is None or not is_intact(change, expected_crc):
            raise DamagedRow(
                f"the change of revision {entry_revision} is damaged on this node's disk: read another node"
            )
        yield change


def _whole(key: bytes) -> bytes:
    if b"\0" in key:  # see `reader.ZEROED`
        raise DamagedRow("the end of a key is damaged on this node's disk: read another node")
    return key
