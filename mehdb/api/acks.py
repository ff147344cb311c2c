"""Writes that are answered once followers hold them: what a write asks for, and the wait.

The order is the promise: what is asked for is read before anything is written, so that a bad parameter writes nothing;
and a write that is not confirmed in time is told as one that is on the leader.
"""

from typing import NamedTuple

from mehdb.api.replicate import Followers
from mehdb.api.requests import Parameters, seconds
from mehdb.errors import NotConfirmed
from mehdb.model import ORIGIN, Revision
from mehdb.parsing import whole_number
from mehdb.settings import ACKS_MAX, WAIT_S_MAX, Settings
from mehdb.store import Store


class Wanted(NamedTuple):
    """How many followers must hold a write, and how long it waits for them, in seconds."""

    followers: int
    wait_s: float


class Acks:
    """Confirms what was written to *store* by the *followers* that pull from it."""

    def __init__(self, store: Store, followers: Followers, settings: Settings) -> None:
        self._store = store
        self._followers = followers
        self._default = Wanted(settings.acks, settings.acks_timeout)
        self._count = whole_number(0, ACKS_MAX)
        self._wait_s = seconds(WAIT_S_MAX)

    def wanted(self, parameters: Parameters) -> Wanted:
        """Take `acks` and `wait` out of *parameters*. To be called before anything is written."""
        default = self._default
        return Wanted(
            parameters.take("acks", self._count, default.followers),
            parameters.take("wait", self._wait_s, default.wait_s),
        )

    async def confirm(self, wanted: Wanted, revision: Revision) -> None:
        """Return once as many followers as *wanted* hold *revision*, the last of a write; none for one of nothing.

        Raises `NotConfirmed`: the write is durable here all the same.
        """
        if not wanted.followers or revision == ORIGIN:
            return
        held = await self._followers.held(revision, self._store.meta.history, wanted.followers, wanted.wait_s)
        if held < wanted.followers:
            raise NotConfirmed(
                f"the write is on the leader, at revision {revision}, and {held} of {wanted.followers} followers hold "
                f"it after {wanted.wait_s:g} s: do not take it as failed. The others get it when they are back",
                revision=revision,
                acks=held,
            )
