"""The newest changes, in memory, for those who watch: a commit is read from the disk by nobody who keeps up.

Invariant: a feed is a run of consecutive durable changes of one session, from `start` + 1 to `head`.
"""

from collections.abc import Sequence
from typing import Final

from mehdb.model import Change, Revision

FEED_CHANGES: Final = 10_000  # seconds of heavy writing: who is further behind reads from the disk
FEED_BYTES: Final = 8 << 20
CHANGE_BYTES: Final = 256  # about what a change occupies beside its key and value


class Feed:
    """All methods belong to one event loop."""

    def __init__(self, head: Revision) -> None:
        self.start = head
        self._changes: list[Change] = []
        self._bytes = 0

    @property
    def head(self) -> Revision:
        """The newest revision that it has, or has begun after."""
        return Revision(self.start + len(self._changes))

    def extend(self, changes: Sequence[Change], size_bytes: int = 0) -> None:
        """Take in *changes*, which follow on `head`, and let go of old ones, some at a time.

        *size_bytes* is about what they occupy, where that is known.
        """
        self._changes += changes
        self._bytes += size_bytes or sum(map(_size_bytes, changes))
        if len(self._changes) > FEED_CHANGES or self._bytes > FEED_BYTES:
            self._halve()

    def after(self, revision: Revision, limit: int) -> Sequence[Change] | None:
        """Return the first *limit* changes after *revision*; None if it does not reach back so far."""
        if revision < self.start:
            return None
        first = revision - self.start
        return self._changes[first : first + limit]

    def _halve(self) -> None:
        """Let go of the older changes, until half of what there may be is left, or less."""
        kept, size_bytes = 0, 0
        for change in reversed(self._changes):
            size_bytes += _size_bytes(change)
            if kept == FEED_CHANGES // 2 or size_bytes > FEED_BYTES // 2:
                size_bytes -= _size_bytes(change)
                break
            kept += 1
        gone = len(self._changes) - kept
        self.start = Revision(self.start + gone)
        del self._changes[:gone]
        self._bytes = size_bytes


def _size_bytes(change: Change) -> int:
    return len(change.key) + len(change.value or b"") + CHANGE_BYTES
