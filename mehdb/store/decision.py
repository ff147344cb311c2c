"""What clients ask the leader's store to write, and what becomes of it: pure functions, called inside the commit.

Each request is decided in order, on what those before it have done: no other write comes between a condition and what
depends on it.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from mehdb.errors import KeyNotFound, MehdbError, PreconditionFailed
from mehdb.model import ORIGIN, Change, Revision

OVERHEAD_BYTES: Final = 256  # about what a write occupies in the queue beside its key and value


class Condition(msgspec.Struct, frozen=True, gc=False):
    """What must hold of a key before it is written: that it is at one of *revisions*, or, *negated*, at none of them.

    None stands for any revision at all (`*`). A key that does not exist is at none. RFC 9110, 13.1.1 and 13.1.2.
    """

    revisions: frozenset[int] | None
    negated: bool = False

    def holds(self, current: Revision) -> bool:
        """Return whether it holds of a key at *current*; 0: there is none."""
        matches = current > ORIGIN and (self.revisions is None or current in self.revisions)
        return matches != self.negated


class Write(msgspec.Struct, frozen=True, gc=False):
    """A request to the leader's store: set *key* to *value*, or delete it (*value* is None), if *conditions* hold.

    A value with *ttl_ms* is deleted so many milliseconds after it was committed.
    """

    key: bytes
    value: bytes | None
    content_type: str | None = None
    ttl_ms: int | None = None
    conditions: tuple[Condition, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether it adds to the store, for which a full volume has no room."""
        return self.value is not None

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that it is about."""
        return (self.key,)

    @property
    def count(self) -> int:
        """How many operations it is."""
        return 1

    @property
    def size_bytes(self) -> int:
        """About how much memory it occupies while it waits."""
        return len(self.key) + len(self.value or b"") + OVERHEAD_BYTES


class Check(msgspec.Struct, frozen=True, gc=False):
    """In a batch: *key* must be at *revision*; 0: must not exist."""

    key: bytes
    revision: Revision

    @property
    def size_bytes(self) -> int:
        """About how much memory it occupies while it waits."""
        return len(self.key) + OVERHEAD_BYTES


class Batch(msgspec.Struct, frozen=True, gc=False):
    """Writes without conditions of their own, and checks: all of it is done, in consecutive revisions, or nothing."""

    operations: tuple[Write | Check, ...]

    @property
    def grows(self) -> bool:
        """Whether it adds to the store."""
        return any(isinstance(operation, Write) and operation.grows for operation in self.operations)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that it is about."""
        return tuple(operation.key for operation in self.operations)

    @property
    def count(self) -> int:
        """How many operations it is."""
        return len(self.operations)

    @property
    def size_bytes(self) -> int:
        """About how much memory it occupies while it waits."""
        return sum(operation.size_bytes for operation in self.operations)


Request = Write | Batch

Outcome = Revision | tuple[Revision, ...] | MehdbError
"""What became of a request: the revision that a write was given, that of each operation of a batch (what a check has
found; 0 for a deletion of what was not there), or why it changed nothing."""

NOTHING_DELETED: Final = "no such key: nothing was deleted"


def decide(
    requests: Iterable[Request], live: dict[bytes, Revision], head: Revision, now_ms: int = 0
) -> tuple[list[Outcome], list[Change]]:
    """Give each request its outcome, in order, and return the changes that they make after *head*.

    *live* has the revision of each key they are about that is live before the first of them. It is updated.
    """
    outcomes: list[Outcome] = []
    changes: list[Change] = []
    for request in requests:
        if isinstance(request, Write):
            outcomes.append(_decide_write(request, live, changes, head, now_ms))
        else:
            outcomes.append(_decide_batch(request, live, changes, head, now_ms))
    return outcomes, changes


def _decide_write(
    write: Write, live: dict[bytes, Revision], changes: list[Change], head: Revision, now_ms: int
) -> Revision | MehdbError:
    current = live.get(write.key, ORIGIN)
    if write.conditions and not all(condition.holds(current) for condition in write.conditions):
        return _not_met(current)
    if write.value is None and current == ORIGIN:
        return KeyNotFound(NOTHING_DELETED)
    return _make(write, live, changes, head, now_ms)


def _decide_batch(
    batch: Batch, live: dict[bytes, Revision], changes: list[Change], head: Revision, now_ms: int
) -> tuple[Revision, ...] | MehdbError:
    made_before = len(changes)
    live_before = {key: live[key] for key in batch.keys if key in live}
    revisions: list[Revision] = []
    failed: list[dict[str, object]] = []
    for number, operation in enumerate(batch.operations, 1):
        current = live.get(operation.key, ORIGIN)
        if isinstance(operation, Check):
            if operation.revision != current:
                failed.append({"operation": number, "key": operation.key.decode(), "revision": current})
            revisions.append(current)
        elif operation.value is None and current == ORIGIN:
            revisions.append(ORIGIN)
        else:
            revisions.append(_make(operation, live, changes, head, now_ms))
    if not failed:
        return tuple(revisions)
    del changes[made_before:]
    for key in batch.keys:
        live.pop(key, None)
    live.update(live_before)
    return PreconditionFailed(
        f"{len(failed)} of the batch's checks failed, nothing was written: read the keys anew and send it again",
        failed=failed,
    )


def _make(write: Write, live: dict[bytes, Revision], changes: list[Change], head: Revision, now_ms: int) -> Revision:
    """Append the change that *write* makes. Return its revision."""
    revision = Revision(head + len(changes) + 1)
    expires_at = None if write.ttl_ms is None else now_ms + write.ttl_ms
    changes.append(Change(revision, write.key, write.value, write.content_type, expires_at))
    if write.value is None:
        del live[write.key]
    else:
        live[write.key] = revision
    return revision


def _not_met(current: Revision) -> PreconditionFailed:
    where = f"is at revision {current}" if current else "does not exist"
    return PreconditionFailed(
        f"the key {where}, so that the condition does not hold: nothing was written. Read it anew and decide again",
        revision=current,
    )
