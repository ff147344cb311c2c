"""Figures that a node keeps of its own work, for whoever reads them now and then: how often, how long, how much.

Plain counters in memory. A figure costs less than a microsecond to keep, and nothing here knows who reads it.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

# From what a read of one key takes to what a client waits for, each step 2 to 2.5 times the one before: so a quantile
# that is read between two bounds is at most as much off.
SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
# From a lone write to the most that a batch takes, and, for what followers apply, to a page of tiny changes.
CHANGES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0, 20_000.0)


@dataclass(frozen=True)
class Distribution:
    """How many values were observed up to each of *bounds*, and, as the last of *counts*, beyond; and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self.counts)

    def __add__(self, other: "Distribution") -> "Distribution":
        counts = tuple(one + more for one, more in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.total + other.total)


class Histogram:
    """Counts values by size. One thread observes; what another reads may lack the last value in the sum alone."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count *value*: up to the first bound that it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        """Return what has been observed so far."""
        return Distribution(self._bounds, tuple(self._counts), self._total)


@dataclass
class Transfers:
    """Whole stores that go one way: how many have, and how far the one under way is, one at a time."""

    completed: int = 0
    done_bytes: int = 0
    size_bytes: int = 0

    def move(self, done_bytes: int, size_bytes: int) -> None:
        """Take down that *done_bytes* of *size_bytes* have gone."""
        self.done_bytes, self.size_bytes = done_bytes, size_bytes

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Have none under way any more when the block ends, however it does."""
        try:
            yield
        finally:
            self.move(0, 0)


@dataclass(frozen=True)
class StoreFigures:
    """What a store tells of its work since the process started, and of the room that it takes."""

    commit_seconds: Distribution
    commit_changes: Distribution
    sync_seconds: Distribution
    compaction_backlog_changes: int
    compacted_changes: int
    volume_size_bytes: int
    store_size_bytes: int
    wal_size_bytes: int
    sent: Transfers
    taken: Transfers
