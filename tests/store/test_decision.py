"""What becomes of requests, in order: conditions, batches, lives."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mehdb.errors import KeyNotFound, MehdbError, PreconditionFailed
from mehdb.model import ORIGIN, Change, Revision
from mehdb.store.decision import Batch, Check, Condition, Outcome, Request, Write, decide

ANY = Condition(None)
NONE = Condition(None, negated=True)
KEYS = st.sampled_from([b"a", b"b", b"c"])
REVISIONS = st.integers(0, 12).map(Revision)
CONDITIONS = st.lists(
    st.builds(Condition, st.none() | st.frozensets(st.integers(1, 12), max_size=3), st.booleans()), max_size=2
).map(tuple)
VALUES = st.none() | st.binary(max_size=2)
WRITES = st.builds(Write, KEYS, VALUES, conditions=CONDITIONS)
BATCHES = st.builds(
    Batch, st.lists(st.builds(Write, KEYS, VALUES) | st.builds(Check, KEYS, REVISIONS), max_size=5).map(tuple)
)


def at(*revisions: int) -> Condition:
    return Condition(frozenset(revisions))


def shown(outcome: Outcome) -> Any:
    """Return *outcome*, or for an error its class and details."""
    return (type(outcome), outcome.details) if isinstance(outcome, MehdbError) else outcome


def decided(requests: list[Request], live: dict[bytes, Revision], head: int, now_ms: int = 0) -> Any:
    outcomes, changes = decide(requests, live, Revision(head), now_ms)
    return [shown(outcome) for outcome in outcomes], changes


def test_outcomes_are_decided_in_order() -> None:
    writes: list[Request] = [
        Write(b"a", b"1"), Write(b"a", None), Write(b"a", None), Write(b"b", None), Write(b"a", b"2", "x/y")
    ]  # fmt: skip
    live = {b"b": Revision(3)}
    outcomes, changes = decided(writes, live, 7)
    assert outcomes == [8, 9, (KeyNotFound, {}), 10, 11]
    assert changes == [
        Change(Revision(8), b"a", b"1"),
        Change(Revision(9), b"a", None),
        Change(Revision(10), b"b", None),
        Change(Revision(11), b"a", b"2", "x/y"),
    ]
    assert live == {b"a": 11}


def test_a_condition_sees_what_the_requests_before_it_have_done() -> None:
    live = {b"k": Revision(5)}
    writes: list[Request] = [Write(b"k", b"%d" % n, conditions=(at(5),)) for n in range(3)]
    assert decided(writes, live, 7)[0] == [8, *[(PreconditionFailed, {"revision": 8})] * 2]


def test_conditions_hold_as_rfc_9110_has_it() -> None:
    here, absent = Revision(5), ORIGIN
    assert [condition.holds(here) for condition in (ANY, NONE, at(5), at(4, 5), at(4))] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert [condition.holds(absent) for condition in (ANY, NONE, at(5), at(0))] == [False, True, False, False]
    assert [Condition(frozenset({4}), negated=True).holds(one) for one in (here, Revision(4), absent)] == [
        True,
        False,
        True,
    ]


def test_a_deletion_of_nothing_is_told_apart_from_a_condition_that_does_not_hold() -> None:
    deletions: list[Request] = [Write(b"k", None, conditions=(one,)) for one in (at(1), ANY, NONE)]
    outcomes, changes = decided(deletions, {}, 3)
    assert outcomes == [*[(PreconditionFailed, {"revision": 0})] * 2, (KeyNotFound, {})]
    assert not changes


def test_a_life_begins_when_it_is_decided() -> None:
    _, changes = decided([Write(b"k", b"v", ttl_ms=1500), Write(b"k", b"v")], {}, 0, now_ms=1_000_000)
    assert [change.expires_at for change in changes] == [1_001_500, None]


def test_a_batch_is_in_consecutive_revisions_and_says_what_became_of_each_operation() -> None:
    live = {b"a": Revision(2), b"d": Revision(3)}
    batch = Batch(
        (
            Check(b"a", Revision(2)), Write(b"a", b"1"), Check(b"a", Revision(8)), Check(b"new", ORIGIN),
            Write(b"new", b"2"), Write(b"absent", None), Write(b"d", None),
        )
    )  # fmt: skip
    outcomes, changes = decided([batch, Write(b"after", b"")], live, 7)
    assert outcomes == [(2, 8, 8, 0, 9, 0, 10), 11]
    assert [change.revision for change in changes] == [8, 9, 10, 11]
    assert live == {b"a": 8, b"new": 9, b"after": 11}


def test_a_batch_with_a_failed_check_leaves_no_trace_and_names_all_that_failed() -> None:
    live = {b"a": Revision(2), b"d": Revision(3)}
    batch = Batch(
        (Write(b"a", b"1"), Write(b"d", None), Write(b"n", b""), Check(b"a", Revision(2)), Check(b"d", Revision(3)))
    )
    outcomes, changes = decided([Write(b"x", b""), batch, Write(b"y", b"")], live, 7)
    failed = [{"operation": 4, "key": "a", "revision": 9}, {"operation": 5, "key": "d", "revision": 0}]
    assert outcomes == [8, (PreconditionFailed, {"failed": failed}), 9]
    assert [change.revision for change in changes] == [8, 9]
    assert live == {b"a": 2, b"d": 3, b"x": 8, b"y": 9}


@given(
    st.dictionaries(KEYS, st.integers(1, 9).map(Revision)), st.lists(WRITES | BATCHES, max_size=6), st.integers(9, 12)
)
def test_requests_together_are_decided_as_they_would_be_one_by_one(
    live: dict[bytes, Revision], requests: list[Request], head: int
) -> None:
    together, apart = dict(live), dict(live)
    outcomes, changes = decided(requests, together, head)
    alone = []
    for request in requests:
        [outcome], made = decided([request], apart, head)
        assert (outcome, len(made)) == (outcomes[len(alone)], len(made))
        alone.append(outcome)
        head += len(made)
    assert together == apart
    assert [change.revision for change in changes] == list(range(changes[0].revision, head + 1)) if changes else True
