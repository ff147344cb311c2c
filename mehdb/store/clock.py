"""The time of day that expiry goes by: the machine's when the process started, and the time elapsed since.

A wall clock that is set while the process runs, by NTP or by hand, neither ends a life early nor prolongs it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

# Unlike CLOCK_MONOTONIC it counts while the machine is suspended: what is to expire does so meanwhile.
ELAPSED_NS: Final = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)


class Clock:
    """Milliseconds since the Unix epoch. Never goes back."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, elapsed_ns: Callable[[], int] = ELAPSED_NS) -> None:
        self._elapsed_ns = elapsed_ns
        self._start_ns = wall_ns() - elapsed_ns()

    def now_ms(self) -> int:
        """Return the time."""
        return (self._start_ns + self._elapsed_ns()) // 1_000_000
