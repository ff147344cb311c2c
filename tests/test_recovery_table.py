"""The leader's recovery table: what `decide` returns for each row, and what it must never do among any three peers."""

import itertools
from collections.abc import Iterator
from typing import Final

import pytest

from mehdb.errors import Damaged
from mehdb.model import Epoch, History, NodePosition, Revision, Role, State
from mehdb.recovery import CatchUp, Decision, Lead, Own, Peers, Refuse, TakeSnapshot, Wait, decide

OURS, OTHER, THIRD = (History(digit * 32) for digit in "abc")
HEAD: Final = Revision(10)
MISSING: Final = Damaged("store.db ends at revision 7, but 10 has been acknowledged", 3)
GARBAGE: Final = Damaged("store.db cannot be read")

EMPTY: Final = Own(None, Revision(0), Epoch(0))
EMPTY_WITH_HISTORY: Final = Own(OURS, Revision(0), Epoch(3))
FULL: Final = Own(OURS, HEAD, Epoch(3))
DAMAGED: Final = Own(OURS, HEAD, Epoch(0), MISSING)
DAMAGED_WITHOUT_MARK: Final = Own(None, Revision(0), Epoch(0), GARBAGE)
ALL_OWN: Final = (EMPTY, EMPTY_WITH_HISTORY, FULL, DAMAGED, DAMAGED_WITHOUT_MARK)

ONE, TWO, THREE = (f"http://mehdb-{ordinal}:9876" for ordinal in (1, 2, 3))
SILENT, FORKED, ABSENT = "silent", "forked", "absent"
Seen = NodePosition | str
"""A peer's position, or that it does not answer, or is on another chain, or that there is none."""


def at(revision: int, history: History | None = OURS, epoch: int = 3) -> NodePosition:
    """Return the position of a peer."""
    return NodePosition("peer", Role.FOLLOWER, State.SYNCING, Epoch(epoch), history, Revision(revision), "00" * 16)


def peers(*seen: Seen) -> Peers:
    """Return what was *seen* of the peers ONE, TWO and so on. One that has forked is ahead."""
    by_url = dict(zip((ONE, TWO, THREE), seen, strict=False))
    positions = {url: at(15) if one == FORKED else one for url, one in by_url.items() if one not in (SILENT, ABSENT)}
    forked = frozenset(url for url, one in by_url.items() if one == FORKED)
    return Peers(
        {url: one for url, one in positions.items() if isinstance(one, NodePosition)},
        {url: "no answer" for url, one in by_url.items() if one == SILENT},
        forked,
    )


