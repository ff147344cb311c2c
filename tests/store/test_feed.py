"""The feed: a run of the newest changes, bounded, and exact about what it no longer has."""

from hypothesis import given
from hypothesis import strategies as st

from mehdb.model import Change, Revision
from mehdb.store.feed import CHANGE_BYTES, FEED_BYTES, FEED_CHANGES, Feed


def change(revision: int, size_bytes: int = 0) -> Change:
    return Change(Revision(revision), b"k", bytes(size_bytes))


@given(
    start=st.integers(0, 5),
    runs=st.lists(st.lists(st.sampled_from([0, 1000, FEED_BYTES // 3, FEED_BYTES * 2]), max_size=4), max_size=8),
    after=st.integers(0, 40),
    limit=st.integers(1, 9),
)
def test_a_feed_gives_what_follows_a_revision_or_says_that_it_does_not_reach_back(
    start: int, runs: list[list[int]], after: int, limit: int
) -> None:
    feed, head = Feed(Revision(start)), start
    for sizes in runs:
        feed.extend([change(head + number, size_bytes) for number, size_bytes in enumerate(sizes, 1)])
        head += len(sizes)
    assert feed.head == head
    assert start <= feed.start <= head
    found = feed.after(Revision(after), limit)
    if after < feed.start:
        assert found is None
    else:
        assert [one.revision for one in found or ()] == list(range(after + 1, min(head, after + limit) + 1))


def test_a_feed_is_bounded_in_number_and_keeps_the_newest() -> None:
    feed = Feed(Revision(0))
    for revision in range(1, 3 * FEED_CHANGES):
        feed.extend([change(revision)])
        assert feed.head - feed.start >= FEED_CHANGES // 2 or feed.start == 0
        assert feed.head - feed.start <= FEED_CHANGES
    assert feed.start > FEED_CHANGES


def test_a_feed_is_bounded_in_bytes() -> None:
    feed, size_bytes = Feed(Revision(0)), 100_000
    for revision in range(1, 500):
        feed.extend([change(revision, size_bytes)])
        assert (feed.head - feed.start) * (size_bytes + 1 + CHANGE_BYTES) <= FEED_BYTES
    assert feed.head - feed.start >= FEED_BYTES // size_bytes // 3
