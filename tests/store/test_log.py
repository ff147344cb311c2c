"""Batches and pages in one transaction each: all of it, or nothing at all."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from mehdb.errors import Diverged, KeyNotFound, MehdbError, PeerAnswerInvalid, StaleEpoch
from mehdb.model import GENESIS, ORIGIN, Chain, Change, Epoch, History, Page, Position, Revision
from mehdb.store import Write
from mehdb.store.log import Log
from mehdb.store.schema import open_writer
from stores import chain_anew, problems_of, seal_anew, sql, tables_of

RETAIN: Final = 1000  # more than these tests write: nothing is compacted
HISTORY: Final = History("0123456789abcdef" * 2)
OTHER_HISTORY: Final = History("f" * 32)
BEFORE: Final = [Change(Revision(1), b"a", b"1"), Change(Revision(2), b"b", b"2", "text/plain")]
CHANGES: Final = [
    Change(Revision(3), b"a", b"3", "text/html"),
    Change(Revision(4), b"c", b"", None, 1_700_000_000),
    Change(Revision(5), b"b", None),
    Change(Revision(6), b"d", b"6"),
]
GOOD: Final = Page(HISTORY, Epoch(3), Revision(2), chain_anew(BEFORE + CHANGES), tuple(CHANGES))


@pytest.fixture
def log(volume: Path) -> Iterator[Log]:
    """The log of a follower that holds `BEFORE` and has seen epoch 3."""
    connection = open_writer(volume)
    log = Log(connection, RETAIN)
    log.apply(Page(HISTORY, Epoch(3), ORIGIN, chain_anew(BEFORE), tuple(BEFORE)))
    yield log
    connection.close()


def replaced(struct: Any, /, **fields: Any) -> Any:
    """Return a Struct with other *fields*."""
    return msgspec.structs.replace(struct, **fields)


# Writing.


def test_a_batch_is_one_row_for_each_change(directory: Path, log: Log) -> None:
    log.adopt(HISTORY, Epoch(4))
    log.write([Write(b"a", None), Write(b"a", None), Write(b"c", b"", "x/y"), Write(b"c", b"4"), Write(b"b", None)])
    changes = [
        *BEFORE,
        Change(Revision(3), b"a", None),
        Change(Revision(4), b"c", b"", "x/y"),
        Change(Revision(5), b"c", b"4"),
        Change(Revision(6), b"b", None),
    ]
    chain, rows = GENESIS, []
    for change in changes:
        crc, chain = seal_anew(chain, change)
        rows.append((*msgspec.structs.astuple(change), crc, chain))
    assert tables_of(directory) == {
        "change": rows,
        "entry": [(b"c", 5)],
        "meta": [(1, HISTORY, 4, 6, chain, 0, 1, 6, 1)],
    }
    assert (log.meta.position, log.meta.keys) == (Position(HISTORY, Revision(6), chain), 1)


def test_a_batch_that_changes_nothing_leaves_the_position(log: Log) -> None:
    before = log.meta
    outcomes = log.write([Write(b"x", None), Write(b"y", None)])
    assert [type(outcome) for outcome in outcomes] == [KeyNotFound, KeyNotFound]
    assert log.meta == before


# Applying.


def test_a_page_that_continues_the_store_is_applied(directory: Path, log: Log) -> None:
    log.apply(GOOD)
    assert log.meta.position == GOOD.end
    assert log.meta.keys == 3
    assert sql(directory, "SELECT key, revision FROM entry ORDER BY key") == [(b"a", 3), (b"c", 4), (b"d", 6)]


@pytest.mark.parametrize("revision", [3, 4, 5])
def test_a_page_may_end_anywhere(log: Log, revision: int) -> None:
    changes = CHANGES[: revision - 2]
    log.apply(replaced(GOOD, changes=tuple(changes), chain=chain_anew(BEFORE + changes)))
    assert log.meta.head == revision
    rest = tuple(CHANGES[revision - 2 :])
    log.apply(replaced(GOOD, after=Revision(revision), changes=rest))
    assert log.meta.position == GOOD.end


def test_a_page_of_a_later_epoch_raises_the_epoch(directory: Path, log: Log) -> None:
    log.apply(replaced(GOOD, epoch=Epoch(9)))
    assert log.meta.epoch == 9
    assert sql(directory, "SELECT epoch FROM meta") == [(9,)]


def changed(number: int, **fields: Any) -> Page:
    """Return the good page with one of its changes altered."""
    changes = [replaced(c, **fields) if n == number else c for n, c in enumerate(CHANGES)]
    return replaced(GOOD, changes=tuple(changes))


def run(first: int, *numbers: int) -> Page:
    """Return a page after *first* with the changes of these *numbers*, and the good page's chain."""
    return replaced(GOOD, after=Revision(first), changes=tuple(CHANGES[n] for n in numbers))