ROWS: Final[list[tuple[str, Own, tuple[Seen, ...], Decision]]] = [
    ("at all of its history", FULL, (at(10), at(10)), Lead(Epoch(3), OURS)),
    ("ahead of all of its history", FULL, (at(9), at(0)), Lead(Epoch(3), OURS)),
    ("alone", FULL, (), Lead(Epoch(3), OURS)),
    ("a peer has seen a higher epoch", FULL, (at(10, epoch=8), at(9, epoch=5)), Lead(Epoch(8), OURS)),
    ("a peer of another history has a higher epoch", EMPTY_WITH_HISTORY, (at(0, OTHER, 8),), Lead(Epoch(3), OURS)),
    ("an empty peer without history", FULL, (at(0, None, 0),), Lead(Epoch(3), OURS)),
    ("behind one", FULL, (at(11),), CatchUp((ONE,))),
    ("behind two: the most advanced first", FULL, (at(11), at(14), at(12)), CatchUp((TWO, THREE, ONE))),
    ("behind one, another is of another history", FULL, (at(99, OTHER), at(12)), CatchUp((TWO,))),
    ("behind one, another has forked", FULL, (FORKED, at(12)), CatchUp((TWO,))),
    ("empty, one holder", EMPTY, (at(7), at(0, None, 0)), TakeSnapshot((ONE,))),
    ("empty, two holders: the most advanced", EMPTY, (at(7), at(9)), TakeSnapshot((TWO,))),
    ("empty, two that hold the same", EMPTY, (at(9), at(9)), TakeSnapshot((ONE, TWO))),
    ("empty but for a history, a holder of it", EMPTY_WITH_HISTORY, (at(7),), TakeSnapshot((ONE,))),
    ("empty but for a history, a holder of another", EMPTY_WITH_HISTORY, (at(7, OTHER),), TakeSnapshot((ONE,))),
    ("empty, no peers", EMPTY, (), Lead(Epoch(0), None)),
    ("empty, all empty", EMPTY, (at(0, None, 0), at(0, None, 0)), Lead(Epoch(0), None)),
    ("empty, all empty, one in a history", EMPTY, (at(0, OTHER, 4), at(0, None, 0)), Lead(Epoch(4), OTHER)),
    ("empty, all empty, in two histories", EMPTY, (at(0, OTHER, 4), at(0, THIRD, 6)), Lead(Epoch(0), None)),
    ("empty but for a history, alone", EMPTY_WITH_HISTORY, (), Lead(Epoch(3), OURS)),
    ("damaged, the holder has all", DAMAGED, (at(10),), TakeSnapshot((ONE,))),
    ("damaged, the holder has more", DAMAGED, (at(9), at(12)), TakeSnapshot((TWO,))),
    ("damaged, nothing known of it, one holder", DAMAGED_WITHOUT_MARK, (at(7),), TakeSnapshot((ONE,))),
]


