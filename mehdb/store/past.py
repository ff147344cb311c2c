"""What a key was: its value at an earlier revision, and its changes, as far back as the log retains them.

There is no index of changes by key: it would cost each write as much as that of live keys. So the log is searched, from
the newest change down, without the interpreter; only a key that has been written since is searched for.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from mehdb.errors import Compacted
from mehdb.model import ORIGIN, PAGE_BYTES, VALUE_BYTES_LIMIT, Change, Revision
from mehdb.store.reader import CHANGE_OVERHEAD_BYTES, Reader
from mehdb.store.schema import Meta

SEARCH_STEP: Final = 100_000  # changes in one statement, and so in one snapshot: some tens of milliseconds
NEWEST: Final = """
    SELECT revision, key, value, content_type, expires_at, crc FROM change
    WHERE revision > ? AND revision < ? AND key = ? ORDER BY revision DESC LIMIT 1"""


class Past(NamedTuple):
    """Changes of a key, the newest first. What was superseded up to *floor* may be missing. *more*: there are older."""

    changes: list[Change]
    floor: Revision
    more: bool


def value_at(reader: Reader, key: bytes, revision: Revision) -> Change | None:
    """Return the change that *key* was live with at *revision*, None if it was not live then.

    Raises `Compacted` if that is no longer known, and `DamagedRow`.
    """
    meta = reader.meta()
    if revision < meta.floor:
        raise _gone(f"revision {revision} is behind the floor {meta.floor}", meta.floor)
    live = reader.get(key, VALUE_BYTES_LIMIT)
    if live is not None and live.revision <= revision:
        return live
    head = reader.meta().head  # not before that of a deletion which the look at what is live has seen
    if live is None and next(_changes(reader, key, Revision(head + 1), revision), None) is None:
        return None  # it is not there now, and has not changed since
    # Also behind the floor. A sweep goes upwards: where it has left a superseded change, it has left all newer ones.
    change = next(_changes(reader, key, Revision(revision + 1), ORIGIN), None)
    if change is not None:
        return change if change.value is not None else None
    floor = reader.meta().floor
    if floor > ORIGIN:
        raise _gone(f"whether there was a value at revision {revision} is no longer known: it would be older than the "
                    f"floor {floor}", floor)  # fmt: skip
    return None


def history(reader: Reader, key: bytes, before: Revision | None, limit: int) -> Past:
    """Return the retained changes of *key* before revision *before*, or all: at most *limit*, about a page of bytes.

    Raises `DamagedRow`.
    """
    changes: list[Change] = []
    size_bytes = 0
    meta: Meta = reader.meta()
    beyond = Revision(meta.head + 1)  # nothing is to be searched from there on, whatever a client names
    for change in _changes(reader, key, beyond if before is None else min(before, beyond), ORIGIN):
        if len(changes) == limit or size_bytes >= PAGE_BYTES:
            return Past(changes, meta.floor, more=True)
        changes.append(change)
        size_bytes += len(change.key) + len(change.value or b"") + CHANGE_OVERHEAD_BYTES
    return Past(changes, reader.meta().floor, more=False)


def _changes(reader: Reader, key: bytes, before: Revision, after: Revision) -> Iterator[Change]:
    """Yield the changes of *key* between the two, newest first. Raises `DamagedRow`."""
    while before > after + 1:
        least = max(after, before - 1 - SEARCH_STEP)
        change = reader.change(NEWEST, (least, before, key))
        before = Revision(least + 1) if change is None else change.revision
        if change is not None:
            yield change


def _gone(reason: str, floor: Revision) -> Compacted:
    return Compacted(f"{reason}: ask for a newer one, or have more retained (--retain-changes)", floor=floor)
