"""The checker of histories accepts what is linearizable and notices what is not, as an exhaustive search does."""

import random
from collections.abc import Iterable

import pytest

from linearizability import Kind, Log, Operation, check, in_doubt, read, refused, write

LOG: Log = {1: b"a", 2: b"b"}
A, B = write(0, 1, 1, b"a"), write(2, 3, 2, b"b")
DELETED: Log = {1: b"a", 2: None, 3: b"b", 4: None}
SET_AND_DELETED = [write(0, 1, 1, b"a"), write(2, 3, 2, None), write(4, 5, 3, b"b"), write(6, 7, 4, None)]

LINEARIZABLE: dict[str, tuple[list[Operation], Log]] = {
    "nothing happened": ([], {}),
    "one after the other": ([A, read(1.1, 1.9, 1, b"a"), B, read(4, 5, 2, b"b")], LOG),
    "revisions need not be without gaps": ([write(0, 1, 7, b"a"), read(2, 3, 7, b"a")], {7: b"a"}),
    "a read beside a write shows the old value": ([A, B, read(2.1, 2.9, 1, b"a")], LOG),
    "a read beside a write shows the new value": ([A, B, read(2.1, 2.2, 2, b"b")], LOG),
    "a read that began before it": ([A, B, read(0, 9, 1, b"a")], LOG),
    "two at once, in either order": ([write(0, 5, 2, b"b"), write(0, 5, 1, b"a"), read(6, 7, 2, b"b")], LOG),
    "two reads beside a write, the later one new": ([A, B, read(2, 2.3, 1, b"a"), read(2.4, 2.5, 2, b"b")], LOG),
    "in doubt and never done": ([A, in_doubt(2, b"b"), read(3, 4, 1, b"a")], {1: b"a"}),
    "in doubt, done and seen": ([A, in_doubt(2, b"b"), read(3, 4, 2, b"b")], LOG),
    "in doubt and done much later": ([A, in_doubt(2, b"b"), read(30, 40, 1, b"a"), read(50, 60, 2, b"b")], LOG),
    "refused and not done": ([A, refused(2, 3, b"b"), read(4, 5, 1, b"a")], {1: b"a"}),
    "nothing before the first write": ([read(0, 0.1, None, None), A], {1: b"a"}),
    "nothing beside the first write": ([read(0.5, 0.6, None, None), A], {1: b"a"}),
    "nothing after each deletion": (
        [*SET_AND_DELETED, read(3.1, 3.9, None, None), read(4.1, 4.2, None, None), read(8, 9, None, None)], DELETED,
    ),
    "nothing, found beside a deletion and the next write": ([*SET_AND_DELETED, read(2.5, 4.5, None, None)], DELETED),
    "a deletion in doubt": (
        [A, in_doubt(2, None), read(3, 4, 1, b"a"), read(5, 6, None, None)], {1: b"a", 2: None},
    ),
    "two deletions in doubt, either may be the one that was done": (
        [A, in_doubt(9, None), in_doubt(2, None), read(5, 6, None, None)], {1: b"a", 2: None},
    ),
}  # fmt: skip

