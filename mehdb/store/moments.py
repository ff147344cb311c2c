"""When each revision came to be, as far as it takes to say for how long somebody has lacked it.

Pure, and bounded: what is long ago is kept less exactly. The invariant it owns: an age that follows from here is never
too short, and too long by at most a hundredth of a second, or of itself.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from mehdb.model import Revision

STEP_S: Final = 0.01  # commits that follow each other more closely share a moment
EXACT_PART: Final = 0.01  # of an age
MOMENTS_MAX: Final = 4096  # the moments of ten years, thinned out, are fewer; thinning them takes a few milliseconds


@dataclass(slots=True)
class _Moment:
    """Revisions up to *head*, from the moment's before on. The first came at *from_s*, the last at *until_s*."""

    head: Revision
    from_s: float
    until_s: float


class Moments:
    """The revisions of one store, and when they came. Times are of one clock that never goes back."""

    def __init__(self) -> None:
        self._moments: list[_Moment] = []  # each later than the one before, in revisions and in time

    def __len__(self) -> int:
        return len(self._moments)

    def note(self, head: Revision, at_s: float) -> None:
        """Take down that *head* is the newest revision at *at_s*. Where it has gone back, another store is there."""
        last = self._moments[-1] if self._moments else None
        if last is not None and head == last.head:
            return
        if last is not None and head < last.head:
            self._moments.clear()
        elif last is not None and len(self._moments) > 1 and at_s - last.from_s < STEP_S:
            last.head, last.until_s = head, at_s
            return
        self._moments.append(_Moment(head, at_s, at_s))
        if len(self._moments) > MOMENTS_MAX:
            self._thin_out(at_s)

    def came_at_s(self, revision: Revision) -> float | None:
        """Return when *revision* came; of those that were there when the first was noted, that moment.

        None if it has not come yet.
        """
        index = bisect_left(self._moments, revision, key=lambda moment: moment.head)
        return self._moments[index].from_s if index < len(self._moments) else None

    def _thin_out(self, now_s: float) -> None:
        """Have neighbours that are one and the same moment, seen from now, be one."""
        first, *others = self._moments  # the first one stays: all that was there when it was noted
        kept = [first]
        for moment in others:
            before = kept[-1]
            if before is not first and moment.until_s - before.from_s < (now_s - moment.until_s) * EXACT_PART:
                before.head, before.until_s = moment.head, moment.until_s
            else:
                kept.append(moment)
        self._moments = kept
