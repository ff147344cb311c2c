"""What a read asks of the node that answers it: a revision, the leader, or how old it may be.

A read that asks for none of it costs nothing. What is promised is so of every value that is read after `Reads.admit`
has returned, never of one that was read before.
"""

import asyncio
from time import monotonic
from typing import Final

from aiohttp import web

from mehdb.api.access import require_valid
from mehdb.api.answers import Answer, waiting
from mehdb.api.forward import ToLeader
from mehdb.api.node import NodeView
from mehdb.api.requests import Parameters, Target, boolean, revision_number, seconds
from mehdb.errors import NotReached, Stopping, TooStale
from mehdb.model import ORIGIN, Revision, Role, State
from mehdb.settings import WAIT_S_MAX
from mehdb.store import Store

AS_OF: Final = web.RequestKey("mehdb_as_of_s", float)
"""In a request: the moment, of the monotonic clock, at which what it reads was all that the leader had."""
WAIT_S: Final = 5.0  # for a revision: a follower that is no further behind has lost its leader
STALENESS_S_MAX: Final = 999_999.0  # days: more is no bound


def _leader(text: str) -> bool:
    if text != "leader":
        raise ValueError("must be leader, or left out")
    return True


class Reads:
    """Admits reads of *store* on this node, or says where else they are answered."""

    def __init__(self, node: NodeView, store: Store, to_leader: ToLeader) -> None:
        self._node = node
        self._store = store
        self._to_leader = to_leader

    async def admit(
        self, request: web.BaseRequest, target: Target, parameters: Parameters, least: Revision = ORIGIN
    ) -> Answer | None:
        """Return once the read may be answered from this node's store, or the answer to give in its place.

        It takes its own out of *parameters* and finishes them: take others before. *least* is a revision that must be
        reached as if it were asked for. Raises `BadParameter`, `NotReached`, `TooStale`, `NotConfirmedLeader`, and what
        `ToLeader` does.
        """
        if not target.query:
            return None
        least = max(least, parameters.take("min_revision", revision_number, ORIGIN))
        wait_s = parameters.take("wait", seconds(WAIT_S_MAX), WAIT_S)
        of_leader = parameters.take("consistency", _leader, default=False)
        staleness_s_max = parameters.take("max_staleness", seconds(STALENESS_S_MAX), None)
        forward = parameters.take("forward", boolean, default=False)
        parameters.finish()
        if of_leader and self._node.role is Role.FOLLOWER:
            return await self._to_leader.read(request, target, forward=forward, wait_s=wait_s)
        if least > self._store.head:
            await self._reach(request, least, wait_s)
        if of_leader:
            await self._node.confirm_leading()
            require_valid(request)
        if staleness_s_max is not None:
            self._require_fresh(staleness_s_max)
        if (staleness_s := self._node.staleness_s()) is not None:
            request[AS_OF] = monotonic() - staleness_s
        return None

    async def _reach(self, request: web.BaseRequest, least: Revision, wait_s: float) -> None:
        """Wait until this node holds *least*. Raises `NotReached`."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + wait_s
        before = Revision(least - 1)
        with waiting(request):
            # A drain interrupts the first wait, once, though reads go on.
            reached = await self._store.wait_beyond(before, wait_s)
            reached = reached or await self._store.wait_beyond(before, max(0.0, end_s - clock()))
        require_valid(request)
        if reached:
            return
        if self._node.state is State.STOPPED:
            raise Stopping("this node stops: ask another one")
        head = self._store.head
        raise NotReached(
            f"this node is at revision {head} and has not reached {least} within {wait_s:g} s: ask again, give it more "
            "time with wait=, or ask the leader with consistency=leader",
            revision=head,
        )

    def _require_fresh(self, staleness_s_max: float) -> None:
        """Raise `TooStale` unless this node held everything that the leader had so many seconds ago."""
        staleness_s = self._node.staleness_s()
        if staleness_s is not None and staleness_s <= staleness_s_max:
            return
        since = "since it started" if staleness_s is None else f"for {staleness_s:.1f} s"
        raise TooStale(
            f"this follower has not held everything that the leader had {since}: ask another node, or the leader with "
            "consistency=leader"
        )
