"""Which changes have outlived their time, found through an index of those that have one.

Superseded changes are in that index until they are compacted away, so each is looked at once: by a cursor that only
moves on. What is committed later expires later, as the writer's thread looks at the clock itself.
"""

from typing import Any, Final, NamedTuple

import apsw

from mehdb.model import Revision
from mehdb.store.decision import Condition, Write

DUE: Final = """
    SELECT expires_at, revision, key FROM change INDEXED BY change_expiry
    WHERE expires_at IS NOT NULL AND (expires_at, revision) > (?, ?) AND expires_at <= ?
    ORDER BY expires_at, revision LIMIT ?"""
NEXT: Final = """
    SELECT expires_at FROM change INDEXED BY change_expiry
    WHERE expires_at IS NOT NULL AND (expires_at, revision) > (?, ?) ORDER BY expires_at, revision LIMIT 1"""


class Due(NamedTuple):
    """The deletion of each key that has expired, unless something newer has taken its place, and where to look on."""

    deletions: list[Write]
    cursor: tuple[int, Revision]


class Expiry:
    """The cursor over all changes that expire, for the one thread that writes."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._cursor = (0, Revision(0))
        self.next_ms: int | None = 0  # not looked for yet: only a leader does
        """When the next change expires, superseded or not, in milliseconds since the epoch; None: none does."""

    def due(self, now_ms: int, limit: int) -> Due:
        """Return the first *limit* changes that have expired at *now_ms*, and were not moved beyond."""
        rows: list[tuple[Any, ...]] = self._connection.execute(DUE, (*self._cursor, now_ms, limit)).fetchall()
        cursor = (rows[-1][0], rows[-1][1]) if rows else self._cursor
        return Due([Write(key, None, conditions=(_still_at(revision),)) for _, revision, key in rows], cursor)

    def move(self, cursor: tuple[int, Revision]) -> None:
        """Move on to *cursor*: what is before it has been deleted, or was superseded."""
        self._cursor = cursor
        self.next_ms = self._next()

    def note(self, expires_at_ms: int) -> None:
        """Take down that a change has been committed that expires then."""
        if self.next_ms is None or expires_at_ms < self.next_ms:
            self.next_ms = expires_at_ms

    def restart(self) -> None:
        """Look at all of them again: changes of another leader may have expired before they came."""
        self._cursor, self.next_ms = (0, Revision(0)), 0

    def _next(self) -> int | None:
        found = self._connection.execute(NEXT, self._cursor).fetchone()
        return None if found is None else int(found[0])


def _still_at(revision: Revision) -> Condition:
    return Condition(frozenset({revision}))