@pytest.mark.parametrize(("own", "seen", "expected"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_each_row_of_the_table(own: Own, seen: tuple[Seen, ...], expected: Decision) -> None:
    assert decide(own, peers(*seen), waited=False) == expected


@pytest.mark.parametrize("own", ALL_OWN)
def test_a_peer_that_does_not_answer_is_waited_for_at_first(own: Own) -> None:
    decision = decide(own, peers(at(10), SILENT), waited=False)
    assert isinstance(decision, Wait)
    assert f"{TWO} (no answer)" in decision.reason


@pytest.mark.parametrize("own", [EMPTY, EMPTY_WITH_HISTORY, DAMAGED, DAMAGED_WITHOUT_MARK])
def test_a_store_without_data_waits_for_ever_where_nobody_else_holds_any(own: Own) -> None:
    decision = decide(own, peers(at(0), SILENT), waited=True)
    assert isinstance(decision, Wait)
    assert f"{TWO} (no answer), which may hold data" in decision.reason


def test_a_store_with_data_leads_after_the_bound_and_says_who_was_not_asked() -> None:
    decision = decide(FULL, peers(at(9), SILENT), waited=True)
    assert decision == Lead(Epoch(3), OURS, (f"{TWO} was not asked: no answer",))


@pytest.mark.parametrize(("seen", "revision"), [(at(99, OTHER), 99), (at(3, OTHER), 3)])
def test_a_peer_of_another_history_is_left_alone_and_named(seen: NodePosition, revision: int) -> None:
    decision = decide(FULL, peers(seen), waited=False)
    note = f"{ONE} has other changes ({OTHER} at revision {revision}): it keeps them and will be diverged"
    assert decision == Lead(Epoch(3), OURS, (note,))


def test_a_peer_on_another_chain_is_left_alone_and_named() -> None:
    decision = decide(FULL, peers(FORKED), waited=False)
    note = f"{ONE} has other changes ({OURS} at revision 15): it keeps them and will be diverged"
    assert decision == Lead(Epoch(3), OURS, (note,))


@pytest.mark.parametrize("own", [EMPTY, EMPTY_WITH_HISTORY, DAMAGED_WITHOUT_MARK, DAMAGED])
def test_several_histories_are_an_operators_choice(own: Own) -> None:
    decision = decide(own, peers(at(12), at(7, OTHER)), waited=False)
    assert isinstance(decision, Refuse)
    assert f"{ONE} has {OURS} at revision 12; {TWO} has {OTHER} at revision 7" in decision.reason
    assert "`mehdb adopt --from URL`" in decision.reason


def test_a_damaged_store_is_not_replaced_by_another_history() -> None:
    decision = decide(DAMAGED, peers(at(99, OTHER)), waited=False)
    assert isinstance(decision, Refuse)
    assert f"of history {OURS}" in decision.reason
    assert OTHER in decision.reason


@pytest.mark.parametrize("seen", [(), (at(0),), (at(0, None, 0), at(0, OTHER))])
def test_a_damaged_store_without_any_copy_is_an_operators_decision(seen: tuple[Seen, ...]) -> None:
    decision = decide(DAMAGED, peers(*seen), waited=True)
    assert isinstance(decision, Refuse)
    assert str(MISSING) in decision.reason
    assert "`mehdb accept-loss`" in decision.reason
    assert "`mehdb restore`" in decision.reason


def test_a_damaged_store_is_not_replaced_by_one_that_lacks_acknowledged_changes() -> None:
    decision = decide(DAMAGED, peers(at(8), at(6)), waited=False)
    assert isinstance(decision, Refuse)
    assert f"{ONE} holds the most, but lacks 2 acknowledged changes" in decision.reason
    assert f"`mehdb adopt --from {ONE}`" in decision.reason


PEER_KINDS: Final[tuple[Seen, ...]] = (
    ABSENT, SILENT, FORKED, at(0, None, 0), at(0), at(0, OTHER, 9), at(9), at(10), at(12, epoch=5), at(12, OTHER, 9),
    at(4, THIRD),
)  # fmt: skip


def situations() -> Iterator[tuple[Own, Peers, bool]]:
    """Yield every own store with every three peers, each asked before and after the bound."""
    for own, seen, waited in itertools.product(ALL_OWN, itertools.product(PEER_KINDS, repeat=3), (False, True)):
        yield own, peers(*seen), waited


def test_in_no_situation_does_the_leader_do_harm() -> None:
    """Whatever three peers are, at whatever time: every decision keeps what the table is for."""
    count = 0
    for own, around, waited in situations():
        decision = decide(own, around, waited=waited)
        where = f"{own} among {around}, {waited=}: {decision}"
        holders = around.with_data()
        has_data = bool(own.head) and not own.damaged
        more = {u for u, p in holders.items() if p.history == own.history and p.revision > own.head} - around.forked
        match decision:
            case Lead(epoch, history, notes):
                assert not own.damaged, where
                assert waited or not around.silent, where
                assert has_data or not (holders or around.silent), where
                assert not (has_data and more), where
                assert own.history is None or history == own.history, where
                assert epoch >= own.epoch, where
                assert all(epoch >= p.epoch for p in around.positions.values() if p.history == history), where
                assert all(any(url in note for note in notes) for url in around.silent), where
            case CatchUp(urls):
                assert has_data, where
                assert set(urls) == more, where
                assert holders[urls[0]].revision == max(holders[url].revision for url in more), where
            case TakeSnapshot(urls):
                assert not has_data, where
                if own.damaged:  # who contradicts what it has acknowledged has no say
                    holders = {url: p for url, p in holders.items() if url not in around.forked}
                assert {p.history for p in holders.values()} == {holders[url].history for url in urls}, where
                assert all(p.revision <= holders[urls[0]].revision for p in holders.values()), where
                assert not own.damaged or own.history in (None, holders[urls[0]].history), where
                assert not own.damaged or own.head <= holders[urls[0]].revision, where
            case Wait(reason):
                assert all(url in reason for url in around.silent), where
                assert not (waited and has_data), where
            case Refuse():
                assert not has_data, where
                assert own.damaged or len({p.history for p in holders.values()}) > 1, where
        count += 1
    assert count == len(ALL_OWN) * len(PEER_KINDS) ** 3 * 2
