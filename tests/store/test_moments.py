"""For how long somebody has lacked a revision: never said too short, hardly too long, in bounded memory."""

from math import nextafter

from hypothesis import given
from hypothesis import strategies as st

from mehdb.model import Revision
from mehdb.store.moments import EXACT_PART, MOMENTS_MAX, STEP_S, Moments

DAY_S = 86400.0
ROUNDING_S = 1e-6


def assert_ages(moments: Moments, came_at_s: dict[int, float], now_s: float) -> None:
    """Each age that is told is the true one, or longer by no more than is promised."""
    for revision, true_s in came_at_s.items():
        told_s = moments.came_at_s(Revision(revision))
        assert told_s is not None
        too_long_s = true_s - told_s
        assert 0 <= too_long_s <= max(STEP_S, EXACT_PART * (now_s - true_s)) + ROUNDING_S, revision


@given(st.lists(st.tuples(st.integers(1, 1000), st.sampled_from((0.0, 0.0001, 0.004, 0.02, 1.0)) | st.floats(0, 50))))
def test_ages_are_exact_to_a_hundredth_of_a_second(steps: list[tuple[int, float]]) -> None:
    moments, came_at_s, now_s, head = Moments(), {}, 1000.0, 0
    moments.note(Revision(0), now_s)
    for changes, pause_s in steps:
        now_s += pause_s
        head += changes
        moments.note(Revision(head), now_s)
        came_at_s |= {head - changes + 1: now_s, head: now_s}
    assert_ages(moments, came_at_s, now_s)
    assert moments.came_at_s(Revision(head + 1)) is None


def test_old_ages_are_exact_to_a_hundredth_of_themselves_and_there_are_never_too_many() -> None:
    """Steadily, then in bursts, then seldom: years of it."""
    moments, came_at_s, now_s = Moments(), {}, 0.0
    moments.note(Revision(0), now_s)
    pauses_s = [0.011] * 30_000 + [0.0, 0.5] * 20_000 + [60.0] * 30_000 + [DAY_S / 24] * 30_000
    for head, pause_s in enumerate(pauses_s, 1):
        now_s += pause_s
        moments.note(Revision(head), now_s)
        came_at_s[head] = now_s
        assert len(moments) <= MOMENTS_MAX
        if head % 20_000 == 0:
            assert_ages(moments, came_at_s, now_s)
    assert now_s > 3 * 365 * DAY_S
    assert_ages(moments, came_at_s, now_s)


def test_what_was_there_before_came_when_the_first_was_noted() -> None:
    moments = Moments()
    moments.note(Revision(5), 10.0)
    moments.note(Revision(6), nextafter(10.0, 11))
    assert [moments.came_at_s(Revision(number)) for number in (1, 5)] == [10.0, 10.0]
    assert moments.came_at_s(Revision(6)) == nextafter(10.0, 11)


def test_the_same_head_again_is_no_moment() -> None:
    moments = Moments()
    for at_s in (1.0, 2.0, 3.0):
        moments.note(Revision(7), at_s)
    assert moments.came_at_s(Revision(7)) == 1.0
    assert moments.came_at_s(Revision(8)) is None


def test_another_store_with_less_begins_anew() -> None:
    moments = Moments()
    for head, at_s in ((7, 1.0), (9, 2.0), (8, 3.0)):
        moments.note(Revision(head), at_s)
    assert moments.came_at_s(Revision(8)) == 3.0
    assert moments.came_at_s(Revision(9)) is None
