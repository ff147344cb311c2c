"""Histograms count what they are given, and transfers say what is under way."""

from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mehdb.figures import CHANGES, SECONDS, Histogram, Transfers

VALUES = st.lists(st.floats(0, 1e5) | st.sampled_from(SECONDS))


def of(values: list[float]) -> Histogram:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    return histogram


@given(VALUES)
def test_each_value_is_counted_at_the_first_bound_that_it_does_not_exceed(values: list[float]) -> None:
    found = of(values).distribution()
    counted = Counter(
        next((at for at, bound in enumerate(SECONDS) if value <= bound), len(SECONDS)) for value in values
    )
    assert found.counts == tuple(counted[at] for at in range(len(SECONDS) + 1))
    assert found.count == len(values)
    assert isclose(found.total, sum(values))


@given(VALUES, VALUES)
def test_two_distributions_are_that_of_all_their_values(one: list[float], other: list[float]) -> None:
    both, whole = of(one).distribution() + of(other).distribution(), of(one + other).distribution()
    assert both.counts == whole.counts
    assert isclose(both.total, whole.total)


def test_a_distribution_that_was_read_stays_as_it_is() -> None:
    histogram = of([0.5])
    before = histogram.distribution()
    histogram.observe(0.5)
    assert (before.count, before.total, histogram.distribution().count) == (1, 0.5, 2)


@pytest.mark.parametrize("bounds", [SECONDS, CHANGES])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    assert all(bisect_left(bounds, bound) == at for at, bound in enumerate(bounds))


def test_a_transfer_is_under_way_until_its_block_ends_however_it_does() -> None:
    transfers = Transfers()
    with suppress(OSError), transfers.under_way():
        transfers.move(3, 10)
        assert (transfers.done_bytes, transfers.size_bytes) == (3, 10)
        raise OSError("gone")
    assert transfers == Transfers()