BAD_PAGES: Final = {
    "a gap inside": (run(2, 0, 1, 3), PeerAnswerInvalid),
    "a gap before its first": (run(2, 1, 2, 3), PeerAnswerInvalid),
    "a gap before it": (run(3, 1, 2, 3), PeerAnswerInvalid),
    "a change twice": (run(2, 0, 1, 1, 2, 3), PeerAnswerInvalid),
    "changes in another order": (run(2, 1, 0, 2, 3), PeerAnswerInvalid),
    "what the store has already": (
        replaced(GOOD, after=ORIGIN, changes=tuple(BEFORE), chain=chain_anew(BEFORE)),
        PeerAnswerInvalid,
    ),
    "it starts before the head": (replaced(GOOD, after=ORIGIN, changes=tuple(BEFORE + CHANGES)), PeerAnswerInvalid),
    "after says less than it holds": (replaced(GOOD, after=Revision(1)), PeerAnswerInvalid),
    "no changes": (replaced(GOOD, changes=(), chain=chain_anew(BEFORE)), PeerAnswerInvalid),
    "no changes and another chain": (replaced(GOOD, changes=()), PeerAnswerInvalid),
    "a flipped value": (changed(0, value=b"4"), Diverged),
    "a flipped key": (changed(3, key=b"e"), Diverged),
    "a flipped content type": (changed(0, content_type="text/hten"), Diverged),
    "a flipped expiry": (changed(1, expires_at=1_700_000_001), Diverged),
    "a deletion for an empty value": (changed(1, value=None), Diverged),
    "a flipped chain": (replaced(GOOD, chain=Chain(bytes(16))), Diverged),
    "a cut chain": (replaced(GOOD, chain=Chain(GOOD.chain[:15])), Diverged),
    "a change cut off its end": (run(2, 0, 1, 2), Diverged),
    "a lower epoch": (replaced(GOOD, epoch=Epoch(2)), StaleEpoch),
    "another history": (replaced(GOOD, history=OTHER_HISTORY), Diverged),
}


@pytest.mark.parametrize("bad", BAD_PAGES)
def test_a_page_that_does_not_continue_the_store_changes_nothing(directory: Path, log: Log, bad: str) -> None:
    page, error = BAD_PAGES[bad]
    before, tables = log.meta, tables_of(directory)
    with pytest.raises(error):
        log.apply(page)
    assert (log.meta, tables_of(directory)) == (before, tables)
    assert problems_of(directory) == ()
    log.apply(GOOD)
    assert log.meta.position == GOOD.end


def test_pages_of_a_forked_leader_are_refused(log: Log) -> None:
    """Same history, same revisions, and consistent in itself: only the chain tells that the changes before differ."""
    forked = [*BEFORE[:1], Change(Revision(2), b"b", b"other")]
    with pytest.raises(Diverged, match="chain at revision 6 is another"):
        log.apply(replaced(GOOD, chain=chain_anew(forked + CHANGES)))


# Adopting.


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Log]:
    """The log of a store that has seen no leader."""
    connection = open_writer(tmp_path)
    yield Log(connection, RETAIN)
    connection.close()


def test_an_empty_store_takes_the_history_of_its_first_page(empty: Log, tmp_path: Path) -> None:
    page = Page(HISTORY, Epoch(5), ORIGIN, chain_anew(BEFORE), tuple(BEFORE))
    empty.apply(page)
    assert (empty.meta.position, empty.meta.epoch) == (page.end, 5)
    assert sql(tmp_path, "SELECT history, epoch, head FROM meta") == [(HISTORY, 5, 2)]


def test_an_empty_store_takes_no_history_from_a_page_that_it_refuses(empty: Log) -> None:
    before = empty.meta
    with pytest.raises(PeerAnswerInvalid):
        empty.apply(GOOD)
    with pytest.raises(Diverged):
        empty.apply(Page(HISTORY, Epoch(5), ORIGIN, GENESIS, tuple(BEFORE)))
    assert empty.meta == before


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_empty_store_adopts_a_history_and_keeps_it_from_its_first_change_on(
    empty: Log, tmp_path: Path, epoch: int
) -> None:
    empty.adopt(HISTORY, Epoch(epoch))
    assert sql(tmp_path, "SELECT history, epoch, head FROM meta") == [(HISTORY, epoch, 0)]
    empty.write([Write(b"k", b"v")])
    with pytest.raises(Diverged, match=OTHER_HISTORY):
        empty.adopt(OTHER_HISTORY, Epoch(epoch))
    assert sql(tmp_path, "SELECT history, epoch, head FROM meta") == [(HISTORY, epoch, 1)]


@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_an_empty_store_takes_another_history_and_its_epoch(empty: Log, epoch: int) -> None:
    """Nothing is lost with a history without changes, and epochs of two histories cannot be compared."""
    empty.adopt(HISTORY, Epoch(4))
    empty.adopt(OTHER_HISTORY, Epoch(epoch))
    assert (empty.meta.history, empty.meta.epoch, empty.meta.head) == (OTHER_HISTORY, epoch, 0)


def test_an_epoch_is_never_lowered(directory: Path, log: Log) -> None:
    log.adopt(HISTORY, Epoch(8))
    refused: list[Callable[[], None]] = [
        lambda: log.adopt(HISTORY, Epoch(7)),
        lambda: log.apply(replaced(GOOD, epoch=Epoch(7))),
    ]
    for obey in refused:
        with pytest.raises(StaleEpoch, match="epoch 7 is over: this store has seen 8"):
            obey()
    log.adopt(HISTORY, Epoch(8))
    assert sql(directory, "SELECT epoch FROM meta") == [(8,)]


def test_what_a_log_says_after_a_refusal_is_what_the_disk_holds(directory: Path, log: Log) -> None:
    for page, _ in BAD_PAGES.values():
        with pytest.raises(MehdbError):
            log.apply(page)
    connection = open_writer(directory)
    assert Log(connection, RETAIN).meta == log.meta
    connection.close()