NOT_LINEARIZABLE: dict[str, tuple[str, list[Operation], Log]] = {
    "a stale read": ("out of order", [A, B, read(4, 5, 1, b"a")], LOG),
    "a stale read after another read": (
        "out of order", [A, write(2, 9, 2, b"b"), read(3, 4, 2, b"b"), read(5, 6, 1, b"a")], LOG,
    ),
    "a stale read after a read of what is in doubt": (
        "out of order", [A, in_doubt(2, b"b"), read(3, 4, 2, b"b"), read(5, 6, 1, b"a")], LOG,
    ),
    "a lost write": ("lost", [A, B, read(4, 5, 1, b"a")], {1: b"a"}),
    "a lost write that nobody missed": ("lost", [A, B], {1: b"a"}),
    "a lost deletion": ("lost", [A, write(2, 3, 2, None)], {1: b"a"}),
    "a read from the future": ("out of order", [A, B, read(1.1, 1.9, 2, b"b")], LOG),
    "a read of what is in doubt, before it was sent": ("out of order", [A, in_doubt(2, b"b"), read(1.1, 1.9, 2, b"b")],
                                                       LOG),
    "two writes in the wrong order": ("out of order", [write(2, 3, 1, b"a"), write(0, 1, 2, b"b")], LOG),
    "a write in doubt in front of one that was done before it": (
        "out of order", [in_doubt(5, b"a"), write(0, 1, 2, b"b")], LOG,
    ),
    "another value": ("not what was written", [A, read(2, 3, 1, b"b")], {1: b"a"}),
    "another value in the log": ("another value", [A], {1: b"b"}),
    "a value of another revision": ("not what was written", [A, B, read(4, 5, 2, b"a")], LOG),
    "a revision that was never given": ("not what was written", [A, read(2, 3, 2, b"a")], {1: b"a"}),
    "a value read of a deletion": ("not what was written", [*SET_AND_DELETED, read(8, 9, 4, b"b")], DELETED),
    "one revision for two": ("one revision for two", [A, write(2, 3, 1, b"a")], {1: b"a"}),
    "what nobody wrote": ("nobody wrote", [A], LOG),
    "what was refused": ("nobody wrote", [A, refused(2, 3, b"b")], LOG),
    "a deletion that was refused": ("nobody wrote", [A, refused(2, 3, None)], {1: b"a", 2: None}),
    "a write in doubt that was done twice": ("nobody wrote", [in_doubt(0, b"a")], {1: b"a", 2: b"a"}),
    "nothing, though it was written": ("out of order", [A, read(2, 3, None, None)], {1: b"a"}),
    "nothing, before the deletion was sent": ("out of order", [*SET_AND_DELETED, read(1.1, 1.9, None, None)], DELETED),
    "nothing, after what followed the deletion": (
        "out of order", [*SET_AND_DELETED, read(5.1, 5.9, None, None)], DELETED,
    ),
    "a value, after nothing was found": (
        "out of order", [A, write(2, 9, 2, None), read(3, 4, None, None), read(5, 6, 1, b"a")], {1: b"a", 2: None},
    ),
    "nothing, before a deletion in doubt was sent": (
        "out of order", [A, in_doubt(5, None), read(2, 3, None, None)], {1: b"a", 2: None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEARIZABLE)
def test_what_is_linearizable_is_accepted(name: str) -> None:
    history, log = LINEARIZABLE[name]
    assert check(history, log) == []
    assert can_be_ordered(history, log)


@pytest.mark.parametrize("name", NOT_LINEARIZABLE)
def test_what_is_not_linearizable_is_noticed(name: str) -> None:
    reason, history, log = NOT_LINEARIZABLE[name]
    problems = check(history, log)
    assert problems
    assert any(problem.startswith((reason, f"acknowledged, but {reason}")) for problem in problems), problems
    assert not can_be_ordered(history, log)


def test_the_checker_agrees_with_an_exhaustive_search() -> None:
    """Over small histories, of which about as many are linearizable as are not."""
    shuffled = random.Random(1)
    verdicts = [0, 0]
    for _ in range(4000):
        history, log = random_history(shuffled)
        expected = can_be_ordered(history, log)
        problems = check(history, log)
        assert (problems == []) == expected, "\n".join([*map(str, history), str(log), *problems])
        verdicts[expected] += 1
    assert min(verdicts) > 1000, "so that both are tried"


def test_a_long_history_is_checked_in_one_pass() -> None:
    """Quadratic time would take hours here; pytest's limit would end it."""
    count = 100_000
    history = [write(n, n + 0.5, n, b"%d" % n) for n in range(1, count)]
    history += [read(n + 0.1, n + 0.9, n, b"%d" % n) for n in range(1, count)]
    log = {n: b"%d" % n for n in range(1, count)}
    assert check(history, log) == []
    stale = read(count, count + 1, count // 2, b"%d" % (count // 2))
    assert len(check([*history, stale], log)) == 1, "one culprit, one line, however many it contradicts"


def can_be_ordered(history: Iterable[Operation], log: Log) -> bool:
    """Return whether some order is a linearization: try them all (Wing and Gong, JPDC 17(1-2), 1993)."""
    wanted: list[tuple[int, bytes | None]] = [(0, None), *sorted(log.items())]
    operations = [op for op in history if op.kind is not Kind.REFUSED]

    def search(left: frozenset[int], done: int) -> bool:
        """Try what may come next, when the log's first *done* changes have happened."""
        if done == len(log) and all(operations[n].kind is Kind.IN_DOUBT for n in left):
            return True
        first_response = min(operations[n].responded_s for n in left) if left else 0
        for n in left:
            op = operations[n]
            if op.invoked_s > first_response:
                continue  # another one had responded by then
            if op.kind is Kind.READ:
                revision, value = wanted[done]
                happens, after = op.value == value and (op.revision == revision or value is op.revision is None), done
            else:
                revision, value = wanted[done + 1] if done < len(log) else (-1, None)
                happens, after = revision > 0 and op.value == value and op.revision in (None, revision), done + 1
            if happens and search(left - {n}, after):
                return True
        return False

    return search(frozenset(range(len(operations))), 0)


def random_history(shuffled: random.Random) -> tuple[list[Operation], Log]:
    """Return what a store may have done, with some operations moved in time or made to show something else."""
    log: dict[int, bytes | None] = {}
    for n in range(shuffled.randrange(5)):
        log[2 * n + 1] = None if shuffled.random() < 0.4 else b"%d" % n
    history: list[Operation] = []
    moment = 0.0
    for revision, value in [(0, None), *log.items()]:
        moment += 2
        if revision:
            begun_s, ended_s = moment - shuffled.randrange(3), moment + shuffled.randrange(3)
            doubted = shuffled.random() < 0.3
            history.append(in_doubt(begun_s, value) if doubted else write(begun_s, ended_s, revision, value))
        for _ in range(shuffled.randrange(3)):
            moment += 1
            begun_s, ended_s = moment - shuffled.randrange(3), moment + shuffled.randrange(3)
            history.append(read(begun_s, ended_s, None if value is None else revision, value))
    if shuffled.random() < 0.3:
        history.append(in_doubt(shuffled.randrange(9), shuffled.choice([None, b"never"])))
    if shuffled.random() < 0.1:
        history.append(refused(0, 1, shuffled.choice([None, b"refused"])))
    for _ in range(shuffled.randrange(8) if history else 0):
        n = shuffled.randrange(len(history))
        op, by_s = history[n], shuffled.randrange(-6, 7)
        history[n] = Operation(op.kind, op.invoked_s + by_s, op.responded_s + by_s, op.revision, op.value)
    if log and shuffled.random() < 0.05:
        del log[shuffled.choice(list(log))]
    return history, log
