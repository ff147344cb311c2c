"""Decides whether a history of one key is linearizable, when the store's log says which write has which revision.

A history is linearizable if every operation can be given one moment between its invocation and its response, so that
in the order of these moments each read shows what the last write before it wrote (Herlihy and Wing, "Linearizability: A
Correctness Condition for Concurrent Objects", TOPLAS 12(3), 1990). The condition is local: a store is linearizable if
each of its keys is, so that one key is enough to look at.

To decide it is NP-complete in general, but not where the order of the writes and the write that each read shows are
known (Gibbons and Korach, "Testing Shared Memories", SIAM J. Comput. 26(4), 1997). Here they are: the log has the
order, a read tells its revision, and no two writes have one value. That leaves one order of all operations to look at:
by revision, a write before the reads of it, those by their invocation. It is a linearization unless an operation in it
had responded before one in front of it was invoked: each can then take the latest invocation so far as its moment. So
one pass over the sorted operations decides.

Two kinds of operations have no revision of their own:

- A write whose answer never came may have happened at any time after its invocation, or never: the log tells. It
  responds at infinity. Which of several deletions in doubt made a deletion in the log cannot be told, but may be
  chosen: the earlier one for the earlier revision, as each only has to be invoked soon enough.
- A read of nothing shows some deletion, or the time before the first write: the earliest of these such that nothing
  behind it had responded before the read was invoked. A later one would only forbid more; and of two such reads, the
  one that is invoked later never comes to stand in front of the other.

`check` knows nothing of mehdb. It trusts the log's order, and nothing else in it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import accumulate
from operator import attrgetter

Log = Mapping[int, bytes | None]
"""All that was ever written to the key: revision → value, None for a deletion."""


class Kind(Enum):
    """What was done, as far as its caller knows."""

    WRITE = auto()  # acknowledged
    IN_DOUBT = auto()  # a write whose answer never came
    REFUSED = auto()  # a write whose answer said that nothing was written
    READ = auto()


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. *value* is what was written or read: None for a deletion, and for a read that found nothing.

    *revision* is None where the caller was told none: a write not acknowledged, a read that found nothing.
    """

    kind: Kind
    invoked_s: float
    responded_s: float
    revision: int | None
    value: bytes | None

    def __str__(self) -> str:
        what = "nothing" if self.value is None else repr(self.value[:12])
        when = f"{self.invoked_s:.6f} to {self.responded_s:.6f}"
        return f"{self.kind.name} of {what} at revision {self.revision}, {when}"


def write(invoked_s: float, responded_s: float, revision: int, value: bytes | None) -> Operation:
    """Return a write, or with None a deletion, that was acknowledged."""
    return Operation(Kind.WRITE, invoked_s, responded_s, revision, value)


def in_doubt(invoked_s: float, value: bytes | None) -> Operation:
    """Return a write, or with None a deletion, whose answer never came."""
    return Operation(Kind.IN_DOUBT, invoked_s, math.inf, None, value)


def refused(invoked_s: float, responded_s: float, value: bytes | None) -> Operation:
    """Return a write, or with None a deletion, that was not done, by its answer."""
    return Operation(Kind.REFUSED, invoked_s, responded_s, None, value)


def read(invoked_s: float, responded_s: float, revision: int | None, value: bytes | None) -> Operation:
    """Return a read; with None, one that found nothing, as does a deletion that had nothing to delete."""
    return Operation(Kind.READ, invoked_s, responded_s, revision, value)


def check(history: Iterable[Operation], log: Log) -> list[str]:
    """Return why *history* is not linearizable, nothing if it is."""
    operations = list(history)
    problems: list[str] = []
    placed = _writes(operations, log, problems) + _reads(operations, log, problems)
    absent = [op for op in operations if op.kind is Kind.READ and op.revision is None]
    placed += _reads_of_nothing(absent, placed, log)
    return problems + _overtaken(placed)


def _writes(operations: list[Operation], log: Log, problems: list[str]) -> list[Operation]:
    """Return the writes that happened, each with its revision."""
    placed: dict[int, Operation] = {}
    for op in operations:
        if op.kind is Kind.WRITE and op.revision is not None:
            if op.revision in placed:
                problems.append(f"one revision for two: {op}; {placed[op.revision]}")
            elif op.revision not in log:
                problems.append(f"lost: {op}")
            elif log[op.revision] != op.value:
                problems.append(f"acknowledged, but another value has that revision: {op}")
            placed[op.revision] = op
    doubts = [op for op in operations if op.kind is Kind.IN_DOUBT]
    by_value = {op.value: op for op in doubts if op.value is not None}
    deletions = iter(sorted((op for op in doubts if op.value is None), key=attrgetter("invoked_s")))
    for revision, value in sorted(log.items()):
        if revision not in placed:
            op = next(deletions, None) if value is None else by_value.pop(value, None)  # one write happens once
            if op is None:
                problems.append(f"nobody wrote revision {revision}, or it was refused, or is there twice: {value!r}")
            else:
                placed[revision] = replace(op, revision=revision)
    return list(placed.values())


def _reads(operations: list[Operation], log: Log, problems: list[str]) -> list[Operation]:
    """Return the reads that found a value."""
    found = [op for op in operations if op.kind is Kind.READ and op.revision is not None]
    problems += [f"not what was written: {op}" for op in found if op.value is None or log.get(_at(op)) != op.value]
    return found


def _reads_of_nothing(absent: list[Operation], placed: list[Operation], log: Log) -> list[Operation]:
    """Return *absent*, each with the revision of the deletion that it shows, 0 for the time before all of *log*."""
    spots = [0, *sorted(revision for revision, value in log.items() if value is None)]
    behind = sorted(placed, key=_at)
    revisions = [_at(op) for op in behind]
    # first_response[n]: the earliest of behind[n] and all after it.
    first_response = [*accumulate((op.responded_s for op in reversed(behind)), min, initial=math.inf)][::-1]
    open_until = [first_response[bisect_left(revisions, spot + 1)] for spot in spots]  # never falls from spot to spot
    # Where no spot is late enough, the last one shows it: `_overtaken` finds what responded too early behind it.
    chosen = [min(bisect_left(open_until, op.invoked_s), len(spots) - 1) for op in absent]
    return [replace(op, revision=spots[spot]) for op, spot in zip(absent, chosen, strict=True)]


def _overtaken(placed: list[Operation]) -> list[str]:
    """Return a line for each of *placed* that was invoked only when one that must come after it had responded."""
    problems: list[str] = []
    latest: Operation | None = None  # the last invoked so far
    blamed: Operation | None = None
    for op in sorted(placed, key=lambda op: (_at(op), op.kind is Kind.READ, op.invoked_s)):
        if latest is None or op.invoked_s > latest.invoked_s:
            latest = op
        elif op.responded_s < latest.invoked_s and latest is not blamed:
            problems.append(f"out of order: {latest}; but before it was invoked: {op}")
            blamed = latest
    return problems


def _at(op: Operation) -> int:
    assert op.revision is not None, f"placed without a revision: {op}"
    return op.revision
